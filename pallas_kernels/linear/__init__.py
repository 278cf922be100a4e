"""Matrix products with dense (bfloat16 or int8) weights: what the operation takes and promises, and who can do it.

A back end is one file beside this one, or in cpu_kernels, with a function of the same signature, and one entry in
`IMPLEMENTATIONS`.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Real

from cpu_kernels.linear import linear as cpu_linear
from pallas_kernels.choice import Choice, best, by_name
from pallas_kernels.linear import reference, streamed


@runtime_checkable
class Linear(Protocol):
    """x [T, I] times w [O, I] transposed: operands in x's dtype, sums and result in float32.

    int8 weights are whole numbers here, exact in any x's dtype; what an output is to be scaled by is the caller's.
    """

    def __call__(self, x: Float[Array, "T I"], w: Real[Array, "O I"]) -> Float[Array, "T O"]:  # noqa: D102
        ...


IMPLEMENTATIONS: dict[str, Linear] = {"reference": reference.linear, "streamed": streamed.linear, "cpu": cpu_linear}


def choose(name: str, platform: str) -> Choice:
    """The implementation called `name`, or for "auto" the best on `platform`.

    Raises:
        ValueError: no implementation has that name, or it cannot run here.
    """
    if name == "auto":
        otherwise = Choice("reference", reference.linear, f"no kernel of our own for {platform}")
        if platform == "cpu":
            otherwise = Choice("streamed", streamed.linear, "XLA:CPU would keep float32 copies of the weights")
        return best(platform, IMPLEMENTATIONS, otherwise)
    return by_name("linear", IMPLEMENTATIONS, name, platform)


__all__ = ["IMPLEMENTATIONS", "Linear", "choose"]
