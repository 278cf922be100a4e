"""Constraints for a vocabulary of 512 ids, by a rule that anybody can follow: free, then one even id, then a run."""

import itertools
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from gptoss_jax.engine.constraint import Hold
from gptoss_jax.engine.sampling import pack_mask
from tests.fake_runner import VOCAB, WINDOW, _draw_from

FREE_BELOW = 400  # free text goes on after an id below this
RUN = (3, 141, 59)
END = 501


def allowed_ids(state: str, step: int) -> Sequence[int]:
    """Ids that may be drawn."""
    if state == "run":
        return [RUN[step]]
    return range(0, 480, 2) if state == "one" else range(480)


def states(tokens: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Before each token, and after the last, the state and the step in it."""
    state, step = "free", 0
    for token in itertools.chain(tokens, [None]):
        yield state, step
        step += 1
        if token is None:
            return
        if state == "free" and token >= FREE_BELOW:
            state, step = "one", 0
        elif state == "one":
            state, step = "run", 0
        elif state == "run" and step == len(RUN):
            state, step = "free", 0


def ruled_answer(prompt: Sequence[int], count: int) -> list[int]:
    """What the fake runner draws under the rule."""
    tokens: list[int] = []
    for _ in range(count):
        ids = allowed_ids(*list(states(tokens))[-1])
        known = [*prompt, *tokens]
        tokens.append(ids[_draw_from(known, known[-WINDOW:]) % len(ids)])
    return tokens


class Rule:
    """A constraint: see the top of this file.

    `late`: matchers wait for it before each hold; `faulty_after`: tokens after which they can say nothing.
    """

    num_ids, end_ids = VOCAB, (END,)

    def __init__(self, late: threading.Event | None = None, faulty_after: int | None = None):
        self.late, self.faulty_after = late, faulty_after

    def start(self) -> "Follower":
        return Follower(self)


class Follower:
    """A matcher."""

    def __init__(self, rule: Rule):
        self._rule, self._tokens = rule, list[int]()

    def advance(self, token_ids: Sequence[int]) -> Hold:
        for token in token_ids:
            state, step = list(states(self._tokens))[-1]
            assert token in allowed_ids(state, step), f"{token} was not allowed"
            self._tokens.append(token)
        if self._rule.late is not None:
            assert self._rule.late.wait(60)
        if self._rule.faulty_after is not None and len(self._tokens) >= self._rule.faulty_after:
            return Hold(fault="no more")
        state, step = list(states(self._tokens))[-1]
        if state == "run":
            return Hold(forced=RUN[step:])
        mask = np.zeros(VOCAB, np.bool_)
        mask[list(allowed_ids(state, step))] = True
        return Hold(pack_mask(mask), stands_below=FREE_BELOW if state == "free" else 0)
