"""How answers that are held to masks share dispatches with those that are not: who waits, and for how many steps.

A held slot takes one step for each mask, others as many as a dispatch has. Dispatches are as long as it takes to make
what each costs beside its steps (the host's part, memory that XLA takes anew) a small share of the others' time, and no
longer, so that held slots are soon served.
"""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from gptoss_jax.engine.held import ANY, Held, HeldSlots, ready

PATIENCE = 0.25  # of a step: how long all wait for masks that are late
LEAST_PATIENCE_SECONDS = 0.001
SHARE_OF_HOST = 0.05  # of the time of slots that are not held
_KEPT = 0.9  # of what is known of earlier dispatches, with each new one
_LEAST_SPREAD = 0.01  # variance of lengths over their squared mean, below which no line goes through them


class Holding(NamedTuple):
    """What holds slots in one dispatch.

    Attributes:
        slots: masks and forced ids.
        steps: of the dispatch, at most.
        faulty: slots whose answers nobody can go on with.
    """

    slots: HeldSlots
    steps: int
    faulty: list[int]


class Pace:
    """Keeps what a dispatch costs beside its steps.

    Attributes:
        host_seconds: about what the host takes between dispatches.
        start_seconds: about what a dispatch takes itself, however few steps it has.
    """

    def __init__(self, *, waits: bool):
        """`waits`: for every mask, and by no clock, since several processes have to decide alike."""
        self._waits, self.host_seconds, self.start_seconds, self._since = waits, 0.0, 0.0, None
        self._sums = np.zeros(5)  # of 1, n, t, n n and n t, over dispatches of n steps that took t seconds

    def took(self, steps: int, seconds: float) -> None:
        """A dispatch had so many steps and took so long: a line through those of late says what one costs without."""
        self._sums = _KEPT * self._sums + np.array((1.0, steps, seconds, steps**2, steps * seconds))
        count, n, t, nn, nt = self._sums.tolist()
        if self._is_known:
            slope = (count * nt - n * t) / (count * nn - n * n)
            self.start_seconds = min(max((t - slope * n) / count, 0.0), t / count)

    @property
    def _is_known(self) -> bool:
        """Whether dispatches of late were long and short enough for a line."""
        count, n, _, nn, _ = self._sums.tolist()
        return count * nn - n * n > _LEAST_SPREAD * n * n

    def ended(self, at_seconds: float | None) -> None:
        """A dispatch of decoding has ended; None: something else was done since."""
        self._since = at_seconds

    def begins(self, at_seconds: float) -> None:
        """The next one begins."""
        if self._since is not None:
            self.host_seconds += 0.2 * (at_seconds - self._since - self.host_seconds)

    def hold(
        self, slots: HeldSlots, held: Mapping[int, Held], decoding: Collection[int], step_seconds: float
    ) -> Holding:
        """Who takes part in the next dispatch.

        Args:
            slots: to be filled.
            held: what holds sequences, by slot.
            decoding: slots whose prompts are read; others sit out.
            step_seconds: what a step takes.
        """
        patience = None if self._waits else max(LEAST_PATIENCE_SECONDS, PATIENCE * step_seconds)
        asked = {slot: each for slot, each in held.items() if slot in decoding}
        steps = [ANY] * (len(decoding) - len(asked))
        known = ready(asked, patience, alone=not steps)
        for slot in held:
            if slot in known and not known[slot].fault:
                steps.append(slots.hold(slot, known[slot]))
            else:
                slots.sit_out(slot)
        faulty = [slot for slot, hold in known.items() if hold.fault]
        return Holding(slots, self._steps(steps, step_seconds), faulty)

    def _steps(self, possible: list[int], step_seconds: float) -> int:
        """How many steps a dispatch has in which slots can take so many each."""
        least, most = min(possible, default=1), max(possible, default=1)
        if self._waits:
            return least
        enough = math.ceil((self.host_seconds + self.start_seconds) / (SHARE_OF_HOST * step_seconds))
        if not self._is_known and most > least:  # all were as long: one that is longer tells
            count, n, *_ = self._sums.tolist()
            enough = max(enough, 2 * math.ceil(n / max(count, 1.0)))
        return min(most, max(least, enough))
