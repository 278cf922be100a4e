"""The mixture of experts: a router picks a few of many MLPs for each token.

openai/gpt-oss torch/model.py, MLPBlock: softmax over the top_k logits alone, SwiGLU, biases before weighting.
"""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from gptoss_jax.model import layers
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.config_ranges import MXFP4_BLOCK
from gptoss_jax.model.exchange import IMPLEMENTATIONS, LocalExperts, RoutedTokens
from gptoss_jax.model.invariant_sum import invariant_sum
from gptoss_jax.model.layers import Kernels
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.taps import Tap
from pallas_kernels import expert_mlp as op

COUNTED_TOKENS = 64  # up to so many, accelerators rank experts by counting: a sort is three launches of its own


def route(
    logits: Float[Array, "*BT E"], top_k: int, is_token: Bool[Array, "*BT"] | None = None
) -> tuple[Int32[Array, "*BT X"], Float[Array, "*BT X"]]:
    """The experts with the largest logits, of equal ones the first, and the softmax over those alone.

    Where `is_token` says that it is padding, they are -1: none.
    """
    is_token = jnp.ones(logits.shape[:-1], jnp.bool_) if is_token is None else is_token
    if math.prod(logits.shape[:-1]) > COUNTED_TOKENS:
        return _sorted(logits, is_token, top_k)
    ways = (functools.partial(way, top_k=top_k) for way in (_sorted, _counted))
    return jax.lax.platform_dependent(logits, is_token, **dict(zip(("cpu", "default"), ways, strict=True)))


def _sorted(
    logits: Float[Array, "*BT E"], is_token: Bool[Array, "*BT"], top_k: int
) -> tuple[Int32[Array, "*BT X"], Float[Array, "*BT X"]]:
    top, ids = jax.lax.top_k(logits, top_k)
    shares = jnp.exp(top - top[..., :1])  # the first is the largest
    return jnp.where(is_token[..., None], ids, -1), shares / invariant_sum(shares)[..., None]


def _counted(
    logits: Float[Array, "*BT E"], is_token: Bool[Array, "*BT"], top_k: int
) -> tuple[Int32[Array, "*BT X"], Float[Array, "*BT X"]]:
    """By how many experts come before each: two reductions, and elementwise work that joins what reads it."""
    expert = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    own, other = logits[..., :, None], logits[..., None, :]
    comes_before = (other > own) | ((other == own) & (expert < expert[:, None]))
    rank = jnp.sum(comes_before, axis=-1, dtype=jnp.int32)
    is_xth = rank[..., None, :] == jnp.arange(top_k, dtype=jnp.int32)[:, None]
    ids = jnp.max(jnp.where(is_xth & is_token[..., None, None], expert, -1), axis=-1)
    top = jnp.sum(jnp.where(is_xth, other, 0), axis=-1)
    shares = jnp.exp(top - top[..., :1])
    total = functools.reduce(operator.add, (shares[..., x : x + 1] for x in range(top_k)))
    return ids, shares / total


