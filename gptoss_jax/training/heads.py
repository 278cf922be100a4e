"""Which examples begin with the same messages, so that a row holds these once."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from gptoss_jax.harmony import tokenizer
from gptoss_jax.training.corpus import Corpus

MAX_DEPTH = 24  # beginnings of an example that are known; longer ones are not shared


class Heads(NamedTuple):
    """The beginnings that some of N examples have in common, as a tree: each is whole messages, none of them learned.

    Attributes:
        paths: the numbers of each example's beginnings, from the shortest to the longest; -1 after the last.
        lengths: tokens of the beginning with each number; 0 in the end, so that number -1 has none.
    """

    paths: Int32[np.ndarray, "N depth"]
    lengths: Int64[np.ndarray, "heads"]

    def shared(self, example: int, other: int) -> int:
        """How many tokens two examples begin with alike, as far as it is known here."""
        path = self.paths[example]
        return int((self.lengths[path] * (path == self.paths[other])).max(initial=0))


def find(corpus: Corpus) -> Heads:
    """The beginnings that at least two of the corpus's examples have, and of equally frequent ones the longest."""
    counts, lengths, chains = _tree(corpus)
    paths = [_branching(chain, counts) for chain in chains]
    depth = max(map(len, paths), default=0)
    table = np.full((len(paths), max(depth, 1)), -1, np.int32)
    for example, path in enumerate(paths):
        table[example, : len(path)] = path
    return Heads(table, np.array([*lengths, 0], np.int64))


def _tree(corpus: Corpus) -> tuple[list[int], list[int], list[list[int]]]:
    """Of each beginning how many examples have it and its tokens; of each example its beginnings' numbers.

    A beginning ends where a message does, before the first learned token. It is known by the hash of its last message
    and by the number of the beginning before that.
    """
    number_of: dict[tuple[int, bytes], int] = {}
    counts: list[int] = []
    lengths: list[int] = []
    chains: list[list[int]] = []
    for ids, ends in _boundaries(corpus):
        parent, begin, chain = -1, 0, []
        for end in ends:
            part = hashlib.blake2b(ids[begin:end].tobytes(), digest_size=16).digest()
            number = number_of.setdefault((parent, part), len(counts))
            if number == len(counts):
                counts.append(0)
                lengths.append(end)
            counts[number] += 1
            chain.append(number)
            parent, begin = number, end
        chains.append(chain)
    return counts, lengths, chains


def _boundaries(corpus: Corpus) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Of each example its ids, and where its messages begin before the first learned token, but for the first."""
    learned = np.append(np.flatnonzero(corpus.learned), len(corpus.ids))
    starts = np.flatnonzero(np.asarray(corpus.ids) == tokenizer.START)
    begins = np.asarray(corpus.offsets)
    first_learned = learned[np.searchsorted(learned, begins[:-1])]
    low = np.searchsorted(starts, begins[:-1] + 1)
    high = np.searchsorted(starts, np.minimum(first_learned, begins[1:]))
    for begin, end, one, last in zip(
        begins[:-1].tolist(), begins[1:].tolist(), low.tolist(), high.tolist(), strict=True
    ):
        yield corpus.ids[begin:end], (starts[one:last] - begin).tolist()


def _branching(chain: list[int], counts: list[int]) -> list[int]:
    """A chain's shared beginnings, without those that all who have them go on from alike."""
    following = [*(counts[number] for number in chain[1:]), 0]
    kept = [number for number, after in zip(chain, following, strict=True) if 1 < counts[number] != after]
    return kept[:MAX_DEPTH]
