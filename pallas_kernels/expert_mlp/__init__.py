"""The chosen experts' MLPs, from packed MXFP4: what the operation takes and promises, and who can do it.

A back end is one file beside this one, or in cpu_kernels, with a function of the same signature, and one entry in
`IMPLEMENTATIONS`.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int32

from cpu_kernels.expert_mlp import expert_mlp as cpu_expert_mlp
from pallas_kernels.choice import Choice, Hardware, best, by_name
from pallas_kernels.expert_mlp import reference
from pallas_kernels.expert_mlp.gradient import differentiable
from pallas_kernels.expert_mlp.layout import (
    AS_PUBLISHED,
    PUBLISHED,
    ExpertWeights,
    Layout,
    Rearrangement,
    packed,
    packed_axes,
    published,
)


@runtime_checkable
class RunExperts(Protocol):
    """What an implementation does.

    Takes x [T, D], the experts that each token chose and their weights, [T, X], and the layer's `ExpertWeights`, in the
    implementation's layout; gives sum_x weight_x * (down(swiglu(gate_up(x))) + down_bias), float32 [T, D]. Matrix
    products take operands of x's dtype and accumulate in float32. A choice outside [0, E) is skipped: that is how
    padding, and experts that live on another device, are said.
    """

    def __call__(  # noqa: D102
        self,
        x: Float[Array, "T D"],
        expert_ids: Int32[Array, "T X"],
        expert_weights: Float[Array, "T X"],
        weights: ExpertWeights,
        *,
        limit: float,
    ) -> Float[Array, "T D"]: ...


class ExpertMlp(NamedTuple):
    """One implementation, and how it wants the weights to lie."""

    run: RunExperts
    layout: Layout = PUBLISHED


def _with_gradient(run: RunExperts, layout: Layout = PUBLISHED) -> ExpertMlp:
    return ExpertMlp(differentiable(run, layout), layout)


IMPLEMENTATIONS: dict[str, ExpertMlp] = {
    "reference": _with_gradient(reference.expert_mlp),
    "cpu": _with_gradient(cpu_expert_mlp),
}


def choose(name: str, hardware: Hardware) -> Choice:
    """The implementation called `name`, or for "auto" the best on `hardware`.

    Raises:
        ValueError: no implementation has that name, or it cannot run here.
    """
    if name == "auto":
        otherwise = Choice("reference", IMPLEMENTATIONS["reference"], "portable jnp")
        return best(IMPLEMENTATIONS, hardware, otherwise)
    return by_name("expert_mlp", IMPLEMENTATIONS, name, hardware)


__all__ = [
    "AS_PUBLISHED",
    "IMPLEMENTATIONS",
    "ExpertMlp",
    "ExpertWeights",
    "Layout",
    "Rearrangement",
    "RunExperts",
    "choose",
    "packed",
    "packed_axes",
    "published",
]
