"""attention for CPUs: keys and values read once, where they lie; memory for logits is O(block), not O(context)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

import cpu_kernels

_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def attend(
    q: Float[Array, "B T N H"], kv: tuple[Array, ...], positions: Int32[Array, "B T"], sinks: Float[Array, "N"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `pallas_kernels.attention.Attend`, whose `PagedKV` or `RingKV` `kv` is; gives the fields of its `Attended`.

    A token's bits depend on no other sequence, and not on its chunk. Queries may be of another dtype than the keys.

    Raises:
        TypeError: a dtype that is neither float32 nor bfloat16, or keys and values of different ones.
        cpu_kernels.Unavailable: the library was not built.
    """
    _check(q, kv, sinks)
    form = "paged" if hasattr(kv, "page_table") else "sliding_window"
    results = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    cpu_kernels.library()
    out, lse = jax.ffi.ffi_call(f"cpu_kernels_{form}_attention", results)(q, *kv, positions, sinks)
    return out, lse


def _check(q: Array, kv: tuple[Array, ...], sinks: Array) -> None:
    keys_and_values = {array.dtype for array in kv if jnp.issubdtype(array.dtype, jnp.floating)}
    for name, dtypes in (("q", {q.dtype}), ("keys and values", keys_and_values), ("sinks", {sinks.dtype})):
        if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
            found = " and ".join(sorted(map(str, dtypes)))
            raise TypeError(f"attention: {name} of {found}, expected one dtype, float32 or bfloat16")
