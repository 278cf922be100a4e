"""linear for CPUs: bfloat16 or int8 weights read once, and unpacked in registers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

import cpu_kernels


def linear(x: Float[Array, "T I"], w: Real[Array, "O I"]) -> Float[Array, "T O"]:
    """See `pallas_kernels.linear.Linear`. Products are exact where x is bfloat16; a token's bits depend on no other.

    Raises:
        TypeError: weights that are not bfloat16 or int8, activations that are not float32 or bfloat16.
        cpu_kernels.Unavailable: the library was not built.
    """
    if w.dtype not in (jnp.bfloat16, jnp.int8) or x.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"linear of {x.dtype} and {w.dtype}, expected float32 or bfloat16, and bfloat16 or int8")
    cpu_kernels.library()
    result = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32)
    return jax.ffi.ffi_call("cpu_kernels_linear", result)(x, w)
