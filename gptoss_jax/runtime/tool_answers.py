"""Answers of a model that calls tools: the rounds of `gptoss_jax.tools.rounds`, run through an engine."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from openai_harmony import Message

from gptoss_jax.engine.constraint import Constraint
from gptoss_jax.engine.request import NOT_FINITE, NOT_HELD, EngineConfig, NumericsError, Request, RequestError
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.errors import GptossError, check_list
from gptoss_jax.grammar.compiled import held_form
from gptoss_jax.harmony import messages, render
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.parsed import Delta
from gptoss_jax.harmony.settings import Settings
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.runtime.answers import Sample, collect
from gptoss_jax.tools import rounds
from gptoss_jax.tools.rounds import Call, Called, Rounds
from gptoss_jax.tools.tool import MOST_ROUNDS, Tool
from gptoss_jax.tools.toolbox import MAX_OUTPUT_CHARACTERS, Toolbox, declared

if TYPE_CHECKING:
    import gptoss_jax.engine.engine
    import gptoss_jax.runtime.language_model


@runtime_checkable
class Watcher(Protocol):
    """Sees the rounds as they go."""

    def show(self, deltas: list[Delta]) -> None:
        """What came of the answer under way."""
        ...

    def answered(self, sample: Sample) -> None:
        """An answer has ended."""
        ...

    def calling(self, call: Call) -> None:
        """A tool begins to work."""
        ...

    def called(self, called: Called) -> None:
        """It has given its output."""
        ...


class _Unseen:
    """Nobody looks."""

    def show(self, deltas: list[Delta]) -> None:
        """Is not shown."""

    def answered(self, sample: Sample) -> None:
        """Is not shown."""

    def calling(self, call: Call) -> None:
        """Is not shown."""

    def called(self, called: Called) -> None:
        """Is not shown."""


def output_characters(max_context_tokens: int) -> int:
    """How long an output may be: at some four characters a token, half of the context."""
    return min(MAX_OUTPUT_CHARACTERS, 2 * max_context_tokens)


@dataclasses.dataclass
class ToolRun:
    """Runs rounds through an engine.

    Attributes:
        engine: draws answers; nothing else runs on it meanwhile.
        tokenizer: the vocabulary.
        request: what each round asks, but for its prompt and its end.
        render: a conversation's ids.
        toolbox: answers calls.
        stop_strings: texts at which an answer ends.
        later_constraint: what answers after the first are held to: a call may be asked for once, not for ever.
        watcher: sees what comes.
        interrupted: asked while answers are drawn and while tools work.
        samples: the answers so far.
    """

    engine: "gptoss_jax.engine.engine.Engine"
    tokenizer: Tokenizer
    request: Request
    render: Callable[[Sequence[Message]], Sequence[int]]
    toolbox: Toolbox
    stop_strings: Sequence[str] = ()
    later_constraint: Constraint | None = None
    watcher: Watcher = dataclasses.field(default_factory=_Unseen)
    interrupted: Callable[[], bool] = rounds.never
    samples: list[Sample] = dataclasses.field(default_factory=list)

    def run(self, turn: Rounds) -> None:
        """Runs the rounds to their end.

        Raises:
            RequestError: the first prompt does not fit the context.
        """
        rounds.run(turn, self._ask, self._carry_out)

    def _ask(self, turn: Rounds) -> Answer | None:
        stream = AnswerStream(self.tokenizer, stop_strings=self.stop_strings)
        is_first, ids = not turn.rounds, tuple(self.render(turn.messages))
        most = turn.tokens_left
        if most is not None and not is_first:  # the first's was promised whole; what is left of it may be cut
            most = max(1, min(most, self.engine.engine_config.max_context_tokens - len(ids)))
        request = dataclasses.replace(
            self.request,
            token_ids=ids,
            max_new_tokens=most,
            ends_at=stream.ends_at,
            constraint=self.request.constraint if is_first else self.later_constraint,
        )
        try:
            self.engine.check(request)
        except RequestError:
            if is_first:
                raise
            return None
        [sample] = collect(self.engine, [request], [stream], self.watcher.show, self.interrupted)
        self.samples.append(sample)
        self.watcher.answered(sample)
        return sample.answer

    def _carry_out(self, call: Call) -> Called:
        self.watcher.calling(call)
        called = rounds.carry_out(self.toolbox, call, self.interrupted)
        self.watcher.called(called)
        return called


def answer_with_tools(
    model: "gptoss_jax.runtime.language_model.LanguageModel",
    prompt: str | Sequence[Message],
    tools: Sequence[Tool],
    *,
    settings: Settings | None = None,
    sampling: SamplingParams | None = None,
    max_new_tokens: int | None = None,
    max_context_tokens: int = 4096,
    tool_rounds: int = MOST_ROUNDS,
    watcher: Watcher | None = None,
) -> Rounds:
    """The answer to a prompt, its calls of `tools` carried out and the model asked again, until it calls none.

    Args:
        model: what answers; its engine is kept for the next call.
        prompt: what a user says, or a conversation.
        tools: what it may call; they are left open.
        settings: what the system and developer messages say, these tools beside it; None: the defaults.
        sampling: how tokens are drawn; None: the defaults.
        max_new_tokens: of all rounds' answers together; None: as far as the context goes.
        max_context_tokens: prompt, answers and outputs at most; memory grows with it.
        tool_rounds: how often calls are carried out at most.
        watcher: sees what comes.

    Returns:
        The rounds: `answer.final` is the text, `messages` the conversation, `rounds` what was called, `ended` why.

    Raises:
        GptossError: a prompt that cannot be said, or tools of one name.
        NumericsError: the model gave logits that are not finite.
    """
    check_list("tools", tools, "tools")
    spoken = [messages.user(prompt)] if isinstance(prompt, str) else list(prompt)
    toolbox = Toolbox([], shared=tools, max_output_characters=output_characters(max_context_tokens))
    acting = toolbox.settings(settings or Settings(), spoken)
    conversation = render.with_opening(spoken, acting)
    form = held_form(acting)
    engine_config = EngineConfig(slots=model.sharding.size("batch"), max_context_tokens=max_context_tokens)
    ids = tuple(render.render(conversation, None))
    request = Request(ids, model.config.stop_ids, max_new_tokens, sampling or SamplingParams(), constraint=form)
    request.check(model.config, engine_config)
    turn = Rounds(conversation, toolbox, declared(conversation), most_rounds=tool_rounds, most_tokens=max_new_tokens)
    ToolRun(
        model._idle_engine(engine_config),
        load_tokenizer(),
        request,
        lambda spoken: render.render(spoken, None),
        toolbox,
        later_constraint=form,
        watcher=watcher or _Unseen(),
    ).run(turn)
    if turn.answer.finish_reason == "error":
        raise NumericsError(NOT_FINITE)
    if turn.answer.finish_reason == "constraint":
        raise GptossError(NOT_HELD)
    return turn
