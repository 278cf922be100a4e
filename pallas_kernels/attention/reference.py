"""What attention means, in jnp: a softmax over keys taken block by block, each query head's sink entering once.

Portable and right rather than fast; the kernels are tested against it.
"""

from typing import NamedTuple

import einops
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.attention.contract import Attended, PagedKV, RingKV

KEYS_PER_BLOCK = 512
LOWEST = -1e30  # what a sink of -inf counts as: far below any logit, and finite, so that nothing is ever inf - inf


def attend(
    q: Float[Array, "B T N H"], kv: PagedKV | RingKV, positions: Int32[Array, "B T"], sinks: Float[Array, "N"]
) -> Attended:
    """See `pallas_kernels.attention.Attend`. Operands of different dtypes meet in the wider one, which is exact."""
    if isinstance(kv, PagedKV):
        return Blocks.of(q, kv, positions).attend(sinks).attended(positions)
    return _sliding_window(q, kv, positions, sinks)


# ---- the softmax ----


class Softmax(NamedTuple):
    """A softmax-weighted sum under way (Milakov and Gimelshein, arXiv:1805.02867): what the keys so far amount to."""

    top: Float[Array, "B K G T"]  # largest logit
    total: Float[Array, "B K G T"]  # sum of exp(logit - top)
    value: Float[Array, "B K G T H"]  # sum of exp(logit - top) * value

    @classmethod
    def of_sinks(cls, sinks: Float[Array, "N"], q: Float[Array, "B T K G H"]) -> "Softmax":
        """Before any key: the sink is the only logit, and it has no value."""
        b, t, k, g, h = q.shape
        top = jnp.maximum(sinks.astype(jnp.float32), LOWEST).reshape(1, k, g, 1)
        top = jnp.broadcast_to(top, (b, k, g, t))
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
        value = jnp.einsum("bkgts,bskh->bkgth", weights, v.astype(jnp.float32), precision="highest")
        return Softmax(top, self.total * shrink + weights.sum(-1), self.value * shrink[..., None] + value)

    def attended(self, positions: Int32[Array, "B T"]) -> Attended:
        """The weighted means of the values taken in, the sink's share going to none."""
        out = einops.rearrange(self.value / self.total[..., None], "b k g t h -> b t (k g) h")
        lse = einops.rearrange(self.top + jnp.log(self.total), "b k g t -> b t (k g)")
        return Attended(out, jnp.where(positions[..., None] < 0, -jnp.inf, lse))


def grouped(q: Float[Array, "B T N *H"], num_kv_heads: int) -> Float[Array, "B T K G *H"]:
    """Query heads beside the others of their key/value head."""
    return einops.rearrange(q, "b t (k g) ... -> b t k g ...", k=num_kv_heads)


def logits_of(
    q: Float[Array, "B T K G H"], k: Float[Array, "B S K H"], visible: Bool[Array, "B T S"]
) -> Float[Array, "B K G T S"]:
    """Scaled products of queries and keys; -inf where a key is not visible."""
    wider = q.dtype if q.dtype == k.dtype else jnp.float32
    logits = jnp.einsum(
        "btkgh,bskh->bkgts", q.astype(wider), k.astype(wider), precision="highest", preferred_element_type=jnp.float32
    )
    return jnp.where(visible[:, None, None], logits * q.shape[-1] ** -0.5, -jnp.inf)


def seen(x: Float[Array, "B S K H"], visible: Bool[Array, "B T S"]) -> Float[Array, "B S K H"]:
    """Keys or values, 0 where no query sees them: what an earlier owner left in a page may be NaN."""
    return jnp.where(jnp.any(visible, axis=1)[..., None, None], x, jnp.zeros_like(x))


# ---- pages ----


