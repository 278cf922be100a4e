"""Random weights of the true shapes, made on the device: one program for each shape, not for each leaf."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.transformer import Model, nest
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels.expert_mlp import AS_PUBLISHED, ExpertWeights, Rearrangement, WeightLayout


def random_params(declared: Model, layout: WeightLayout) -> Any:
    """The tree that a model takes, in `layout`: codes uniform, scales near 2^-6, dense weights normal / 50."""
    ways = declared.rearrangements(layout)
    leaves = {}
    for seed, (path, leaf) in enumerate(declared.leaves.items()):
        kind = _kind(path.rpartition("/")[2], leaf.dtype)
        leaves[path] = _made(kind, leaf.shape, leaf.dtype, ways[path], jnp.uint32(seed))
    return nest(leaves)


def random_experts(config: ModelConfig, layout: WeightLayout, seed: int = 0) -> ExpertWeights:
    """One layer's experts in `layout`."""
    shapes = published_shapes(config.num_experts, config.hidden_size, config.intermediate_size)
    kinds = ("codes", "scales", "normal") * 2
    arrays = [
        _made(kind, shape.shape, shape.dtype, way, jnp.uint32(seed + i))
        for i, (kind, shape, way) in enumerate(zip(kinds, shapes, layout, strict=False))
    ]
    return ExpertWeights(*arrays)


def published_shapes(experts: int, hidden: int, inner: int) -> list[jax.ShapeDtypeStruct]:
    """What an `ExpertWeights` begins with, in its order."""

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((experts, *shape), jnp.dtype(dtype))

    return [
        array(jnp.uint8, 2 * inner, hidden // 32, 16),
        array(jnp.uint8, 2 * inner, hidden // 32),
        array(jnp.bfloat16, 2 * inner),
        array(jnp.uint8, hidden, inner // 32, 16),
        array(jnp.uint8, hidden, inner // 32),
        array(jnp.bfloat16, hidden),
    ]


def shapes_of(declared: Model, layout: WeightLayout) -> Any:
    """`random_params` as shapes, for programs that are compiled before the weights are there."""
    ways = declared.rearrangements(layout)
    return nest(
        {
            path: jax.eval_shape(ways[path].pack, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            for path, leaf in declared.leaves.items()
        }
    )


def published_experts(layout: WeightLayout, weights: ExpertWeights) -> ExpertWeights:
    """The published bytes of packed weights."""
    return jax.jit(functools.partial(expert_op.published, layout))(weights)


def published_params(declared: Model, layout: WeightLayout, params: Any) -> Any:
    """The same weights for the portable kernels."""
    ways, leaves = declared.rearrangements(layout), {}
    for path in declared.leaves:
        leaf = functools.reduce(lambda tree, key: tree[int(key) if key.isdigit() else key], path.split("/"), params)
        leaves[path] = leaf if ways[path] is AS_PUBLISHED else jax.jit(ways[path].unpack)(leaf)
    return nest(leaves)


def _kind(name: str, dtype: Any) -> str:
    if name == "scales":
        return "scales"
    return "codes" if dtype == jnp.uint8 else "ones" if name == "norm" else "normal"


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _made(kind: str, shape: tuple[int, ...], dtype: Any, way: Rearrangement, seed: jax.Array) -> jax.Array:
    """A leaf; the seed is data, so that layers share a program."""
    key = jax.random.key(seed)
    if kind == "scales":
        return way.pack(jax.random.randint(key, shape, 119, 123, jnp.int32).astype(jnp.uint8))
    if kind == "codes":
        return way.pack(jax.random.bits(key, shape, jnp.uint8))
    if kind == "ones":
        return jnp.ones(shape, dtype)
    return way.pack(jax.random.normal(key, shape, dtype) * dtype.type(0.02))
