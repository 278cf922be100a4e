"""Ctrl-C: while a command is imported, while it compiles, while it answers, and while it ends.

Imports little, so that a command can ask for `end_at_once` before all else.
"""

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

EXIT_CODE = 128 + signal.SIGINT
_SHOW_CURSOR = b"\x1b[?25h"


def is_ignored() -> bool:
    """Whether Ctrl-C is for others, as it is for jobs in a script's background."""
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def end_at_once() -> None:
    """From now on Ctrl-C ends the process, without a traceback."""
    if not is_ignored():
        signal.signal(signal.SIGINT, _end)


@contextlib.contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """While the block runs, Ctrl-C ends the process: JAX's imports would swallow an exception."""
    before: Any = signal.getsignal(signal.SIGINT)
    end_at_once()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """While the block runs, Ctrl-C is only noted, however often, for the block to ask about.

    An exception in the middle of a dispatch would lose the engine's state.
    """
    pressed = threading.Event()
    with _handled_by(lambda number, frame: pressed.set()):
        yield pressed.is_set


@contextlib.contextmanager
def noted_with_sigterm() -> Iterator[Callable[[], int]]:
    """As `noted`, of SIGTERM too, by which schedulers end jobs; gives the number of the first signal, 0 before one."""
    numbers: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        numbers.append(number)

    before: Any = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, note)
    try:
        with _handled_by(note):
            yield lambda: numbers[0] if numbers else 0
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def stopping(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """While the block runs, Ctrl-C is said to be heard, for the block to ask about; a second one ends the process.

    It is raised at the block's end at latest: in the middle of loading or compiling, an exception may fall into one of
    JAX's callbacks, which swallow it. A compiler may hold the main thread for minutes, in which Python runs no handler
    of signals; so a thread listens.
    """
    pressed = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    listener = threading.Thread(target=_listen, args=[reader, say], daemon=True)
    with _handled_by(lambda number, frame: pressed.set()):
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        listener.start()
        try:
            yield pressed.is_set
        finally:
            signal.set_wakeup_fd(before)
            os.close(writer)
            listener.join()
            os.close(reader)
        if pressed.is_set():
            raise KeyboardInterrupt


def _listen(reader: int, say: Callable[[str], None]) -> None:
    """Takes the signals that Python's own handler in C writes into a pipe, until that is closed."""
    said = False
    while number := os.read(reader, 1):
        if number[0] == signal.SIGINT and said:
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), _SHOW_CURSOR)  # which a progress bar hides
            _end()
        elif number[0] == signal.SIGINT:
            say("stopping (Ctrl-C again ends at once)")
            said = True


def raise_when_pressed() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt; in a garbage collector's callback, which drops it, a bit later."""
    if not is_ignored():
        signal.signal(signal.SIGINT, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame and frame.f_code not in callbacks:
        frame = frame.f_back
    if not frame:
        raise KeyboardInterrupt
    threading.Timer(0.01, os.kill, [os.getpid(), number]).start()


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before: Any = signal.getsignal(signal.SIGINT)
    if not is_ignored():
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int = signal.SIGINT, frame: FrameType | None = None) -> NoReturn:
    with contextlib.suppress(OSError, RuntimeError):  # nobody reads it; it was in the middle of being written to
        if sys.stdout:
            sys.stdout.flush()
        os.write(2, b"\n")
    os._exit(EXIT_CODE)
