"""What a run of method full ends with, beside its metrics: a checkpoint that everything here loads."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from gptoss_jax.checkpoints.orbax.writer import Writer
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.training.run_folder import RUN, RunFolder


@runtime_checkable
class Trained(Protocol):
    """What is needed of a `gptoss_jax.training.step.Trainer` of method full."""

    config: ModelConfig

    def trained_leaves(self, state: Any) -> Iterator[tuple[str, np.ndarray]]:
        """Every leaf as the model declares it."""
        ...


def write_checkpoint(folder: RunFolder, trainer: Trained, state: Any, provenance: Mapping[str, Any]) -> Path:
    """Writes all weights as a checkpoint in the run's folder; after an interruption, those that are not there yet.

    Args:
        folder: of the run.
        trainer: knows how leaves are made of the state.
        state: after the last step.
        provenance: where the weights come from, for people.

    Raises:
        CheckpointError: something is in the way.
        OSError: it cannot be written.
    """
    path = folder.result("full")
    identity = {"written by": "gptoss_jax.finetune", "run": json.loads((folder.path / RUN).read_bytes())}
    with Writer(path, identity) as writer:
        for name, leaf in trainer.trained_leaves(state):
            if name not in writer.finished:
                writer.write(name, leaf)
        return writer.finish(trainer.config, provenance)
