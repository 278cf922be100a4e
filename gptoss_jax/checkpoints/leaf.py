"""What a checkpoint needs to know of a weight that the model declares."""

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np

MAX_AXES = 8
MAX_SIZE = 1 << 63  # of an axis, or of a file


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


def are_sizes(values: Any) -> bool:
    """Whether a damaged file's `values` can be a shape, or places in a file: few whole numbers within their range."""
    few = isinstance(values, list | tuple) and len(values) <= MAX_AXES
    return few and all(type(value) is int and 0 <= value < MAX_SIZE for value in values)


def leaf_bytes(leaf: Leaf) -> int:
    """Bytes of a declared leaf."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize
