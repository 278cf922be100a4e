"""How tokens meet experts that live on several devices: the collectives of a layer of experts, as a value.

`Kernels.exchange` names one; `docs/sharding.md` walks through writing another. An exchange runs inside
`Sharding.map`: on every device of the mesh, with that device's own arrays.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int32

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
"""What all experts add for a data shard's M tokens, the same on every device that shares those.

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
