"""The keys and values behind each row, as a pytree that steps take and give back.

Full-attention layers share a pool of pages, so that memory follows the tokens that are there; banded layers keep a
ring of the last `sliding_window` tokens per row, whatever the context. Knows no attention.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from gptoss_jax.config import ModelConfig
from gptoss_jax.sharding import Sharding

PAGE_TOKENS = 64


class KVCache(NamedTuple):
    """State of B rows. With data shards, rows and pages are cut alike, and a row's pages are of its own shard.

    Example: pages of 64 tokens, page_table[0] = [5, 2, 0, 0], lengths[0] = 70. Row 0's tokens 0 to 63 are page 5, its
    tokens 64 to 69 the first six slots of page 2; token 70 comes next. Its banded layers hold token p in slot p % 128.
    """

    k: tuple[
        Float[Array, "_ _ K H"], ...
    ]  # by layer: pages [P, S, K, H] where attention is full, else a ring [B, W, K, H]
    v: tuple[Float[Array, "_ _ K H"], ...]  # alike
    page_table: Int32[Array, "B M"]  # the page of each run of S tokens, counted within the row's data shard
    lengths: Int32[Array, "B"]  # tokens that the row holds

    def with_layer(self, i: int, k: Float[Array, "_ _ K H"], v: Float[Array, "_ _ K H"]) -> "KVCache":
        """The cache with layer i's keys and values replaced."""
        return self._replace(k=(*self.k[:i], k, *self.k[i + 1 :]), v=(*self.v[:i], v, *self.v[i + 1 :]))


def num_pages(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


def empty(config: ModelConfig, *, rows: int, pages: int, max_context_tokens: int, dtype: jnp.dtype) -> KVCache:
    """A cache of `rows` empty rows over a pool of `pages` pages, each row at most `max_context_tokens` long."""

    def layer(i: int) -> jax.Array:
        first = (rows, config.sliding_window) if config.is_banded(i) else (pages, PAGE_TOKENS)
        return jnp.zeros((*first, config.num_kv_heads, config.head_dim), dtype)

    return KVCache(
        k=tuple(layer(i) for i in range(config.num_layers)),
        v=tuple(layer(i) for i in range(config.num_layers)),
        page_table=jnp.zeros((rows, num_pages(max_context_tokens)), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
    )


def layout(config: ModelConfig, sharding: Sharding) -> KVCache:
    """Where each array of a cache lies on the mesh, as a KVCache of shardings."""
    layer = tuple(
        sharding.named(("rows" if config.is_banded(i) else "pages", None, "heads", None))
        for i in range(config.num_layers)
    )
    table, lengths = sharding.named(("rows", None)), sharding.named(("rows",))
    return KVCache(layer, layer, table, lengths)  # pyright: ignore[reportArgumentType]


def allocate(
    config: ModelConfig, sharding: Sharding, *, rows: int, pages: int, max_context_tokens: int, dtype: jnp.dtype
) -> KVCache:
    """An `empty` cache, made on the devices that hold its pieces."""
    make = functools.partial(empty, config, rows=rows, pages=pages, max_context_tokens=max_context_tokens, dtype=dtype)
    return jax.jit(make, out_shardings=layout(config, sharding))()


def write_pages(
    pages: Float[Array, "P S K H"],
    new: Float[Array, "B T K H"],
    page_table: Int32[Array, "B M"],
    positions: Int32[Array, "B T"],
) -> Float[Array, "P S K H"]:
    """The pool with `new` at its `positions`; position -1 (padding) is not written."""
    at = jnp.take_along_axis(page_table, jnp.maximum(positions, 0) // PAGE_TOKENS, axis=1)
    at = jnp.where(positions < 0, pages.shape[0], at)  # beyond the pool: dropped
    return pages.at[at, positions % PAGE_TOKENS].set(new.astype(pages.dtype), mode="drop")


def write_ring(
    ring: Float[Array, "B W K H"], new: Float[Array, "B T K H"], positions: Int32[Array, "B T"]
) -> Float[Array, "B W K H"]:
    """The ring with the last W of `new` at their `positions`; position -1 (padding) is not written."""
    rows, window = ring.shape[:2]
    newest = jnp.max(positions, axis=1, keepdims=True)
    kept = (positions >= 0) & (positions > newest - window)  # an older one would fight for a newer one's slot
    slot = jnp.where(kept, positions % window, window)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    return ring.at[row, slot].set(new.astype(ring.dtype), mode="drop")
