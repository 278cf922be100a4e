"""Bfloat16 experts to MXFP4 and back, one expert at a time: exact on the MXFP4 grid, by rounding elsewhere.

The rule is that of `pallas_kernels.mxfp4.quantize`, in integer NumPy on bfloat16's bits: ten times as fast on a CPU.
"""

import functools
import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

from gptoss_jax.errors import GptossError
from gptoss_jax.model.config_ranges import MXFP4_BLOCK as BLOCK

SCALE_BIAS = 127  # of E8M0 exponents (OCP Microscaling Formats v1.0)
CODES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
"""The value of each FP4 code, as `pallas_kernels.mxfp4.CODES`, without importing JAX."""

_MANTISSA_BITS = 7  # of bfloat16, whose bits order its magnitudes
_LOWEST, _HIGHEST = -3 << _MANTISSA_BITS, 3 << _MANTISSA_BITS  # magnitudes in [1/8, 8), as bits less those of 1
_SMALLEST_NORMAL = 1 << _MANTISSA_BITS
_OFF_GRID = 0x80
_LEAST_NORMAL_SCALE, _MOST_SCALE = 2, 252  # under which bfloat16 has 1/2 as a normal number, and has 6


class Packed(NamedTuple):
    """One expert's matrix.

    Attributes:
        blocks: uint8 [out, in / 32, 16].
        scales: uint8 [out, in / 32].
        exact: whether they stand for the very same values.
        error_power: sum of the squares of what rounding changed.
        power: sum of the squares of the weights (0 where nothing was changed).
    """

    blocks: np.ndarray
    scales: np.ndarray
    exact: bool
    error_power: float
    power: float


def pack(weights: np.ndarray, given_scales: np.ndarray | None = None) -> Packed:
    """Packs one expert, bfloat16 [in, out] as published: blocks of 32 run along the inputs.

    An exact packing gives back every value, but its bytes may differ from those that the values came from: a block
    whose largest code was 3 (times 2^s) may as well be written with 6 (times 2^(s-1)), and here is. Numbers below
    2^-126 count as zero, as they do for the hardware.

    `given_scales`, uint8 [out, in / 32], stand in place of those that the rule gives.
    """
    inputs, out = weights.shape
    bits = weights.view(np.uint16).reshape(-1, BLOCK, out)
    blocks = np.empty((out, inputs // BLOCK, BLOCK // 2), np.uint8)
    scales = np.empty((out, inputs // BLOCK), np.uint8)
    exact, error_power, power = True, 0.0, 0.0
    for i, rows in enumerate(bits):  # row by row of blocks, which stays in the processor's cache
        given = None if given_scales is None else given_scales[:, i]
        codes, scales[:, i], row_exact = _pack_rows(rows, given)
        blocks[:, i] = (codes[0::2] | codes[1::2] << 4).T
        if not row_exact:
            exact = False
            row_error, row_power = _powers(rows, codes, scales[:, i])
            error_power, power = error_power + row_error, power + row_power
    return Packed(blocks, scales, exact, error_power, power)


def _pack_rows(bits: np.ndarray, given: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, bool]:
    """Codes [32, out] and scales [out] of bfloat16 bits [32, out], and whether they stand for the same values."""
    magnitudes = (bits & 0x7FFF).view(np.int16)
    positive = magnitudes >= _SMALLEST_NORMAL
    flushed = np.count_nonzero(magnitudes) > np.count_nonzero(positive)
    if given is None:
        largest = magnitudes.max(axis=0, where=positive, initial=0) if flushed else magnitudes.max(axis=0)
        scales = np.where(largest == 0, np.int16(SCALE_BIAS), np.maximum((largest >> _MANTISSA_BITS) - 2, 0))
    else:
        scales = given.astype(np.int16)
    codes = np.take(_nearest_codes(), magnitudes - ((scales << _MANTISSA_BITS) + _LOWEST), mode="clip")
    codes *= positive
    exact = not flushed and bool(codes.max() < _OFF_GRID)
    return (codes & 7) | (bits >> 12).astype(np.uint8) & 8, scales.astype(np.uint8), exact


@functools.cache
def _nearest_codes() -> np.ndarray:
    """By the bits of a magnitude less those of 1/8: the nearest code (ties to even), marked where it is not exact."""
    bits = np.arange(_LOWEST, _HIGHEST) + (SCALE_BIAS << _MANTISSA_BITS)
    values = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    codes = CODES[:8].astype(np.float64)
    distances = np.abs(values[:, None] - codes) + 1e-9 * (np.arange(8) % 2)
    nearest = np.argmin(distances, axis=1)
    return np.where(codes[nearest] == values, nearest, nearest | _OFF_GRID).astype(np.uint8)


def _powers(bits: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> tuple[float, float]:
    """Sums of squares of what rounding changed, and of the weights."""
    weights = (bits.astype(np.uint32) << 16).view(np.float32)
    error = np.ldexp(CODES[codes], scales.astype(np.int32) - SCALE_BIAS) - weights
    return float(np.vdot(error, error)), float(np.vdot(weights, weights))


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """One expert's matrix as bfloat16 [in, out]: the inverse of `pack`, and exact, as a code has two significant bits.

    Args:
        blocks: uint8 [out, in / 32, 16].
        scales: uint8 [out, in / 32].

    Raises:
        GptossError: a value is beyond bfloat16: a scale byte above 252 under a large code, or 255, which is NaN.
    """
    if scales.size and (scales.min() < _LEAST_NORMAL_SCALE or scales.max() > _MOST_SCALE):
        return _unpack_any(blocks, scales)
    bits = np.take(_code_pairs(), blocks).view(np.uint16)  # [out, in / 32, 32]
    exponents = (scales.astype(np.int16) - SCALE_BIAS) << _MANTISSA_BITS
    bits += exponents.view(np.uint16)[..., None] * (bits & 0x7FFF != 0)  # a zero has no exponent
    return np.ascontiguousarray(bits.reshape(len(bits), -1).T).view(ml_dtypes.bfloat16)


@functools.cache
def _code_pairs() -> np.ndarray:
    """Of each byte the bfloat16 bits of its two codes, the low one first, as one number of 32 bits."""
    bits = CODES.astype(ml_dtypes.bfloat16).view(np.uint16)
    pairs = np.stack([np.tile(bits, 16), np.repeat(bits, 16)], axis=-1)
    return np.ascontiguousarray(pairs).view(np.uint32).reshape(256)


def _unpack_any(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """As `unpack` where bfloat16 has subnormal numbers for some values, or none."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    with np.errstate(over="ignore", under="ignore"):
        values = np.ldexp(CODES[codes], scales.astype(np.int32)[..., None] - SCALE_BIAS).astype(ml_dtypes.bfloat16)
    if (scales == 255).any() or not np.isfinite(values).all():
        raise GptossError(f"scale byte {scales.max()}: a value is beyond bfloat16, or NaN")
    return np.ascontiguousarray(values.reshape(len(values), -1).T)


def is_on_grid_untransposed(weights: np.ndarray) -> bool:
    """Whether blocks along the last axis lie on the grid: so they do where an export forgot to transpose."""
    return weights.shape[-1] % BLOCK == 0 and pack(np.ascontiguousarray(weights.T)).exact


def relative_rms(error_power: float, power: float) -> float:
    """Root mean square of an error, relative to that of what it was made on."""
    return math.sqrt(error_power / power) if power else 0.0
