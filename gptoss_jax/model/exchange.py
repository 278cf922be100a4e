"""How tokens meet experts that live on several devices: the collectives of a layer of experts, as a value.

A mesh names one of IMPLEMENTATIONS, or leaves it to the rule of `mesh.choose_exchange`; `Kernels.exchange` takes one of
one's own, as `docs/sharding.md` walks through. An exchange runs inside `Sharding.map`: on every device of the mesh,
with that device's own arrays.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped

from gptoss_jax.model.mesh import RAGGED_PLATFORMS
from gptoss_jax.model.sharding import Sharding

NOBODY = -1


class RoutedTokens(NamedTuple):
    """M tokens, and the experts that each is assigned to; an assignment to NOBODY is none.

    Attributes:
        x: their activations, as the experts take them.
        expert_ids: numbered over all devices.
        routing_weights: the shares by which what the experts give is added.
    """

    x: Float[Array, "M D"]
    expert_ids: Int32[Array, "M X"]
    routing_weights: Float[Array, "M X"]


class LocalExperts(NamedTuple):
    """The experts of one device.

    Attributes:
        run: what they add for M tokens, float32 [M, D]. An assignment to one that lives elsewhere adds nothing.
        per_device: how many each device has, in the order of the shards.
    """

    run: Callable[[RoutedTokens], Float[Array, "M D"]]
    per_device: int


Exchange = Callable[[Sharding, LocalExperts, RoutedTokens], Float[Array, "M D"]]
"""What all experts add for a batch shard's M tokens, the same on every device that shares those.

