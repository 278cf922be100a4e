"""The two streams of a command, colours and progress bars where a terminal shows them, and Ctrl-C while it works."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment, Segments
from rich.style import Style

from gptoss_jax.cli import command


class _Errors(Console):
    """A console on stderr; once nobody reads that any more it is silent, and the command goes on."""

    def on_broken_pipe(self) -> None:  # rich would end the command
        self.quiet = True
        command.write_nowhere(sys.stderr)


class Screen:
    """The two streams of a command. Nothing but `answer` and `document` write to stdout.

    Attributes:
        reader_left: nobody reads stdout any more; what is written from then on goes nowhere.
    """

    def __init__(self):
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]  (a text stream)
        plain = "NO_COLOR" in os.environ  # no-color.org; rich would still write codes for dim and bold
        self._errors = _Errors(
            stderr=True, highlight=False, emoji=False, soft_wrap=True, color_system=None if plain else "auto"
        )
        self._open = ""  # the stream whose last line is unfinished
        self.reader_left = False

    def say(self, line: str) -> None:
        """A line on stderr, cut at words to the width of a terminal; elsewhere a line stays a line."""
        self.finish_line()
        self._errors.print(line, markup=False, soft_wrap=not self._errors.is_terminal)

    def aside(self, text: str, style: str) -> None:
        """Text on stderr that goes on where the last left off."""
        if self._open == "stdout":
            self.finish_line()
        self._errors.print(Segments([Segment(text, Style.parse(style))]), end="")  # as text, tabs would be spaces
        self._note("stderr", text)

    def answer(self, text: str) -> None:
        """Text on stdout that goes on where the last left off."""
        if self._open == "stderr":
            self.finish_line()
        self._write(text)
        self._note("stdout", text)

    def document(self, value: object) -> None:
        """A JSON document on stdout, in escapes where stdout's encoding has not all of its characters."""
        try:
            text = command.to_json(value)
            text.encode(sys.stdout.encoding)
        except UnicodeEncodeError:
            text = command.to_json(value, ensure_ascii=True)
        self.answer(text + "\n")

    def finish_line(self) -> None:
        """Ends the line under way, on whichever stream."""
        if self._open == "stdout":
            self._write("\n")
        elif self._open:
            self._errors.print()
        self._open = ""

    def check_reader(self) -> None:
        """Raises BrokenPipeError if nobody reads stdout any more, once what had to be kept is kept."""
        if self.reader_left:
            raise BrokenPipeError

    def _write(self, text: str) -> None:
        try:
            print(text, end="", flush=True)
        except BrokenPipeError:
            self.reader_left = True
            command.write_nowhere(sys.stdout)

    def _note(self, stream: str, text: str) -> None:
        if text:
            self._open = "" if text.endswith("\n") else stream

    @contextmanager
    def progress(self, what: str, interrupted: Callable[[], bool]) -> Iterator[Callable[[int, int], None]]:
        """A bar on stderr while the block runs, for a function that reports how much of all is done.

        Once `interrupted`, the report raises KeyboardInterrupt.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._errors, transient=True, disable=not self._errors.is_terminal) as bars:
            bar = bars.add_task(what, total=None)

            def report(done: int, total: int) -> None:
                bars.update(bar, completed=done, total=total)
                if interrupted():
                    raise KeyboardInterrupt

            yield report


@contextmanager
def interrupted_late() -> Iterator[Callable[[], bool]]:
    """While the block runs, Ctrl-C is only noted, for the block to ask about, and raised at its end at latest.

    In the middle of loading or compiling, an exception may fall into one of JAX's callbacks, which swallow it.
    """
    with interruptible() as pressed:
        yield pressed
        if pressed():
            raise KeyboardInterrupt


@contextmanager
def interruptible(*, insisting: bool = True) -> Iterator[Callable[[], bool]]:
    """While the block runs, Ctrl-C is only noted, for the block to ask about; if `insisting`, a second one interrupts.

    An exception in the middle of a dispatch would lose the engine's state.
    """
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed and insisting:
            raise KeyboardInterrupt
        pressed = True

    before: Any = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
