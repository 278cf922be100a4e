"""expert_mlp of dense weights for few experts: all of them, for every token, in two large matrix products.

A token costs E experts and not X, but nothing is sorted, gathered or scattered, and JAX derives the gradients to x,
routing weights, weights, biases and adapters. Where E is 2 X and the products are large, that is hard to beat.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.expert_mlp.reference import ALPHA
from pallas_kernels.expert_mlp.weights import ExpertWeights, is_dense


def expert_mlp(
    x: Float[Array, "T D"],
    expert_ids: Int32[Array, "T X"],
    routing_weights: Float[Array, "T X"],
    weights: ExpertWeights,
    *,
    limit: float,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.expert_mlp.RunExperts`; routing weights are applied before the second product.

    Raises:
        NotImplementedError: the weights are packed.
    """
    if not is_dense(weights):
        raise NotImplementedError(
            "expert_mlp: all-experts takes dense weights, got packed MXFP4; the reference takes both"
        )
    w = weights
    num_experts = w.gate_up_blocks.shape[0]
    shares = _shares(expert_ids, routing_weights, num_experts)
    taken = jnp.any((expert_ids >= 0) & (expert_ids < num_experts), axis=-1, keepdims=True)
    x = jnp.where(taken, x, 0)  # padding may hold NaN, which zeros would not take back
    gate, linear = (_half(x, w, half) for half in (0, 1))
    gate, linear = jnp.minimum(gate, limit), jnp.clip(linear, -limit, limit)
    hidden = gate * jax.nn.sigmoid(ALPHA * gate) * (linear + 1) * shares[..., None]
    return _down(hidden.astype(x.dtype), w) + _einsum("te,ed->td", shares, w.down_bias.astype(jnp.float32))


def _shares(
    expert_ids: Int32[Array, "T X"], routing_weights: Float[Array, "T X"], num_experts: int
) -> Float[Array, "T E"]:
    """Routing weights by expert, 0 for experts that a token is not assigned to."""
    assigned = expert_ids[..., None] == jnp.arange(num_experts, dtype=jnp.int32)
    return jnp.sum(jnp.where(assigned, routing_weights.astype(jnp.float32)[..., None], 0), axis=1)


def _half(x: Float[Array, "T D"], w: ExpertWeights, half: int) -> Float[Array, "T E F"]:
    """The gate (0) or the linear part (1) of every expert: weights are split, being far smaller."""
    y = _einsum("td,efd->tef", x, w.gate_up_blocks[:, half::2]) + w.gate_up_bias[:, half::2].astype(jnp.float32)
    if w.gate_up_adapter is None:
        return y
    low = _einsum("td,erd->ter", x, w.gate_up_adapter.a)
    return y + _einsum("ter,efr->tef", low.astype(x.dtype), w.gate_up_adapter.b[:, half::2])


def _down(hidden: Float[Array, "T E F"], w: ExpertWeights) -> Float[Array, "T D"]:
    """The weighted experts' sum, without their biases."""
    y = _einsum("tef,edf->td", hidden, w.down_blocks)
    if w.down_adapter is None:
        return y
    low = _einsum("tef,erf->ter", hidden, w.down_adapter.a)
    return y + _einsum("ter,edr->td", low.astype(hidden.dtype), w.down_adapter.b)


def _einsum(names: str, x: Array, w: Array) -> Array:
    """In x's dtype, added up in float32."""
    w = w.astype(x.dtype)
    return jnp.einsum(names, x, w, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
