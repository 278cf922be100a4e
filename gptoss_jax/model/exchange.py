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


class LocalExperts(NamedTuple):
    """The experts of one device.

    Attributes:
        run: what they add for M tokens, float32 [M, D], of x [M, D], the experts that each token is assigned to and
            their routing weights, [M, X]. Experts are numbered over all devices; an assignment to one that lives
            elsewhere, or to -1, adds nothing.
        per_device: how many each device has, in the order of the shards.
    """

    run: Callable[[Float[Array, "M D"], Int32[Array, "M X"], Float[Array, "M X"]], Float[Array, "M D"]]
    per_device: int


Exchange = Callable[
    [Sharding, LocalExperts, Float[Array, "M D"], Int32[Array, "M X"], Float[Array, "M X"]], Float[Array, "M D"]
]
"""What all experts add for a batch shard's M tokens, the same on every device that shares those.

Takes the mesh, this device's experts, and x, expert ids and routing weights, which every device that shares the tokens
has alike. M is the slots of a shard times the width of a step: it need not divide by anything.
"""


def sum_outputs(
    sharding: Sharding,
    experts: LocalExperts,
    x: Float[Array, "M D"],
    expert_ids: Int32[Array, "M X"],
    routing_weights: Float[Array, "M X"],
) -> Float[Array, "M D"]:
    """Every device runs its own experts on all tokens, and one sum adds what they give."""
    return sharding.sum_over(experts.run(x, expert_ids, routing_weights), "experts", "expert_hidden")


def gather_tokens(
    sharding: Sharding,
    experts: LocalExperts,
    x: Float[Array, "M D"],
    expert_ids: Int32[Array, "M X"],
    routing_weights: Float[Array, "M X"],
) -> Float[Array, "M D"]:
    """Every device runs its own experts on the tokens of all batch shards, and each shard gets the sum for its own."""
    shared = tuple(axis for axis in sharding.cut("experts") if axis in sharding.cut("batch"))
    if not shared:
        return sum_outputs(sharding, experts, x, expert_ids, routing_weights)
    gathered = (jax.lax.all_gather(array, shared, tiled=True) for array in (x, expert_ids, routing_weights))
    y = jax.lax.psum_scatter(experts.run(*gathered), shared, scatter_dimension=0, tiled=True)
    others = tuple(axis for axis in sharding.cut("experts", "expert_hidden") if axis not in shared)
    return jax.lax.psum(y, others) if others else y


def send_tokens(
    sharding: Sharding,
    experts: LocalExperts,
    x: Float[Array, "M D"],
    expert_ids: Int32[Array, "M X"],
    routing_weights: Float[Array, "M X"],
) -> Float[Array, "M D"]:
    """Every token goes to the devices that have experts of it, once to each, and what they add comes back.

    Devices that have the same tokens each send a share of them. No token is dropped: a parcel has room for all.
    """
    if not sharding.cut("experts"):
        return sum_outputs(sharding, experts, x, expert_ids, routing_weights)
    alike = tuple(axis for axis in sharding.cut("experts") if axis not in sharding.cut("batch"))
    tokens = x.shape[0]
    x, ids, weights = (
        _own_share(sharding, alike, array, padding)
        for array, padding in ((x, 0), (expert_ids, -1), (routing_weights, 0))
    )
    shards = sharding.size("experts")
    is_for = ids // experts.per_device == jnp.arange(shards, dtype=jnp.int32)[:, None, None]  # [shards, tokens, X]
    dispatch = _Dispatch.of(sharding, is_for.any(-1))
    x, ids, weights = (dispatch.to_experts(array) for array in (x, ids, weights))
    y = dispatch.and_back(experts.run(x, jnp.where(dispatch.arrived[:, None], ids, -1), weights))
    y = sharding.sum_over(y, "expert_hidden")
    return jax.lax.all_gather(y, alike, tiled=True)[:tokens] if alike else y


IMPLEMENTATIONS: Mapping[str, Exchange] = {
    "sum": sum_outputs,
    "gather": gather_tokens,
    "all_to_all": send_tokens,
}
"""By the names of `mesh.EXCHANGES`."""


def _own_share(sharding: Sharding, alike: tuple[str, ...], array: Shaped[Array, "M N"], padding: int) -> Array:
    """Of rows that the devices along `alike` all have, those that this device deals with: [ceil(M / devices), N]."""
    if not alike:
        return array
    devices = math.prod(sharding.mesh.shape[axis] for axis in alike)
    share = -(-array.shape[0] // devices)
    padded = jnp.pad(array, ((0, devices * share - array.shape[0]), (0, 0)), constant_values=padding)
    return jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(alike) * share, share)


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

    def to_experts(self, rows: Shaped[Array, "M N"]) -> Shaped[Array, "SM N"]:
        """Rows of this device -> those that came from each device; see `arrived`."""
        return self._exchanged(rows[self.order], self.sending, self.arriving).reshape(-1, rows.shape[-1])

    @property
    def arrived(self) -> Bool[Array, "SM"]:
        """Which rows of `to_experts` somebody has sent."""
        return (jnp.arange(self.order.shape[1], dtype=jnp.int32) < self.arriving[:, None]).reshape(-1)

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
