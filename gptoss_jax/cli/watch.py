"""Watches that every process of a run over several hosts is alive, and ends this one, with a line, when one is not.

The connections of the roll call stay open: over them process 0 and each of the others send one another a beat each
second. Where one ends without a goodbye, or is silent for too long, the devices of that process will not answer any
more, and whoever waits for them waits in vain, deep in a library. So a thread ends the process; process 0, which alone
is connected to all, tells the others first whom it lost. Strangers have no part in it: nobody listens. Knows no JAX.
"""

import atexit
import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from gptoss_jax.errors import one_line

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may well succeed
BEAT, GOODBYE, FAILED = b"", b"goodbye", b"failed"  # lines; any other says why all have to end
BEAT_SECONDS = 1.0
GRACE_SECONDS = 30.0  # in which all end that meet the same mistake
MAX_LINE_BYTES = 1000

_own: "Watch | None" = None


def start(connections: Mapping[int, socket.socket], num_processes: int, timeout_seconds: float) -> None:
    """From now on this process ends with EXIT_CODE and a line as soon as another is lost.

    Args:
        connections: the roll call's, by the process at the other end: process 0, or all the others.
        num_processes: of the run.
        timeout_seconds: after how much silence a process counts as hanging.
    """
    global _own
    _own = Watch(connections, num_processes, timeout_seconds, _end)
    threading.Thread(target=_own.run, daemon=True, name="watch").start()


def say_goodbye_at_exit() -> None:
    """To be called before JAX is imported, whose own exit waits for the others: exits run backwards."""
    atexit.register(lambda: _own and _own.say(GOODBYE))


def wait_for_verdict() -> None:
    """Ends the process if another is lost, which this one may have noticed first, by a library's error."""
    if _own:
        time.sleep(_own.timeout_seconds + 2 * BEAT_SECONDS)


def fail(exit_code: int) -> None:
    """Tells the others that this process ends, having said why: unless they end too, they do so after a while."""
    if _own:
        _own.failed_with = exit_code
        _own.say(FAILED)


def _end(line: str, exit_code: int) -> None:
    """Ends the process wherever it is. What was printed is there; what is half written is as after any kill."""
    with contextlib.suppress(
        OSError, RuntimeError, ValueError
    ):  # nobody reads it; it is being written to; it is closed
        sys.stdout.flush()
    if line:
        command = Path(sys.argv[0]).stem.removeprefix("gptoss-")  # as in `-m gptoss_jax.generate`, or the script
        show_cursor = b"\r\x1b[?25h" if os.isatty(2) else b""  # which a progress bar hides
        with contextlib.suppress(OSError):
            os.write(2, show_cursor + f"{command}: {line}\n".encode())
    os._exit(exit_code)


class Watch:
    """One process's watch over those that it is connected to."""

    def __init__(
        self,
        connections: Mapping[int, socket.socket],
        num_processes: int,
        timeout_seconds: float,
        end: Callable[[str, int], None],
    ):
        """`end`: ends this process with a line, "" for none, and an exit code. For the rest see `start`."""
        self.timeout_seconds = timeout_seconds
        self.failed_with: int | None = None  # the exit code of a process that has said itself why it ends
        self._is_leaving = False
        self._connections, self._end = dict(connections), end
        self._num_processes = num_processes
        self._heard = dict.fromkeys(connections, time.monotonic())
        self._failed: dict[int, float] = {}  # when each said so
        self._begun = dict.fromkeys(connections, b"")  # a line of which the end has not come
        self._selector = selectors.DefaultSelector()
        for other, connection in connections.items():
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, other)

    def run(self) -> None:
        """Returns when all that it watches have said goodbye."""
        beat_at = time.monotonic()
        while self._connections:
            if (now := time.monotonic()) >= beat_at:
                self.say(BEAT)
                beat_at = now + min(BEAT_SECONDS, self.timeout_seconds / 4)
            for key, _ in self._selector.select(max(0.0, beat_at - now)):
                self._hear(key.data)
            self._check()  # after all that has come is heard: it may be this process that was stopped

    def say(self, line: bytes) -> None:
        """Sends a line to all that are left; after a goodbye it is no matter any more how they end."""
        self._is_leaving |= line == GOODBYE
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):  # reading finds out; one that hangs takes no more
                connection.send(line + b"\n")

    def _hear(self, other: int) -> None:
        try:
            received = self._connections[other].recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:  # reset: it died with something unread
            received = b""
        if not received:
            self._lose(f"{self._named(other)} has died: its connection ended")
            self._forget(other)
            return
        self._heard[other] = time.monotonic()
        *lines, rest = (self._begun[other] + received).split(b"\n")
        self._begun[other] = rest[:MAX_LINE_BYTES]
        for line in lines:
            self._obey(other, line)

    def _obey(self, other: int, line: bytes) -> None:
        if line == GOODBYE:
            self._forget(other)
        elif line == FAILED:
            self._failed[other] = time.monotonic()
        elif line != BEAT:
            self._lose(one_line(line.decode(errors="replace")))

    def _forget(self, other: int) -> None:
        if connection := self._connections.pop(other, None):
            self._selector.unregister(connection)
            connection.close()

    def _check(self) -> None:
        now = time.monotonic()
        for other in list(self._connections):
            if now - self._heard[other] > self.timeout_seconds:
                seconds = f"{self.timeout_seconds:g} s (--host-timeout)"
                self._lose(f"{self._named(other)} hangs, or its host is gone: nothing came from it for {seconds}")
            if other in self._failed and now - self._failed[other] > GRACE_SECONDS:
                self._lose(f"{self._named(other)} has ended with an error that it names itself")

    def _lose(self, line: str) -> None:
        """The run is over: says so to those that only process 0 knows, and ends."""
        if self._is_leaving:
            return
        self.say(line.encode())
        if self.failed_with is not None:
            self._end("", self.failed_with)
        self._end(f"{line}: start all of them again", EXIT_CODE)

    def _named(self, other: int) -> str:
        return f"process {other} of {self._num_processes}"
