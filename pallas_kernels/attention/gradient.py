"""The gradient of attention, in jnp, for any back end: blocks of keys are run again, none is kept.

FlashAttention's backward pass (Dao et al., arXiv:2205.14135, algorithm 4), with one more logit for the sink, and with a
gradient of the log-sum-exp, whose derivative by a logit is that logit's probability.
"""

from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention import reference
from pallas_kernels.attention.contract import Attend, Attended, PagedKV, RingKV


def differentiable(attend: Callable[..., tuple[Array, Array]]) -> Attend:
    """`attend`, an `Attend` that may give a plain tuple, with a gradient for queries, keys, values and sinks."""

    @jax.custom_vjp
    def differentiated(
        q: Float[Array, "B T N H"], kv: PagedKV | RingKV, positions: Int32[Array, "B T"], sinks: Float[Array, "N"]
    ) -> Attended:
        return Attended(*attend(q, kv, positions, sinks))

    def forward(*arguments):
        attended = Attended(*attend(*arguments))
        return attended, (arguments, attended)

    def backward(saved, cotangent):
        (q, kv, positions, sinks), attended = saved
        if isinstance(kv, PagedKV):
            return _paged(q, kv, positions, sinks, attended, cotangent)
        return _sliding_window(q, kv, positions, sinks, cotangent)

    differentiated.defvjp(forward, backward)
    return differentiated


def _paged(
    q: Float[Array, "B T N H"],
    kv: PagedKV,
    positions: Int32[Array, "B T"],
    sinks: Float[Array, "N"],
    attended: Attended,
    cotangent: Attended,
) -> tuple[Any, ...]:
    """The cotangents of the four arguments."""
    blocks, kv_heads = reference.Blocks.of(q, kv, positions), kv.k.shape[2]
    wide_q, scale = blocks.q.astype(jnp.float32), q.shape[-1] ** -0.5
    d_out = reference.grouped(cotangent.out.astype(jnp.float32), kv_heads)
    lse = _by_head(jnp.where(positions[..., None] < 0, jnp.inf, attended.lse), kv_heads)  # inf: padding has no part
    # A logit's gradient is its probability times (what its value adds beyond the mean of all, plus lse's gradient); the
    # sink's value is 0.
    mean = jnp.sum(cotangent.out.astype(jnp.float32) * attended.out.astype(jnp.float32), axis=-1)
    mean = _by_head(mean - cotangent.lse, kv_heads)

    def add_block(i, sums):
        dq, dk_pages, dv_pages = sums
        at, k, v, visible = blocks.take(i)
        k, v = k.astype(jnp.float32), v.astype(jnp.float32)
        probability = jnp.exp(reference.logits_of(wide_q, k, visible) - lse[..., None])
        dv = jnp.einsum("bkgts,btkgh->bskh", probability, d_out, precision="highest")
        d_probability = jnp.einsum("btkgh,bskh->bkgts", d_out, v, precision="highest")
        d_logits = probability * (d_probability - mean[..., None]) * scale
        dq = dq + jnp.einsum("bkgts,bskh->btkgh", d_logits, k, precision="highest")
        dk = jnp.einsum("bkgts,btkgh->bskh", d_logits, wide_q, precision="highest")
        pages = (*at.shape, *kv.k.shape[1:])
        return dq, dk_pages.at[at].add(dk.reshape(pages)), dv_pages.at[at].add(dv.reshape(pages))

    pools = jnp.zeros(kv.k.shape, jnp.float32), jnp.zeros(kv.v.shape, jnp.float32)
    dq, dk, dv = lax.fori_loop(0, blocks.number, add_block, (jnp.zeros_like(wide_q), *pools))
    of_sink = jnp.exp(sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1) - lse)
    d_sinks = -jnp.sum(of_sink * mean, axis=(0, 3)).reshape(sinks.shape)
    d_kv = PagedKV._make([dk.astype(kv.k.dtype), dv.astype(kv.v.dtype), None])
    return dq.reshape(q.shape).astype(q.dtype), d_kv, None, d_sinks.astype(sinks.dtype)


def _by_head(x: Float[Array, "B T N"], kv_heads: int) -> Float[Array, "B K G T"]:
    return einops.rearrange(x, "b t (k g) -> b k g t", k=kv_heads)


def _sliding_window(
    q: Float[Array, "B T N H"],
    kv: RingKV,
    positions: Int32[Array, "B T"],
    sinks: Float[Array, "N"],
    cotangent: Attended,
) -> tuple[Any, ...]:
    """The reference's own, block by block: its work and memory are O(T W)."""

    def attended(q, k, v, k_new, v_new, sinks):
        found = reference.attend(q, RingKV(k, v, k_new, v_new, kv.start), positions, sinks)
        return Attended(found.out.astype(cotangent.out.dtype), found.lse)

    _, pull = jax.vjp(attended, q, *kv[:4], sinks)
    dq, dk, dv, dk_new, dv_new, d_sinks = pull(cotangent)
    return dq, RingKV._make([dk, dv, dk_new, dv_new, None]), None, d_sinks
