"""What attention means, in jnp: a softmax over keys taken block by block, each query head's sink entering once.

Portable and right rather than fast; the kernels are tested against it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

KEYS_PER_BLOCK = 512


class Softmax(NamedTuple):
    """A softmax-weighted sum under way (Milakov and Gimelshein, arXiv:1805.02867): what the keys so far amount to."""

    top: Float[Array, "B K G T"]  # largest logit
    total: Float[Array, "B K G T"]  # sum of exp(logit - top)
    value: Float[Array, "B K G T H"]  # sum of exp(logit - top) * value

    @classmethod
    def of_sinks(cls, sinks: Float[Array, "N"], q: Float[Array, "B T K G H"]) -> "Softmax":
        """Before any key: the sink is the only logit, and it has no value."""
        b, t, k, g, h = q.shape
        top = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, k, g, 1), (b, k, g, t))
        return cls(top, jnp.ones((b, k, g, t), jnp.float32), jnp.zeros((b, k, g, t, h), jnp.float32))

    def add(
        self,
        q: Float[Array, "B T K G H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        visible: Bool[Array, "B T S"],
    ) -> "Softmax":
        """Takes in one block of keys and values, those that are visible to each query."""
        logits = logits_of(q, k, visible)
        top = jnp.maximum(self.top, logits.max(-1))
        weights = jnp.exp(logits - top[..., None])
        shrink = jnp.exp(self.top - top)
        value = jnp.einsum("bkgts,bskh->bkgth", weights, seen(v, visible), precision="highest")
        return Softmax(top, self.total * shrink + weights.sum(-1), self.value * shrink[..., None] + value)

    def output(self) -> Float[Array, "B T N H"]:
        """The weighted mean of the values taken in, the sink's share going to none."""
        b, k, g, t, h = self.value.shape
        return (self.value / self.total[..., None]).transpose(0, 3, 1, 2, 4).reshape(b, t, k * g, h)


def logits_of(
    q: Float[Array, "B T K G H"], k: Float[Array, "B S K H"], visible: Bool[Array, "B T S"]
) -> Float[Array, "B K G T S"]:
    """Scaled products of queries and keys; -inf where a key is not visible."""
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, precision="highest", preferred_element_type=jnp.float32)
    return jnp.where(visible[:, None, None], logits * q.shape[-1] ** -0.5, -jnp.inf)


def seen(v: Float[Array, "B S K H"], visible: Bool[Array, "B T S"]) -> Float[Array, "B S K H"]:
    """v in float32, and 0 where no query sees it: what an earlier owner left in a page may be NaN."""
    return jnp.where(jnp.any(visible, axis=1)[..., None, None], v.astype(jnp.float32), 0)


def _grouped(q: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B T K G H"]:
    return q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[-1])


class Blocks(NamedTuple):
    """The keys behind some queries, as blocks of a few pages of each row."""

    q: Float[Array, "B T K G H"]
    k_pages: Float[Array, "P S K H"]
    v_pages: Float[Array, "P S K H"]
    page_table: Int32[Array, "B M"]
    positions: Int32[Array, "B T"]
    pages: int  # of each row in a block
    number: Int32[Array, ""]  # blocks that the longest row has keys in

    @classmethod
    def of(cls, q, k_pages, v_pages, page_table, positions) -> "Blocks":
        """Cuts, into about KEYS_PER_BLOCK keys each."""
        pages = max(1, KEYS_PER_BLOCK // k_pages.shape[1])
        keys = pages * k_pages.shape[1]
        number = (jnp.max(positions) + keys) // keys
        return cls(_grouped(q, k_pages.shape[2]), k_pages, v_pages, page_table, positions, pages, number)

    def take(self, i: Int32[Array, ""]) -> tuple[Array, Array, Array, Bool[Array, "B T S"]]:
        """Block i: its pages [B, pages], its keys and values [B, S, K, H], and which of them each query sees."""
        page = i * self.pages + jnp.arange(self.pages, dtype=jnp.int32)
        at = self.page_table[:, jnp.minimum(page, self.page_table.shape[1] - 1)]  # repeats lie beyond every position
        (rows, _), (_, page_tokens, *heads) = at.shape, self.k_pages.shape
        keys = self.pages * page_tokens
        k = _take(self.k_pages, at).reshape(rows, keys, *heads)
        v = _take(self.v_pages, at).reshape(rows, keys, *heads)
        key_positions = i * keys + jnp.arange(keys, dtype=jnp.int32)
        visible = key_positions <= self.positions[..., None]
        return at, k, seen(v, visible), visible

    def attend(self, sinks: Float[Array, "N"]) -> Softmax:
        """The softmax over all blocks."""

        def add_block(i: Int32[Array, ""], softmax: Softmax) -> Softmax:
            _, k, v, visible = self.take(i)
            return softmax.add(self.q, k, v, visible)

        return lax.fori_loop(0, self.number, add_block, Softmax.of_sinks(sinks, self.q))


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P S K H"],
    v_pages: Float[Array, "P S K H"],
    page_table: Int32[Array, "B M"],
    positions: Int32[Array, "B T"],
    sinks: Float[Array, "N"],
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.attention.PagedAttention`. Reads as many blocks as the longest row has keys."""
    return Blocks.of(q, k_pages, v_pages, page_table, positions).attend(sinks).output()


def _take(pages: Float[Array, "P S K H"], at: Int32[Array, "B C"]) -> Float[Array, "B C S K H"]:
    """pages[at]. The barrier ties the pool to what the loop changes: XLA:CPU would lift a float32 copy out of it."""
    pages, at = lax.optimization_barrier((pages, at))
    return pages[at]


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
    """See `pallas_kernels.attention.BandedAttention`. Queries go in blocks of at most W, so that work is O(T W)."""
    tokens, window = q.shape[1], k_ring.shape[1]
    block = min(tokens, window)
    padding = -tokens % block
    k = _pad_tokens(jnp.concatenate([_in_order(k_ring, start), k_new], axis=1), padding)
    v = _pad_tokens(jnp.concatenate([_in_order(v_ring, start), v_new], axis=1), padding)
    q = _pad_tokens(q, padding)
    positions = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=-1)
    key_positions = start[:, None] - window + jnp.arange(window + tokens + padding, dtype=jnp.int32)

    outputs = []
    for first in range(0, tokens, block):
        keys, queries = slice(first, first + block + window), slice(first, first + block)
        distance = positions[:, queries, None] - key_positions[:, None, keys]
        visible = (distance >= 0) & (distance < window) & (key_positions[:, None, keys] >= 0)
        q_block = _grouped(q[:, queries], k_ring.shape[2])
        softmax = Softmax.of_sinks(sinks, q_block).add(q_block, k[:, keys], v[:, keys], visible)
        outputs.append(softmax.output())
    return jnp.concatenate(outputs, axis=1)[:, :tokens]


def _in_order(ring: Float[Array, "B W K H"], start: Int32[Array, "B"]) -> Float[Array, "B W K H"]:
    """The ring from its oldest slot, position start - W, to its newest, start - 1."""
    window = ring.shape[1]
    slots = (start[:, None] + jnp.arange(window, dtype=jnp.int32)) % window
    return jnp.take_along_axis(ring, slots[:, :, None, None], axis=1)


def _pad_tokens(x: Float[Array, "B T *rest"], tokens: int) -> Float[Array, "B U *rest"]:
    return jnp.pad(x, ((0, 0), (0, tokens), (0, 0), (0, 0)))
