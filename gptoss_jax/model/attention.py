"""The attention module: projections, rotation, the cache's update, and the op that attends.

Even layers see the last `sliding_window` keys, odd ones everything before them; a learned sink per query head takes its
share of every softmax (openai/gpt-oss torch/model.py, AttentionBlock).
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from gptoss_jax.model import kv_cache, layers, rope
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.kv_cache import KVCache
from gptoss_jax.model.layers import Kernels
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.taps import Tap
from pallas_kernels.attention import PagedKV, Places, RingKV


class Positions(NamedTuple):
    """Positions of the tokens of one step, and the rotations that belong to them: the same in every layer."""

    of_tokens: Int32[Array, "B T"]  # from the start of the token's sequence; -1 for padding
    cosine: Float[Array, "B T J"]
    sine: Float[Array, "B T J"]
    places: Places | None = None  # of packed rows: without a cache, and several sequences in a row


class Attention(nnx.Module):
    """One layer's attention, from the residual stream to what is added to it."""

    def __init__(self, config: ModelConfig, layer: int, sharding: Sharding, kernels: Kernels, dtype: jnp.dtype):
        self.config, self.sharding, self.kernel, self.dtype = config, sharding, kernels.attention, dtype
        self.packed_kernel = kernels.packed_attention
        self.layer = layer
        heads, kv_heads = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        hidden, by_head = (config.hidden_size,), ("heads", None)
        on = (sharding, kernels.linear)
        self.norm = layers.weight(hidden, (None,))
        self.q = layers.Linear(heads, by_head, hidden, (None,), *on)
        self.k = layers.Linear(kv_heads, by_head, hidden, (None,), *on)
        self.v = layers.Linear(kv_heads, by_head, hidden, (None,), *on)
        self.sinks = layers.weight((config.num_heads,), ("heads",))
        self.out = layers.Linear(hidden, (None,), heads, by_head, *on)

    def __call__(
        self, residual: Float[Array, "B T D"], positions: Positions, cache: KVCache | None, tap: Tap
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """What attention adds to the residual stream, and the cache with these tokens in it; None: they are all."""
        x = layers.rms_norm(residual, self.norm[...], self.config.rms_norm_eps).astype(self.dtype)
        q = rope.rotate(self.q(x), positions.cosine, positions.sine).astype(self.dtype)
        k = rope.rotate(self.k(x), positions.cosine, positions.sine).astype(self.dtype)
        v = self.v(x).astype(self.dtype)
        if positions.places is not None:
            attended = self._attend_packed(q, k, v, positions.places)
        elif cache is None:
            attended = self._attend_alone(q, k, v, positions.of_tokens)
        else:
            attended, cache = self._attend(q, k, v, positions.of_tokens, cache)
        tap("attention", attended)
        return self.out(attended.astype(self.dtype)), cache

    def _attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int32[Array, "B T"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T N H"], KVCache]:
        """Attends on every device with its own sequences and heads, and gives the cache with k and v written."""
        sliding = self.config.has_sliding_window(self.layer)
        tokens, stored = ("batch", None, "heads", None), ("batch" if sliding else "pages", None, "heads")
        attend = self.sharding.map(
            self._attend_ring if sliding else self._attend_pages,
            in_axes=(tokens, tokens, tokens, stored, stored, ("batch", None), ("batch", None), ("batch",), ("heads",)),
            out_axes=(tokens, stored, stored),
        )
        i = self.layer
        attended, k_stored, v_stored = attend(
            q, k, v, cache.k[i], cache.v[i], positions, cache.page_table, cache.lengths, self.sinks[...]
        )
        return attended, cache.with_layer(i, k_stored, v_stored)

    def _attend_pages(self, q, k, v, k_pages, v_pages, positions, page_table, lengths, sinks):
        del lengths  # written before they are read: a query finds every key up to its own in the pool
        k_pages = kv_cache.write_pages(k_pages, k, page_table, positions)
        v_pages = kv_cache.write_pages(v_pages, v, page_table, positions)
        keys, values = (kv_cache.by_heads(pool, k.shape[2]) for pool in (k_pages, v_pages))
        attended = self.kernel(q, PagedKV(keys, values, page_table), positions, sinks)
        return attended.out, k_pages, v_pages

    def _attend_ring(self, q, k, v, k_ring, v_ring, positions, page_table, lengths, sinks):
        del page_table
        keys, values = (kv_cache.by_heads(ring, k.shape[2]) for ring in (k_ring, v_ring))
        k, v = k.astype(k_ring.dtype), v.astype(v_ring.dtype)  # as the ring will hold them
        attended = self.kernel(q, RingKV(keys, values, k, v, lengths), positions, sinks)
        return attended.out, kv_cache.write_ring(k_ring, k, positions), kv_cache.write_ring(v_ring, v, positions)

    # ---- without a cache ----

    def _attend_packed(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], places: Places
    ) -> Float[Array, "B T N H"]:
        """Attends within rows that several sequences share, each token to those of its own that come before it."""
        tokens = ("batch", None, "heads", None)
        by_row: Any = ("batch", None)
        window = self.config.sliding_window if self.config.has_sliding_window(self.layer) else None
        attend = self.sharding.map(
            functools.partial(self.packed_kernel, window=window),
            in_axes=(tokens, tokens, tokens, Places(by_row, by_row, by_row), ("heads",)),
            out_axes=tokens,
        )
        return attend(q, k, v, places, self.sinks[...])

    def _attend_alone(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int32[Array, "B T"],
    ) -> Float[Array, "B T N H"]:
        """Attends to these tokens only: a whole sequence from position 0, as training and analysis run it."""
        tokens = ("batch", None, "heads", None)
        attend = self.sharding.map(
            self._own_ring if self.config.has_sliding_window(self.layer) else self._own_pages,
            in_axes=(tokens, tokens, tokens, ("batch", None), ("heads",)),
            out_axes=tokens,
        )
        return attend(q, k, v, positions, self.sinks[...])

    def _own_pages(self, q, k, v, positions, sinks):
        (k_pages, table), (v_pages, _) = kv_cache.as_pages(k), kv_cache.as_pages(v)
        return self.kernel(q, PagedKV(k_pages, v_pages, table), positions, sinks).out

    def _own_ring(self, q, k, v, positions, sinks):
        sequences, tokens, *heads = k.shape
        nothing = jnp.zeros((sequences, min(self.config.sliding_window, tokens), *heads), k.dtype)
        start = jnp.zeros(sequences, jnp.int32)
        return self.kernel(q, RingKV(nothing, nothing, k, v, start), positions, sinks).out
