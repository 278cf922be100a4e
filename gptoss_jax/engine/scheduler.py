"""What an engine does next, and who gives way when memory is short: one small policy, to be replaced by another.

Give `Engine` any object with these methods. None of them changes a sequence.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from gptoss_jax.engine.sequence import Sequence

LOOKAHEAD = 64  # sequences that wait longest, among which one that fits is looked for


class Prefill(NamedTuple):
    """Read a chunk of the prompts of these sequences, or of as many as one dispatch takes, the first ones first."""

    sequences: list[Sequence]


class Decode(NamedTuple):
    """Draw up to `max_steps` tokens for every sequence whose prompt is read; None: as many as a dispatch takes."""

    max_steps: int | None = None


class Scheduler:
    """First come, first served, with a bound to what is small and passes by; prompts and decoding take turns.

    A sequence that does not fit yet lets younger ones go first that do, LOOKAHEAD times at most: then all wait for it,
    so that a large one gets its pages after as many others at the latest.

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

    def admit(self, waiting: Iterable[Sequence], fits: Callable[[Sequence], bool]) -> Sequence | None:
        """Which of the sequences that wait gets a slot now; None: nobody.

        Args:
            waiting: the oldest first.
            fits: whether there is a slot with enough pages for a sequence, and nobody reads just now what it could
                share in a moment.
        """
        for sequence in itertools.islice(waiting, LOOKAHEAD):
            if fits(sequence):
                return sequence
            if sequence.passed >= LOOKAHEAD:
                return None
        return None

    def preempt(self, running: Iterable[Sequence]) -> Sequence:
        """Which of the sequences that run gives its slot and pages back, to be computed again later: the youngest."""
        return max(running, key=lambda sequence: sequence.request_id)
