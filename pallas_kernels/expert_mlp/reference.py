"""What expert_mlp means, in jnp: tiles of rows that share an expert, each dequantising just that expert.

Portable and right rather than fast; the kernels are tested against it. Work and memory follow the experts that were
chosen: a token costs X experts, whatever E is, and one expert's weights are unpacked at a time.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels import mxfp4
from pallas_kernels.expert_mlp.layout import ExpertWeights
from pallas_kernels.expert_mlp.tiles import Tiles, tile_rows

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
        expert, choice, taken = tiles.tile(number)
        of_expert = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, expert, keepdims=False), weights)
        y = one_expert(x[choice // per_token], of_expert, limit)
        y = jnp.where(taken[:, None], y * flat_weights[choice][:, None], 0)
        return out.at[choice // per_token].add(y)

    return lax.fori_loop(0, tiles.end_tile[-1], add_tile, jnp.zeros(x.shape, jnp.float32))


def one_expert(x: Float[Array, "M D"], weights: ExpertWeights, limit: float) -> Float[Array, "M D"]:
    """down(swiglu(gate_up(x))) of one expert, whose `weights` have no leading E; float32."""
    gate_up = mxfp4.dequantize(weights.gate_up_blocks, weights.gate_up_scales, x.dtype)
    h = _matmul(x, gate_up) + weights.gate_up_bias.astype(jnp.float32)
    down = mxfp4.dequantize(weights.down_blocks, weights.down_scales, x.dtype)
    return _matmul(swiglu(h, limit).astype(x.dtype), down) + weights.down_bias.astype(jnp.float32)


def _matmul(x: Float[Array, "M I"], w: Float[Array, "O I"]) -> Float[Array, "M O"]:
    return lax.dot_general(
        x, w, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
