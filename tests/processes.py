"""Commands as people run them, in processes of their own: forks of one that has imported them, which takes seconds."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
# What the commands import when they come to it: they begin without JAX.
_MODULES = ("cli.answering", "cli.batch_job", "cli.chat", "cli.finetune_run", "cli.scoring", "runtime.loading")
_MODULES += ("training.loop", "training.result", "training.step")
_CONTEXT.set_forkserver_preload([*(f"gptoss_jax.{name}" for name in _MODULES), "tests.preloaded"])


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    returncode: int | None
    stdout: str
    stderr: str


def run(
    module: str,
    *arguments: Any,
    stdin: str | bytes = "",
    environment: Mapping[str, str | None] = {},
    prepare: Callable[[], object] | None = None,
    meanwhile: Callable[[Any], object] | None = None,
    timeout_seconds: float = 300,
) -> Done:
    """`python -m module arguments`, its streams being files.

    `environment` names variables to set, or with None to unset; `prepare` is called in the process before the command.
    `meanwhile` gets the process while it runs: a multiprocessing.Process.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        names[0].write_bytes(stdin.encode() if isinstance(stdin, str) else stdin)
        for name in names[1:]:
            name.touch()
        redirect = _Redirect([str(name) for name in names], prepare)
        process = start(module, *arguments, prepare=redirect, environment=environment)
        if meanwhile is not None:
            meanwhile(process)
        process.join(timeout_seconds)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{module} {arguments} ran longer than {timeout_seconds} s")
        return Done(process.exitcode, *(name.read_text() for name in names[1:]))


def start(module: str, *arguments: Any, prepare: Callable[[], object], environment: Mapping[str, str | None]) -> Any:
    """A process that calls `prepare`, then runs the command."""
    everything = {"XLA_FLAGS": None} | dict(environment)
    process = _CONTEXT.Process(target=_child, args=(module, [str(a) for a in arguments], prepare, everything))
    process.start()
    return process


class _Redirect(NamedTuple):
    """Standard streams from and to files, and what else is to be done."""

    names: list[str]
    prepare: Callable[[], object] | None

    def __call__(self) -> None:
        for descriptor, name in enumerate(self.names):
            flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT
            os.dup2(os.open(name, flags), descriptor)
        if self.prepare is not None:
            self.prepare()


def _child(
    module: str, arguments: list[str], prepare: Callable[[], object], environment: Mapping[str, str | None]
) -> None:
    prepare()
    # The fork's own stream objects are those of the process that imported; multiprocessing closes its stdin.
    sys.stdin, sys.stdout, sys.stderr = (open(i, mode, closefd=False) for i, mode in enumerate(("r", "w", "w")))
    for name, value in environment.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # what was imported already would only be named in a warning
    runpy.run_module(module, run_name="__main__", alter_sys=True)
