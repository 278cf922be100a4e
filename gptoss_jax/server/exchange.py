"""One request and its response, whatever API it came by: what the engine is asked, and what the client gets."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from gptoss_jax.api.asked import Asked, Options
from gptoss_jax.api.completions import Prompt
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.parsed import Delta
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.server.problems import Problem
from gptoss_jax.server.tool_turn import ServerTools

Scorer = Callable[[Sequence[int], int], Prompt]
"""Log probabilities of a prompt's tokens, with so many of the likeliest beside each; on the engine's devices."""


@dataclasses.dataclass(frozen=True)
class Model:
    """What answers.

    Attributes:
        names: what requests may call it; the first stands in responses.
        tokenizer: its vocabulary.
        stop_ids: its own.
        defaults: gives what acts where a request says nothing: a seed, and perhaps today's date, of its own.
        vocab_path: as for `harmony.render`.
        score: gives log probabilities of prompts.
        tools: those that are run here for requests that ask for them; None: none.
        max_context_tokens: of the engine.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    defaults: Callable[[], Options]
    vocab_path: str | None
    score: Scorer
    tools: ServerTools | None = None
    max_context_tokens: int = 0

    def check_name(self, body: Mapping[str, Any]) -> None:
        """Raises Problem for a request that asks for another model."""
        name = body.get("model")
        if name is not None and name not in self.names:
            message = f"model is {str(name)[:60]!r}, expected {' or '.join(self.names)}"
            raise Problem(404, message, param="model", code="model_not_found")


@runtime_checkable
class Exchange(Protocol):
    """One request and its response."""

    @property
    def asked(self) -> Sequence[Asked]:
        """What the engine is asked: the answers to the first, then those to the next."""
        ...

    @property
    def stream(self) -> bool:
        """Whether the answer comes as events."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Of the response."""
        ...

    def begin(self) -> Sequence[bytes]:
        """Events before the first token."""
        ...

    def take(self, number: int, deltas: Sequence[Delta]) -> Sequence[bytes]:
        """Events for what came of the answer with this number, which goes on."""
        ...

    def finish(self, number: int, deltas: Sequence[Delta], answer: Answer) -> Sequence[bytes]:
        """Events for what came last of an answer, which has ended."""
        ...

    def end(self, answers: Sequence[Answer], cached_tokens: int) -> Sequence[bytes]:
        """Events once all answers have ended."""
        ...

    def fail(self, problem: Problem) -> Sequence[bytes]:
        """Events in place of all that would come."""
        ...

    def whole(self, answers: Sequence[Answer], cached_tokens: int) -> dict[str, Any]:
        """The response's JSON."""
        ...


def new_id() -> str:
    """A response's own part of its id, which nobody guesses."""
    return secrets.token_hex(16)


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
