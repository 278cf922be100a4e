"""Follows one harmony answer token by token, and says what may come next: packed bits, forced ids, or anything.

Reasoning is free: no grammar runs there, and its mask holds until the message ends. Headers and bodies are
llguidance's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptoss_jax.engine.constraint import Hold
from gptoss_jax.harmony.tokenizer import CALL, END, MESSAGE, RETURN, STARTOFTEXT, VOCAB_SIZE, Tokenizer

_WORDS = VOCAB_SIZE // 32


def _free_mask(end: int) -> np.ndarray:
    """Any text, and the control token that ends it."""
    allowed = np.zeros(VOCAB_SIZE, np.bool_)
    allowed[:STARTOFTEXT] = allowed[end] = True
    mask = np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32)
    mask.setflags(write=False)
    return mask


_FREE = {end: Hold(_free_mask(end), stands_below=STARTOFTEXT) for end in (END, RETURN, CALL)}


class MessageMatcher:
    """A `Matcher` for an engine."""

    def __init__(self, first: Any, following: Any, tokenizer: Tokenizer):
        """`first`: an LLMatcher after `<|start|>assistant`, where a completion begins; `following`: before it."""
        self._following, self._matcher, self._tokenizer = following, first.deep_copy(), tokenizer
        self._header: list[int] = []
        self._free_until: int | None = None  # the control token that ends the free text under way
        self._forced: list[int] = []

    def advance(self, token_ids: Sequence[int]) -> Hold:
        """What may follow; see `engine.constraint.Matcher`."""
        for token in token_ids:
            if not self._take(token):
                return Hold(fault=self._fault(token))
        if self._free_until is not None:
            return _FREE[self._free_until]
        return self._next()

    def _take(self, token: int) -> bool:
        """Follows a token; false if the grammar cannot."""
        if self._free_until is not None:
            if token == self._free_until:
                self._free_until, self._matcher, self._header = None, self._following.deep_copy(), []
            return True
        self._forced = self._forced[1:] if self._forced[:1] == [token] else []
        if not self._matcher.consume_token(token):
            return False
        self._header.append(token)
        if token == MESSAGE and self._matcher.is_stopped():
            self._free_until = self._end_of_free_text()
        return True

    def _end_of_free_text(self) -> int:
        """What ends a message of the header that has just come, whose text nobody holds."""
        header = self._tokenizer.decode(self._header)
        if " to=" in header:
            return CALL
        return RETURN if "<|channel|>final" in header else END

    def _next(self) -> Hold:
        matcher = self._matcher
        if matcher.is_stopped() and not matcher.is_error():
            return Hold(np.zeros(_WORDS, np.uint32))  # complete: nobody asks what follows
        self._forced = self._forced or matcher.compute_ff_tokens()
        if self._forced:
            return Hold(forced=tuple(self._forced))
        mask = np.frombuffer(matcher.compute_bitmask(), "<u4")[:_WORDS].astype(np.uint32)
        if matcher.is_error() or not mask.any():
            return Hold(fault=self._fault(None))
        return Hold(mask)

    def _fault(self, token: int | None) -> str:
        what = "no id may follow" if token is None else f"id {token} may not follow"
        reason = self._matcher.get_error().split("\n")[0][:200]
        return f"{what} in the form that the answer is held to" + (f": {reason}" if reason else "")
