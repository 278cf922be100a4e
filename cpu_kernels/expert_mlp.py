"""expert_mlp for CPUs: each chosen expert's packed weights are read once, and unpacked in registers."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

import cpu_kernels


def expert_mlp(
    x: Float[Array, "T D"],
    expert_ids: Int32[Array, "T X"],
    routing_weights: Float[Array, "T X"],
    weights: tuple[Array, ...],
    *,
    limit: float,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.expert_mlp.ExpertMlp`, whose `ExpertWeights` the six `weights` are.

    A row's bits depend on no other row, and its sum runs over its choices in the order of their experts.

    Raises:
        TypeError: activations or biases of another dtype than the contract's.
        cpu_kernels.Unavailable: the library was not built.
    """
    _, _, gate_up_bias, _, _, down_bias = weights
    if x.dtype not in (jnp.bfloat16, jnp.float32) or {gate_up_bias.dtype, down_bias.dtype} != {jnp.dtype(jnp.bfloat16)}:
        raise TypeError(
            f"expert_mlp of {x.dtype} with biases of {gate_up_bias.dtype} and {down_bias.dtype}, "
            "expected float32 or bfloat16, and bfloat16"
        )
    cpu_kernels.library()
    call = jax.ffi.ffi_call("cpu_kernels_expert_mlp", jax.ShapeDtypeStruct(x.shape, jnp.float32))
    return call(x, expert_ids, routing_weights.astype(jnp.float32), *weights, limit=np.float32(limit))
