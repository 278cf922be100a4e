"""attention for CPUs: keys and values read once, where they lie; memory for logits is O(block), not O(context)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

import cpu_kernels

_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P S K H"],
    v_pages: Float[Array, "P S K H"],
    page_table: Int32[Array, "B M"],
    positions: Int32[Array, "B T"],
    sinks: Float[Array, "N"],
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.attention.PagedAttention`. A token's bits depend on no other row, and not on its chunk.

    Raises:
        TypeError: a dtype that is neither float32 nor bfloat16, or keys and values of different ones.
        cpu_kernels.Unavailable: the library was not built.
    """
    _check(q=q, k_pages=k_pages, v_pages=v_pages, sinks=sinks)
    _check_alike(k_pages=k_pages, v_pages=v_pages)
    return _call("cpu_kernels_paged_attention", q, k_pages, v_pages, page_table, positions, sinks)


def banded_attention(
    q: Float[Array, "B T N H"],
    k_ring: Float[Array, "B W K H"],
    v_ring: Float[Array, "B W K H"],
    k_new: Float[Array, "B T K H"],
    v_new: Float[Array, "B T K H"],
    start: Int32[Array, "B"],
    positions: Int32[Array, "B T"],
    sinks: Float[Array, "N"],
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.attention.BandedAttention`. A token's bits depend on no other row, and not on its chunk.

    Raises:
        TypeError: a dtype that is neither float32 nor bfloat16, or keys and values of different ones.
        cpu_kernels.Unavailable: the library was not built.
    """
    _check(q=q, k_ring=k_ring, v_ring=v_ring, k_new=k_new, v_new=v_new, sinks=sinks)
    _check_alike(k_ring=k_ring, v_ring=v_ring, k_new=k_new, v_new=v_new)
    return _call("cpu_kernels_banded_attention", q, k_ring, v_ring, k_new, v_new, start, positions, sinks)


def _check(**arrays: Array) -> None:
    for name, array in arrays.items():
        if array.dtype not in _DTYPES:
            raise TypeError(f"attention: {name} is {array.dtype}, expected float32 or bfloat16")


def _check_alike(**arrays: Array) -> None:
    dtypes = {name: array.dtype for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1:
        found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"attention: keys and values of one dtype expected, got {found}")


def _call(target: str, q: Float[Array, "B T N H"], *others: Array) -> Float[Array, "B T N H"]:
    cpu_kernels.library()
    return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(q.shape, jnp.float32))(q, *others)
