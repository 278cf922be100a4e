"""expert_mlp of dense float32 weights for training on CPUs: only the experts that tokens are assigned to, and back."""

import functools
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
    weights: Any,
    *,
    limit: float,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.expert_mlp.RunExperts`, whose `ExpertWeights` the `weights` are; with its own gradient.

    It has the same bits each time, whatever the number of threads; so has the gradient.

    Raises:
        TypeError: activations or weights are not float32, or biases neither float32 nor bfloat16.
        NotImplementedError: there are adapters, or the weights are packed.
        cpu_kernels.Unavailable: the library was not built.
    """
    if weights.gate_up_scales is not None:
        raise NotImplementedError(
            "expert_mlp: cpu-dense takes dense weights, got packed MXFP4; the reference takes both"
        )
    if weights.gate_up_adapter is not None or weights.down_adapter is not None:
        raise NotImplementedError("expert_mlp: this kernel has no adapters; the reference has (expert_mlp=reference)")
    matrices = weights.gate_up_blocks, weights.down_blocks
    biases = weights.gate_up_bias, weights.down_bias
    if {array.dtype for array in (x, *matrices)} != {jnp.dtype(jnp.float32)} or any(
        bias.dtype not in (jnp.float32, jnp.bfloat16) for bias in biases
    ):
        got = ", ".join(str(array.dtype) for array in (x, *matrices, *biases))
        raise TypeError(
            f"expert_mlp: x, gate_up, down and their biases of {got}, expected float32 (biases: or bfloat16)"
        )
    cpu_kernels.library()
    gate_up_bias, down_bias = (bias.astype(jnp.float32) for bias in biases)
    shares = routing_weights.astype(jnp.float32)
    return _run(limit, x, expert_ids, shares, matrices[0], gate_up_bias, matrices[1], down_bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(limit, *arguments):
    return _call("dense_experts", arguments[0])(*arguments, limit=np.float32(limit))


def _forward(limit, *arguments):
    return _run(limit, *arguments), arguments


def _backward(limit, arguments, by_y):
    x, _, *others = arguments
    by_x, *by_others = _call("dense_experts_gradient", [x, *others])(*arguments, by_y, limit=np.float32(limit))
    return by_x, None, *by_others


def _call(name: str, results: Any) -> Any:
    """The handler of that name, which gives arrays like `results`."""
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, jnp.float32), results)
    return jax.ffi.ffi_call(f"cpu_kernels_{name}", shapes)


_run.defvjp(_forward, _backward)
