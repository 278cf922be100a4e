"""Batch jobs for tests: commands with a model that is not there, which die at any write that a test names."""

import io
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterable
from multiprocessing import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from gptoss_jax import whole_files
from tests import processes
from tests.gate import TinyModel
from tests.goldens.make import two_layers_config

# With the real vocabulary, so that text goes in and comes out.
WORDY = two_layers_config() | {"vocab_size": 201_088, "eos_token_id": 200_002, "pad_token_id": 199_999}
BOUNDARIES = ("open", "write", "fsync", "ftruncate", "replace", "rename", "link", "unlink", "mkdir", "rmdir")
BATCH = "gptoss_jax.batch"


def rows(count: int, **fields: Any) -> list[dict[str, Any]]:
    """Plain rows whose answers have different lengths."""
    return [
        {"id": f"row {i} ✓", "token_ids": [i + 1, 2 * i], "max_new_tokens": 1 + i % 5} | fields for i in range(count)
    ]


def write_rows(path: Path, documents: Iterable[Any]) -> Path:
    """A JSONL file; what is text already stands there as it is."""
    lines = (line if isinstance(line, str) else json.dumps(line) for line in documents)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The documents of a JSONL file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def wordy(folder: Path) -> Path:
    """Random weights that take prompts in words, published; only the first call in a folder writes them."""
    return folder / "published" if (folder / "published").exists() else TinyModel(WORDY).write(folder)


class Dying(NamedTuple):
    """Kills the process before its n-th call that changes something below a folder.

    Attributes:
        folder: files elsewhere do not count.
        at: n, from 1.
        half_way: only writes count, and the n-th has written half of its bytes by then.
    """

    folder: str
    at: int
    half_way: bool

    def install(self) -> None:
        """From now on."""
        left = [self.at]

        def guarded(original: Any, path_of: Any, is_write: bool) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                path = path_of(*arguments, **options)
                counts = path is not None and f"{path}/".startswith(f"{self.folder}/")
                if counts and (is_write or not self.half_way):
                    left[0] -= 1
                    if left[0] == 0:
                        if self.half_way:
                            original(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                        os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            return call

        for name in BOUNDARIES:
            setattr(os, name, guarded(getattr(os, name), _opened if name == "open" else _path, name == "write"))
        whole_files._Out.write = guarded(io.FileIO.write, lambda out, data: _path(out.fileno()), is_write=True)


def _path(place: Any, *others: Any, dir_fd: int | None = None, **options: Any) -> str:
    """What a call is about: a descriptor's or a name's file."""
    if isinstance(place, int):
        return os.readlink(f"/proc/self/fd/{place}")
    folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    return os.path.join(folder, os.fspath(place))


def _opened(place: Any, flags: int, *others: Any, **options: Any) -> str | None:
    return _path(place, **options) if flags & os.O_CREAT else None


class Fake(NamedTuple):
    """In a command's process: a model that needs no weights and draws from the whole of what a sequence holds."""

    dying: Dying | None = None

    def __call__(self) -> None:
        from gptoss_jax.cli import model_flags

        model_flags.load_for_answers = _load_fake
        if self.dying:
            self.dying.install()


def _load_fake(options: Any, screen: Any, engine_config: Any) -> tuple[Any, Any]:
    from gptoss_jax.cli import model_flags
    from gptoss_jax.engine.engine import Engine
    from tests.fake_runner import FakeRunner

    model = SimpleNamespace(decode_bytes=lambda slots, context: slots, read_bandwidth=lambda at_least: 1e9)
    return model, Engine(FakeRunner(engine_config), model_flags.config(options), engine_config)


class Instant(NamedTuple):
    """In a command's process: every row has the same answer at once; the most memory held is written to a file."""

    report: str

    def __call__(self) -> None:
        from gptoss_jax.jobs.work import Worker
        from tests.made_answers import FINAL, answer
        from tests.memory import peak_bytes

        Fake()()
        found = [answer(FINAL)]

        def run(self: Worker, tasks: Any, interrupted: Any) -> bool:
            while group := list(itertools.islice(tasks, 256)):
                self._put([task.row.answered(task.asked, found, "gpt-oss") for task in group])
            return True

        Worker.run = run
        util.Finalize(None, lambda: Path(self.report).write_text(str(peak_bytes())), exitpriority=0)


FAKE = Fake()
REAL = None
"""In place of a fake: the model that the checkpoint holds."""


def run(checkpoint: Path, *arguments: Any, model: Callable[[], object] | None = FAKE, **options: Any) -> processes.Done:
    """The command; `model` is called in its process before it."""
    return processes.run(BATCH, *arguments, "--checkpoint", checkpoint, prepare=model, **options)
