"""What a checkpoint needs to know of a weight that the model declares."""

import math
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Leaf(Protocol):
    """One declared weight, as `gptoss_jax.model.transformer.declare` gives it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Number format, as stored."""
        ...

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical names of the axes."""
        ...


def leaf_bytes(leaf: Leaf) -> int:
    """Bytes of a declared leaf."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize
