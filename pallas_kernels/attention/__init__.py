"""Attention with a sink per query head, over pages or over a sliding window: what it takes and gives, who can do it.

    attend(q, kv: PagedKV | RingKV, positions, sinks) -> Attended(out, lse)

`contract.py` says what each of these is, `reference.py` in jnp what the op means. A back end is one file beside these,
or in cpu_kernels, with a function of this signature, and one entry in `IMPLEMENTATIONS`.

For training, `packed.py` has attention over packed rows: `attend_packed(q, k, v, places, sinks, *, window) -> out`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cpu_kernels import attention as cpu
from pallas_kernels.attention import reference
from pallas_kernels.attention.contract import Attend, Attended, PagedKV, RingKV, merge
from pallas_kernels.attention.gradient import differentiable
from pallas_kernels.attention.packed import PACKED, AttendPacked, Places, attend_packed, choose_packed
from pallas_kernels.choice import Choice, Hardware, Implementations, KernelError, best, by_name


def _reference() -> Attend:
    return differentiable(reference.attend)


def _cpu() -> Attend:
    return differentiable(cpu.attend)


# Kernels for devices are jitted, so that all layers of a program share one: lowering it takes Python half a second.
def _gpu() -> Attend:
    from pallas_kernels.attention import gpu

    return differentiable(jax.jit(gpu.attend))


def _gpu_interpreted() -> Attend:
    from pallas_kernels.attention import gpu
    from pallas_kernels.interpreter import InterpretGPUParams

    return differentiable(functools.partial(gpu.attend, interpret=InterpretGPUParams()))


def _tpu() -> Attend:
    from pallas_kernels.attention import tpu

    return differentiable(jax.jit(tpu.attend))


def _tpu_interpreted() -> Attend:
    from pallas_kernels.attention import tpu
    from pallas_kernels.interpreter import InterpretTPUParams

    return differentiable(functools.partial(tpu.attend, interpret=InterpretTPUParams()))


IMPLEMENTATIONS = Implementations[Attend](
    {
        "reference": _reference,
        "cpu": _cpu,
        "gpu": _gpu,
        "gpu-interpreted": _gpu_interpreted,
        "tpu": _tpu,
        "tpu-interpreted": _tpu_interpreted,
    }
)


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


__all__ = [
    "IMPLEMENTATIONS",
    "PACKED",
    "Attend",
    "AttendPacked",
    "Attended",
    "PagedKV",
    "Places",
    "RingKV",
    "attend_packed",
    "choose",
    "choose_packed",
    "merge",
]
