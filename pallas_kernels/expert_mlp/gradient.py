"""The gradient of expert_mlp, in jnp, for any implementation of it: what fine-tuning through a kernel needs.

Packed weights are whole numbers and have no gradient; x, the routing weights, the biases and adapters do, and dense
weights. Each tile of
rows is run again, one expert unpacked at a time, so memory stays that of one expert.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.expert_mlp import reference
from pallas_kernels.expert_mlp.tiles import Tiles, tile_rows
from pallas_kernels.expert_mlp.weights import ExpertWeights, WeightLayout, is_trainable, packed, published


def differentiable(run: Any, layout: WeightLayout) -> Any:
    """`run`, an implementation whose weights lie in `layout`, with a gradient."""

    def expert_mlp(
        x: Float[Array, "T D"],
        expert_ids: Int32[Array, "T X"],
        routing_weights: Float[Array, "T X"],
        weights: ExpertWeights,
        *,
        limit: float,
    ) -> Float[Array, "T D"]:
        return _run(run, layout, limit, x, expert_ids, routing_weights, weights)

    return expert_mlp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(run, layout, limit, x, expert_ids, routing_weights, weights):
    return run(x, expert_ids, routing_weights, weights, limit=limit)


def _forward(run, layout, limit, *arguments):
    return run(*arguments, limit=limit), arguments


def _backward(run, layout, limit, saved, gradient):
    del run
    x, expert_ids, routing_weights, weights = saved
    num_experts, per_token = weights.gate_up_bias.shape[0], expert_ids.shape[1]
    tiles = Tiles.of(expert_ids, num_experts, tile_rows(expert_ids.size, num_experts))
    flat_weights = routing_weights.reshape(-1)

    def add_tile(number, sums):
        dx, d_routing, d_floats = sums
        expert, assignment, taken = tiles.tile(number)
        of_expert, token = _unpacked(weights, layout, expert), assignment // per_token
        dy = jnp.where(taken[:, None], gradient[token], 0)
        # An empty row holds any token, padding with a NaN perhaps, which zeros would not take back.
        x_tile, shares = jnp.where(taken[:, None], x[token], 0), jnp.where(taken, flat_weights[assignment], 0)

        def one_expert(x, floats):
            return reference.one_expert(x, _with_floats(of_expert, floats), limit)

        y, pull = jax.vjp(one_expert, x_tile, _floats(of_expert))
        dx_tile, d_tile = pull(dy * shares[:, None])
        return (
            dx.at[token].add(dx_tile.astype(jnp.float32)),
            d_routing.at[assignment].add(jnp.sum(dy * y, axis=-1)),
            jax.tree.map(lambda total, d: total.at[expert].add(d.astype(jnp.float32)), d_floats, d_tile),
        )

    floats = _floats(weights)
    as_published = jax.eval_shape(functools.partial(published, layout), floats)
    sums = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), (x, flat_weights, as_published))
    dx, d_routing, d_floats = lax.fori_loop(0, tiles.end_tile[-1], add_tile, sums)
    d_weights = jax.tree.map(lambda d, array: d.astype(array.dtype), packed(layout, d_floats), floats)
    return dx.astype(x.dtype), None, d_routing.reshape(expert_ids.shape).astype(routing_weights.dtype), d_weights


def _floats(weights: ExpertWeights) -> ExpertWeights:
    """What has a gradient: biases, adapters and dense weights, None for the rest."""
    return jax.tree.map(lambda array: array if is_trainable(array) else None, weights)


def _with_floats(weights: ExpertWeights, floats: ExpertWeights) -> ExpertWeights:
    """`weights` with what has a gradient replaced."""
    return weights._replace(**{name: new for name, new in floats._asdict().items() if new is not None})


def _unpacked(weights: ExpertWeights, layout: WeightLayout, expert: Int32[Array, ""]) -> ExpertWeights:
    """One expert's weights as published, without the leading E."""
    one = jax.tree.map(lambda w: lax.dynamic_slice_in_dim(w, expert, 1), weights)
    return jax.tree.map(lambda w: w[0], published(layout, one))


_run.defvjp(_forward, _backward)
