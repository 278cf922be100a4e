"""The tensors of a gpt-oss model with seeded random weights, made chunk by chunk.

Every tensor is a function of the seed, its name in the Hugging Face MXFP4 format, and its shape, so that all formats of
one config and seed hold the same model. The gains keep every part of the network at work, so that a mistake in any of
them shows in the logits. Knows no model code, no JAX and no trained weights.
"""

import functools
import hashlib
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from gptoss_jax.checkpoints import huggingface
from gptoss_jax.checkpoints.packing import CODES
from gptoss_jax.model.config import ModelConfig, parse_config
from gptoss_jax.model.config_ranges import MXFP4_BLOCK

CHUNK_ELEMENTS = 1 << 22  # elements generated at a time

Content = Literal["normal", "blocks", "scales"]


class _Gain(NamedTuple):
    """How a leaf's values are spread.

    Attributes:
        content: "normal": bfloat16 of standard deviation `gain`. "blocks": uniform FP4 codes. "scales": E8M0 exponents
            (three neighbours) that give the codes the deviation `gain`.
        mean: of normal values.
        gain: the deviation; that of a matrix is divided by the square root of its inputs.
        is_matrix: whether it is.
    """

    content: Content
    mean: float = 0.0
    gain: float = 0.0
    is_matrix: bool = False


# Leaf, without the layer in front -> its gain. They give attention scores a deviation of about 2 against sinks of about
# 3, spread the router, drive the SwiGLU into its clamp at times, and let each block add about what the residual holds.
# Larger inputs to the experts would make 24 random layers chaotic, and bfloat16 would then say nothing.
_GAINS = {
    "embedding": _Gain("normal", gain=1.0),
    "unembedding": _Gain("normal", gain=2.5, is_matrix=True),
    "norm": _Gain("normal", mean=1.0, gain=0.2),
    "attention/norm": _Gain("normal", mean=1.0, gain=0.2),
    "attention/q/weight": _Gain("normal", gain=1.0, is_matrix=True),
    "attention/q/bias": _Gain("normal", gain=0.3),
    "attention/k/weight": _Gain("normal", gain=1.0, is_matrix=True),
    "attention/k/bias": _Gain("normal", gain=0.3),
    "attention/v/weight": _Gain("normal", gain=1.0, is_matrix=True),
    "attention/v/bias": _Gain("normal", gain=0.3),
    "attention/out/weight": _Gain("normal", gain=3.0, is_matrix=True),
    "attention/out/bias": _Gain("normal", gain=0.1),
    "attention/sinks": _Gain("normal", mean=3.0, gain=2.0),
    "moe/norm": _Gain("normal", mean=1.0, gain=0.2),
    "moe/router/weight": _Gain("normal", gain=2.0, is_matrix=True),
    "moe/router/bias": _Gain("normal", gain=0.5),
    "moe/gate_up/blocks": _Gain("blocks"),
    "moe/gate_up/scales": _Gain("scales", gain=1.5, is_matrix=True),
    "moe/gate_up/bias": _Gain("normal", gain=1.5),
    "moe/down/blocks": _Gain("blocks"),
    "moe/down/scales": _Gain("scales", gain=0.3, is_matrix=True),
    "moe/down/bias": _Gain("normal", gain=0.2),
}


