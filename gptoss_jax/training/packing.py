"""Rows of tokens (written next)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32


class Row(NamedTuple):
    """A packed row of T tokens; `Places` says what position, first and head mean.

    Attributes:
        tokens: ids; 0 at padding.
        position: of a token in its conversation, from 0; -1 at padding.
        first: index in the row where the conversation's own part begins; 0 at padding and in the head.
        head: number of tokens at the row's start that the conversation continues; 0 at padding and in the head.
        targets: the token to predict at each place; 0 where it is not learned.
        learned: whether the target is learned.
    """

    tokens: Int32[np.ndarray, "T"]
    position: Int32[np.ndarray, "T"]
    first: Int32[np.ndarray, "T"]
    head: Int32[np.ndarray, "T"]
    targets: Int32[np.ndarray, "T"]
    learned: Bool[np.ndarray, "T"]


def empty_row(row_tokens: int) -> Row:
    """A row of padding."""
    zeros = np.zeros(row_tokens, np.int32)
    return Row(zeros, zeros - 1, zeros, zeros, zeros, np.zeros(row_tokens, bool))
