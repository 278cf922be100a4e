"""Attention with a sink per query head, over a paged pool or over a ring: what it takes and promises, who can do it.

B rows, T query tokens, N query heads, K key/value heads (query head n reads head n // (N / K)), H head size, P pages of
S tokens, M pages per row, W slots of the ring (the window). A query's `positions` count from the start of its row; -1
says padding, whose output is 0. The sink is one more logit per query head in the softmax, unscaled, with no value.
A back end is one file beside this one with functions of the same signatures, and one entry in `IMPLEMENTATIONS`.
"""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from cpu_kernels import attention as cpu
from pallas_kernels.attention import gpu, reference, tpu
from pallas_kernels.attention.gradient import differentiable_banded, differentiable_paged
from pallas_kernels.choice import Choice, Hardware, KernelError, best, by_name
from pallas_kernels.interpreter import InterpretGPUParams


@runtime_checkable
class PagedAttention(Protocol):
    """Every key up to the query's own position, which the pool already holds. Memory is O(block), not O(context)."""

    def __call__(  # noqa: D102
        self,
        q: Float[Array, "B T N H"],
        k_pages: Float[Array, "P S K H"],
        v_pages: Float[Array, "P S K H"],
        page_table: Int32[Array, "B M"],
        positions: Int32[Array, "B T"],
        sinks: Float[Array, "N"],
    ) -> Float[Array, "B T N H"]: ...


@runtime_checkable
class BandedAttention(Protocol):
    """The last W keys up to the query's own position: T new ones, and those that the ring held before them.

    Position p lives in slot p % W; the ring is as it was before the new keys, and `start` counts the tokens behind it.
    """

    def __call__(  # noqa: D102
        self,
        q: Float[Array, "B T N H"],
        k_ring: Float[Array, "B W K H"],
        v_ring: Float[Array, "B W K H"],
        k_new: Float[Array, "B T K H"],
        v_new: Float[Array, "B T K H"],
        start: Int32[Array, "B"],
        positions: Int32[Array, "B T"],
        sinks: Float[Array, "N"],
    ) -> Float[Array, "B T N H"]: ...


class Attention(NamedTuple):
    """One implementation of both forms."""

    paged: PagedAttention
    banded: BandedAttention


def _with_gradient(paged: PagedAttention, banded: BandedAttention) -> Attention:
    return Attention(differentiable_paged(paged), differentiable_banded(banded))


def _for_device(paged: PagedAttention, banded: BandedAttention) -> Attention:
    """Kernels that all layers of a program share: lowering one takes Python half a second."""
    return _with_gradient(jax.jit(paged), jax.jit(banded))


IMPLEMENTATIONS: dict[str, Attention] = {
    "reference": _with_gradient(reference.paged_attention, reference.banded_attention),
    "cpu": _with_gradient(cpu.paged_attention, cpu.banded_attention),
    "gpu": _for_device(gpu.paged_attention, gpu.banded_attention),
    "gpu-interpreted": _with_gradient(
        functools.partial(gpu.paged_attention, interpret=InterpretGPUParams()),
        functools.partial(gpu.banded_attention, interpret=InterpretGPUParams()),
    ),
    "tpu": _for_device(tpu.paged_attention, tpu.banded_attention),
    "tpu-interpreted": _with_gradient(
        functools.partial(tpu.paged_attention, interpret=pltpu.InterpretParams()),
        functools.partial(tpu.banded_attention, interpret=pltpu.InterpretParams()),
    ),
}


def choose(name: str, hardware: Hardware, dtype: DTypeLike = jnp.bfloat16) -> Choice:
    """The implementation called `name`, or for "auto" the best on `hardware` for queries, keys and values of `dtype`.

    Raises:
        KernelError: no implementation has that name, or it cannot run here, or not exactly.
    """
    rounds = "a GPU's tensor cores would round float32" if dtype == jnp.float32 else None
    if name == "auto":
        otherwise = Choice("reference", IMPLEMENTATIONS["reference"], "portable jnp")
        if rounds and hardware.platform == "gpu":
            return otherwise._replace(reason=f"{otherwise.reason}; {rounds}")
        return best(IMPLEMENTATIONS, hardware, otherwise)
    choice = by_name("attention", IMPLEMENTATIONS, name, hardware)
    if rounds and name == "gpu":
        raise KernelError(f"attention kernel {name!r} cannot run: {rounds}; auto takes the best that can")
    return choice


__all__ = ["IMPLEMENTATIONS", "Attention", "BandedAttention", "PagedAttention", "choose"]
