"""The gradient of attention, in jnp, for any implementation of it: blocks of keys are run again, none is kept.

FlashAttention's backward pass (Dao et al., arXiv:2205.14135, algorithm 4), with one more logit for the sink.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention import reference


def differentiable_paged(run: Any) -> Any:
    """`run`, a `PagedAttention`, with a gradient for queries, keys, values and sinks."""

    def paged_attention(
        q: Float[Array, "B T N H"],
        k_pages: Float[Array, "P S K H"],
        v_pages: Float[Array, "P S K H"],
        page_table: Int32[Array, "B M"],
        positions: Int32[Array, "B T"],
        sinks: Float[Array, "N"],
    ) -> Float[Array, "B T N H"]:
        return _paged(run, q, k_pages, v_pages, page_table, positions, sinks)

    return paged_attention


def differentiable_banded(run: Any) -> Any:
    """`run`, a `BandedAttention`, with a gradient for queries, keys, values and sinks."""

    def banded_attention(
        q: Float[Array, "B T N H"],
        k_ring: Float[Array, "B W K H"],
        v_ring: Float[Array, "B W K H"],
        k_new: Float[Array, "B T K H"],
        v_new: Float[Array, "B T K H"],
        start: Int32[Array, "B"],
        positions: Int32[Array, "B T"],
        sinks: Float[Array, "N"],
    ) -> Float[Array, "B T N H"]:
        return _banded(run, q, k_ring, v_ring, k_new, v_new, start, positions, sinks)

    return banded_attention


# ---- over pages ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _paged(run, *arguments):
    return run(*arguments)


def _paged_forward(run, *arguments):
    return run(*arguments), arguments


def _paged_backward(run, saved, gradient):
    del run
    q, k_pages, v_pages, page_table, positions, sinks = saved
    blocks = reference.Blocks.of(q, k_pages, v_pages, page_table, positions)
    softmax = blocks.attend(sinks)
    q, scale = blocks.q.astype(jnp.float32), q.shape[-1] ** -0.5
    g = gradient.reshape(q.shape).astype(jnp.float32)
    log_total = softmax.top + jnp.log(softmax.total)
    # What a logit's probability changes by, beside its own value: the mean over all of them. The sink has no value.
    mean = jnp.einsum("btkgh,bkgth->bkgt", g, softmax.value) / softmax.total

    def add_block(i, sums):
        dq, dk_pages, dv_pages = sums
        at, k, v, visible = blocks.take(i)
        k = reference.seen(k, visible)
        probability = jnp.exp(reference.logits_of(q, k, visible) - log_total[..., None])
        dv = jnp.einsum("bkgts,btkgh->bskh", probability, g, precision="highest")
        d_probability = jnp.einsum("btkgh,bskh->bkgts", g, v, precision="highest")
        d_logits = probability * (d_probability - mean[..., None]) * scale
        dq = dq + jnp.einsum("bkgts,bskh->btkgh", d_logits, k, precision="highest")
        dk = jnp.einsum("bkgts,btkgh->bskh", d_logits, q, precision="highest")
        pages = (*at.shape, *k_pages.shape[1:])
        return dq, dk_pages.at[at].add(dk.reshape(pages)), dv_pages.at[at].add(dv.reshape(pages))

    pools = jnp.zeros(k_pages.shape, jnp.float32), jnp.zeros(v_pages.shape, jnp.float32)
    dq, dk_pages, dv_pages = lax.fori_loop(0, blocks.number, add_block, (jnp.zeros_like(q), *pools))
    of_sink = jnp.exp(sinks.astype(jnp.float32).reshape(1, *q.shape[2:4], 1) - log_total)
    d_sinks = -jnp.sum(of_sink * mean, axis=(0, 3)).reshape(sinks.shape)
    return (
        dq.reshape(gradient.shape).astype(saved[0].dtype),
        dk_pages.astype(k_pages.dtype),
        dv_pages.astype(v_pages.dtype),
        None,
        None,
        d_sinks.astype(sinks.dtype),
    )


_paged.defvjp(_paged_forward, _paged_backward)


# ---- over the band ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _banded(run, *arguments):
    return run(*arguments)


def _banded_forward(run, *arguments):
    return run(*arguments), arguments


def _banded_backward(run, saved, gradient):
    """The reference's own, block by block: its work and memory are O(T W)."""
    del run
    q, k_ring, v_ring, k_new, v_new, start, positions, sinks = saved

    def banded(q, k_ring, v_ring, k_new, v_new, sinks):
        return reference.banded_attention(q, k_ring, v_ring, k_new, v_new, start, positions, sinks)

    _, pull = jax.vjp(banded, q, k_ring, v_ring, k_new, v_new, sinks)
    *d_arrays, d_sinks = pull(gradient)
    return *d_arrays, None, None, d_sinks


_banded.defvjp(_banded_forward, _banded_backward)
