"""The MXFP4 number format: how packed bytes become weights, and weights packed bytes.

OCP Microscaling Formats v1.0, section 5.3: blocks of 32 FP4 (E2M1) codes share one E8M0 scale. Byte j of a block holds
element 2j in its low nibble and element 2j + 1 in its high nibble; a weight is code * 2^(scale - 127). Scale byte 255
is NaN, and 0 (2^-127, below float32's normal numbers) would be flushed to zero: checkpoints with 255 are refused.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

BLOCK = 32
SCALE_BIAS = 127
CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def decode_scales(scales: UInt8[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """E8M0 bytes as two float32 factors whose product is 2^(scale - 127).

    Two, because 2^-127 (byte 0) is no normal float32, yet 6 * 2^-127 is: multiply a code by one after the other.
    """
    exponent = jnp.maximum(scales, 1).astype(jnp.uint32) << 23
    return lax.bitcast_convert_type(exponent, jnp.float32), jnp.where(scales == 0, 0.5, 1.0).astype(jnp.float32)


def dequantize(
    blocks: UInt8[Array, "*rows B 16"], scales: UInt8[Array, "*rows B"], dtype: DTypeLike
) -> Float[Array, "*rows I"]:
    """The weights that `blocks` and `scales` stand for, I = 32 B along the last axis, exactly.

    bfloat16 holds every MXFP4 value (two significant bits); results below float32's smallest normal number, 2^-126,
    may be flushed to zero by the hardware.
    """
    # The barrier, since XLA misreads the nibbles of a constant (openxla/xla#38964), and weights that a jitted function
    # closes over are one.
    blocks = lax.optimization_barrier(blocks)
    codes = lax.bitcast_convert_type(blocks, jnp.float4_e2m1fn)  # [..., 16, 2]: the low nibble comes first
    codes = codes.astype(jnp.float32).reshape(*blocks.shape[:-1], BLOCK)
    power, half = decode_scales(scales)
    weights = codes * half[..., None] * power[..., None]
    return weights.astype(dtype).reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)


def quantize(
    weights: Float[Array, "*rows I"],
) -> tuple[UInt8[Array, "*rows B 16"], UInt8[Array, "*rows B"]]:
    """The nearest MXFP4 blocks and scales, by the rule of OCP MX v1.0, section 6.3 (the meaning of converters/packing).

    The scale's exponent is that of the block's largest magnitude less 2 (E2M1's own largest exponent); codes round to
    nearest, ties to even, and saturate at 6. Weights that lie on an MXFP4 grid come back exactly: such a block's
    largest value becomes 4 or 6 and its other values stay codes. A block of zeros gets scale byte 127.
    """
    blocks = weights.astype(jnp.float32).reshape(*weights.shape[:-1], weights.shape[-1] // BLOCK, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    exponent = (lax.bitcast_convert_type(largest, jnp.uint32) >> 23).astype(jnp.int32) - 2
    scales = jnp.where(largest == 0, SCALE_BIAS, jnp.clip(exponent, 0, 254)).astype(jnp.uint8)
    power, half = decode_scales(scales)
    codes = jnp.clip(blocks / power[..., None] / half[..., None], -CODES[7], CODES[7]).astype(jnp.float4_e2m1fn)
    pairs = codes.reshape(*scales.shape, BLOCK // 2, 2)
    return lax.bitcast_convert_type(pairs, jnp.uint8), scales


def rounded(weights: Float[Array, "*rows I"]) -> Float[Array, "*rows I"]:
    """The weights that `dequantize(*quantize(weights))` gives, in the weights' dtype, by arithmetic alone.

    For training with the experts that will be exported: `w + stop_gradient(rounded(w) - w)`. What comes out lies on the
    MXFP4 grid, so rounding it again, or packing it (gptoss_jax.checkpoints.packing), changes nothing. As there, numbers
    below 2^-126 count as zero. NaN stays NaN.
    """
    blocks = weights.astype(jnp.float32).reshape(*weights.shape[:-1], weights.shape[-1] // BLOCK, BLOCK)
    blocks = jnp.where(jnp.abs(blocks) < jnp.finfo(jnp.float32).tiny, jnp.copysign(0.0, blocks), blocks)
    largest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    exponent = (lax.bitcast_convert_type(largest, jnp.uint32) >> 23).astype(jnp.int32) - 2
    power, half = decode_scales(jnp.clip(exponent, 0, 254).astype(jnp.uint8))
    codes = _nearest_codes(blocks / power / half) * half * power
    return codes.astype(weights.dtype).reshape(weights.shape)


def _nearest_codes(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The nearest E2M1 numbers, ties to even, saturating: steps of 1/2 below 2, of 1 below 4, of 2 from there on."""
    magnitude = jnp.abs(values)
    step = jnp.where(magnitude < 2, 0.5, jnp.where(magnitude < 4, 1.0, 2.0))
    return jnp.clip(jnp.round(values / step) * step, -CODES[7], CODES[7])
