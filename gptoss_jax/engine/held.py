"""Masks of answers that are held to a form, computed in threads while others decode, on the host. Knows no JAX.

A sequence whose mask is late sits out a dispatch: it stalls nobody, and its tokens do not depend on it.
"""

import concurrent.futures
import functools
import os
from collections.abc import Mapping, Sequence

import numpy as np

from gptoss_jax.engine.constraint import Constraint, Hold

ANY = np.iinfo(np.int32).max  # every id is below it
NONE = -1  # in place of a forced id


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """Those of the process, made with the first answer that is held to a form."""
    return concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="masks")


class Held:
    """What may follow the tokens of one sequence, as far as it is known."""

    def __init__(self, constraint: Constraint, token_ids: Sequence[int]):
        """`token_ids` of the answer are there already."""
        self._matcher = constraint.start()
        self.next = _threads().submit(self._matcher.advance, tuple(token_ids))

    def advance(self, token_ids: Sequence[int]) -> None:
        """Has it computed what may follow once these came too."""
        if token_ids:
            self.next = _threads().submit(self._matcher.advance, tuple(token_ids))


def ready(held: Mapping[int, Held], patience_seconds: float | None, *, alone: bool) -> dict[int, Hold]:
    """What may follow, by slot, of those where it is known within the time.

    Args:
        held: by slot.
        patience_seconds: how long to wait for all of them. None: until all are there.
        alone: nobody else has anything to do, so that it is waited for one at least.
    """
    waiting = {each.next for each in held.values()}
    _, late = concurrent.futures.wait(waiting, patience_seconds)
    if alone and late == waiting:
        concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
    return {slot: each.next.result() for slot, each in held.items() if each.next.done()}


class HeldSlots:
    """What may follow in each of B slots during one dispatch, as host arrays.

    Attributes:
        mask: uint32 [B, ceil(V / 32)], a bit per id: whether it may be drawn.
        stands_below: int32 [B]: the slot goes on with the same mask after an id below this one, else it pauses.
        forced: int32 [B, S], ids that come first whatever is drawn, then NONE; after the last of them the slot pauses.
        takes_part: bool [B]: whether the slot takes any step.
    """

    def __init__(self, slots: int, vocab_size: int, most_steps: int):
        """Slots of which none is held."""
        self.mask = np.full((slots, -(-vocab_size // 32)), 2**32 - 1, np.uint32)
        self.stands_below = np.full(slots, ANY, np.int32)
        self.forced = np.full((slots, most_steps), NONE, np.int32)
        self.takes_part = np.ones(slots, np.bool_)

    def sit_out(self, slot: int) -> None:
        """The slot takes no step."""
        self.takes_part[slot] = False

    def hold(self, slot: int, hold: Hold) -> int:
        """The slot is held to this; gives how many steps it can take, ANY if it need not pause."""
        if hold.forced:
            count = min(len(hold.forced), self.forced.shape[1])
            self.forced[slot, :count] = hold.forced[:count]
            return count
        if hold.mask is None:
            raise ValueError(f"nothing says what may follow in slot {slot}")
        words = min(hold.mask.size, self.mask.shape[1])
        self.mask[slot, :words], self.mask[slot, words:] = hold.mask[:words], 0
        self.stands_below[slot] = hold.stands_below
        return ANY if hold.stands_below else 1
