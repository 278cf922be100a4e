"""expert_mlp for CPUs: the packed weights of each expert in use are read once, and unpacked in registers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

import cpu_kernels


def expert_mlp(
    x: Float[Array, "T D"],
    expert_ids: Int32[Array, "T X"],
    routing_weights: Float[Array, "T X"],
    weights: tuple[Any, ...],
    *,
    limit: float,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.expert_mlp.RunExperts`, whose `ExpertWeights` the `weights` are.

    A token's bits depend on no other token, and its sum runs over its assignments in the order of their experts.

    Raises:
        TypeError: activations or biases of another dtype than the contract's.
        NotImplementedError: there are adapters, or the weights are dense.
        cpu_kernels.Unavailable: the library was not built.
    """
    *arrays, gate_up_adapter, down_adapter = weights
    if gate_up_adapter is not None or down_adapter is not None:
        raise NotImplementedError("expert_mlp: this kernel has no adapters; the reference has (expert_mlp=reference)")
    _, gate_up_scales, gate_up_bias, _, _, down_bias = arrays
    if gate_up_scales is None:
        raise NotImplementedError(
            "expert_mlp: this kernel takes packed MXFP4, got dense weights; the reference takes both"
        )
    if x.dtype not in (jnp.bfloat16, jnp.float32) or {gate_up_bias.dtype, down_bias.dtype} != {jnp.dtype(jnp.bfloat16)}:
        raise TypeError(
            f"expert_mlp of {x.dtype} with biases of {gate_up_bias.dtype} and {down_bias.dtype}, "
            "expected float32 or bfloat16, and bfloat16"
        )
    cpu_kernels.library()
    call = jax.ffi.ffi_call("cpu_kernels_expert_mlp", jax.ShapeDtypeStruct(x.shape, jnp.float32))
    return call(x, expert_ids, routing_weights.astype(jnp.float32), *arrays, limit=np.float32(limit))
