"""Commands in a terminal as a person sees them: a pseudo-terminal, and an emulator that says what is on the screen."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyte

from tests import processes

SECONDS = 120  # a machine under load may compile for long
LINES = 40


class Terminal:
    """A command in a terminal of 40 lines.

    Attributes:
        bytes: all that it wrote, on both streams.
    """

    def __init__(self, descriptor: int, process: Any, columns: int):
        self.descriptor, self.process = descriptor, process
        self.screen = pyte.Screen(columns, LINES)
        self._emulator = pyte.ByteStream(self.screen)
        self.bytes = b""

    @property
    def text(self) -> str:
        """What is on the screen, without empty lines at its end and white space at lines' ends."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def wait_for(self, text: str, times: int = 1) -> None:
        """Reads until the text is on the screen, so many times."""
        end = time.monotonic() + SECONDS
        while self.text.count(text) < times:
            over = time.monotonic() > end or not self.process.is_alive()
            self._read(0.1)
            assert not over or self.text.count(text) >= times, f"no {text!r} on the screen:\n{self.text}"

    def type(self, keys: str) -> None:
        """Types, and does not wait."""
        os.write(self.descriptor, keys.encode())

    def say(self, keys: str, expected: str) -> None:
        """Types, and reads until what is to come of it is on the screen once more than before."""
        before = self.text.count(expected)
        self.type(keys)
        self.wait_for(expected, before + 1)

    def ended(self) -> int:
        """The exit code, once the command has ended."""
        end = time.monotonic() + SECONDS
        while self.process.is_alive() and time.monotonic() < end:
            self._read(0.1)
        self._read(0.1)
        self.process.join(1)
        return self.process.exitcode

    def _read(self, seconds: float) -> None:
        if select.select([self.descriptor], [], [], seconds)[0]:
            with contextlib.suppress(OSError):  # the other end is closed
                new = os.read(self.descriptor, 65536)
                self.bytes += new
                self._emulator.feed(new)
                if b"\x1b[6n" in new:  # where is the cursor? prompt_toolkit asks
                    at = self.screen.cursor
                    os.write(self.descriptor, b"\x1b[%d;%dR" % (at.y + 1, at.x + 1))


class _InTerminal(NamedTuple):
    """Makes a terminal the process's own, and its three streams; and works in a folder."""

    path: str
    folder: str
    stdout: str | None

    def __call__(self) -> None:
        os.chdir(self.folder)
        os.setsid()
        descriptor = os.open(self.path, os.O_RDWR)
        fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
        for stream in range(3):
            os.dup2(descriptor, stream)
        if self.stdout:
            os.dup2(os.open(self.stdout, os.O_WRONLY | os.O_CREAT), 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # multiprocessing's children ignore it


@contextlib.contextmanager
def run(
    folder: Path,
    module: str,
    *arguments: Any,
    columns: int = 80,
    stdout: Path | None = None,
    **environment: str | None,
) -> Iterator[Terminal]:
    """`python -m module arguments` in `folder`, which holds a home for caches; `stdout`: a file in its place."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    everything = {"XDG_CACHE_HOME": str(folder / "home"), "TERM": "xterm-256color", "NO_COLOR": None, **environment}
    everything |= {"COLUMNS": None, "LINES": None}
    prepare = _InTerminal(os.ttyname(theirs), str(folder), stdout and str(stdout))
    process = processes.start(module, *arguments, prepare=prepare, environment=everything)
    try:
        yield Terminal(ours, process, columns)
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
