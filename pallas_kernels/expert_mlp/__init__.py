"""The chosen experts' MLPs, from packed MXFP4: what the operation takes and promises, and who can do it.

A back end is one file beside this one, or in cpu_kernels, with a function of the same signature, and one entry in
`IMPLEMENTATIONS`.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int32

from cpu_kernels.expert_mlp import expert_mlp as cpu_expert_mlp
from pallas_kernels.choice import Choice, best, by_name
from pallas_kernels.expert_mlp import reference
from pallas_kernels.expert_mlp.reference import ExpertWeights


@runtime_checkable
class ExpertMlp(Protocol):
    """One implementation.

    Takes x [T, D], the experts that each token chose and their weights, [T, X], and the layer's `ExpertWeights`; gives
    sum_x weight_x * (down(swiglu(gate_up(x))) + down_bias), float32 [T, D]. Matrix products take operands of x's dtype
    and accumulate in float32. A choice outside [0, E) is skipped: that is how padding, and experts that live on
    another device, are said.
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


IMPLEMENTATIONS: dict[str, ExpertMlp] = {"reference": reference.expert_mlp, "cpu": cpu_expert_mlp}


def choose(name: str, platform: str) -> Choice:
    """The implementation called `name`, or for "auto" the best on `platform`.

    Raises:
        ValueError: no implementation has that name, or it cannot run here.
    """
    if name == "auto":
        otherwise = Choice("reference", reference.expert_mlp, f"no fused kernel for {platform} yet")
        return best(platform, IMPLEMENTATIONS, otherwise)
    return by_name("expert_mlp", IMPLEMENTATIONS, name, platform)


__all__ = ["IMPLEMENTATIONS", "ExpertMlp", "ExpertWeights", "choose"]
