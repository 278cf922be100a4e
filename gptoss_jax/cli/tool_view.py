"""Rounds of tool calls as people see them: each answer, then its calls and what they gave, on stderr."""

from collections.abc import Callable

from gptoss_jax.cli.answer_view import AnswerView, remarks
from gptoss_jax.cli.mistakes import spell_flags
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.harmony.parsed import Delta
from gptoss_jax.runtime.answers import Sample
from gptoss_jax.tools.rounds import Call, Called, Rounds
from gptoss_jax.tools.toolbox import bounded

SHOWN_CHARACTERS = 2000  # of a call and of an output; the model reads more
_STYLE = "dim"


class ToolView:
    """See `gptoss_jax.runtime.tool_answers.Watcher`."""

    def __init__(
        self,
        screen: Screen,
        new_view: Callable[[], AnswerView],
        *,
        shows_answers: bool = True,
        shows_calls: bool = True,
        to_see_reasoning: str = "",
    ):
        """`to_see_reasoning`: what to type for it, where it is hidden."""
        self._screen, self._new_view, self._view = screen, new_view, new_view()
        self._shows_answers, self._shows_calls = shows_answers, shows_answers and shows_calls
        self._to_see_reasoning = to_see_reasoning

    def show(self, deltas: list[Delta]) -> None:
        """What came of the answer under way."""
        if self._shows_answers:
            self._view.show(deltas)

    def answered(self, sample: Sample) -> None:
        """Ends an answer, and says what a reader should know of it."""
        if self._shows_answers:
            self._view.finish(sample.answer, goes_on=bool(sample.answer.parsed.calls))
        for remark in remarks(sample.answer, self._to_see_reasoning):
            self._screen.say(remark)
        self._view = self._new_view()

    def calling(self, call: Call) -> None:
        """A call, before its tool begins to work."""
        if self._shows_calls:
            self._view.aside_text(f"call to {call.recipient}", _cut(call.arguments), _STYLE)

    def called(self, called: Called) -> None:
        """What it gave."""
        if self._shows_calls:
            label = "failed" if called.output.failed else "output"
            self._view.aside_text(f"{label} after {called.seconds:.1f} s", _cut(called.output.text), _STYLE)

    def ended(self, turn: Rounds) -> None:
        """Says why there are no more rounds, where somebody may ask."""
        if remark := turn.remark():
            self._screen.say(spell_flags(remark))


def _cut(text: str) -> str:
    return bounded(text.rstrip("\n"), SHOWN_CHARACTERS)
