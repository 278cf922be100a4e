"""linear for CPUs, in jnp: weights become float32 on their way to the arithmetic unit, never in memory.

XLA:CPU has no bfloat16 arithmetic. Given a plain dot product it writes a float32 copy of the weights, and lifts it out
of a decoding loop, where it stays: 7 GB beside the 13 GB of the 20b model.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Real

MAX_REDUCED_ROWS = 2  # up to here a fused multiply and reduce reads the weights once a row, at memory speed
MAX_BLOCK = 1024  # rows of the weights made float32 at a time


def linear(x: Float[Array, "T I"], w: Real[Array, "O I"]) -> Float[Array, "T O"]:
    """See `pallas_kernels.linear.Linear`. Products of bfloat16 are exact in float32, so the operands may grow."""
    x = x.astype(jnp.float32)
    if x.shape[0] <= MAX_REDUCED_ROWS:
        w, x = lax.optimization_barrier((w, x))  # ties w to x, which a decoding loop changes: nothing can be lifted
        return jnp.sum(w.astype(jnp.float32) * x[:, None], axis=-1)
    outputs = w.shape[0]
    block = next(size for size in range(min(MAX_BLOCK, outputs), 0, -1) if outputs % size == 0)

    def one_block(i: Int32[Array, ""]) -> Float[Array, "T O2"]:
        at, weights = lax.optimization_barrier((i * block, w))  # as above, for the loop over blocks
        part = lax.dynamic_slice_in_dim(weights, at, block).astype(jnp.float32)
        return lax.dot_general(x, part, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)

    y = lax.map(one_block, jnp.arange(outputs // block, dtype=jnp.int32))
    return y.transpose(1, 0, 2).reshape(x.shape[0], outputs)
