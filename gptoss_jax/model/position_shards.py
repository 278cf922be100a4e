"""Keys and values cut by position: which of a sequence's tokens a device holds, and how the parts' attentions meet.

Where a mesh cuts positions into n shards, a page of the full-attention layers' pool is n runs of 64 tokens, of which
shard s holds run s. So every shard has its part of every sequence whatever its length, page tables and pools of pages
are as without, and on a device the pool looks like any other: its own tokens, in order. Each token is stored by one
shard; every shard attends with all queries to its own keys, and `merged` makes one softmax of the parts.

Rings of sliding-window layers are not cut: it would save little of 128 tokens a slot, and cost a merge in each of these
layers.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from gptoss_jax.model.mesh import PAGE_TOKENS
from gptoss_jax.model.sharding import Sharding
from pallas_kernels.attention import Attended


class PositionShard(NamedTuple):
    """One device's part of the positions.

    Example: 2 shards. Positions 0 to 63 and 128 to 191 are those of shard 0, its keys 0 to 127; of its keys, a query at
    position 100 sees those up to 63, and one at position 130 those up to 66.
    """

    shard: Int32[Array, ""] | int  # which of them
    shards: int

    def last_seen(self, positions: Int32[Array, "B T"]) -> Int32[Array, "B T"]:
        """Of queries at `positions`, the last of this shard's keys that each sees, counted in the shard; -1: none."""
        page, rest = positions // self._page_tokens, positions % self._page_tokens
        seen = page * PAGE_TOKENS + jnp.clip(rest - self.shard * PAGE_TOKENS + 1, 0, PAGE_TOKENS)
        return jnp.where(positions < 0, -1, seen - 1)

    def holds(self, positions: Int32[Array, "B T"]) -> Bool[Array, "B T"]:
        """Whether tokens at `positions` are stored here; padding, at -1, is not."""
        return (positions >= 0) & (positions % self._page_tokens // PAGE_TOKENS == self.shard)

    def own(
        self, new: tuple[Float[Array, "B T K H"], ...], positions: Int32[Array, "B T"]
    ) -> tuple[tuple[Float[Array, "B T K H"], ...], Int32[Array, "B T"]]:
        """Of `new`, the tokens that are stored here, before the others; and where, counted in the shard, or -1."""
        is_own = self.holds(positions)
        stored = jnp.where(is_own, self.last_seen(positions), -1)
        if positions.shape[1] == 1:
            return new, stored
        order = jnp.argsort(~is_own, axis=1, stable=True).astype(jnp.int32)
        moved = tuple(jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in new)
        return moved, jnp.take_along_axis(stored, order, axis=1)

    def sinks(self, sinks: Float[Array, "N"]) -> Float[Array, "N"]:
        """The sinks, on the first shard alone: each is one logit of the whole softmax."""
        return jnp.where(self.shard == 0, sinks, jnp.full_like(sinks, -jnp.inf))

    @property
    def _page_tokens(self) -> int:
        return self.shards * PAGE_TOKENS


def merged(part: Attended, sharding: Sharding) -> Float[Array, "B T N H"]:
    """Inside `Sharding.map`: attention to all keys, float32, from each shard's to its own, as `attention.merge`."""
    top = sharding.max_over(lax.stop_gradient(part.lse), "positions")
    weight = jnp.exp(part.lse - jnp.where(jnp.isneginf(top), 0, top))
    value = part.out.astype(jnp.float32) * weight[..., None]
    total, value = sharding.sum_over((weight, value), "positions")
    return value / jnp.where(total == 0, 1, total)[..., None]
