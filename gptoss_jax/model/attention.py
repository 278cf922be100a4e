"""The attention module: projections, rotation, the cache's update, and the op that attends.

Even layers see a band of the last `sliding_window` keys, odd ones everything before them; a learned sink per query
head takes its share of every softmax (openai/gpt-oss torch/model.py, AttentionBlock).
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from gptoss_jax.model import kv_cache, layers, rope
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.kv_cache import KVCache
from gptoss_jax.model.layers import Kernels
from gptoss_jax.model.sharding import Sharding


class Step(NamedTuple):
    """What every layer of one step shares: where its tokens stand."""

    positions: Int32[Array, "B T"]  # from the row's start; -1 for padding
    cosine: Float[Array, "B T J"]
    sine: Float[Array, "B T J"]


class Attention(nnx.Module):
    """One layer's attention, from the residual stream to what is added to it."""

    def __init__(self, config: ModelConfig, layer: int, sharding: Sharding, kernels: Kernels, dtype: jnp.dtype):
        self.config, self.sharding, self.kernel, self.dtype = config, sharding, kernels.attention, dtype
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
        self, residual: Float[Array, "B T D"], step: Step, cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """What attention adds to the residual stream, and the cache with these tokens in it."""
        x = layers.rms_norm(residual, self.norm[...], self.config.rms_norm_eps).astype(self.dtype)
        q = rope.rotate(self.q(x), step.cosine, step.sine).astype(self.dtype)
        k = rope.rotate(self.k(x), step.cosine, step.sine).astype(self.dtype)
        v = self.v(x).astype(self.dtype)
        attended, cache = self._attend(q, k, v, step.positions, cache)
        return self.out(attended.astype(self.dtype)), cache

    def _attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int32[Array, "B T"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T N H"], KVCache]:
        """Attends on every device to its own rows and heads, and gives the cache with k and v written."""
        banded = self.config.has_sliding_window(self.layer)
        tokens, stored = ("batch", None, "heads", None), ("batch" if banded else "pages", None, "heads")
        attend = self.sharding.map(
            self._banded if banded else self._paged,
            in_axes=(tokens, tokens, tokens, stored, stored, ("batch", None), ("batch", None), ("batch",), ("heads",)),
            out_axes=(tokens, stored, stored),
        )
        i = self.layer
        attended, k_stored, v_stored = attend(
            q, k, v, cache.k[i], cache.v[i], positions, cache.page_table, cache.lengths, self.sinks[...]
        )
        return attended, cache.with_layer(i, k_stored, v_stored)

    def _paged(self, q, k, v, k_pages, v_pages, positions, page_table, lengths, sinks):
        del lengths  # written before they are read: a query finds every key up to its own in the pool
        k_pages = kv_cache.write_pages(k_pages, k, page_table, positions)
        v_pages = kv_cache.write_pages(v_pages, v, page_table, positions)
        keys, values = (kv_cache.by_heads(pool, k.shape[2]) for pool in (k_pages, v_pages))
        return self.kernel.paged(q, keys, values, page_table, positions, sinks), k_pages, v_pages

    def _banded(self, q, k, v, k_ring, v_ring, positions, page_table, lengths, sinks):
        del page_table
        keys, values = (kv_cache.by_heads(ring, k.shape[2]) for ring in (k_ring, v_ring))
        attended = self.kernel.banded(q, keys, values, k, v, lengths, positions, sinks)
        return attended, kv_cache.write_ring(k_ring, k, positions), kv_cache.write_ring(v_ring, v, positions)
