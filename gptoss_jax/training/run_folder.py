"""The folder of one run: what it is, whose it is now, and where its files lie. Knows no JAX.

A run is what its options, its data and the weights that it starts from say; a folder takes one run, and one process.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gptoss_jax import whole_files
from gptoss_jax.errors import GptossError, short
from gptoss_jax.files import FileError, read_json
from gptoss_jax.training.metrics import METRICS

FORMAT = 1
RUN, LOCK, STATES, CORPORA = "run.json", ".lock", "states", "tokens"
CHECKPOINT, ADAPTER = "checkpoint", "adapter"  # the results of the two methods


class RunFolderError(GptossError):
    """A folder of another run, or one that another process works in."""


@dataclass(frozen=True)
class RunRecord:
    """Everything that the weights of a run's end depend on, for JSON.

    Attributes:
        asked: the options.
        data: hashes and numbers of conversations, of training and of validation.
        source: hash of the weights that it starts from, and their config's numbers.
        versions: of the packages that compute. They may change between two processes; the bits may then too.
    """

    asked: Mapping[str, Any]
    data: Mapping[str, Any]
    source: Mapping[str, Any]
    versions: Mapping[str, Any]

    def __post_init__(self):
        for part in fields(self):  # as JSON gives them back, so that a tuple and a list are no difference
            object.__setattr__(self, part.name, json.loads(json.dumps(getattr(self, part.name))))

    def differences(self, now: "RunRecord") -> list[str]:
        """A line for each thing that was another one in this record than it is `now`, versions left out."""
        lines = []
        for part in ("asked", "data", "source"):
            before, after = getattr(self, part), getattr(now, part)
            for name in dict.fromkeys((*before, *after)):
                if before.get(name) != after.get(name):
                    lines.append(f"{part}, {name}: {_short(before.get(name))} then, {_short(after.get(name))} now")
        return lines


def _short(value: object) -> str:
    return "nothing" if value is None else short(value)


class RunFolder:
    """The folder, which no other process can open as long as this one has it. Use it in a `with` block.

    Attributes:
        path: the folder.
        is_new: whether no process has worked in it before.
        version_changes: what the record says of packages whose versions have changed since, a line each.
    """

    def __init__(self, path: Path, record: RunRecord):
        """Makes the folder, or takes it up where it is of the same run.

        Raises:
            RunFolderError: it is of another run, of none, or another process has it.
            OSError: it cannot be made.
        """
        self.path, self.version_changes = path, list[str]()
        _check_ours(path, record)  # before anything is made
        path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_new = not _check_ours(path, record)
            if self.is_new:
                _write(path / RUN, record)
            else:
                before = _read(path / RUN).versions
                self.version_changes = [
                    f"{name} was {before.get(name)} when this run began, and is {version} now"
                    for name, version in record.versions.items()
                    if before.get(name) != version
                ]
        except BlockingIOError:
            os.close(self._lock)
            raise RunFolderError(f"another process trains in {path}: wait for its end, or stop it") from None
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._lock)

    def abandon(self) -> None:
        """Takes back what made the folder that of a run, where none has begun a step: another may have it then."""
        if self.states.exists() or (self.path / METRICS).exists() or self.result("full").exists():
            return
        (self.path / RUN).unlink(missing_ok=True)
        shutil.rmtree(self.corpora, ignore_errors=True)
        if os.listdir(self.path) == [LOCK]:
            (self.path / LOCK).unlink()
            self.path.rmdir()

    @property
    def corpora(self) -> Path:
        """The folder of token ids that were made of the conversations."""
        return self.path / CORPORA

    @property
    def states(self) -> Path:
        """The folder of saved states."""
        return self.path / STATES

    def result(self, method: str) -> Path:
        """The folder of what the run ends with."""
        return self.path / (CHECKPOINT if method == "full" else ADAPTER)


def _check_ours(path: Path, record: RunRecord) -> bool:
    """Whether a run of this record has begun at `path`.

    Raises:
        RunFolderError: something else is there.
    """
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is no folder, expected one, or nothing there")
    if not (path / RUN).exists():
        strange = [name for name in os.listdir(path) if not name.startswith(".")] if path.exists() else []
        if strange:
            raise RunFolderError(f"{path} holds {short(strange[0])} and no {RUN}: name another folder for --output")
        return False
    if differences := _read(path / RUN).differences(record):
        first = f"{path} is of another run than this one; another --output keeps both, and removing it begins anew"
        raise RunFolderError("\n".join([first, *differences]))
    return True


def _write(path: Path, record: RunRecord) -> None:
    text = json.dumps({"format": FORMAT, **asdict(record)}, indent=2, ensure_ascii=False) + "\n"
    whole_files.write_whole(path, text.encode())


def _read(path: Path) -> RunRecord:
    try:
        document = read_json(path)
    except FileError as error:
        raise RunFolderError(f"{path} is damaged, {error.what}: remove its folder to begin anew") from None
    parts = [part.name for part in fields(RunRecord)]
    is_one = isinstance(document, dict) and all(isinstance(document.get(part), dict) for part in parts)
    if not is_one or document.get("format") != FORMAT:
        raise RunFolderError(f"{path} is no run's record of this version: remove its folder to begin anew")
    return RunRecord(*(document[part] for part in parts))