Takes the mesh, this device's experts, and the tokens, which every device that shares them has alike. M is the slots of
a shard times the width of a step: it need not divide by anything.
"""


def sum_outputs(sharding: Sharding, experts: LocalExperts, tokens: RoutedTokens) -> Float[Array, "M D"]:
    """Every device runs its own experts on all tokens, and one sum adds what they give."""
    return sharding.sum_over(experts.run(tokens), "experts", "expert_hidden")


def gather_tokens(sharding: Sharding, experts: LocalExperts, tokens: RoutedTokens) -> Float[Array, "M D"]:
    """Every device runs its own experts on the tokens of all batch shards, and each shard gets the sum for its own."""
    shared = tuple(axis for axis in sharding.cut("experts") if axis in sharding.cut("batch"))
    if not shared:
        return sum_outputs(sharding, experts, tokens)
    y = experts.run(jax.lax.all_gather(tokens, shared, tiled=True))
    y = jax.lax.psum_scatter(y, shared, scatter_dimension=0, tiled=True)
    others = tuple(axis for axis in sharding.cut("experts", "expert_hidden") if axis not in shared)
    return jax.lax.psum(y, others) if others else y


def send_tokens(sharding: Sharding, experts: LocalExperts, tokens: RoutedTokens) -> Float[Array, "M D"]:
    """Every token goes to the devices that have experts of it, once to each, and what they add comes back.

    Devices that have the same tokens each send a share of them. No token is dropped: a parcel has room for all.
    """
    if not sharding.cut("experts"):
        return sum_outputs(sharding, experts, tokens)
    alike = tuple(axis for axis in sharding.cut("experts") if axis not in sharding.cut("batch"))
    own = _own_share(sharding, alike, tokens)
    shards = jnp.arange(sharding.size("experts"), dtype=jnp.int32)
    is_for = own.expert_ids // experts.per_device == shards[:, None, None]  # [shards, tokens, X]
    dispatch = _Dispatch.of(sharding, is_for.any(-1))
    y = dispatch.and_back(experts.run(dispatch.to_experts(own)))
    y = sharding.sum_over(y, "expert_hidden")
    return jax.lax.all_gather(y, alike, tiled=True)[: len(tokens.x)] if alike else y


IMPLEMENTATIONS: Mapping[str, Exchange] = {
    "sum": sum_outputs,
    "gather": gather_tokens,
    "all_to_all": send_tokens,
}
"""By the names of `mesh.EXCHANGES`."""


def _own_share(sharding: Sharding, alike: tuple[str, ...], tokens: RoutedTokens) -> RoutedTokens:
    """Of tokens that the devices along `alike` all have, those that this device deals with: ceil(M / devices)."""
    if not alike:
        return tokens
    devices = math.prod(sharding.mesh.shape[axis] for axis in alike)
    share = -(-len(tokens.x) // devices)

    def of(array: Shaped[Array, "M N"], padding: int) -> Array:
        padded = jnp.pad(array, ((0, devices * share - len(array)), (0, 0)), constant_values=padding)
        return jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(alike) * share, share)

    return RoutedTokens(of(tokens.x, 0), of(tokens.expert_ids, NOBODY), of(tokens.routing_weights, 0))


class _Dispatch(NamedTuple):
    """Which rows go to which device of the experts, and the ways there and back.

    For each device there are M rows of which the first ones count, those that are meant for it: a ragged all-to-all
    sends no others, a plain one sends all. What arrives is the same but for rows that do not count.

    Attributes:
        sharding: the mesh.
        is_sent: of each device and row, whether it goes there.
        order: of each device, the rows that go there, in their order, and then the others.
        sending: how many go to each.
        arriving: how many come from each.
    """

    sharding: Sharding
    is_sent: Bool[Array, "S M"]
    order: Int32[Array, "S M"]
    sending: Int32[Array, "S"]
    arriving: Int32[Array, "S"]

    @classmethod
    def of(cls, sharding: Sharding, is_sent: Bool[Array, "S M"]) -> "_Dispatch":
        """Counts rows, and tells every device how many it will get."""
        order = jnp.argsort(~is_sent, axis=1, stable=True).astype(jnp.int32)
        sending = jnp.sum(is_sent, axis=1, dtype=jnp.int32)
        arriving = jax.lax.all_to_all(sending, sharding.cut("experts"), 0, 0, tiled=True)
        return cls(sharding, is_sent, order, sending, arriving)

    def to_experts(self, tokens: RoutedTokens) -> RoutedTokens:
        """This device's tokens -> room for M from each device; rows that nobody has sent are assigned to no expert."""
        there = [self._exchanged(rows[self.order], self.sending, self.arriving) for rows in tokens]
        came = RoutedTokens(*(rows.reshape(-1, rows.shape[-1]) for rows in there))
        is_sent = jnp.arange(self.order.shape[1], dtype=jnp.int32) < self.arriving[:, None]
        return came._replace(expert_ids=jnp.where(is_sent.reshape(-1, 1), came.expert_ids, NOBODY))

    def and_back(self, made: Float[Array, "SM N"]) -> Float[Array, "M N"]:
        """For each row of this device the sum of what was made of it, where it was sent."""
        made = made.reshape(*self.order.shape, -1)
        back = self._exchanged(made, self.arriving, self.sending)
        place = jnp.maximum(jnp.cumsum(self.is_sent, axis=1, dtype=jnp.int32) - 1, 0)
        rows = jnp.take_along_axis(back, place[..., None], axis=1)
        return jnp.sum(jnp.where(self.is_sent[..., None], rows, 0), axis=0)

    def _exchanged(self, rows: Array, sending: Array, arriving: Array) -> Array:
        """Of [S, M, N], M rows for each device become M rows from each."""
        axes, (shards, room) = self.sharding.cut("experts"), rows.shape[:2]
        if self.sharding.mesh.devices.flat[0].platform not in RAGGED_PLATFORMS:
            return jax.lax.all_to_all(rows, axes, 0, 0, tiled=True)
        flat = rows.reshape(shards * room, -1)
        begins = room * jnp.arange(shards, dtype=jnp.int32)
        there = jnp.full(shards, room * self.sharding.index("experts"), jnp.int32)  # where each device puts this one's
        # What arrives is written over a copy of what is sent: rows that do not count may hold anything, and zeros would
        # live from layer to layer on GPUs, more of them in each.
        return jax.lax.ragged_all_to_all(flat, flat, begins, sending, there, arriving, axis_name=axes).reshape(
            rows.shape
        )
