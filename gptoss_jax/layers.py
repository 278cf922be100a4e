"""What attention and experts are both made of: a declared weight, RMSNorm, a linear map."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from gptoss_jax.sharding import Axes

Shape = tuple[int, ...]
BFLOAT16 = jnp.dtype(jnp.bfloat16)


def weight(shape: Shape, axes: Axes, dtype: jnp.dtype = BFLOAT16) -> nnx.Param:
    """A declaration: shape, dtype as stored, logical axes. Allocates nothing."""
    if len(shape) != len(axes):
        raise ValueError(f"a weight of shape {shape} cannot have the axes {axes}")
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)  # pyright: ignore[reportArgumentType]


def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*rows D"]:
    """x / rms(x) * scale, all in float32 (the scale is multiplied before any cast)."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale.astype(jnp.float32)


class Linear(nnx.Module):
    """y = x W^T + b over several axes: W is [*out, *in], as published; y is float32 [..., *out]."""

    def __init__(self, out: Shape, out_axes: Axes, inputs: Shape, in_axes: Axes):
        self.num_inputs = len(inputs)
        self.weight = weight(out + inputs, out_axes + in_axes)
        self.bias = weight(out, out_axes)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """y, float32; the matrix product takes operands of x's dtype."""
        return contract(x, self.weight[...], self.num_inputs) + self.bias[...].astype(jnp.float32)


def contract(x: Float[Array, "..."], w: Float[Array, "..."], num_inputs: int = 1) -> Float[Array, "..."]:
    """x [..., *in] times w [*out, *in] over the last `num_inputs` axes: operands in x's dtype, sums in float32."""
    x_axes = tuple(range(x.ndim - num_inputs, x.ndim))
    w_axes = tuple(range(w.ndim - num_inputs, w.ndim))
    return lax.dot_general(
        x,
        w.astype(x.dtype),
        ((x_axes, w_axes), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
