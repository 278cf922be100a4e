"""The two streams of a command, colours and progress bars, where a terminal shows them."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from gptoss_jax.cli import command
from gptoss_jax.cli.escapes import guard_terminals, raw_stream, visible


class _Errors(Console):
    """A console on stderr; once nobody reads that any more it is silent, and the command goes on."""

    def on_broken_pipe(self) -> None:  # rich would end the command
        self.quiet = True
        command.write_nowhere(sys.stderr)


class Screen:
    """The two streams of a command. Nothing but `answer` and `document` write to stdout."""

    def __init__(self, *, quiet: bool = False):
        """`quiet`: neither notes nor progress."""
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]  (a text stream)
        plain = "NO_COLOR" in os.environ  # no-color.org; rich would still write codes for dim and bold
        self._errors = _Errors(
            file=raw_stream(sys.stderr),
            highlight=False,
            emoji=False,
            soft_wrap=True,
            color_system=None if plain else "auto",
        )
        self._on_stderr = visible if sys.stderr.isatty() else str  # rich draws there, beside the guard of all streams
        self._quiet = quiet
        self._open = ""  # the stream whose last line is unfinished
        self._bars: Progress | None = None  # what an answer must not be written into
        self._lost: OSError | None = None  # why stdout takes no more

    def hush(self) -> None:
        """From now on nothing is written to either stream: another process of the same run says it."""
        self._errors.quiet = True
        command.write_nowhere(sys.stdout)

    def leave_stdout_to_answers(self) -> None:
        """From now on what libraries print to stdout's descriptor goes nowhere."""
        unguarded = raw_stream(sys.stdout)
        unguarded.flush()
        sys.stdout = os.fdopen(os.dup(unguarded.fileno()), "w", encoding=unguarded.encoding, errors=unguarded.errors)
        guard_terminals()
        command.write_nowhere(unguarded)

    def say(self, line: str) -> None:
        """A line on stderr, cut at words to the width of a terminal; elsewhere a line stays a line."""
        self.finish_line()
        if self._errors.is_terminal:
            self._errors.print(self._on_stderr(line), markup=False, soft_wrap=False)
        else:
            self._errors.print(Segments([Segment(line + "\n")]), end="")  # as text it would lose characters

    def note(self, line: str) -> None:
        """A line on stderr that a reader of the answer can do without."""
        if not self._quiet:
            self.say(line)

    def aside(self, text: str, style: str) -> None:
        """Text on stderr that goes on where the last left off."""
        if self._open == "stdout":
            self.finish_line()
        segment = Segment(self._on_stderr(text), Style.parse(style))  # as text, tabs would be spaces
        self._errors.print(Segments([segment]), end="")
        self._note("stderr", text)

    def answer(self, text: str) -> None:
        """Text on stdout that goes on where the last left off."""
        if self._open == "stderr":
            self.finish_line()
        if self._bars:
            self._bars.stop()
        self._write(text)
        if self._bars:
            self._bars.start()
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

    @property
    def reader_left(self) -> bool:
        """Nobody reads stdout any more, or its disk is full; what is written from then on goes nowhere."""
        return self._lost is not None

    def check_reader(self) -> None:
        """Raises what kept stdout from being written, BrokenPipeError mostly, once what had to be kept is kept."""
        if self._lost:
            raise self._lost

    def _write(self, text: str) -> None:
        try:
            print(text, end="", flush=True)
        except OSError as error:
            self._lost = OSError(error.errno, error.strerror, "stdout")  # of the same class, by its number
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
        bars = Progress(
            *columns,
            console=self._errors,
            transient=True,
            disable=self._quiet or not self._errors.is_terminal or self._errors.is_dumb_terminal,
            redirect_stdout=False,  # to stderr, even where stdout is a file
            redirect_stderr=False,
        )
        with bars, self._separate(bars):
            bar = bars.add_task(what, total=None)

            def report(done: int, total: int) -> None:
                bars.update(bar, completed=done, total=total)
                if interrupted():
                    raise KeyboardInterrupt

            yield report

    @contextmanager
    def status(self, seconds_between: float = 30.0) -> Iterator[Callable[[str], None]]:
        """A line on stderr that is replaced while the block runs; where there is no terminal, a line now and then."""
        if self._quiet or not self._errors.is_terminal or self._errors.is_dumb_terminal:
            last = time.monotonic()

            def write(line: str) -> None:
                nonlocal last
                if time.monotonic() - last >= seconds_between:
                    last = time.monotonic()
                    self.note(line)

            yield write
            return
        with Live(console=self._errors, transient=True, redirect_stdout=False, redirect_stderr=False) as live:
            yield lambda line: live.update(Text(self._on_stderr(line), overflow="ellipsis", no_wrap=True))

    @contextmanager
    def _separate(self, bars: Progress) -> Iterator[None]:
        """While the block runs, an answer on the same terminal takes the bar's place, and the bar comes back below."""
        self._bars = bars if sys.stdout.isatty() else None
        try:
            yield
        finally:
            self._bars = None
