"""The keys and values of each slot's sequence so far, as a pytree that steps take and give back.

Full-attention layers share a pool of pages, so that memory follows the tokens that are there; sliding-window layers
keep a ring of the last `sliding_window` tokens per slot, or of the context where that is shorter. Knows no attention.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.mesh import PAGE_TOKENS
from gptoss_jax.model.sharding import Axes, Sharding


class KVCache(NamedTuple):
    """State of B slots, a sequence each. Data shards cut slots and pages alike; a slot's pages are of its own shard.

    Example: pages of 64 tokens, page_table[0] = [5, 2, 0, 0], lengths[0] = 70. Slot 0's tokens 0 to 63 are page 5, its
    tokens 64 to 69 the first six places of page 2; token 70 comes next. Its sliding-window layers hold token p at place
    p % 128 of their rings.
    """

    # By layer: pages [P, S, K H] where attention is full, else a ring [B, W, K H]. Heads and their size are one axis:
    # two of them a TPU would lay out with the pages innermost, and copy the pool for a kernel that wants it row-major.
    # S is 64 on each device: where a mesh cuts positions, a page is as many times longer (`position_shards`).
    k: tuple[Float[Array, "_ _ KH"], ...]
    v: tuple[Float[Array, "_ _ KH"], ...]  # alike
    page_table: Int32[Array, "B M"]  # the page of each run of S tokens, counted within the slot's data shard
    lengths: Int32[Array, "B"]  # tokens that the slot's sequence has in the cache

    def with_layer(self, i: int, k: Float[Array, "_ _ KH"], v: Float[Array, "_ _ KH"]) -> "KVCache":
        """The cache with layer i's keys and values replaced."""
        return self._replace(k=(*self.k[:i], k, *self.k[i + 1 :]), v=(*self.v[:i], v, *self.v[i + 1 :]))


class Rings(NamedTuple):
    """The rings of the sliding-window layers alone: those of a cache, or copies of them."""

    k: tuple[Float[Array, "B W KH"], ...]
    v: tuple[Float[Array, "B W KH"], ...]


def page_tokens(sharding: Sharding) -> int:
    """Tokens of a page: 64 for each of the shards that the mesh cuts positions into."""
    return PAGE_TOKENS * sharding.size("positions")


def num_pages(tokens: int, page_tokens: int = PAGE_TOKENS) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // page_tokens)


def empty(
    config: ModelConfig,
    *,
    slots: int,
    pages: int,
    max_context_tokens: int,
    dtype: jnp.dtype,
    page_tokens: int = PAGE_TOKENS,
) -> KVCache:
    """A cache of `slots` empty slots over a pool of `pages` pages, each sequence at most `max_context_tokens` long."""

    def layer(i: int) -> jax.Array:
        if config.has_sliding_window(i):
            return _empty_ring(config, slots, max_context_tokens, dtype)
        return jnp.zeros((pages, page_tokens, config.num_kv_heads * config.head_dim), dtype)

    return KVCache(
        k=tuple(layer(i) for i in range(config.num_layers)),
        v=tuple(layer(i) for i in range(config.num_layers)),
        page_table=jnp.zeros((slots, num_pages(max_context_tokens, page_tokens)), jnp.int32),
        lengths=jnp.zeros(slots, jnp.int32),
    )


def _empty_ring(config: ModelConfig, count: int, max_context_tokens: int, dtype: jnp.dtype) -> jax.Array:
    window = min(config.sliding_window, max_context_tokens)  # a window wider than the context sees all of it
    return jnp.zeros((count, window, config.num_kv_heads * config.head_dim), dtype)


POOL_AXES: Axes = ("pages", "positions", "heads")
RING_AXES: Axes = ("batch", None, "heads")  # whole on every shard of positions: see `position_shards`


def axes(config: ModelConfig) -> KVCache:
    """The logical axes of each array of a cache, as a KVCache of them."""
    layer = tuple(RING_AXES if config.has_sliding_window(i) else POOL_AXES for i in range(config.num_layers))
    return KVCache._make([layer, layer, ("batch", None), ("batch",)])


def layout(config: ModelConfig, sharding: Sharding) -> KVCache:
    """Where each array of a cache lies on the mesh, as a KVCache of shardings."""
    return sharding.named_tree(axes(config))


def allocator(
    config: ModelConfig, sharding: Sharding, *, slots: int, pages: int, max_context_tokens: int, dtype: jnp.dtype
) -> Callable[[], KVCache]:
    """Makes `empty` caches, each on the devices that hold its shards."""
    sizes = {"slots": slots, "pages": pages, "max_context_tokens": max_context_tokens}
    make = functools.partial(empty, config, **sizes, dtype=dtype, page_tokens=page_tokens(sharding))
    return jax.jit(make, out_shardings=layout(config, sharding))


# ---- the rings alone, of which prefixes keep copies ----


def rings(config: ModelConfig, cache: KVCache) -> Rings:
    """The rings of a cache."""
    sliding = _sliding_layers(config)
    return Rings(tuple(cache.k[i] for i in sliding), tuple(cache.v[i] for i in sliding))


def with_rings(config: ModelConfig, cache: KVCache, new: Rings) -> KVCache:
    """The cache with other rings."""
    for i, k, v in zip(_sliding_layers(config), new.k, new.v, strict=True):
        cache = cache.with_layer(i, k, v)
    return cache


def ring_axes(config: ModelConfig) -> Rings:
    """The logical axes of each ring, as Rings of them."""
    layers = (RING_AXES,) * len(_sliding_layers(config))
    return Rings._make([layers, layers])


