"""The loop that answers a model's calls: rounds of an answer, its calls, their outputs, until an answer calls nothing.

`Rounds` asks no model and starts no thread: a driver asks, gives each answer to `take`, carries out the calls that this
returns, gives their outputs to `put`, and asks again. `run` is the driver for who may wait.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from openai_harmony import Message

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import render
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.messages import from_parsed
from gptoss_jax.harmony.tool_results import result_message
from gptoss_jax.tools.tool import MOST_ROUNDS, ToolOutput
from gptoss_jax.tools.toolbox import Toolbox

INTERRUPTED = ToolOutput("the user interrupted this call", failed=True)

_HEARS_SECONDS = 0.05  # how soon an interruption ends the wait for a tool

Ended = Literal["answered", "handed_over", "rounds", "tokens", "context", "interrupted"]


class Call(NamedTuple):
    """A call of the model's.

    Attributes:
        recipient: "python", "browser.open", "functions.NAME".
        arguments: as the model wrote them.
    """

    recipient: str
    arguments: str

    def document(self) -> dict[str, Any]:
        """For JSON, as `harmony.answer.call_document` writes calls."""
        return {"name": self.recipient.removeprefix("functions."), "arguments": self.arguments}


class Called(NamedTuple):
    """A call and what it gave, after so many seconds."""

    call: Call
    output: ToolOutput
    seconds: float

    def document(self) -> dict[str, Any]:
        """For JSON, without the time that it took: the same calls give the same bytes."""
        return {**self.call.document(), "output": self.output.text, "failed": self.output.failed}


@dataclass
class Round:
    """One answer, and those of its calls that tools answered."""

    answer: Answer
    called: list[Called] = field(default_factory=list)


class Rounds:
    """A conversation on its way through rounds.

    Attributes:
        messages: all of them so far, answers and outputs too.
        rounds: one for each answer.
        ended: why no more follow; None while some do. "answered": the last answer calls nothing, or was cut.
            "handed_over": it calls functions that the caller declared and no tool takes. "rounds", "tokens",
            "context": there was no room for another round, so its calls wait. "interrupted": by the user.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        toolbox: Toolbox,
        declared: Collection[str],
        *,
        most_rounds: int = MOST_ROUNDS,
        most_tokens: int | None = None,
    ):
        """A conversation that the assistant is to go on with.

        Args:
            messages: the conversation, with or without the messages in front.
            toolbox: answers calls; without tools it answers none.
            declared: recipients that the prompt declares; calls to those that no tool takes are the caller's.
            most_rounds: how often calls are carried out.
            most_tokens: of all answers together; None: as far as the context goes.

        Raises:
            GptossError: fewer than one round.
        """
        if most_rounds < 1:
            raise GptossError(f"tool_rounds is {most_rounds}, expected at least 1")
        self.messages, self.rounds = list(messages), list[Round]()
        self.ended: Ended | None = None
        self._toolbox, self._declared = toolbox, declared
        self._most_rounds, self._most_tokens = most_rounds, most_tokens
        self._calls: list[Message] = []  # those that are being carried out

    @property
    def answer(self) -> Answer:
        """The last one."""
        return self.rounds[-1].answer

    @property
    def tokens_left(self) -> int | None:
        """How long the next answer may be; None: as far as the context goes."""
        if self._most_tokens is None:
            return None
        return self._most_tokens - sum(len(round.answer.parsed.token_ids) for round in self.rounds)

    def take(self, answer: Answer) -> list[Call]:
        """Adds an answer; gives the calls to be carried out now, in order. None of them: the rounds have ended."""
        before = len(self.messages)
        self.messages += from_parsed(answer.history())
        self.rounds.append(Round(answer))
        waiting = [self.messages[call] for call in render.waiting_calls(self.messages) if call >= before]
        self._calls = [call for call in waiting if self._is_answered(str(call.recipient))]
        if not self._calls or answer.finish_reason != "stop":
            self._calls, self.ended = [], "interrupted" if answer.finish_reason == "cancelled" else "answered"
            if waiting and answer.finish_reason == "stop":
                self.ended = "handed_over"
        elif len(self.rounds) > self._most_rounds:
            self._calls, self.ended = [], "rounds"
        elif self.tokens_left is not None and self.tokens_left <= 0:
            self._calls, self.ended = [], "tokens"
        elif len(self._calls) < len(waiting):
            self.ended = "handed_over"  # once its own are answered
        return [Call(str(call.recipient), arguments_of(call)) for call in self._calls]

    def put(self, called: Sequence[Called]) -> None:
        """Adds what the calls gave that `take` returned last, in their order."""
        self.messages += [
            result_message(call, each.output.text) for call, each in zip(self._calls, called, strict=True)
        ]
        self.rounds[-1].called += called
        self._calls = []
        if self.was_interrupted_in_a_call:
            self.ended = "interrupted"

    def does_not_fit(self) -> None:
        """Ends the rounds: with what the tools gave, the conversation is longer than the context."""
        self.ended = "context"

    def waiting(self) -> list[Call]:
        """The calls of the last answer that nobody has answered."""
        done = [each.call for each in self.rounds[-1].called]
        calls = [Call(str(call.recipient), call.content) for call in self.answer.parsed.calls]
        return [call for call in calls if call not in done]

    def remark(self) -> str | None:
        """What a reader should know of why there are no more rounds; None: there is nothing to say."""
        carried = sum(bool(round.called) for round in self.rounds)
        wait = "the calls of the last answer wait"
        return {
            "rounds": f"calls were carried out {carried} times, and tool_rounds allows no more: {wait}",
            "tokens": f"{self._most_tokens} tokens were drawn, and max_new_tokens allows no more: {wait}",
            "context": f"after {carried} rounds of tools the conversation no longer fits max_context_tokens",
            "interrupted": "the call was interrupted" if self.was_interrupted_in_a_call else None,
        }.get(str(self.ended))

    @property
    def was_interrupted_in_a_call(self) -> bool:
        """Whether a tool may still be at work, until it is closed."""
        return bool(self.rounds) and any(each.output is INTERRUPTED for each in self.rounds[-1].called)

    def document(self) -> dict[str, Any]:
        """Why they ended and what was called, for JSON."""
        rounds = [
            {
                "answer": each.answer.document(),
                "calls": [called.document() | {"seconds": round(called.seconds, 3)} for called in each.called],
            }
            for each in self.rounds
        ]
        return {"ended": self.ended, "rounds": rounds}

    def _is_answered(self, recipient: str) -> bool:
        """Whether its output comes from here: of a tool's call, or of one to what nobody declared."""
        return self._toolbox.takes(recipient) or (bool(self._toolbox.tools) and recipient not in self._declared)


