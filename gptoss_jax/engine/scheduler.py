"""What an engine does next, and who gives way when memory is short: one small policy, to be replaced by another.

Give `Engine` any object with these methods. None of them changes a sequence.
"""

from collections.abc import Iterable
from typing import NamedTuple

from gptoss_jax.engine.sequence import Sequence


class Prefill(NamedTuple):
    """Read a chunk of the prompts of these sequences, or of as many as one dispatch takes, the first ones first."""

    sequences: list[Sequence]


class Decode(NamedTuple):
    """Draw up to `max_steps` tokens for every sequence whose prompt is read; None: as many as a dispatch takes."""

    max_steps: int | None = None


class Scheduler:
    """First come, first served; prompts and decoding take turns.

    After each chunk of a prompt the others draw one token, as in a batch that mixes both (chunked prefill, Agrawal et
    al., arXiv:2308.16369): nobody waits longer than one chunk.
    """

    def __init__(self):
        self._chunk_was_last = False

    def next(self, running: Iterable[Sequence]) -> Prefill | Decode | None:
        """The next dispatch; None if nothing runs.

        Args:
            running: sequences that hold a slot.
        """
        by_age = sorted(running, key=lambda sequence: sequence.request_id)
        unread = [sequence for sequence in by_age if sequence.num_unread]
        if unread and (len(unread) == len(by_age) or not self._chunk_was_last):
            self._chunk_was_last = True
            return Prefill(unread)
        self._chunk_was_last = False
        return Decode(1 if unread else None) if by_age else None

    def admit(self, waiting: Iterable[Sequence]) -> Sequence:
        """Which of the sequences that wait gets the next free slot; there is at least one."""
        return min(waiting, key=lambda sequence: sequence.request_id)

    def preempt(self, running: Iterable[Sequence]) -> Sequence:
        """Which of the sequences that run gives its slot and pages back, to be computed again later: the youngest."""
        return max(running, key=lambda sequence: sequence.request_id)
