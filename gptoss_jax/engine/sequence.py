"""A request on its way through an engine, as the host sees it: what it holds, and what its caller has seen."""

import dataclasses
from typing import Any

from gptoss_jax.engine.held import Held
from gptoss_jax.engine.request import Event, FinishReason, Request


@dataclasses.dataclass(eq=False)
class Sequence:
    """One request: what was drawn for it, and, while it runs, what it holds.

    Attributes:
        request_id: the engine's number for it; a smaller one is older.
        request: what is asked.
        limit: tokens of the answer at most.
        tokens: the answer so far, all of which the caller has seen.
        pages: of its shard's pool, in order of its positions.
        prompt: token ids to read before the next token is drawn: the request's, and after a preemption perhaps the
            answer's so far.
        prefilled: tokens of `prompt` that are in the cache.
        drawn: tokens of the answer that are in `prompt` or were drawn since it was read. Fewer than `tokens` while an
            answer is drawn again after a preemption.
        block_keys: of the blocks of `prompt`, by which the prefix cache finds them; None: not asked for yet.
        passed: younger sequences that got a slot while it waited.
        cached: tokens of the prompt that the prefix cache held when it first got a slot; None: it has had none.
        held: what may follow its tokens, where it is held to a form and runs.
    """

    request_id: int
    request: Request
    limit: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    prompt: tuple[int, ...] = ()
    prefilled: int = 0
    drawn: int = 0
    block_keys: list[bytes] | None = None
    passed: int = 0
    cached: int | None = None
    held: Held | None = None

    def __post_init__(self):
        self.prompt = self.request.token_ids

    # ---- how much of the cache it takes, in tokens ----

    @property
    def num_unread(self) -> int:
        """Tokens of the prompt that are still to be read before decoding begins.

        The last one of a prompt whose answer is held to a form is not among them: it goes in with the first step of
        decoding, so that the answer's first token is drawn as the others are.
        """
        return len(self.prompt) - self.prefilled - bool(self.request.constraint)

    @property
    def num_known(self) -> int:
        """Tokens that the caller knows of, the request's own among them."""
        return len(self.request.token_ids) + len(self.tokens)

    @property
    def most_cached(self) -> int:
        """Tokens in the cache if the answer goes on to its limit: the last token drawn never enters it."""
        return len(self.request.token_ids) + self.limit - 1

    def cached_after(self, steps: int) -> int:
        """Tokens in the cache after so many decoding steps; the token drawn last enters it with the first."""
        return min(len(self.request.token_ids) + self.drawn - 1 + steps, self.most_cached)

    # ---- what happens to it ----

    def restart(self, *, draw_again: bool) -> None:
        """Forgets what was computed. The answer so far is drawn again, to the same bits, or read as part of the prompt.

        Args:
            draw_again: whether the engine is deterministic: reading the answer in chunks may round otherwise.
        """
        self.pages, self.prefilled, self.block_keys, self.held = [], 0, None, None
        self.prompt = self.request.token_ids if draw_again else (*self.request.token_ids, *self.tokens)
        self.drawn = 0 if draw_again else len(self.tokens)

    def take(self, tokens: list[int], logprobs: Any, top: Any, *, faulty: bool) -> Event:
        """Takes in what was drawn, and gives what is news of it to the caller; the event may be empty.

        Args:
            tokens: the next tokens.
            logprobs: of each of them, a host array.
            top: likeliest ids and their log probabilities, host arrays [tokens, Z]; None if nobody asks.
            faulty: whether the logits after them were not finite.
        """
        # What is drawn again after a preemption is what the caller has seen already, bit by bit.
        again = min(max(0, len(self.tokens) - self.drawn), len(tokens))
        self.drawn += len(tokens)
        step, (new, reason) = len(self.tokens), self._until_end(tokens[again:])
        self.tokens += new
        here = slice(again, again + len(new))
        reason = reason or ("error" if faulty else None)
        news = tuple(new), tuple(logprobs[here].tolist()), reason, step, self._top(top, here)
        return Event(self.request_id, *news, cached_tokens=self.cached or 0)

    def give_up(self) -> Event:
        """The end of an answer of which nobody can say how it may go on."""
        return Event(self.request_id, (), (), "constraint", len(self.tokens))

    def _top(self, top: Any, here: slice) -> tuple[tuple[tuple[int, float], ...], ...]:
        """The likeliest ids of each new token, with their log probabilities, as many as were asked for."""
        if asked := self.request.sampling.top_logprobs:
            pairs = zip(*(x[here, :asked].tolist() for x in top), strict=True)
            return tuple(tuple(zip(ids, logprobs, strict=True)) for ids, logprobs in pairs)
        return ()

    def _until_end(self, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
        """New tokens up to where the answer ends, and why it does; None if it goes on."""
        for count, token in enumerate(tokens, 1):
            if (self.request.ends_at and self.request.ends_at(token)) or token in self.request.stop_ids:
                return tokens[:count], "stop"
        return tokens, "length" if len(self.tokens) + len(tokens) >= self.limit else None
