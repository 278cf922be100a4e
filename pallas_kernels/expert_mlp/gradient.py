"""The gradient of expert_mlp, in jnp, for any implementation of it: what fine-tuning through a kernel needs.

Packed weights are whole numbers and have no gradient; x, the experts' weights per token and the biases do. Each tile of
rows is run again, one expert unpacked at a time, so memory stays that of one expert.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.expert_mlp import reference
from pallas_kernels.expert_mlp.layout import ExpertWeights, Layout, published
from pallas_kernels.expert_mlp.tiles import Tiles, tile_rows


def differentiable(run: Any, layout: Layout) -> Any:
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
        dx, d_weights, d_gate_up_bias, d_down_bias = sums
        expert, choice, taken = tiles.tile(number)
        of_expert, token = _unpacked(weights, layout, expert), choice // per_token
        dy = jnp.where(taken[:, None], gradient[token], 0)

        def one_expert(x, gate_up_bias, down_bias):
            biased = of_expert._replace(gate_up_bias=gate_up_bias, down_bias=down_bias)
            return reference.one_expert(x, biased, limit)

        y, pull = jax.vjp(one_expert, x[token], of_expert.gate_up_bias, of_expert.down_bias)
        dx_tile, *d_biases = pull(dy * flat_weights[choice][:, None])
        return (
            dx.at[token].add(dx_tile.astype(jnp.float32)),
            d_weights.at[choice].add(jnp.sum(dy * y, axis=-1)),
            d_gate_up_bias.at[expert].add(d_biases[0].astype(jnp.float32)),
            d_down_bias.at[expert].add(d_biases[1].astype(jnp.float32)),
        )

    ways = {"gate_up_bias": layout.gate_up_bias, "down_bias": layout.down_bias}
    biases = [jax.eval_shape(way.unpack, getattr(weights, name)) for name, way in ways.items()]  # as published
    sums = tuple(jnp.zeros(array.shape, jnp.float32) for array in (x, flat_weights, *biases))
    dx, d_weights, *d_biases = lax.fori_loop(0, tiles.end_tile[-1], add_tile, sums)
    found = zip(ways.items(), d_biases, strict=True)
    learnt: Any = {name: way.pack(d.astype(getattr(weights, name).dtype)) for (name, way), d in found}
    d_packed = ExpertWeights(*[learnt.get(name) for name in ExpertWeights._fields])  # pyright: ignore[reportArgumentType]
    return dx.astype(x.dtype), None, d_weights.reshape(expert_ids.shape).astype(routing_weights.dtype), d_packed


def _unpacked(weights: ExpertWeights, layout: Layout, expert: Int32[Array, ""]) -> ExpertWeights:
    """One expert's weights as published, without the leading E."""
    one = jax.tree.map(lambda w: lax.dynamic_slice_in_dim(w, expert, 1), weights)
    return jax.tree.map(lambda w: w[0], published(layout, one))


_run.defvjp(_forward, _backward)
