"""Beginnings of prompts that are in the cache already, found by their content: a prompt shares them, and reads on.

A prompt is cut into blocks: the shortest runs of whole pages at whose ends a prompt's chunks end too, so that what is
left is read in the chunks in which it would be read without this. Full-attention layers find a block's keys and values
in its pages. Sliding-window layers need the last tokens before the block's end, whose rings a snapshot keeps; a block
without one ends no prefix. Only what was read as a prompt is kept: what decoding writes may be rounded otherwise.

Pages are not held for this. They are free once their sequences have ended, and lost when the pool gives them anew.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from gptoss_jax.engine.page_pool import PagePool
from gptoss_jax.engine.statistics import Statistics

Key = bytes


def block_keys(tokens: Sequence[int], block_tokens: int) -> list[Key]:
    """A key for each whole block: the SHA-256 digest of all tokens up to its end."""
    ids, keys, key = np.asarray(tokens, np.int32), [], b""
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        key = hashlib.sha256(key + ids[end - block_tokens : end].tobytes()).digest()
        keys.append(key)
    return keys


class Prefix(NamedTuple):
    """The beginning of a prompt that is in the cache: the keys of its blocks, their pages, the last one's snapshot."""

    keys: Sequence[Key] = ()
    pages: Sequence[int] = ()
    snapshot: int | None = None


class PrefixCache:
    """The blocks that the pages of one data shard hold, and which of them have a snapshot of their rings."""

    def __init__(self, pool: PagePool, num_snapshots: int, statistics: Statistics):
        """`num_snapshots`: those of this shard; `statistics` count what is evicted."""
        self._pool, self._statistics = pool, statistics
        self._pages: dict[Key, list[int]] = {}
        self._key_of_page: dict[int, Key] = {}
        self._snapshots = Snapshots(num_snapshots)

    def find(self, keys: Sequence[Key]) -> Prefix:
        """The longest beginning of the blocks `keys` that a prompt can go on from."""
        pages, length, num_pages, snapshot = list[int](), 0, 0, None
        for count, key in enumerate(keys, 1):
            if key not in self._pages:
                break
            pages += self._pages[key]
            if (kept := self._snapshots.find(key)) is not None:
                length, snapshot, num_pages = count, kept, len(pages)
        return Prefix() if snapshot is None else Prefix(keys[:length], pages[:num_pages], snapshot)

    def use(self, prefix: Prefix) -> None:
        """Counts one more holder of a prefix's pages; it has shown its worth."""
        self._pool.share(prefix.pages)
        if prefix.keys:
            self._snapshots.note_want(prefix.keys[-1])

    def add(self, key: Key, pages: Sequence[int]) -> int | None:
        """Notes that `pages` hold a block, which was read just now.

        Returns:
            The snapshot to which the rings are to be saved; None: they have one.
        """
        known = key in self._pages
        if not known:
            self._pool.keep(pages)
            self._pages[key] = list(pages)
            self._key_of_page.update(dict.fromkeys(pages, key))
        if self._snapshots.find(key) is not None:
            return None
        self._statistics.evictions += self._snapshots.is_full
        return self._snapshots.take(key, wanted=known)  # whoever reads a block again has missed its rings

    def forget(self, pages: Iterable[int]) -> None:
        """Forgets the blocks that lie in any of `pages`: something else will."""
        for key in {self._key_of_page[page] for page in pages if page in self._key_of_page}:
            for page in self._pages.pop(key):
                del self._key_of_page[page]
            self._snapshots.drop(key)
            self._statistics.evictions += 1


class Snapshots:
    """Which block has which snapshot. Where all are taken, the one that is least likely wanted is given away.

    Long prompts and tails that come once would push out a prefix that many share. So there are two lists, of new ones
    and of those that were wanted, each in the order of use, and new ones go first (segmented LRU: Karedla et al.,
    Caching strategies to improve disk system performance, 1994). Wanted ones are half of all at most: else nothing new
    would stay until it is wanted.
    """

    def __init__(self, count: int):
        """Snapshots 0 to `count` - 1."""
        self._count, self._free = count, list(reversed(range(count)))
        self._new: OrderedDict[Key, int] = OrderedDict()
        self._wanted: OrderedDict[Key, int] = OrderedDict()

    @property
    def is_full(self) -> bool:
        """Whether the next one is taken from another block."""
        return not self._free

    def find(self, key: Key) -> int | None:
        """The block's snapshot, if it has one."""
        return self._new.get(key, self._wanted.get(key))

    def take(self, key: Key, *, wanted: bool) -> int:
        """A snapshot for a block that has none."""
        if self.is_full:
            self._free.append((self._new or self._wanted).popitem(last=False)[1])
        self._new[key] = snapshot = self._free.pop()
        if wanted:
            self.note_want(key)
        return snapshot

    def note_want(self, key: Key) -> None:
        """A block's snapshot was wanted, now for the last time."""
        self._wanted[key] = self._new.pop(key) if key in self._new else self._wanted.pop(key)
        if len(self._wanted) > max(1, self._count // 2):
            oldest, snapshot = self._wanted.popitem(last=False)
            self._new[oldest] = snapshot

    def drop(self, key: Key) -> None:
        """Takes the block's snapshot from it, if it has one."""
        if (snapshot := self._new.pop(key, self._wanted.pop(key, None))) is not None:
            self._free.append(snapshot)