class Blocks(NamedTuple):
    """The keys that some queries see, in blocks of a few pages of each sequence."""

    q: Float[Array, "B T K G H"]
    kv: PagedKV
    positions: Int32[Array, "B T"]
    pages: int  # of each sequence in a block
    number: Int32[Array, ""]  # blocks that the longest sequence has keys in

    @classmethod
    def of(cls, q: Float[Array, "B T N H"], kv: PagedKV, positions: Int32[Array, "B T"]) -> "Blocks":
        """Cuts, into about KEYS_PER_BLOCK keys each."""
        page_tokens, kv_heads = kv.k.shape[1:3]
        pages = max(1, KEYS_PER_BLOCK // page_tokens)
        keys = pages * page_tokens
        return cls(grouped(q, kv_heads), kv, positions, pages, (jnp.max(positions) + keys) // keys)

    def take(self, i: Int32[Array, ""]) -> tuple[Array, Array, Array, Bool[Array, "B T S"]]:
        """Block i: its pages [B, pages], its keys and values [B, S, K, H], and which of them each query sees."""
        page = i * self.pages + jnp.arange(self.pages, dtype=jnp.int32)
        table = self.kv.page_table
        at = table[:, jnp.minimum(page, table.shape[1] - 1)]  # repeats lie beyond every position
        keys = self.pages * self.kv.k.shape[1]
        visible = i * keys + jnp.arange(keys, dtype=jnp.int32) <= self.positions[..., None]
        k, v = (seen(_take(pool, at), visible) for pool in (self.kv.k, self.kv.v))
        return at, k, v, visible

    def attend(self, sinks: Float[Array, "N"]) -> Softmax:
        """The softmax over all blocks."""

        def add_block(i: Int32[Array, ""], softmax: Softmax) -> Softmax:
            _, k, v, visible = self.take(i)
            return softmax.add(self.q, k, v, visible)

        return lax.fori_loop(0, self.number, add_block, Softmax.of_sinks(sinks, self.q))


def _take(pool: Float[Array, "P S K H"], at: Int32[Array, "B C"]) -> Float[Array, "B CS K H"]:
    """The pages `at`, as a run of keys. The barrier ties the pool to what the loop changes.

    XLA:CPU would lift a float32 copy of it out of the loop.
    """
    pool, at = lax.optimization_barrier((pool, at))
    return pool[at].reshape(at.shape[0], -1, *pool.shape[2:])


# ---- the sliding window ----


def _sliding_window(
    q: Float[Array, "B T N H"], kv: RingKV, positions: Int32[Array, "B T"], sinks: Float[Array, "N"]
) -> Attended:
    """Queries go in blocks of at most W, so that work is O(T W)."""
    tokens, (window, kv_heads) = q.shape[1], kv.k.shape[1:3]
    block = min(tokens, window)
    padding = -tokens % block
    k = _pad_tokens(jnp.concatenate([_in_order(kv.k, kv.start), kv.k_new], axis=1), padding)
    v = _pad_tokens(jnp.concatenate([_in_order(kv.v, kv.start), kv.v_new], axis=1), padding)
    q = _pad_tokens(q, padding)
    positions = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=-1)
    key_positions = kv.start[:, None] - window + jnp.arange(window + tokens + padding, dtype=jnp.int32)

    parts = []
    for first in range(0, tokens, block):
        keys, queries = slice(first, first + block + window), slice(first, first + block)
        distance = positions[:, queries, None] - key_positions[:, None, keys]
        visible = (distance >= 0) & (distance < window) & (key_positions[:, None, keys] >= 0)
        k_block, v_block = seen(k[:, keys], visible), seen(v[:, keys], visible)
        q_block = grouped(q[:, queries], kv_heads)
        softmax = Softmax.of_sinks(sinks, q_block).add(q_block, k_block, v_block, visible)
        parts.append(softmax.attended(positions[:, queries]))
    return Attended(*(jnp.concatenate(part, axis=1)[:, :tokens] for part in zip(*parts, strict=True)))


def _in_order(ring: Float[Array, "B W K H"], start: Int32[Array, "B"]) -> Float[Array, "B W K H"]:
    """The ring from its oldest slot, position start - W, to its newest, start - 1."""
    window = ring.shape[1]
    slots = (start[:, None] + jnp.arange(window, dtype=jnp.int32)) % window
    return jnp.take_along_axis(ring, slots[:, :, None, None], axis=1)


def _pad_tokens(x: Float[Array, "B T *rest"], tokens: int) -> Float[Array, "B U *rest"]:
    return jnp.pad(x, ((0, 0), (0, tokens), (0, 0), (0, 0)))
