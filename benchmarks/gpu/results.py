"""Figures on disk as soon as they are measured: lines of JSON, to which several processes append."""

import json
import os
from pathlib import Path
from typing import Any


class Results:
    """What one section found: a line of a file and a line on stdout for each figure.

    Attributes:
        section: its name, which stands in every line.
        is_good: whether every check has passed so far.
    """

    def __init__(self, path: Path, section: str):
        self._path, self.section, self.is_good = path, section, True

    def add(self, kind: str, entry: dict[str, Any], line: str) -> None:
        """Keeps a figure, and prints its line."""
        append(self._path, {"section": self.section, "kind": kind, **entry})
        print(line, flush=True)

    def leave_out(self, what: str, why: str) -> None:
        """Notes what is not measured."""
        self.add("left_out", {"what": what, "why": why}, f"left out: {what}: {why}")

    def judge(self, entry: dict[str, Any], what: str, said: str, *, ok: bool) -> bool:
        """Keeps the verdict of a check, which ends its section badly if it is not `ok`; gives it."""
        self.is_good &= ok
        self.add("check", {"what": what, "ok": ok, **entry}, f"{'ok ' if ok else 'BAD'} {what}: {said}")
        return ok

    def found(self, kind: str) -> list[dict[str, Any]]:
        """The figures of a kind, of all sections, in their order."""
        return [entry for entry in read(self._path) if entry["kind"] == kind]


def append(path: Path, entry: dict[str, Any]) -> None:
    """One write to the end of the file, so that lines of several processes do not mix, on the disk when it returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(entry, default=_python_number) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _python_number(value: Any) -> Any:
    """Of one of NumPy's."""
    return value.item()


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a file; a last line that is cut, by a process that died in it, is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]
