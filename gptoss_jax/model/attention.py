"""The attention module: projections, rotation, the cache's update, and the op that attends.

Even layers see the last `sliding_window` keys, odd ones everything before them; a learned sink per query head takes its
share of every softmax (openai/gpt-oss torch/model.py, AttentionBlock).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from gptoss_jax.model import kv_cache, layers, position_shards, rope
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.kv_cache import KVCache
from gptoss_jax.model.layers import Kernels
from gptoss_jax.model.position_shards import PositionShard
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.taps import Tap
from pallas_kernels.attention import PagedKV, Places, RingKV
from pallas_kernels.placement import Stored


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
        self.layer, self.few_launches, self.place = layer, kernels.few_launches, kernels.place
        heads, kv_heads = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        hidden, by_head = (config.hidden_size,), ("heads", None)
        on = (sharding, kernels.linear)
        self.norm = layers.weight(hidden, (None,))
        self.q = layers.Linear(heads, by_head, hidden, (None,), *on)
        self.k = layers.Linear(kv_heads, by_head, hidden, (None,), *on)
        self.v = layers.Linear(kv_heads, by_head, hidden, (None,), *on)
        self.joined = layers.Product(("heads", None, None), (None,), *on)
        self.sinks = layers.weight((config.num_heads,), ("heads",))
        self.out = layers.Linear(hidden, (None,), heads, by_head, *on)

    def __call__(
        self, residual: Float[Array, "B T D"], positions: Positions, cache: KVCache | None, tap: Tap
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """What attention adds to the residual stream, and the cache with these tokens in it; None: they are all."""
        x = layers.rms_norm(residual, self.norm[...], self.config.rms_norm_eps).astype(self.dtype)
        if cache is not None and (joined := self._placed(x, cache)) is not None:
            attended, cache = self._attend_placed(x, joined, positions, cache)
            tap("attention", attended)
            return self.out(attended.astype(self.dtype)), cache
        q, k, v = self._projected(x)
        q = rope.rotate(q, positions.cosine, positions.sine).astype(self.dtype)
        k = rope.rotate(k, positions.cosine, positions.sine).astype(self.dtype)
        v = v.astype(self.dtype)
        if positions.places is not None:
            attended = self._attend_packed(q, k, v, positions.places)
        elif cache is None:
            attended = self._attend_alone(q, k, v, positions.of_tokens)
        else:
            attended, cache = self._attend(q, k, v, positions.of_tokens, cache)
        tap("attention", attended)
        return self.out(attended.astype(self.dtype)), cache

    def _projected(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values before the rotation, in one product where `weight_transforms` joined them."""
        joined = self.q.weight.get_value()
        if not isinstance(joined, layers.Joined):
            return self.q(x), self.k(x), self.v(x)
        y = self.joined(x, joined.weight) + joined.bias.astype(jnp.float32)
        q = y[..., :-2, :]
        return q.reshape(*q.shape[:2], -1, q.shape[-1]), y[..., -2, :], y[..., -1, :]

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
        tokens, stored = ("batch", None, "heads", None), kv_cache.RING_AXES if sliding else kv_cache.POOL_AXES
        one_token = self.few_launches and q.shape[1] == 1 and self._may_be_page(cache)
        attend_window = self._attend_written_ring if one_token else self._attend_ring
        attend_all = self._attend_page_shards if self.sharding.size("positions") > 1 else self._attend_pages
        attend = self.sharding.map(
            attend_window if sliding else attend_all,
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

    def _attend_page_shards(self, q, k, v, k_pages, v_pages, positions, page_table, lengths, sinks):
        """As `_attend_pages`, of the positions that this device holds; then all devices' parts are merged."""
        del lengths
        shard = PositionShard(self.sharding.index("positions"), self.sharding.size("positions"))
        (k, v), written = shard.own((k, v), positions)
        k_pages = kv_cache.write_pages(k_pages, k, page_table, written)
        v_pages = kv_cache.write_pages(v_pages, v, page_table, written)
        keys, values = (kv_cache.by_heads(pool, k.shape[2]) for pool in (k_pages, v_pages))
        part = self.kernel(q, PagedKV(keys, values, page_table), shard.last_seen(positions), shard.sinks(sinks))
        return position_shards.merged(part, self.sharding), k_pages, v_pages

    def _attend_ring(self, q, k, v, k_ring, v_ring, positions, page_table, lengths, sinks):
        del page_table
        keys, values = (kv_cache.by_heads(ring, k.shape[2]) for ring in (k_ring, v_ring))
        k, v = k.astype(k_ring.dtype), v.astype(v_ring.dtype)  # as the ring will hold them
        if self.few_launches:  # or XLA keeps the joined product until the write at the end, and makes them anew of it
            k, v = jax.lax.optimization_barrier((k, v))
        attended = self.kernel(q, RingKV(keys, values, k, v, lengths), positions, sinks)
        return attended.out, kv_cache.write_ring(k_ring, k, positions), kv_cache.write_ring(v_ring, v, positions)

    def _attend_written_ring(self, q, k, v, k_ring, v_ring, positions, page_table, lengths, sinks):
        """As `_attend_ring`, of one token, whose key is in the ring before it is read.

        All W slots then hold what it sees, or those up to its own while the ring fills: a page with one query.
        """
        del page_table, lengths
        k_ring, v_ring = kv_cache.write_ring(k_ring, k, positions), kv_cache.write_ring(v_ring, v, positions)
        keys, values = (kv_cache.by_heads(ring, k.shape[2]) for ring in (k_ring, v_ring))
        slot = jnp.minimum(positions, k_ring.shape[1] - 1)
        return self.kernel(q, PagedKV(keys, values, _ring_pages(positions)), slot, sinks).out, k_ring, v_ring

    # ---- a decoded token, with a kernel that rotates and stores it ----

    def _may_be_page(self, cache: KVCache) -> bool:
        """Whether attention kernels take this layer's ring as one page."""
        return cache.k[self.layer].shape[1] % kv_cache.PAGE_TOKENS == 0

    def _placed(self, x: Float[Array, "B T D"], cache: KVCache) -> layers.Joined | None:
        """The joined projections, if these are decoded tokens and `self.place` can store them."""
        joined = self.q.weight.get_value()
        if self.place is None or x.shape[1] > 1 or not isinstance(joined, layers.Joined):
            return None
        if self.sharding.size("positions") > 1 and not self.config.has_sliding_window(self.layer):
            return None  # it would store the token on every shard
        return joined if self._may_be_page(cache) and cache.k[self.layer].dtype == self.dtype else None

    def _attend_placed(
        self, x: Float[Array, "B T D"], joined: layers.Joined, positions: Positions, cache: KVCache
    ) -> tuple[Float[Array, "B T N H"], KVCache]:
        """As `_attend`, from the normed residual stream."""
        sliding, by_sequence = self.config.has_sliding_window(self.layer), ("batch", None)
        stored = kv_cache.RING_AXES if sliding else kv_cache.POOL_AXES
        projected, tokens = (*by_sequence, "heads", None, None), (*by_sequence, "heads", None)
        attend = self.sharding.map(
            functools.partial(self._attend_placed_locally, sliding=sliding),
            in_axes=(
                *(projected, ("heads", None, None), (*by_sequence, None), (*by_sequence, None)),
                *(stored, stored, by_sequence, by_sequence, ("heads",)),
            ),
            out_axes=(tokens, stored, stored),
        )
        i, y = self.layer, self.joined(x, joined.weight)
        held = cache.k[i], cache.v[i], positions.of_tokens, cache.page_table, self.sinks[...]
        attended, k, v = attend(y, joined.bias, positions.cosine, positions.sine, *held)
        return attended, cache.with_layer(i, k, v)

    def _attend_placed_locally(self, y, bias, cosine, sine, k, v, positions, page_table, sinks, *, sliding):
        assert self.place is not None, "asked for in `_placed`"
        seen = positions
        if sliding:  # see `_attend_written_ring`
            page_table, seen = _ring_pages(positions), jnp.minimum(positions, k.shape[1] - 1)
        stored = Stored(k, v, page_table)
        turns = jnp.concatenate([cosine, sine], axis=1)  # the same in every layer: XLA makes it once
        q, k, v = self.place(y[:, 0], bias, turns, stored, positions[:, 0])
        keys, values = (kv_cache.by_heads(x, y.shape[2]) for x in (k, v))
        q = q.reshape(*positions.shape, -1, q.shape[-1])
        return self.kernel(q, PagedKV(keys, values, page_table), seen, sinks).out, k, v

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


def _ring_pages(positions: Int32[Array, "B T"]) -> Int32[Array, "B M"]:
    """The page table of rings: each is its sequence's only page."""
    return jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]
