"""A layer's expert weights: what is published, adapters beside it, and the weight layouts that kernels want.

A `WeightLayout` is one `Rearrangement` an array, so that a loader can go array by array and never hold two copies of a
model. Every rearrangement is undone exactly, to the published bytes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


class Adapter(NamedTuple):
    """A product of low rank R beside each expert's matrix W: where W x stood, W x + b (a x) stands (LoRA).

    b has a row for each published row of W (of gate_up, interleaved), whatever weight layout W is in. A scale, as
    alpha / R in Hu et al., arXiv:2106.09685, is part of b.
    """

    a: Float[Array, "E R I"]
    b: Float[Array, "E O R"]


class ExpertWeights(NamedTuple):
    """The experts of one layer, as published: E experts, D hidden, F expert hidden, blocks of 32 along the input.

    Rows of gate_up are interleaved: even rows are the gate, odd rows the linear part. Adapters are optional.

    Dense weights, which can be trained, stand as floats where the blocks do, [E, 2 F, D] and [E, D, F]; both scales
    are None then (`is_dense`).
    """

    gate_up_blocks: UInt8[Array, "E F2 DB 16"] | Float[Array, "E F2 D"]
    gate_up_scales: Any  # UInt8[Array, "E F2 DB"], or None
    gate_up_bias: Float[Array, "E F2"]
    down_blocks: UInt8[Array, "E D FB 16"] | Float[Array, "E D F"]
    down_scales: Any  # UInt8[Array, "E D FB"], or None
    down_bias: Float[Array, "E D"]
    gate_up_adapter: Adapter | None = None
    down_adapter: Adapter | None = None


def is_trainable(array: Any) -> bool:
    """Whether `array` holds numbers that have a gradient: 4-bit floats are codes of MXFP4, as a TPU v7x reads them."""
    return jnp.issubdtype(array.dtype, jnp.floating) and jnp.finfo(array.dtype).bits > 4


def is_dense(weights: ExpertWeights) -> bool:
    """Whether `weights` are floats rather than packed MXFP4."""
    return weights.gate_up_scales is None and weights.gate_up_blocks is not None


def without_adapters(weights: ExpertWeights) -> tuple[Array, ...]:
    """The six arrays of `weights`, for a kernel that can take no more.

    Raises:
        NotImplementedError: there are adapters, which may not be left out silently, or the weights are dense.
    """
    if is_dense(weights):
        raise NotImplementedError(
            "expert_mlp: this kernel takes packed MXFP4, got dense weights; the reference takes both"
        )
    *arrays, gate_up_adapter, down_adapter = weights
    if gate_up_adapter is not None or down_adapter is not None:
        raise NotImplementedError("expert_mlp: this kernel has no adapters; the reference has (expert_mlp=reference)")
    return tuple(arrays)


class Rearrangement(NamedTuple):
    """From an array as it is published to the array that a kernel reads, and back; whoever calls it jits it."""

    pack: Callable[[Array], Array]
    unpack: Callable[[Array], Array]
    axes: Callable[[tuple[Any, ...]], tuple[Any, ...]]  # names of the published axes -> names of the packed ones
    described: str
    greatest: int | None = None  # value of the published array that the kernel can read; None: any


def unchanged(x: Any) -> Any:
    """x as it is: the rearrangement of an array whose published order a kernel reads."""
    return x


AS_PUBLISHED = Rearrangement(unchanged, unchanged, unchanged, "as published")


class WeightLayout(NamedTuple):
    """A rearrangement for each of the six arrays that `ExpertWeights` begins with, by its name; adapters stay."""

    gate_up_blocks: Rearrangement = AS_PUBLISHED
    gate_up_scales: Rearrangement = AS_PUBLISHED
    gate_up_bias: Rearrangement = AS_PUBLISHED
    down_blocks: Rearrangement = AS_PUBLISHED
    down_scales: Rearrangement = AS_PUBLISHED
    down_bias: Rearrangement = AS_PUBLISHED


PUBLISHED = WeightLayout()


def packed(layout: WeightLayout, weights: ExpertWeights) -> ExpertWeights:
    """Weights in `layout`, from those in published order.

    Raises:
        NotImplementedError: the weights are dense, and the layout is not the published one.
    """
    if is_dense(weights) and layout != PUBLISHED:
        raise NotImplementedError(
            "expert_mlp: this kernel takes packed MXFP4, got dense weights; the reference takes both"
        )
    return _each(layout, weights, lambda way, array: way.pack(array))


def published(layout: WeightLayout, weights: ExpertWeights) -> ExpertWeights:
    """Weights in published order, from those in `layout`; the inverse of `packed`."""
    return _each(layout, weights, lambda way, array: way.unpack(array))


def packed_axes(layout: WeightLayout, axes: ExpertWeights) -> ExpertWeights:
    """The logical axes of weights in `layout`, from those of the published ones."""
    return _each(layout, axes, lambda way, names: way.axes(names))


def _each(layout: WeightLayout, weights: ExpertWeights, act: Callable[[Rearrangement, Any], Any]) -> ExpertWeights:
    """`weights` with what `act` makes of each array that is there; None, as in a gradient, stays."""
    found = {name: (way, getattr(weights, name)) for name, way in layout._asdict().items()}
    return weights._replace(**{name: act(way, array) for name, (way, array) in found.items() if array is not None})
