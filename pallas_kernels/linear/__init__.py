"""Matrix products with dense (bfloat16 or int8) weights: what the operation takes and promises, and who can do it.

A back end is one file beside this one, or in cpu_kernels, with a function of the same signature, and one entry in
`IMPLEMENTATIONS`.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Real

from cpu_kernels.linear import linear as cpu_linear
from pallas_kernels.choice import Choice, Hardware, best, by_name
from pallas_kernels.linear import reference, streamed
from pallas_kernels.linear.gradient import differentiable


@runtime_checkable
class Linear(Protocol):
    """x [T, I] times w [O, I] transposed: operands in x's dtype, sums and result in float32.

    int8 weights are whole numbers here, exact in any x's dtype; what an output is to be scaled by is the caller's.
    """

    def __call__(self, x: Float[Array, "T I"], w: Real[Array, "O I"]) -> Float[Array, "T O"]:  # noqa: D102
        ...


IMPLEMENTATIONS: dict[str, Linear] = {
    "reference": differentiable(reference.linear),
    "streamed": differentiable(streamed.linear),
    "cpu": differentiable(cpu_linear),
}


def choose(name: str, hardware: Hardware) -> Choice:
    """The implementation called `name`, or for "auto" the best on `hardware`.

    Raises:
        KernelError: no implementation has that name, or it cannot run here.
    """
    if name == "auto":
        otherwise = Choice("reference", IMPLEMENTATIONS["reference"], "a plain product is XLA's own business")
        if hardware.platform == "cpu":
            reason = "XLA:CPU would keep float32 copies of the weights"
            otherwise = Choice("streamed", IMPLEMENTATIONS["streamed"], reason)
        return best(IMPLEMENTATIONS, hardware, otherwise)
    return by_name("linear", IMPLEMENTATIONS, name, hardware)


__all__ = ["IMPLEMENTATIONS", "Linear", "choose"]
