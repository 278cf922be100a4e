"""Experts: weights that one-hot activations pick, bit for bit, and random ones against the reference in float32."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks.gpu import weights
from benchmarks.gpu.comparing import exactly, near
from pallas_kernels import expert_mlp as op
from pallas_kernels import mxfp4

if TYPE_CHECKING:
    from benchmarks.gpu.smoke import Smoke

FEW = 3  # experts: M rows a tile are M tokens to each
ONE, FOUR = 0x22, 0x66  # two codes of E2M1 in a byte: 1.0, 4.0
UNIT_SCALE = 127  # 2^0
NO_LIMIT = 2.0**100  # of the SwiGLU
HOT = 2.0**4  # the activation that FOUR makes 64, whose sigmoid is 1 in float32
LARGE = 2.0**17  # the one that makes any gate of `gated` beyond 512: its sigmoid is 0 or 1
GATED_SCALES = (120, 135)
ROW_ERRORS = {"bfloat16": 1e-2, "float32": 1e-5}  # a block of 64 wrong outputs of 2,880 is 1.5e-1


def exact(smoke: "Smoke", what: str, *, rows: int, scales: tuple[int, int], columns: int | None = None) -> None:
    """The second product: token t has hidden unit f alone, 1, and its outputs are column f of its expert's weights.

    Shows boxes of copies and their ends, the order of codes, every scale byte of [low, high), which thread holds what.
    """
    rng = np.random.default_rng(rows)
    hidden, inner = _sizes(smoke)
    down = _random_codes(rng, hidden, inner), _random_scales(rng, hidden, inner, scales)
    bias = np.zeros((FEW, 2 * inner), np.float32)
    bias[:, 1::2] = 1 / 64 - 1  # the linear half: a gate of 64 gives 64 * (bias + 1) = 1, and one of 0 gives 0
    gate_up = _picking(2 * inner, hidden, FOUR, inner, every=2)
    published = _published(gate_up, bias, down)
    dense = _dense(*down)

    def expected(expert: np.ndarray, hot: np.ndarray, sign: np.ndarray) -> np.ndarray:
        return dense[expert, :, hot]

    _one_hot(smoke, what, rows, published, functools.partial(_activations, value=HOT), expected, (1,), columns or inner)


def gated(smoke: "Smoke", what: str, *, rows: int, columns: int | None = None) -> None:
    """The first product: one-hot activations of both signs, large enough that a SwiGLU is g (l + 1) or 0, rounded once.

    The second product hands the hidden units on as they are.
    """
    rng = np.random.default_rng(rows)
    hidden, inner = _sizes(smoke)
    gate_up = _random_codes(rng, 2 * inner, hidden), _random_scales(rng, 2 * inner, hidden, GATED_SCALES)
    published = _published(gate_up, np.zeros((FEW, 2 * inner), np.float32), _picking(hidden, inner, ONE, inner))
    dense = _dense(*gate_up)

    def expected(expert: np.ndarray, hot: np.ndarray, sign: np.ndarray) -> np.ndarray:
        sums = dense[expert, :, hot] * (np.float32(LARGE) * sign[:, None]).astype(np.float32)
        gate, linear = sums[:, ::2], sums[:, 1::2]
        units = np.where(gate > 0, gate * (linear + np.float32(1)), np.float32(0))
        found = np.zeros((len(expert), hidden), np.float32)
        found[:, :inner] = units.astype(ml_dtypes.bfloat16).astype(np.float32)
        return found

    _one_hot(
        smoke, what, rows, published, functools.partial(_activations, value=LARGE), expected, (1, -1), columns or hidden
    )


def _one_hot(
    smoke: "Smoke",
    what: str,
    rows: int,
    published: op.ExpertWeights,
    activations: Callable[..., np.ndarray],
    expected: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    signs: tuple[int, ...],
    columns: int,
) -> None:
    """The first columns once for each sign, FEW x rows tokens in a call; the first call is repeated for its bits."""
    kernel = smoke.kernels.expert_mlp
    packed = jax.jit(functools.partial(op.packed, kernel.layout))(published)
    run = jax.jit(functools.partial(kernel.run, limit=NO_LIMIT))
    tokens, rng = FEW * rows, np.random.default_rng(rows + 1)
    hot = np.concatenate([rng.permutation(columns) for _ in signs])
    sign = np.repeat(np.asarray(signs), columns)
    found, wanted, first = [], [], None
    for begin in range(0, len(hot), tokens):
        part = np.arange(begin, begin + tokens) % len(hot)
        expert = rng.permutation(np.repeat(np.arange(FEW, dtype=np.int32), rows))
        x = jnp.asarray(activations(smoke.config.hidden_size, hot[part], sign[part]), jnp.bfloat16)
        arguments = (x, jnp.asarray(expert[:, None]), jnp.ones((tokens, 1), jnp.float32), packed)
        first = first or arguments
        found.append(np.asarray(run(*arguments)))
        wanted.append(expected(expert, hot[part], sign[part]))
    if smoke.judge(f"{what}: repeated", run, first or (), exactly(wanted[0])):
        smoke.verdict(what, np.concatenate(found), exactly(np.concatenate(wanted)))


def _activations(hidden: int, hot: np.ndarray, sign: np.ndarray, *, value: float) -> np.ndarray:
    x = np.zeros((len(hot), hidden), np.float32)
    x[np.arange(len(hot)), hot] = value * sign
    return x


def _sizes(smoke: "Smoke") -> tuple[int, int]:
    return smoke.config.hidden_size, smoke.config.intermediate_size


def _random_codes(rng: np.random.Generator, out: int, inputs: int) -> np.ndarray:
    return rng.integers(0, 256, (FEW, out, inputs // 32, 16), np.uint8)


def _random_scales(rng: np.random.Generator, out: int, inputs: int, scales: tuple[int, int]) -> np.ndarray:
    return rng.integers(*scales, (FEW, out, inputs // 32), np.uint8)


def _picking(out: int, inputs: int, code: int, count: int, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a matrix whose output `every` * i is input i times `code`, for i below `count`, else 0."""
    blocks, scales = np.zeros((FEW, out, inputs // 32, 16), np.uint8), np.full((FEW, out, inputs // 32), UNIT_SCALE)
    for i in range(count):
        blocks[:, every * i, i // 32, i % 32 // 2] = code & (0x0F if i % 2 == 0 else 0xF0)
    return blocks, scales.astype(np.uint8)


def _published(gate_up: Any, gate_up_bias: np.ndarray, down: Any) -> op.ExpertWeights:
    biases = gate_up_bias, np.zeros((FEW, down[0].shape[1]), np.float32)
    first, second = (jnp.asarray(bias, jnp.bfloat16) for bias in biases)
    (blocks, scales), (down_blocks, down_scales) = (map(jnp.asarray, packed) for packed in (gate_up, down))
    return op.ExpertWeights(blocks, scales, first, down_blocks, down_scales, second)


def _dense(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.asarray(mxfp4.dequantize(jnp.asarray(blocks), jnp.asarray(scales), jnp.float32))


# ---- random weights ----


def experts(
    smoke: "Smoke", what: str, *, tokens: int, num_experts: int = 0, dtype: str = "bfloat16", skew: bool = False
) -> None:
    """The op against the reference in float32; if `skew`, one expert has every token, and others lose assignments."""
    config, kernel = smoke.config, smoke.kernels.expert_mlp
    count, top_k = num_experts or config.num_experts, config.experts_per_token
    rng = np.random.default_rng(tokens)
    published = _random_published(count, config.hidden_size, config.intermediate_size)
    packed = jax.jit(functools.partial(op.packed, kernel.layout))(published)
    ids = np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)]).astype(np.int32)
    if skew:
        ids[:, 0], ids[::3, 1] = 1, -1
    x = jnp.asarray(rng.standard_normal((tokens, config.hidden_size), np.float32), jnp.dtype(dtype))
    arguments = x, jnp.asarray(ids), jnp.asarray(rng.random((tokens, top_k), np.float32))
    reference = jax.jit(functools.partial(op.IMPLEMENTATIONS["reference"].run, limit=config.swiglu_limit))
    expected = np.asarray(reference(x.astype(jnp.float32), *arguments[1:], published))
    run = jax.jit(functools.partial(kernel.run, limit=config.swiglu_limit))
    smoke.judge(what, run, (*arguments, packed), near(expected, ROW_ERRORS[dtype]))


def _random_published(count: int, hidden: int, inner: int) -> op.ExpertWeights:
    """Codes uniform, scales from 2^-9 to 2^-5, biases normal / 10."""
    arrays = []
    for seed, shape in enumerate(weights.published_shapes(count, hidden, inner)):
        key = jax.random.key(seed)
        if shape.dtype == jnp.bfloat16:
            arrays.append(jax.random.normal(key, shape.shape, jnp.bfloat16) * jnp.bfloat16(0.1))
        elif len(shape.shape) == 3:
            arrays.append(jax.random.randint(key, shape.shape, 118, 123, jnp.int32).astype(jnp.uint8))
        else:
            arrays.append(jax.random.bits(key, shape.shape, jnp.uint8))
    return op.ExpertWeights(*arrays)
