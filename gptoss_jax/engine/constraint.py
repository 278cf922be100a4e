"""What holds an answer to a form, as an engine sees it: after each token, which ids may follow. Knows no grammar."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


class Hold(NamedTuple):
    """What may follow the tokens so far.

    Attributes:
        mask: uint32 [ceil(V / 32)], a bit per id as `sampling.pack_mask` lays them out: whether it may be drawn. None
            where something else says what follows.
        stands_below: the mask still holds after an id below this one; 0: after none.
        forced: the next ids, if only these can follow.
        fault: why nobody can say what may follow; the answer ends here then.
    """

    mask: np.ndarray | None = None
    stands_below: int = 0
    forced: tuple[int, ...] = ()
    fault: str = ""


@runtime_checkable
class Matcher(Protocol):
    """Follows one answer."""

    def advance(self, token_ids: Sequence[int]) -> Hold:
        """What may follow once these came, of which each was allowed. Called in a thread, one call at a time."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """A form that answers are held to.

    Attributes:
        num_ids: ids that it speaks of, from 0 on; a model has to have them all.
        end_ids: with these an answer is complete, and ends.
    """

    @property
    def num_ids(self) -> int: ...  # noqa: D102

    @property
    def end_ids(self) -> tuple[int, ...]: ...  # noqa: D102

    def start(self) -> Matcher:
        """What follows an answer from its first token on."""
        ...