def ring_allocator(
    config: ModelConfig, sharding: Sharding, *, count: int, max_context_tokens: int, dtype: jnp.dtype
) -> Callable[[], Rings]:
    """Makes `count` empty copies of a slot's rings, over the data shards alike."""

    def make() -> Rings:
        layers = tuple(_empty_ring(config, count, max_context_tokens, dtype) for _ in _sliding_layers(config))
        return Rings(layers, layers)

    return jax.jit(make, out_shardings=sharding.named_tree(ring_axes(config)))


def _sliding_layers(config: ModelConfig) -> list[int]:
    return [i for i in range(config.num_layers) if config.has_sliding_window(i)]


def write_pages(
    pages: Float[Array, "P S KH"],
    new: Float[Array, "B T K H"],
    page_table: Int32[Array, "B M"],
    positions: Int32[Array, "B T"],
) -> Float[Array, "P S KH"]:
    """The pool with `new` at its `positions`; position -1 (padding, after a sequence's tokens) is not written.

    Pool and positions are those of one device.
    """
    page = jnp.take_along_axis(page_table, jnp.maximum(positions, 0) // PAGE_TOKENS, axis=1)
    end = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    return _write(pages, _flat(new), page, positions % PAGE_TOKENS, jnp.zeros_like(end), end)


def write_ring(
    ring: Float[Array, "B W KH"], new: Float[Array, "B T K H"], positions: Int32[Array, "B T"]
) -> Float[Array, "B W KH"]:
    """The ring with the last W of `new` at their `positions`; position -1 (padding) is not written."""
    slots, window = ring.shape[:2]
    slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[:, None], positions.shape)
    end = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    first = jnp.maximum(end - window, 0)  # an older token would fight for a newer one's place
    return _write(ring, _flat(new), slot, positions % window, first, end)


def by_heads(stored: Float[Array, "Z Y KH"], kv_heads: int) -> Float[Array, "Z Y K H"]:
    """Keys or values as the attention op takes them: the same bytes."""
    return einops.rearrange(stored, "z y (k h) -> z y k h", k=kv_heads)


def as_pages(new: Float[Array, "B T K H"]) -> tuple[Float[Array, "P S K H"], Int32[Array, "B M"]]:
    """Keys or values of whole sequences as pages of their own, and the page table that says so: the same bytes."""
    padded = jnp.pad(new, ((0, 0), (0, -new.shape[1] % PAGE_TOKENS), (0, 0), (0, 0)))
    pages = einops.rearrange(padded, "b (m s) k h -> (b m) s k h", s=PAGE_TOKENS)
    table = jnp.arange(len(pages), dtype=jnp.int32)
    return pages, einops.rearrange(table, "(b m) -> b m", b=len(new))


def _flat(new: Float[Array, "B T K H"]) -> Float[Array, "B T KH"]:
    return einops.rearrange(new, "b t k h -> b t (k h)")


@jax.custom_vjp
def _write(
    stored: Float[Array, "Z Y KH"],
    new: Float[Array, "B T KH"],
    major: Int32[Array, "B T"],
    minor: Int32[Array, "B T"],
    first: Int32[Array, "B"],
    end: Int32[Array, "B"],
) -> Float[Array, "Z Y KH"]:
    """`stored` with tokens `first` to `end` of each slot's `new` at [major, minor]."""
    new = new.astype(stored.dtype)
    return jax.lax.platform_dependent(
        stored, new, major, minor, first, end, cpu=_write_slices, default=_write_scattered
    )


def _write_forward(stored, new, major, minor, first, end):
    return _write(stored, new, major, minor, first, end), (new[:0], major, minor, first, end)


def _write_backward(saved, gradient):
    """`new` gets the gradient of the places it was written to; `stored` gets zero there."""
    none, major, minor, first, end = saved
    new = jnp.where(_is_written(major, first, end)[..., None], gradient[major, minor], 0).astype(none.dtype)
    return _write(gradient, jnp.zeros_like(new), major, minor, first, end), new, None, None, None, None


_write.defvjp(_write_forward, _write_backward)


def _is_written(major: Int32[Array, "B T"], first: Int32[Array, "B"], end: Int32[Array, "B"]) -> Bool[Array, "B T"]:
    ordinal = jnp.arange(major.shape[1], dtype=jnp.int32)
    return (ordinal >= first[:, None]) & (ordinal < end[:, None])


def _write_scattered(stored, new, major, minor, first, end):
    written = _is_written(major, first, end)
    major = jnp.where(written, major, stored.shape[0])  # beyond the array: dropped
    return stored.at[major, minor].set(new, mode="drop")


def _write_slices(stored, new, major, minor, first, end):
    """Token by token, in place, as bits: XLA:CPU takes bfloat16 through a float32 copy of the whole cache.

    It does so for a scatter, which an indexed update is to it, and for a slice's update of bfloat16 numbers alike.
    """
    bits = jnp.dtype(f"uint{8 * stored.dtype.itemsize}")

    def write_token(slot, token, stored):
        at = (major[slot, token], minor[slot, token], 0)
        update = jax.lax.bitcast_convert_type(new[slot, token][None, None], bits)
        written = jax.lax.dynamic_update_slice(jax.lax.bitcast_convert_type(stored, bits), update, at)
        return jax.lax.bitcast_convert_type(written, stored.dtype)

    def write_slot(slot, stored):
        return jax.lax.fori_loop(first[slot], end[slot], functools.partial(write_token, slot), stored)

    return jax.lax.fori_loop(0, new.shape[0], write_slot, stored)
