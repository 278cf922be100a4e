"""One packed row of tokens: several examples after one another, what they begin with alike once in front of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from gptoss_jax.training.corpus import Corpus


class Row(NamedTuple):
    """A packed row of T tokens; `pallas_kernels.attention.packed.Places` says what position, first and head mean.

    Attributes:
        tokens: ids; 0 at padding.
        position: of a token in its example, from 0; -1 at padding.
        first: index in the row where the example's own part begins; 0 at padding and in the head.
        head: number of tokens at the row's start that the example continues; 0 at padding and in the head.
        targets: the token to predict at each place; 0 where it is not learned.
        learned: whether the target is learned.
    """

    tokens: Int32[np.ndarray, "T"]
    position: Int32[np.ndarray, "T"]
    first: Int32[np.ndarray, "T"]
    head: Int32[np.ndarray, "T"]
    targets: Int32[np.ndarray, "T"]
    learned: Bool[np.ndarray, "T"]


class Member(NamedTuple):
    """An example in a row, and how many tokens of the row's head it continues."""

    example: int
    head: int


def empty(row_tokens: int) -> Row:
    """A row of padding."""
    tokens, first, head, targets = np.zeros((4, row_tokens), np.int32)
    return Row(tokens, np.full(row_tokens, -1, np.int32), first, head, targets, np.zeros(row_tokens, bool))


def fill(corpus: Corpus, members: Sequence[Member], row_tokens: int) -> Row:
    """The row of some examples; the first is whole, and the longest of the others' heads is the row's.

    A head's last token is followed by several examples' first ones, so it learns nothing; these begin a message, which
    is never learned.
    """
    row = empty(row_tokens)
    row_head = max((member.head for member in members), default=0)
    _put(row, corpus, members[0].example, 0, row_head, 0)
    end = _put(row, corpus, members[0].example, row_head, None, row_head)
    for member in members[1:]:
        end = _put(row, corpus, member.example, member.head, None, end)
    return row


def _put(row: Row, corpus: Corpus, example: int, begin: int, end: int | None, at: int) -> int:
    """Writes an example's tokens from `begin` to `end` at an index of the row; where they end there."""
    offset, next_offset = corpus.offsets[example : example + 2].tolist()
    stop = next_offset if end is None else offset + end
    ids, learned = corpus.ids[offset + begin : stop], corpus.learned[offset + begin : stop]
    if not len(ids):
        return at
    place = slice(at, at + len(ids))
    row.tokens[place] = ids
    row.position[place] = np.arange(begin, begin + len(ids))
    row.first[place] = at
    row.head[place] = begin
    row.learned[at : at + len(ids) - 1] = learned[1:]
    row.targets[at : at + len(ids) - 1] = np.where(learned[1:], ids[1:], 0)
    return at + len(ids)
