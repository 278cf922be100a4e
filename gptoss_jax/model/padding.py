"""An expert's width where a mesh does not cut it into whole MXFP4 blocks: blocks of zeros stand at its end.

Exact: the gate and the linear part of what is added are 0, so is their product, and the down projection's columns for
it are 0. Only what is loaded onto devices is padded; leaves as declared, checkpoints and exports are as published.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.config_ranges import MXFP4_BLOCK
from gptoss_jax.model.mesh import expert_width
from gptoss_jax.model.sharding import Axes, Sharding

WIDTH = "expert_hidden"


def is_padded(config: ModelConfig, sharding: Sharding, axes: Axes) -> bool:
    """Whether an array with these axes is longer on the mesh than it is published."""
    return WIDTH in axes and expert_width(config, sharding.size(WIDTH)) > config.intermediate_size


def shape(config: ModelConfig, sharding: Sharding, published: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    """The shape on the mesh of an array of this shape, whose axis of the width counts blocks, columns or row pairs."""
    blocks = config.intermediate_size // MXFP4_BLOCK
    padded = expert_width(config, sharding.size(WIDTH)) // MXFP4_BLOCK
    return tuple(n // blocks * padded if name == WIDTH else n for n, name in zip(published, axes, strict=True))


def stored_axes(config: ModelConfig, sharding: Sharding, axes: Axes) -> Axes:
    """How an array is laid over the mesh while it is as published: what is to be padded is not cut along the width."""
    return tuple(None if name == WIDTH else name for name in axes) if is_padded(config, sharding, axes) else axes


def put(config: ModelConfig, sharding: Sharding, array: Any, axes: Axes) -> jax.Array:
    """A published array on the mesh, with the zeros that `axes` ask for."""
    placed = sharding.put(array, stored_axes(config, sharding, axes))
    return padder(config, sharding, axes)(placed) if is_padded(config, sharding, axes) else placed


def padder(config: ModelConfig, sharding: Sharding, axes: Axes) -> Callable[[jax.Array], jax.Array]:
    """From an array in its `stored_axes` to the padded one, compiled: each device pads, and keeps its own part."""
    at, shards = axes.index(WIDTH), sharding.size(WIDTH)

    def own_part(x: jax.Array) -> jax.Array:
        length = shape(config, sharding, x.shape, axes)[at]
        padded = jnp.pad(x, [(0, length - x.shape[at] if i == at else 0) for i in range(x.ndim)])
        return jax.lax.dynamic_slice_in_dim(padded, sharding.index(WIDTH) * (length // shards), length // shards, at)

    return jax.jit(sharding.map(own_part, in_axes=(stored_axes(config, sharding, axes),), out_axes=axes))
