"""What people see: the answer on stdout, all else on stderr; colours and progress bars where a terminal shows them."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment, Segments
from rich.style import Style

from gptoss_jax.cli import command
from gptoss_jax.engine.request import NOT_FINITE
from gptoss_jax.harmony.answer import RAW, Answer, call_document
from gptoss_jax.harmony.parser import Delta
from gptoss_jax.runtime import language_model as runtime
from gptoss_jax.runtime.language_model import LanguageModel

REASONING = "analysis"
REASONING_STYLE = "dim"


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
        """A piece of text on stderr, as it comes."""
        if self._open == "stdout":
            self.finish_line()
        self._errors.print(Segments([Segment(text, Style.parse(style))]), end="")  # as text, tabs would be spaces
        self._note("stderr", text)

    def answer(self, text: str) -> None:
        """A piece of text on stdout, as it comes."""
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


class AnswerView:
    """Shows one answer as it comes: the answer proper on stdout, on stderr the reasoning, if wanted, and preambles."""

    def __init__(self, screen: Screen, *, show_reasoning: bool = False, print_calls: bool = False):
        """`print_calls`: in the end on stdout, where a program can read them, one JSON object a line."""
        self._screen, self._show_reasoning, self._print_calls = screen, show_reasoning, print_calls
        self._aside = ""  # what is being shown that is no answer
        self._answered = False

    def show(self, deltas: list[Delta]) -> None:
        """The next pieces. Calls are shown when they are complete."""
        for delta in deltas:
            if delta.is_answer or delta.channel == RAW:
                self._begin("")
                self._screen.answer(delta.text)
                self._answered = True
            elif delta.channel == REASONING:
                if self._show_reasoning:
                    self._begin("reasoning")
                    self._screen.aside(delta.text, REASONING_STYLE)
            elif delta.role != "assistant" or delta.recipient is None:  # a preamble, or another's words
                self._begin(delta.channel or delta.role)
                self._screen.aside(delta.text, "")

    def _begin(self, aside: str) -> None:
        """Tells what is no answer from what is one: a label before it, an empty line behind it."""
        if aside != self._aside:
            self._screen.finish_line()
            self._screen.aside(f"[{aside}]\n" if aside else "\n", REASONING_STYLE)
            self._aside = aside

    def finish(self, answer: Answer) -> None:
        """Ends the line; if the model came to no answer, shows what it wrote outside of any message in its place."""
        if not self._answered:
            self._screen.answer(answer.stray_text if answer.final is None else answer.final)
        self._screen.finish_line()
        for call in answer.parsed.calls if self._print_calls else ():
            self._screen.answer(json.dumps(call_document(call), ensure_ascii=False) + "\n")


def load_model(
    screen: Screen, options: flags.FlagValues, interrupted: Callable[[], bool], *, if_random: str
) -> LanguageModel:
    """The model that the flags name, loaded under a progress bar, and what people should know of it on stderr.

    Raises:
        GptossError: as `runtime.load`.
        KeyboardInterrupt: once `interrupted`.
    """
    with screen.progress("loading", interrupted) as report:
        language_model = runtime.load_from_flags(options, report)
    screen.say(f"loaded {language_model.source} in {language_model.load_seconds:.1f} s")
    screen.say(language_model.kernels)
    if language_model.weights_are_random:
        screen.say(f"these weights are RANDOM: {if_random}")
    return language_model


def remarks(answer: Answer, to_see_reasoning: str = "") -> list[str]:
    """What a reader of the answer should know: that it was cut, that there is none, that it was not well-formed.

    `to_see_reasoning`: what to type for it, where it is hidden.
    """
    parsed = answer.parsed
    lines: list[str] = []
    if answer.finish_reason == "error":
        lines.append(f"the answer ended at step {len(parsed.token_ids)}: {NOT_FINITE}")
    if answer.finish_reason == "length":
        lines.append(f"the answer was cut at {len(parsed.token_ids)} tokens (--max-new-tokens, --max-context-tokens)")
    if answer.finish_reason == "cancelled":
        lines.append(f"the answer was interrupted after {len(parsed.token_ids)} tokens")
    if answer.final is None and answer.stray_text:
        lines.append("no final answer: this is text that the model wrote outside of any message")
    elif answer.final is None and parsed.reasoning and not parsed.calls:
        hint = f" ({to_see_reasoning} shows it)" if to_see_reasoning else ""
        lines.append(f"no final answer: the model was still reasoning{hint}")
    elif answer.final is None and parsed.token_ids and not parsed.calls:
        lines.append("no final answer: the model had not come to one")
    if parsed.faults:
        first, *others = parsed.faults
        more = f" (and {len(others)} more)" if others else ""
        lines.append(f"not well-formed harmony, {parsed.parse_status}: {first}{more}")
    return lines


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