def arguments_of(call: Message) -> str:
    """The arguments of a call."""
    return "".join(getattr(part, "text", "") for part in call.content)


def never() -> bool:
    """Nobody interrupts."""
    return False


def run(
    rounds: Rounds,
    ask: Callable[[Rounds], Answer | None],
    carry_out: Callable[[Call], Called],
) -> None:
    """Asks and carries out calls until the rounds have ended.

    Args:
        rounds: says what is next.
        ask: the answer to `rounds.messages`, of `rounds.tokens_left` at most; None: they no longer fit the context.
        carry_out: one call; see `carry_out`.
    """
    while rounds.ended is None:
        answer = ask(rounds)
        if answer is None:
            rounds.does_not_fit()
            return
        called: list[Called] = []
        for call in rounds.take(answer):
            was_interrupted = bool(called) and called[-1].output is INTERRUPTED
            called.append(Called(call, INTERRUPTED, 0.0) if was_interrupted else carry_out(call))
        rounds.put(called)


def called_now(toolbox: Toolbox, call: Call) -> Called:
    """One call, which this waits for."""
    began = time.monotonic()
    output = toolbox.call(*call)
    return Called(call, output, time.monotonic() - began)


def carry_out(toolbox: Toolbox, call: Call, interrupted: Callable[[], bool] = never) -> Called:
    """One call, in a thread of its own, so that an interruption is heard: the output is INTERRUPTED then.

    The tool's own time limit ends what is left in the thread, or the toolbox's `close` before that.
    """
    done: list[Called] = []
    began = time.monotonic()
    # A daemon: a tool that hangs must not keep the process from ending.
    thread = threading.Thread(target=lambda: done.append(called_now(toolbox, call)), name="tool", daemon=True)
    thread.start()
    while thread.is_alive() and not interrupted():
        thread.join(_HEARS_SECONDS)
    return done[0] if done else Called(call, INTERRUPTED, time.monotonic() - began)