@dataclass(frozen=True)
class RandomTensor:
    """One tensor of the Hugging Face MXFP4 format; its values follow from these fields and the seed.

    Attributes:
        name: in that format.
        shape: sizes of its axes.
        content: what its values are: see `_Gain`.
        mean: of normal values.
        std: standard deviation of normal values, or that which scales give to codes.
    """

    name: str
    shape: tuple[int, ...]
    content: Content
    mean: float
    std: float

    @property
    def dtype(self) -> np.dtype:
        """bfloat16, or uint8 for MXFP4 blocks and scales."""
        return np.dtype(ml_dtypes.bfloat16 if self.content == "normal" else np.uint8)

    def chunks(self, seed: int) -> Iterator[np.ndarray]:
        """All elements in order, flattened, in chunks of bounded size."""
        size = math.prod(self.shape)
        for start in range(0, size, CHUNK_ELEMENTS):
            yield self._elements(seed, start, min(CHUNK_ELEMENTS, size - start))

    def expert(self, seed: int, expert: int) -> np.ndarray:
        """One expert's values, where the leading axis is E."""
        size = math.prod(self.shape[1:])
        return self._elements(seed, expert * size, size).reshape(self.shape[1:])

    def _elements(self, seed: int, start: int, count: int) -> np.ndarray:
        """Elements [start, start + count) of the flattened tensor."""
        itemsize = self.dtype.itemsize
        raw = _random_bytes(seed, self.name, start * itemsize, count * itemsize)
        if self.content == "blocks":
            return raw
        if self.content == "scales":
            return _scale_bytes(self.std)[raw]
        table = _bfloat16_bits(self.mean + self.std * _normal_quantiles())
        return table[raw.view("<u2")].view(self.dtype)


def tensors(config: ModelConfig) -> dict[str, RandomTensor]:
    """Leaf -> the tensor that the Hugging Face MXFP4 format stores for it."""
    found = {}
    for leaf, recipe in huggingface.mxfp4_recipes(config).items():
        content, mean, gain, is_matrix = _GAINS[re.sub(r"^layers/\d+/", "", leaf)]
        blocks = MXFP4_BLOCK if content == "scales" else 1
        inputs = recipe.shape[-1] * blocks if is_matrix else 1
        found[leaf] = RandomTensor(recipe.tensor, recipe.shape, content, mean, gain / math.sqrt(inputs))
    return found


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """All tensors of a random model in memory, in the Hugging Face MXFP4 format.

    Args:
        config: a config.json in the Hugging Face spelling.
        seed: any integer.

    Returns:
        Name -> array, of `ml_dtypes.bfloat16`, or of uint8 for MXFP4 blocks and scales.

    Raises:
        ConfigError: the config is not a gpt-oss model.
    """
    return {
        tensor.name: np.concatenate(list(tensor.chunks(seed))).reshape(tensor.shape)
        for tensor in tensors(parse_config(config)).values()
    }


def dequantized_experts(blocks: RandomTensor, scales: RandomTensor, seed: int) -> Iterator[np.ndarray]:
    """Expert by expert, the weights as bfloat16 [in, out]: exact, since a code has two significant bits."""
    for i in range(blocks.shape[0]):
        packed = blocks.expert(seed, i)
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], MXFP4_BLOCK)
        exponents = scales.expert(seed, i).astype(np.int32) - 127
        weights = np.ldexp(CODES[codes], exponents[..., None]).astype(ml_dtypes.bfloat16)
        yield np.ascontiguousarray(weights.reshape(len(weights), -1).T)


@functools.cache
def _normal_quantiles() -> np.ndarray:
    """65,536 equally likely values of the standard normal distribution, all within 4.4 of zero."""
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)])


def _bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float64 -> bfloat16 bits by way of float32, to nearest even; no library's version matters."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _scale_bytes(std: float) -> np.ndarray:
    """The exponent that gives uniform FP4 codes this deviation, and its neighbours, as a table of 256."""
    codes_rms = math.sqrt(float(np.mean(CODES.astype(np.float64) ** 2)))
    neighbours_rms = math.sqrt((0.5**2 + 1**2 + 2**2) / 3)
    exponent = 127 + round(math.log2(std / (codes_rms * neighbours_rms)))
    return np.array([exponent - 1 + i % 3 for i in range(256)], np.uint8)


def _random_bytes(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """Bytes [start, start + count) of the stream that belongs to this seed and name."""
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = np.random.PCG64(np.random.SeedSequence(int.from_bytes(key, "little")))
    generator.advance(start // 8)
    draws = (start % 8 + count + 7) // 8
    return generator.random_raw(draws).astype("<u8", copy=False).view(np.uint8)[start % 8 :][:count]
