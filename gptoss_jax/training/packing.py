"""A corpus -> rows of tokens, epoch after epoch, in an order that depends on the seed alone; resumable at any row."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from gptoss_jax.training import heads, rows
from gptoss_jax.training.best_fit import Conversation, Packing
from gptoss_jax.training.corpus import Corpus
from gptoss_jax.training.jsonl import DataError
from gptoss_jax.training.rows import Member, Row

_BUFFER_ROWS = 128  # so many rows' tokens are packed together: more leave less padding, fewer mix better


class Position(NamedTuple):
    """Where a run stands in its data: all that a resume needs to know of it.

    Attributes:
        epoch: from 0.
        row: the next one of the epoch's plan.
    """

    epoch: int = 0
    row: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which of N examples each of R rows holds, in an epoch.

    Attributes:
        examples: their numbers, row after row.
        heads: of each how many tokens of its row's head it continues.
        offsets: where each row begins in these, and where the last ends.
        padding_share: of the tokens of all rows.
    """

    examples: Int32[np.ndarray, "N"]
    heads: Int32[np.ndarray, "N"]
    offsets: Int64[np.ndarray, "_"]
    padding_share: float

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def members(self, row: int) -> list[Member]:
        """The examples of a row."""
        part = slice(*self.offsets[row : row + 2].tolist())
        return [*map(Member, self.examples[part].tolist(), self.heads[part].tolist())]


class Packer:
    """Plans rows of a corpus, and makes them."""

    def __init__(self, corpus: Corpus, row_tokens: int, seed: int = 0):
        """Finds out what examples begin alike: of a million a few seconds.

        Args:
            corpus: of at least one example.
            row_tokens: tokens of a row.
            seed: of the order.

        Raises:
            DataError: an example that no row holds.
        """
        self.corpus, self.row_tokens, self._seed = corpus, row_tokens, seed
        longest = int(corpus.lengths.argmax())
        if corpus.lengths[longest] > row_tokens:
            found = f"{corpus.lengths[longest]:,} tokens, expected at most the {row_tokens:,} of a row"
            raise DataError(f"{corpus.where(longest)}: the conversation has {found}")
        self._packing = Packing(heads.find(corpus), corpus.lengths, row_tokens)
        is_next = np.any(corpus.lines[1:] != corpus.lines[:-1], axis=1)
        self._conversations = np.split(np.arange(len(corpus)), np.flatnonzero(is_next) + 1)
        self._planned: tuple[int, Plan] | None = None

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch, the same each time; the last one is kept.

        Conversations are shuffled, packed a buffer at a time, and the rows of a buffer shuffled.
        """
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._plan(epoch)
        return self._planned[1]

    def rows_of(self, epochs: float) -> int:
        """How many rows so many epochs have, judged by the first one: others may have a few more or less."""
        return max(1, math.ceil(epochs * len(self.plan(0))))

    def row(self, epoch: int, row: int) -> Row:
        """One row of an epoch's plan."""
        return rows.fill(self.corpus, self.plan(epoch).members(row), self.row_tokens)

    def _plan(self, epoch: int) -> Plan:
        packed: list[list[Member]] = []
        for number, buffer in enumerate(self._buffers(epoch)):
            found = self._packing.pack(buffer)
            packed += [found[i] for i in _shuffled(len(found), self._seed, epoch, number + 1)]
        members = [member for row in packed for member in row]
        examples = np.array([member.example for member in members], np.int32)
        continued = np.array([member.head for member in members], np.int32)
        used = int(self.corpus.lengths.sum() - continued.sum(dtype=np.int64))
        offsets = np.cumsum([0, *map(len, packed)], dtype=np.int64)
        return Plan(examples, continued, offsets, 1 - used / (len(packed) * self.row_tokens))

    def _buffers(self, epoch: int) -> Iterator[list[Conversation]]:
        """All conversations, shuffled, a buffer at a time."""
        buffer, tokens = [], 0
        for i in _shuffled(len(self._conversations), self._seed, epoch, 0):
            buffer.append(self._conversations[i])
            tokens += int(self.corpus.lengths[buffer[-1]].sum())
            if tokens >= _BUFFER_ROWS * self.row_tokens:
                yield buffer
                buffer, tokens = [], 0
        if buffer:
            yield buffer


class RowStream:
    """The rows of one epoch after the other, without end."""

    def __init__(self, packer: Packer, position: Position = Position()):  # noqa: B008  # it does not change
        """Goes on where `position` says."""
        self._packer, self._position = packer, position

    @property
    def position(self) -> Position:
        """Where the next row is."""
        return self._position

    def take(self, count: int) -> list[Row]:
        """The next rows."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Row:
        epoch, row = self._position
        if row >= len(self._packer.plan(epoch)):
            epoch, row = epoch + 1, 0
        self._position = Position(epoch, row + 1)
        return self._packer.row(epoch, row)


def _shuffled(count: int, *seeds: int) -> list[int]:
    """The numbers below `count` in an order that the seeds give, with any version of NumPy."""
    state = np.zeros(1, np.uint64)
    for seed in seeds:
        state = _mixed(state + np.uint64(seed))
    return np.argsort(_mixed(state + np.arange(count, dtype=np.uint64)), kind="stable").tolist()


def _mixed(numbers: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """A hash of each number: SplitMix64 (Steele, Lea and Flood, doi:10.1145/2660193.2660195)."""
    z = numbers + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
