"""Examples into as few rows as can be: each into the row that shares most of its beginning, of these into the fullest.

Best fit (the fullest bin with room) leaves little padding where examples are much shorter than a row; see
`tests/unit/test_training_packing.py` for how little.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from gptoss_jax.training.heads import Heads
from gptoss_jax.training.rows import Member

_FIRST_ROWS = 64
_NONE = -1 << 62  # less than any score

Conversation = Int64[np.ndarray, "_"]
"""The numbers of one conversation's examples."""


class OpenRows:
    """Rows that still have room.

    Attributes:
        members: of each row.
    """

    members: list[list[Member]]

    def __init__(self, heads: Heads, lengths: Int64[np.ndarray, "N"], row_tokens: int):
        """No rows yet.

        Args:
            heads: what the examples begin with.
            lengths: tokens of each example.
            row_tokens: tokens of a row.
        """
        self.members = []
        self._heads, self._lengths, self._row_tokens = heads, lengths, row_tokens
        self._free = np.zeros(_FIRST_ROWS, np.int64)
        self._paths = np.full((_FIRST_ROWS, heads.paths.shape[1]), -1, np.int32)

    def place(self, example: int, least_shared: int = 0) -> None:
        """Puts an example where it fits, into a row of its own if nowhere else.

        Args:
            example: its number.
            least_shared: only into rows with whose first example it has at least so many tokens in common.
        """
        count = len(self.members)
        path, length = self._heads.paths[example], int(self._lengths[example])
        shared = (self._heads.lengths[path] * (self._paths[:count] == path)).max(1, initial=0)
        left = self._free[:count] - length + shared
        score = np.where((left >= 0) & (shared >= least_shared), shared * (self._row_tokens + 1) - left, _NONE)
        row = int(score.argmax()) if count else -1
        if row < 0 or score[row] == _NONE:
            self.open(example)
            return
        self.members[row].append(Member(example, int(shared[row])))
        self._free[row] = left[row]

    def open(self, example: int) -> None:
        """A new row that begins with an example."""
        row = len(self.members)
        if row == len(self._free):
            self._free = np.concatenate([self._free, np.zeros_like(self._free)])
            self._paths = np.concatenate([self._paths, np.full_like(self._paths, -1)])
        self.members.append([Member(example, 0)])
        self._free[row] = self._row_tokens - self._lengths[example]
        self._paths[row] = self._heads.paths[example]

    def take_back(self, start: int) -> list[int]:
        """The examples of the emptiest row from `start` on, which is taken away; none if it is half full."""
        row = start + int(self._free[start : len(self.members)].argmax())
        if 2 * self._free[row] < self._row_tokens:
            return []
        examples = [member.example for member in self.members[row]]
        last = len(self.members) - 1
        self.members[row] = self.members[last]
        self._free[row], self._paths[row] = self._free[last], self._paths[last]
        del self.members[last]
        return examples


class Packing:
    """What packing needs to know of all examples."""

    def __init__(self, heads: Heads, lengths: Int64[np.ndarray, "N"], row_tokens: int):
        """As for `OpenRows`."""
        self._heads, self._lengths, self._row_tokens = heads, lengths, row_tokens

    def pack(self, conversations: Sequence[Conversation]) -> list[list[Member]]:
        """Rows that together hold all the examples of some conversations.

        Those that begin alike get rows of their own if they fill some; others, and what is left, go where they fit.
        """
        rows, rest = OpenRows(self._heads, self._lengths, self._row_tokens), []
        pools: dict[int, list[Conversation]] = {}
        for conversation in conversations:
            pools.setdefault(int(self._heads.paths[conversation[0], 0]), []).append(conversation)
        for root, pool in pools.items():
            shared = int(self._heads.lengths[root])
            if not shared or self._tokens(pool, shared) < self._row_tokens:
                rest += pool
                continue
            start = len(rows.members)
            self._fill(rows, pool, shared)
            rest += [np.array([example]) for example in rows.take_back(start)]
        self._fill(rows, rest, 0)
        return rows.members

    def _fill(self, rows: OpenRows, pool: Sequence[Conversation], shared: int) -> None:
        """Places a pool's conversations, all of which begin with `shared` tokens.

        A conversation's examples have most in common with each other: of those who save most, as many begin a row as
        the rows that there will be.
        """
        opening = self._opening(pool, shared)
        for i in opening:
            rows.open(self._longest_first(pool[i])[0])
            for example in self._longest_first(pool[i])[1:]:
                rows.place(example, shared)
        for i in sorted(set(range(len(pool))) - set(opening)):
            for example in self._longest_first(pool[i]):
                rows.place(example, shared)

    def _opening(self, pool: Sequence[Conversation], shared: int) -> list[int]:
        """Which of a pool's conversations are to begin rows."""
        saved = [self._saved(conversation, shared) for conversation in pool]
        opening, tokens = [], self._tokens(pool, shared)
        for i in sorted((i for i in range(len(pool)) if saved[i]), key=lambda i: -saved[i]):
            tokens -= saved[i]
            if tokens < (len(opening) + 1) * (self._row_tokens - shared):
                break
            opening.append(i)
        return opening

    def _tokens(self, pool: Sequence[Conversation], shared: int) -> int:
        return sum(int(self._lengths[conversation].sum()) - shared * len(conversation) for conversation in pool)

    def _saved(self, conversation: Conversation, shared: int) -> int:
        """Tokens that a row which begins with the conversation's longest example need not hold again for the others."""
        if len(conversation) == 1:
            return 0
        longest, *others = self._longest_first(conversation)
        return sum(self._heads.shared(example, longest) - shared for example in others)

    def _longest_first(self, conversation: Conversation) -> list[int]:
        if len(conversation) == 1:
            return [int(conversation[0])]
        return conversation[np.argsort(-self._lengths[conversation], kind="stable")].tolist()
