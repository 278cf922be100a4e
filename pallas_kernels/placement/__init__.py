"""What is done to a decoded token's projections before attention: bias, rotation, and the write to the cache, in one.

    place(projected, bias, turns, stored, positions) -> queries, keys, values

A back end is one file beside this one with a function of the same signature, and one entry in `IMPLEMENTATIONS`: under
the name of the attention kernel that it goes with, as the two are chosen together. Where there is none, the model does
it step by step.
"""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.choice import Implementations


class Stored(NamedTuple):
    """A layer's keys and values as the cache holds them, in pages of S tokens, M of them for a sequence.

    Position p stands in place p % S of the page of p // S, modulo M: a ring is one page, round which positions go.
    """

    k: Float[Array, "P S KH"]
    v: Float[Array, "P S KH"]
    page_table: Int32[Array, "B M"]


@runtime_checkable
class Place(Protocol):
    """Of B tokens: rotated queries of the cache's dtype, and the stored keys and values with the tokens' in them.

    `projected` holds for each of K key/value heads its G query heads, its key and its value, as products without bias;
    everything is added and rotated in float32, pair i of a head's size, (i, i + H / 2), by the angles whose cosines and
    sines `turns` has. A token at position -1 is padding, and is not written. All else that is
    stored stays, in place where the caller gives its buffers away.
    """

    def __call__(  # noqa: D102
        self,
        projected: Float[Array, "B K G2 H"],
        bias: Float[Array, "K G2 H"],
        turns: Float[Array, "B 2 J"],
        stored: Stored,
        positions: Int32[Array, "B"],
    ) -> tuple[Float[Array, "B K G H"], Float[Array, "P S KH"], Float[Array, "P S KH"]]: ...


def _gpu() -> Place:
    from pallas_kernels.placement import gpu

    return jax.jit(gpu.place)


def _gpu_interpreted() -> Place:
    from pallas_kernels.interpreter import InterpretGPUParams
    from pallas_kernels.placement import gpu

    return jax.jit(functools.partial(gpu.place, interpret=InterpretGPUParams()))


IMPLEMENTATIONS = Implementations[Place]({"gpu": _gpu, "gpu-interpreted": _gpu_interpreted})
