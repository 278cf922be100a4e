"""One answer as people see it: the answer proper on stdout, reasoning and remarks on stderr."""

import json

from gptoss_jax.cli.terminal import Screen
from gptoss_jax.engine.request import NOT_FINITE, NOT_HELD
from gptoss_jax.grammar.compiled import CompiledForm
from gptoss_jax.grammar.verdict import verdict
from gptoss_jax.harmony.answer import RAW, Answer, call_document
from gptoss_jax.harmony.parsed import Delta

REASONING = "analysis"
REASONING_STYLE = "dim"


class AnswerView:
    """Shows one answer as it comes: the answer proper on stdout, on stderr the reasoning, if wanted, and preambles."""

    def __init__(self, screen: Screen, *, show_reasoning: bool = False, print_calls: bool = False):
        """`print_calls`: in the end on stdout, where a program can read them, one JSON object a line."""
        self._screen, self._show_reasoning, self._print_calls = screen, show_reasoning, print_calls
        self._aside = ""  # the kind of text that is being shown, where it is no answer
        self._answered = False
        self._raw = False

    def show(self, deltas: list[Delta]) -> None:
        """What came next. Calls are shown when they are complete."""
        for delta in deltas:
            if delta.is_answer or delta.channel == RAW:
                self._begin("")
                self._screen.answer(delta.text)
                self._answered = True
                self._raw |= delta.channel == RAW
            elif delta.kind in ("call", "cut_call"):
                continue
            elif delta.channel != REASONING:  # a preamble, or text of another role
                self.aside_text(delta.channel or delta.role, delta.text)
            elif self._show_reasoning:
                self.aside_text("reasoning", delta.text, REASONING_STYLE)

    def aside_text(self, label: str, text: str, style: str = "") -> None:
        """Text on stderr below its label, which stands once above what comes of it."""
        self._begin(label)
        self._screen.aside(text, style)

    def _begin(self, aside: str) -> None:
        """Marks text that is no answer: a label before it, an empty line after it."""
        if aside != self._aside:
            self._screen.finish_line()
            self._screen.aside(f"[{aside}]\n" if aside else "\n", REASONING_STYLE)
            self._aside = aside

    def finish(self, answer: Answer, *, goes_on: bool = False) -> None:
        """Ends the line; if the model came to no answer, shows what it wrote outside of any message in its place.

        Beside an answer such text stands on stderr, and so does what came of a call that was cut: no program reads it.
        So it does where the conversation `goes_on` with what tools give.
        """
        if not self._answered and not goes_on:
            self._screen.answer(answer.stray_text if answer.final is None else answer.final)
        if not self._raw:
            self._finish_asides(answer, is_answered=goes_on or answer.final is not None)
        self._screen.finish_line()
        for call in answer.parsed.calls if self._print_calls else ():
            self._screen.answer(json.dumps(call_document(call), ensure_ascii=False) + "\n")

    def _finish_asides(self, answer: Answer, *, is_answered: bool) -> None:
        if answer.stray_text and is_answered:
            self.aside_text("outside of any message", answer.stray_text)
        for call in answer.parsed.cut_calls:
            self.aside_text(f"cut call to {call.recipient}", call.content)


def form_remarks(form: CompiledForm | None, answer: Answer) -> list[str]:
    """What a reader should know of an answer that was held to a form: why it does not have it."""
    found = verdict(form, answer) if form else {"fault": None}
    return [f"the answer does not have the form that was asked for: {found['fault']}"] if found["fault"] else []


def remarks(answer: Answer, to_see_reasoning: str = "") -> list[str]:
    """What a reader of the answer should know: that it was cut, that there is none, that it was not well-formed.

    `to_see_reasoning`: what to type for it, where it is hidden.
    """
    parsed = answer.parsed
    called = parsed.calls or parsed.cut_calls
    lines: list[str] = []
    if answer.finish_reason == "error":
        lines.append(f"the answer ended at step {len(parsed.token_ids)}: {NOT_FINITE}")
    if answer.finish_reason == "constraint":
        lines.append(f"the answer ended at step {len(parsed.token_ids)}: {NOT_HELD}")
    if answer.finish_reason == "length":
        lines.append(f"the answer was cut at {len(parsed.token_ids)} tokens (--max-new-tokens, --max-context-tokens)")
    if answer.finish_reason == "cancelled":
        lines.append(f"the answer was interrupted after {len(parsed.token_ids)} tokens")
    if answer.final is None and answer.stray_text:
        lines.append("no final answer: this is text that the model wrote outside of any message")
    elif answer.final is None and parsed.reasoning and not called:
        hint = f" ({to_see_reasoning} shows it)" if to_see_reasoning else ""
        lines.append(f"no final answer: the model was still reasoning{hint}")
    elif answer.final is None and parsed.token_ids and not called:
        lines.append("no final answer: the model had not come to one")
    lines += [f"the call to {call.recipient} was cut, so it is none" for call in parsed.cut_calls]
    if parsed.faults:
        first, *others = parsed.faults
        more = f" (and {len(others)} more)" if others else ""
        lines.append(f"not well-formed harmony, {parsed.parse_status}: {first}{more}")
    return lines
