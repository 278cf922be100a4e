"""What expert_mlp means, in jnp: tiles of rows that share an expert, each dequantising just that expert; dense too.

Portable and right rather than fast; the kernels are tested against it. Work and memory follow the experts that
tokens are assigned to: a token costs X experts, whatever E is, and one expert's weights are unpacked at a time.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels import mxfp4
from pallas_kernels.expert_mlp.tiles import Tiles, tile_rows
from pallas_kernels.expert_mlp.weights import Adapter, ExpertWeights

ALPHA = 1.702  # sigmoid's slope in the SwiGLU (openai/gpt-oss torch/model.py, swiglu)


def swiglu(h: Float[Array, "M F2"], limit: float) -> Float[Array, "M F"]:
    """gate * sigmoid(1.702 gate) * (linear + 1): gate from even columns, clamped above only; linear both ways."""
    gate = jnp.minimum(h[:, 0::2], limit)
    linear = jnp.clip(h[:, 1::2], -limit, limit)
    return gate * jax.nn.sigmoid(ALPHA * gate) * (linear + 1)


def expert_mlp(
    x: Float[Array, "T D"],
    expert_ids: Int32[Array, "T X"],
    routing_weights: Float[Array, "T X"],
    weights: ExpertWeights,
    *,
    limit: float,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.expert_mlp.ExpertMlp`."""
    num_experts = weights.gate_up_blocks.shape[0]
    per_token = expert_ids.shape[1]
    tiles = Tiles.of(expert_ids, num_experts, tile_rows(expert_ids.size, num_experts))
    flat_weights = routing_weights.reshape(-1)

    def add_tile(number: Int32[Array, ""], out: Float[Array, "T D"]) -> Float[Array, "T D"]:
        expert, assignment, taken = tiles.tile(number)
        of_expert = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, expert, keepdims=False), weights)
        y = one_expert(x[assignment // per_token], of_expert, limit)
        y = jnp.where(taken[:, None], y * flat_weights[assignment][:, None], 0)
        return out.at[assignment // per_token].add(y)

    return lax.fori_loop(0, tiles.end_tile[-1], add_tile, jnp.zeros(x.shape, jnp.float32))


def one_expert(x: Float[Array, "M D"], weights: ExpertWeights, limit: float) -> Float[Array, "M D"]:
    """down(swiglu(gate_up(x))) of one expert, whose `weights` have no leading E; float32."""
    w = weights
    h = _product(x, w.gate_up_blocks, w.gate_up_scales, w.gate_up_adapter) + w.gate_up_bias.astype(jnp.float32)
    hidden = swiglu(h, limit).astype(x.dtype)
    return _product(hidden, w.down_blocks, w.down_scales, w.down_adapter) + w.down_bias.astype(jnp.float32)


def _product(
    x: Float[Array, "M I"],
    blocks: UInt8[Array, "O B 16"] | Float[Array, "O I"],
    scales: UInt8[Array, "O B"] | None,
    adapter: Adapter | None,
) -> Float[Array, "M O"]:
    """x times one expert's matrix, its adapter's product added."""
    w = blocks.astype(x.dtype) if scales is None else mxfp4.dequantize(blocks, scales, x.dtype)
    y = _matmul(x, w)
    if adapter is None:
        return y
    low = _matmul(x, adapter.a.astype(x.dtype))
    return y + _matmul(low.astype(x.dtype), adapter.b.astype(x.dtype))


def _matmul(x: Float[Array, "M I"], w: Float[Array, "O I"]) -> Float[Array, "M O"]:
    return lax.dot_general(
        x, w, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
