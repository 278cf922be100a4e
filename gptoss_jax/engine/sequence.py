"""A request on its way through an engine, as the host sees it."""

import dataclasses

from gptoss_jax.engine.request import Request


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
    """

    request_id: int
    request: Request
    limit: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    prompt: tuple[int, ...] = ()
    prefilled: int = 0
    drawn: int = 0

    def __post_init__(self):
        self.prompt = self.request.token_ids

    @property
    def num_unread(self) -> int:
        """Tokens of the prompt that are not yet in the cache."""
        return len(self.prompt) - self.prefilled

    @property
    def num_cached(self) -> int:
        """Tokens in the cache: the token drawn last enters it with the next step."""
        return self.prefilled if self.num_unread else len(self.request.token_ids) + self.drawn - 1

    @property
    def num_known(self) -> int:
        """Tokens that the cache holds once the sequence is where it was when its caller last heard of it."""
        return len(self.request.token_ids) + len(self.tokens)

    @property
    def most_cached(self) -> int:
        """Tokens in the cache if the answer goes on to its limit: the last token drawn never enters it."""
        return len(self.request.token_ids) + self.limit - 1

    def cached_after(self, steps: int) -> int:
        """Tokens in the cache after so many decoding steps."""
        return min(self.num_cached + steps, self.most_cached)

    def restart(self, *, draw_again: bool) -> None:
        """Forgets what was computed. The answer so far is drawn again, to the same bits, or read as part of the prompt.

        Args:
            draw_again: whether the engine is deterministic: reading the answer in chunks may round otherwise.
        """
        self.pages, self.prefilled = [], 0
        self.prompt = self.request.token_ids if draw_again else (*self.request.token_ids, *self.tokens)
        self.drawn = 0 if draw_again else len(self.tokens)
