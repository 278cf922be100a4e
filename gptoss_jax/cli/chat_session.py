"""A conversation that goes on: its messages, its settings, the engine that answers. Knows no terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from openai_harmony import Message

from gptoss_jax.engine.request import Request
from gptoss_jax.errors import GptossError
from gptoss_jax.grammar.compiled import held_form
from gptoss_jax.harmony import messages, render
from gptoss_jax.harmony.messages import Conversation
from gptoss_jax.harmony.settings import Settings
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.runtime.answers import Sample
from gptoss_jax.runtime.tool_answers import ToolRun, Watcher
from gptoss_jax.tools.rounds import Rounds
from gptoss_jax.tools.tool import MOST_ROUNDS
from gptoss_jax.tools.toolbox import Toolbox, declared

if TYPE_CHECKING:
    import gptoss_jax.engine.engine


def no_tools() -> Toolbox:
    """A chat in which calls are for the user."""
    return Toolbox([])


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
        new_tools: makes the tools that the model may call, which the settings declare.
        tool_rounds: how often calls are carried out for one turn at most.
        tools: those that are open.
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
    new_tools: Callable[[], Toolbox] = no_tools
    tool_rounds: int = MOST_ROUNDS
    tools: Toolbox = field(default_factory=no_tools)

    def answer(self, new: Sequence[Message], watcher: Watcher, interrupted: Callable[[], bool]) -> Rounds:
        """The answer to `new` messages, in rounds if it calls tools; the conversation then holds all of them.

        Raises:
            GptossError: the conversation no longer fits the context; it stays as it was.
        """
        return self._answer(self.messages, list(new), 0, watcher, interrupted)

    def retry(self, watcher: Watcher, interrupted: Callable[[], bool]) -> Rounds:
        """Another answer in place of the last, drawn with the next seed.

        Raises:
            GptossError: there is none of this session; as `answer`.
        """
        if not self.last_turn:
            raise GptossError("there is no answer to draw anew")
        before, new, retries = self.last_turn
        return self._answer(before, new, retries + 1, watcher, interrupted)

    def _answer(
        self,
        before: list[Message],
        new: list[Message],
        retries: int,
        watcher: Watcher,
        interrupted: Callable[[], bool],
    ) -> Rounds:
        conversation = [*before, *new]
        turn = Rounds(
            conversation,
            self.tools,
            declared(self.with_opening(conversation)),
            most_rounds=self.tool_rounds,
            most_tokens=self.request.max_new_tokens,
        )
        sampling = replace(self.request.sampling, seed=(self.request.sampling.seed + retries) % 2**32)
        form = held_form(self.settings, vocab_path=self.vocab_path)
        request = replace(self.request, sampling=sampling, constraint=form)
        run = ToolRun(
            self.engine,
            self.tokenizer,
            request,
            self.render,
            self.tools,
            self.stop_strings,
            form,
            watcher,
            interrupted,
            self.samples,
        )
        run.run(turn)
        self.messages = turn.messages
        self.last_turn = before, new, retries
        self.results = []
        return turn

    def renew_tools(self) -> None:
        """Ends the tools, whatever they are doing, and begins with new ones."""
        self.tools.close()
        self.tools = self.new_tools()

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
        self.renew_tools()

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
        return self.with_opening(self.messages)

    def with_opening(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with what the settings put in front."""
        return render.with_opening(messages, self.settings)
