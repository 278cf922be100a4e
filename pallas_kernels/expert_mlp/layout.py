"""How a layer's packed weights lie in memory: as published, or rearranged once at load for the kernel that reads them.

A `Layout` is one `Rearrangement` an array, so that a loader can go array by array and never hold
two copies of a model. Every rearrangement is undone exactly, to the published bytes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, UInt8


class ExpertWeights(NamedTuple):
    """The experts of one layer, as published: E experts, D hidden, F expert hidden, blocks of 32 along the input.

    Rows of gate_up are interleaved: even rows are the gate, odd rows the linear part.
    """

    gate_up_blocks: UInt8[Array, "E F2 DB 16"]
    gate_up_scales: UInt8[Array, "E F2 DB"]
    gate_up_bias: Float[Array, "E F2"]
    down_blocks: UInt8[Array, "E D FB 16"]
    down_scales: UInt8[Array, "E D FB"]
    down_bias: Float[Array, "E D"]


class Rearrangement(NamedTuple):
    """One array's way from how it is published to how a kernel reads it, and back; jitted by who calls it."""

    pack: Callable[[Array], Array]
    unpack: Callable[[Array], Array]
    axes: Callable[[tuple[Any, ...]], tuple[Any, ...]]  # names of the published axes -> names of the packed ones
    described: str
    greatest: int | None = None  # value of the published array that the kernel can read; None: any


def unchanged(x: Any) -> Any:
    """x."""
    return x


AS_PUBLISHED = Rearrangement(unchanged, unchanged, unchanged, "as published")


class Layout(NamedTuple):
    """A rearrangement for each array of `ExpertWeights`, in its order."""

    gate_up_blocks: Rearrangement = AS_PUBLISHED
    gate_up_scales: Rearrangement = AS_PUBLISHED
    gate_up_bias: Rearrangement = AS_PUBLISHED
    down_blocks: Rearrangement = AS_PUBLISHED
    down_scales: Rearrangement = AS_PUBLISHED
    down_bias: Rearrangement = AS_PUBLISHED


PUBLISHED = Layout()


def packed(layout: Layout, weights: ExpertWeights) -> ExpertWeights:
    """Published weights, rearranged."""
    return ExpertWeights(*(way.pack(array) for way, array in zip(layout, weights, strict=True)))


def published(layout: Layout, weights: ExpertWeights) -> ExpertWeights:
    """Rearranged weights, as they were published."""
    return ExpertWeights(*(way.unpack(array) for way, array in zip(layout, weights, strict=True)))


def packed_axes(layout: Layout, axes: ExpertWeights) -> ExpertWeights:
    """The logical axes of rearranged weights, from those of the published ones."""
    ways: Any = zip(layout, axes, strict=True)
    return ExpertWeights(*(way.axes(names) for way, names in ways))
