"""The console scripts: from their first moment Ctrl-C ends them without a traceback, as their modules import for long.

Commands are named, not imported: they stand above this room.
"""

import importlib

from gptoss_jax.cli import interrupts


def generate() -> None:
    """gptoss-generate."""
    _run("gptoss_jax.generate")


def batch() -> None:
    """gptoss-batch."""
    _run("gptoss_jax.batch")


def finetune() -> None:
    """gptoss-finetune."""
    _run("gptoss_jax.finetune")


def plan() -> None:
    """gptoss-plan."""
    _run("gptoss_jax.plan")


def serve() -> None:
    """gptoss-serve."""
    _run("gptoss_jax.serve")


def score() -> None:
    """gptoss-score."""
    _run("gptoss_jax.score")


def convert() -> None:
    """gptoss-convert."""
    _run("converters.convert")


def export() -> None:
    """gptoss-export."""
    _run("converters.export")


def random_weights() -> None:
    """gptoss-random-weights."""
    _run("converters.random_weights")


def _run(module: str) -> None:
    interrupts.end_at_once()
    importlib.import_module(module).cli()
