"""Attention over packed rows for CPUs, and its gradient: blocks of keys that no query of a block sees cost nothing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

import cpu_kernels

_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def attend_packed(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    places: tuple[Int32[Array, "B T"], ...],
    sinks: Float[Array, "N"],
    *,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.attention.AttendPacked`, whose `Places` the `places` are. Sums are in float32.

    The bits of output and gradients are the same on every run, whatever the number of threads.

    Raises:
        TypeError: a dtype that is neither float32 nor bfloat16.
        ValueError: a window below 1.
        cpu_kernels.Unavailable: the library was not built.
    """
    for name, array in (("q", q), ("k", k), ("v", v), ("sinks", sinks)):
        if array.dtype not in _DTYPES:
            raise TypeError(f"packed attention: {name} of {array.dtype}, expected float32 or bfloat16")
    if window is not None and window < 1:
        raise ValueError(f"packed attention: window {window}, expected at least 1, or None")
    cpu_kernels.library()
    return _attend(window or 0, q, k, v, places, sinks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(window: int, *arguments: Any) -> Float[Array, "B T N H"]:
    return _forward(window, *arguments)[0]


def _forward(window: int, *arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    q, k, v, places, sinks = arguments
    results = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    call = jax.ffi.ffi_call("cpu_kernels_packed_attention", results)
    out, lse = call(q, k, v, *places, sinks, window=np.int64(window))
    return out, (arguments, out, lse)


def _backward(window: int, saved: tuple[Any, ...], d_out: Float[Array, "B T N H"]) -> tuple[Any, ...]:
    (q, k, v, places, sinks), out, lse = saved
    differentiated = q, k, v, sinks
    results = [jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in differentiated]
    call = jax.ffi.ffi_call("cpu_kernels_packed_attention_gradient", results)
    found = call(q, k, v, *places, sinks, out, lse, d_out, window=np.int64(window))
    dq, dk, dv, d_sinks = (d.astype(array.dtype) for d, array in zip(found, differentiated, strict=True))
    return dq, dk, dv, None, d_sinks


_attend.defvjp(_forward, _backward)
