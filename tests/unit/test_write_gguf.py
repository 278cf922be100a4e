"""MXFP4 blocks as llama.cpp has them, without llama.cpp: tests/live/test_gguf.py reads whole files."""

import jax.numpy as jnp
import numpy as np

from benchmarks import write_gguf
from pallas_kernels import mxfp4


def dequantized(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Float32 weights of MXFP4 as published."""
    return np.asarray(mxfp4.dequantize(jnp.asarray(blocks), jnp.asarray(scales), np.float32))


def gguf_dequantized(packed: np.ndarray) -> np.ndarray:
    """llama.cpp's dequantize_row_mxfp4, literally (ggml-quants.c): uint8 [..., 17 B] -> float32 [..., 32 B]."""
    doubled = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
    blocks = packed.reshape(-1, 17)
    scale = np.ldexp(np.float32(0.5), blocks[:, :1].astype(np.int32) - 127).astype(np.float32)
    codes = np.concatenate([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], axis=1)
    return (doubled[codes] * scale).reshape(*packed.shape[:-1], -1)


def test_repacked_experts_are_the_same_weights():
    """Nibbles in the wrong order, which a benchmark of random weights would never show."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (2, 3, 5, 16), np.uint8)
    scales = random.integers(3, 252, (2, 3, 5), np.uint8)  # no infinities, no subnormals
    expected = dequantized(blocks, scales)
    got = gguf_dequantized(write_gguf.repack(blocks, scales))
    assert got.shape == (2, 3, 160)
    np.testing.assert_array_equal(got, expected)
