"""A conversation that goes on: its messages, its settings, the engine that answers. Knows no terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from openai_harmony import Message

from gptoss_jax.engine.request import Request
from gptoss_jax.errors import GptossError
from gptoss_jax.grammar.compiled import held_form
from gptoss_jax.harmony import messages, render
from gptoss_jax.harmony.answer import AnswerStream
from gptoss_jax.harmony.messages import Conversation
from gptoss_jax.harmony.parsed import Delta
from gptoss_jax.harmony.settings import Settings
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.runtime.answers import Sample, collect

if TYPE_CHECKING:
    import gptoss_jax.engine.engine


@dataclass
class ChatSession:
    """A conversation and the engine that goes on with it.

    Attributes:
        engine: of one slot at least.
        tokenizer: the vocabulary.
        request: how answers are drawn and end; its tokens are replaced by those of each turn.
        stop_strings: texts before which an answer ends.
        settings: what the system and developer messages say.
        messages: the conversation so far, without the messages that the settings put in front.
        vocab_path: as for `harmony.render`.
        samples: the answers of this session.
        results: of the calls that wait, in order, those that are there.
        last_turn: the conversation before the last answer, what that answered, and how often it was drawn anew.
    """

    engine: "gptoss_jax.engine.engine.Engine"
    tokenizer: Tokenizer
    request: Request
    stop_strings: tuple[str, ...]
    settings: Settings
    messages: list[Message]
    vocab_path: str | None = None
    samples: list[Sample] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    last_turn: tuple[list[Message], list[Message], int] | None = None

    def answer(
        self, new: Sequence[Message], show: Callable[[list[Delta]], None], interrupted: Callable[[], bool]
    ) -> Sample:
        """The answer to `new` messages, both of which the conversation then holds.

        Raises:
            GptossError: the conversation no longer fits the context; it stays as it was.
        """
        return self._answer(self.messages, list(new), 0, show, interrupted)

    def retry(self, show: Callable[[list[Delta]], None], interrupted: Callable[[], bool]) -> Sample:
        """Another answer in place of the last, drawn with the next seed.

        Raises:
            GptossError: there is none of this session; as `answer`.
        """
        if not self.last_turn:
            raise GptossError("there is no answer to draw anew")
        before, new, retries = self.last_turn
        return self._answer(before, new, retries + 1, show, interrupted)

    def _answer(
        self,
        before: list[Message],
        new: list[Message],
        retries: int,
        show: Callable[[list[Delta]], None],
        interrupted: Callable[[], bool],
    ) -> Sample:
        conversation = [*before, *new]
        stream = AnswerStream(self.tokenizer, stop_strings=self.stop_strings)
        sampling = replace(self.request.sampling, seed=(self.request.sampling.seed + retries) % 2**32)
        token_ids = tuple(self.render(conversation))
        form = held_form(self.settings, vocab_path=self.vocab_path)
        request = replace(self.request, token_ids=token_ids, ends_at=stream.ends_at, sampling=sampling, constraint=form)
        (sample,) = collect(self.engine, [request], [stream], show, interrupted)
        self.messages = [*conversation, *messages.from_parsed(sample.answer.history())]
        self.last_turn = before, new, retries
        self.samples.append(sample)
        self.results = []
        return sample

    def waiting(self) -> list[str]:
        """The names of the calls that wait for a result, in order."""
        names = [str(self.messages[call].recipient) for call in render.waiting_calls(self.messages)]
        return names[len(self.results) :]

    def take_result(self, text: str) -> list[Message]:
        """Notes the result of the first call that waits; gives all of them once none waits any more.

        Raises:
            GptossError: no call waits.
        """
        calls = render.waiting_calls(self.messages)
        if not calls:
            raise GptossError("no call waits for a result")
        results = [*self.results, text]
        if len(results) < len(calls):
            self.results = results
            return []
        names = [self.messages[call].recipient for call in calls]
        documents = [{"name": name, "content": result} for name, result in zip(names, results, strict=True)]
        return messages.tool_results(documents, Conversation(tuple(self.messages)))

    def forget(self) -> None:
        """Empties the conversation."""
        self.messages, self.results, self.last_turn = [], [], None

    def render(self, conversation: Sequence[Message]) -> list[int]:
        """The ids after which the assistant speaks."""
        return render.render(conversation, self.settings, vocab_path=self.vocab_path)

    def change(self, **fields: str) -> None:
        """Other settings from the next turn on.

        Raises:
            GptossError: a value that cannot be, or the conversation brings system messages of its own.
        """
        settings = replace(self.settings, **fields)
        render.check_can_be_set(self.messages, list(fields))
        self.settings = settings

    def conversation(self) -> list[Message]:
        """All messages, with what the settings put in front."""
        return render.with_opening(self.messages, self.settings)
