"""What attention and experts are both made of: a declared weight, RMSNorm, a linear map."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from gptoss_jax.sharding import Axes, Sharding
from pallas_kernels import attention as attention_op
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels import linear as linear_op


class Kernels(NamedTuple):
    """The implementation of each op that a model runs with."""

    attention: attention_op.Attention = attention_op.IMPLEMENTATIONS["reference"]
    expert_mlp: expert_op.ExpertMlp = expert_op.IMPLEMENTATIONS["reference"]
    linear: linear_op.Linear = linear_op.IMPLEMENTATIONS["reference"]


Shape = tuple[int, ...]
BFLOAT16 = jnp.dtype(jnp.bfloat16)


def weight(shape: Shape, axes: Axes, dtype: jnp.dtype = BFLOAT16) -> nnx.Param:
    """A declaration: shape, dtype as stored, logical axes. Allocates nothing."""
    if len(shape) != len(axes):
        raise ValueError(f"a weight of shape {shape} cannot have the axes {axes}")
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)  # pyright: ignore[reportArgumentType]


def embed(table: Float[Array, "V D"], tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
    """Each token's row. The barrier ties the table to the tokens: XLA:CPU would lift a float32 copy out of a loop."""
    table, tokens = lax.optimization_barrier((table, tokens))
    return table[tokens]


def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*rows D"]:
    """x / rms(x) * scale, all in float32 (the scale is multiplied before any cast)."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale.astype(jnp.float32)


class Linear(nnx.Module):
    """y = x W^T + b over several axes: W is [*out, *in], as published; y is float32 [B, T, *out]."""

    def __init__(
        self, out: Shape, out_axes: Axes, inputs: Shape, in_axes: Axes, sharding: Sharding, kernel: linear_op.Linear
    ):
        self.product = Product(out_axes, in_axes, sharding, kernel)
        self.weight = weight(out + inputs, out_axes + in_axes)
        self.bias = weight(out, out_axes)

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """y; the matrix product takes operands of x's dtype."""
        return self.product(x, self.weight[...]) + self.bias[...].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Product:
    """x W^T over several axes, on every device its own piece: W is [*out, *in], its axes named logically."""

    out_axes: Axes
    in_axes: Axes
    sharding: Sharding
    kernel: linear_op.Linear

    def __call__(self, x: Float[Array, "B T ..."], w: Float[Array, "..."]) -> Float[Array, "B T ..."]:
        """The product of x [B, T, *in], float32 [B, T, *out]."""
        rows = ("rows", None)
        run = self.sharding.map(
            self._run_local, in_axes=(rows + self.in_axes, self.out_axes + self.in_axes), out_axes=rows + self.out_axes
        )
        return run(x, w)

    def _run_local(self, x: Float[Array, "B T ..."], w: Float[Array, "..."]) -> Float[Array, "B T ..."]:
        rows, out = x.shape[:2], w.shape[: len(self.out_axes)]
        inputs = math.prod(w.shape[len(self.out_axes) :])
        y = self.kernel(x.reshape(-1, inputs), w.reshape(-1, inputs)).reshape(*rows, *out)
        for logical in filter(None, self.in_axes):  # each device summed over its piece of the inputs
            y = self.sharding.sum_over(y, logical)
        return y
