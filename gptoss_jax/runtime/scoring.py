"""Log probabilities of given text: what scoring gives, which ids have any, and long texts in windows. Knows no JAX."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32

from gptoss_jax.engine.request import RequestError
from gptoss_jax.errors import GptossError
from gptoss_jax.model.config import ModelConfig


class Scores(NamedTuple):
    """Log probabilities (natural, by the model's own distribution) of T tokens but the first; Z alternatives each."""

    logprobs: Float[np.ndarray, "T-1"]
    top_ids: Int32[np.ndarray, "T-1 Z"]  # the likeliest first
    top_logprobs: Float[np.ndarray, "T-1 Z"]


class Summary(NamedTuple):
    """Scores in four numbers."""

    tokens_scored: int
    total_logprob: float
    mean_logprob: float
    perplexity: float


class Windows(NamedTuple):
    """How long texts are cut.

    Attributes:
        size: tokens of a window.
        stride: tokens between the beginnings of two windows.
    """

    size: int
    stride: int

    @classmethod
    def of(cls, max_context_tokens: int, stride: int | None = None) -> "Windows":
        """Windows of `max_context_tokens` that begin every `stride` tokens; None: every half a window.

        Raises:
            GptossError: sizes that leave tokens out, or nothing to score.
        """
        stride = max(1, max_context_tokens // 2) if stride is None else stride
        if max_context_tokens < 2:
            raise GptossError(f"max_context_tokens is {max_context_tokens}, expected at least 2")
        if not 1 <= stride < max_context_tokens:
            raise GptossError(f"stride is {stride}, expected 1 to {max_context_tokens - 1}, below max_context_tokens")
        return cls(max_context_tokens, stride)

    def over(self, length: int) -> Iterator[tuple[int, int, int]]:
        """First token, end, and first token to score of each window over `length` tokens: every token but 0, once."""
        scored = 1
        for first in range(0, length, self.stride):
            end = min(first + self.size, length)
            yield first, end, scored
            if end == length:
                return
            scored = end


def check_named(token_ids: Sequence[int], config: ModelConfig) -> None:
    """Raises RequestError for an id that names no token: rows of the embedding from there on have no probability."""
    for position, token in enumerate(token_ids):
        if not 0 <= token < config.num_token_ids:
            raise RequestError(
                f"token id {token} at position {position} names no token, expected 0 to {config.num_token_ids - 1}"
            )


def score_in_windows(score: Callable[[Sequence[int]], Scores], token_ids: Sequence[int], windows: Windows) -> Scores:
    """Scores of every token but the first, in as few windows as hold them all.

    Args:
        score: of the tokens of one window: `LanguageModel.score`, whose errors it raises.
        token_ids: the whole text.
        windows: how it is cut.
    """
    windows_scores = []
    for first, end, scored in windows.over(len(token_ids)):
        scores = score(token_ids[first:end])
        windows_scores.append([array[scored - first - 1 :] for array in scores])
    return Scores(*(np.concatenate(arrays) for arrays in zip(*windows_scores, strict=True)))


def summary(logprobs: np.ndarray) -> Summary:
    """Tokens, sum, mean and perplexity, summed in float64."""
    total = float(np.sum(logprobs, dtype=np.float64))
    mean = total / logprobs.size
    return Summary(logprobs.size, total, mean, math.exp(-mean) if mean > -700 else math.inf)
