"""What a process touches while a block runs: files, by whatever language, and whoever connects; Linux only.

Python's own audit events say which paths and hosts it was asked for. What is compiled (openai-harmony, llguidance)
passes no audit: that a certain file was opened says the kernel, and that somebody connected, a socket that listens.
"""

import ctypes
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_IN_OPEN, _IN_ALL_EVENTS = 0x20, 0xFFF
_ASKED = ("open", "os.", "socket.", "urllib.", "http.", "subprocess.", "shutil.", "glob.", "pathlib.", "ctypes.dlopen")
_UNAUDITED = ("stat", "lstat", "access", "readlink")  # CPython has no events for them

_heard: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _heard is not None and event.startswith(_ASKED):
        _heard.append(f"{event} {arguments!r}")


sys.addaudithook(_hear)  # which nobody can take away again: it hears nothing while `_heard` is None


class Watched:
    """A file and an address that nobody should touch.

    Attributes:
        path: the file's.
        url: of the address.
        heard: what Python was asked for, an event a line.
    """

    def __init__(self, folder: Path):
        self.path, self.heard = folder / "nobodys-business", list[str]()
        self.path.write_text("secret-content")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = self._libc.inotify_init1(os.O_NONBLOCK)
        assert self._libc.inotify_add_watch(self._inotify, os.fsencode(self.path), _IN_ALL_EVENTS) > 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"

    def touched(self) -> list[str]:
        """What names the file or the address, in any spelling, and what the kernel saw."""
        marks = (self.path.name, self.url.removeprefix("http://").rstrip("/"), self.url.split(":")[-1].rstrip("/"))
        found = [line for line in self.heard if any(mark in line for mark in marks)]
        for what, look in {"the file": lambda: os.read(self._inotify, 4096), "a client": self._listener.accept}.items():
            try:
                look()
                found.append(f"{what} came")
            except BlockingIOError:
                pass
        return found

    def close(self) -> None:
        os.close(self._inotify)
        self._listener.close()


@contextmanager
def watching(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """Hears while the block runs; `folder` is the test's own."""
    global _heard
    if not hasattr(ctypes.CDLL(None), "inotify_init1"):
        pytest.skip("the kernel has no inotify: it is Linux's")
    watched = Watched(folder)

    def noting(name: str, original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            watched.heard.append(f"os.{name} {arguments!r}")
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patches:
        for name in _UNAUDITED:
            patches.setattr(os, name, noting(name, getattr(os, name)))
        _heard = watched.heard
        try:
            yield watched
        finally:
            _heard = None
            watched.close()