class Mxfp4Linear(nnx.Module):
    """The declaration of one matrix and bias per expert, packed: rows are outputs, blocks run along the inputs."""

    def __init__(self, experts: int, out: int, inputs: int, out_axis: str | None, in_axis: str | None):
        blocks, uint8 = inputs // MXFP4_BLOCK, jnp.dtype(jnp.uint8)
        self.blocks = layers.weight(
            (experts, out, blocks, MXFP4_BLOCK // 2), ("experts", out_axis, in_axis, None), uint8
        )
        self.scales = layers.weight((experts, out, blocks), ("experts", out_axis, in_axis), uint8)
        self.bias = layers.weight((experts, out), ("experts", out_axis))


PACKED = ("gate_up/blocks", "gate_up/scales", "gate_up/bias", "down/blocks", "down/scales", "down/bias")
"""The leaves that an `ExpertWeights` begins with, in its order: declared as published, run in the kernel's layout."""


ADAPTER_AXES = {
    "gate_up": (("experts", None, None), ("experts", "expert_hidden", None)),
    "down": (("experts", None, "expert_hidden"), ("experts", None, None)),
}
"""The logical axes of the two factors of an expert matrix's adapter, a [E, R, in] and b [E, out, R]."""


class MixtureOfExperts(nnx.Module):
    """One layer's router and experts, from the residual stream to what is added to it."""

    def __init__(self, config: ModelConfig, sharding: Sharding, kernels: Kernels, dtype: jnp.dtype):
        self.config, self.sharding, self.kernel, self.dtype = config, sharding, kernels.expert_mlp, dtype
        self.exchange = kernels.exchange or IMPLEMENTATIONS[sharding.exchange_name]
        hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
        self.norm = layers.weight((hidden,), (None,))
        self.router = layers.Linear((experts,), (None,), (hidden,), (None,), sharding, kernels.linear, exact=True)
        self.gate_up = Mxfp4Linear(experts, 2 * inner, hidden, "expert_hidden", None)
        self.down = Mxfp4Linear(experts, hidden, inner, None, "expert_hidden")

    def __call__(
        self, residual: Float[Array, "B T D"], is_token: Bool[Array, "B T"], tap: Tap
    ) -> Float[Array, "B T D"]:
        """What the top_k experts add to the residual stream; padding, which is no token, is assigned to none."""
        x = layers.rms_norm(residual, self.norm[...], self.config.rms_norm_eps)
        logits = self.router(x)
        tap("router", logits)
        packed, axes = self._weights()
        tokens = ("batch", None, None)
        run = self.sharding.map(self._run_local, in_axes=(tokens, tokens, ("batch", None), axes), out_axes=tokens)
        return run(x.astype(self.dtype), logits, is_token, packed)

    def _weights(self) -> tuple[op.ExpertWeights, op.ExpertWeights]:
        """The op's weights, and the logical axes of each: packed ones, dense ones in training, adapters beside them."""
        leaves: list[Any] = [functools.reduce(getattr, path.split("/"), self) for path in PACKED]
        weights = op.ExpertWeights(*(leaf.get_value() for leaf in leaves))
        axes = op.packed_axes(self.kernel.layout, op.ExpertWeights(*(leaf.get_metadata("axes") for leaf in leaves)))
        for matrix, (a_axes, b_axes) in ADAPTER_AXES.items():
            blocks, scales = f"{matrix}_blocks", f"{matrix}_scales"
            if isinstance(found := getattr(weights, blocks), layers.Adapted):
                weights = weights._replace(**{blocks: found.base, f"{matrix}_adapter": op.Adapter(found.a, found.b)})
                axes = axes._replace(**{f"{matrix}_adapter": op.Adapter(a_axes, b_axes)})  # pyright: ignore[reportArgumentType]
            if op.is_trainable(getattr(weights, blocks)):  # trained themselves: [E, out, in]
                weights = weights._replace(**{scales: None})
                axes = axes._replace(**{blocks: getattr(axes, blocks)[:3], scales: None})
        return weights, axes

    def _run_local(self, x, logits, is_token, packed):
        """This device's experts, and its part of their width, and what the devices that hold the rest add to it."""
        ids, weights = route(logits, self.config.experts_per_token, is_token)
        count = packed.gate_up_blocks.shape[0]
        first = self.sharding.index("experts") * count
        is_first = self.sharding.index("expert_hidden") == 0  # the bias of a sum that is split counts once
        packed = packed._replace(down_bias=jnp.where(is_first, packed.down_bias, 0))
        tokens = RoutedTokens(*(a.reshape(-1, a.shape[-1]) for a in (x, ids, weights)))

        def run(tokens):
            ids, limit = tokens.expert_ids - first, self.config.swiglu_limit
            return self.kernel.run(tokens.x, ids, tokens.routing_weights, packed, limit=limit)

        return self.exchange(self.sharding, LocalExperts(run, count), tokens).reshape(x.shape)
