"""YaRN frequencies and the rotation of queries and keys.

Peng et al., arXiv:2309.00071, as openai/gpt-oss torch/model.py computes it: the correction range is not rounded to
whole dimensions, and the concentration factor scales cosine and sine at every length, short ones included.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from gptoss_jax.model.config import ModelConfig


def correction_range(config: ModelConfig) -> tuple[float, float]:
    """Pair indices between which YaRN blends from extrapolation to interpolation (8.092779 and 17.398025)."""

    def pair_that_turns(rotations: float) -> float:
        wavelengths = config.initial_context_length / (rotations * 2 * math.pi)
        return config.head_dim / 2 * math.log(wavelengths) / math.log(config.rope_theta)

    return pair_that_turns(config.rope_beta_fast), pair_that_turns(config.rope_beta_slow)


def concentration(config: ModelConfig) -> float:
    """Factor on cosine and sine, 0.1 ln s + 1 (1.3465736): attention logits grow by its square."""
    return 0.1 * math.log(config.rope_scaling_factor) + 1


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair (i, i + H/2), float32 [H/2]."""
    pair = np.arange(config.head_dim // 2)
    plain = config.rope_theta ** (-2 * pair / config.head_dim)
    low, high = correction_range(config)
    interpolated = np.clip((pair - low) / (high - low), 0, 1)
    return (plain * (interpolated / config.rope_scaling_factor + 1 - interpolated)).astype(np.float32)


def rotation(
    config: ModelConfig, positions: Int32[Array, "B T"]
) -> tuple[Float[Array, "B T J"], Float[Array, "B T J"]]:
    """Cosine and sine of every position's angles, concentration included, float32 (J = H/2)."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    factor = jnp.float32(concentration(config))
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "B T N H"], cosine: Float[Array, "B T J"], sine: Float[Array, "B T J"]
) -> Float[Array, "B T N H"]:
    """x turned by its position's angles: pair i is (i, i + H/2), computed in float32, in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, :, None], sine[:, :, None]
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)
