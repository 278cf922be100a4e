"""An adapter merged into the weights that it stands beside, leaf by leaf, and what of it the rounding leaves.

W + b a is computed in float32, then rounded once: to bfloat16, or of packed experts to MXFP4 by the rule of OCP MX
v1.0, section 6.3 (to nearest, ties to even). W lies on the MXFP4 grid, so a difference of less than half a step is
lost there: `Merger.losses` says how much was. Few experts, or some rows, are in memory as float32 at a time. No JAX.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import ml_dtypes
import numpy as np

from gptoss_jax.checkpoints import packing
from gptoss_jax.checkpoints.packing import BLOCK
from gptoss_jax.errors import GptossError
from gptoss_jax.model import adapters
from gptoss_jax.model.adapters import LowRank
from gptoss_jax.model.config import ModelConfig

EXPERTS_AT_ONCE = 4
ROWS = 4096  # of a matrix that are merged at once where it has no experts
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Loss(NamedTuple):
    """What became of one matrix's difference d = b a: r is the merged and rounded matrix, W the base.

    Attributes:
        weights: how many numbers the matrix has, of all experts.
        changed: of these, those whose value is another in r than in W.
        packed: of the weights, those that are MXFP4 codes afterwards.
        nibbles: of these, those in whose place another code stands.
        scales: MXFP4 scales, of 32 weights each, in whose place another stands.
        delta_power: the sum of the squares of d.
        base_power: that of W.
        kept_power: the sum of (r - W) d.
        error_power: the sum of the squares of r - W - d.
    """

    weights: int = 0
    changed: int = 0
    packed: int = 0
    nibbles: int = 0
    scales: int = 0
    delta_power: float = 0.0
    base_power: float = 0.0
    kept_power: float = 0.0
    error_power: float = 0.0

    def plus(self, other: "Loss") -> "Loss":
        """Both together."""
        return Loss(*(mine + its for mine, its in zip(self, other, strict=True)))  # pyright: ignore[reportArgumentType]

    @property
    def delta(self) -> float:
        """|d| / |W|: how large the difference is."""
        return _root_of_ratio(self.delta_power, self.base_power)

    @property
    def kept(self) -> float:
        """(r - W) d / |d|^2: the share of the difference that is still there; 1: all, 0: the base came back."""
        return self.kept_power / self.delta_power if self.delta_power else 1.0

    @property
    def error(self) -> float:
        """|r - W - d| / |d|: what the rounding added, in units of the difference; 1 where the base came back."""
        return _root_of_ratio(self.error_power, self.delta_power)


def _root_of_ratio(power: float, of: float) -> float:
    return math.sqrt(power / of) if of else 0.0


class Merger:
    """A change for `Export.run`: leaves that the adapters are of come merged, others as they are.

    Attributes:
        losses: by matrix, as in "layers/0/attention/q", of all that was merged so far.
    """

    def __init__(self, config: ModelConfig, factors: Mapping[str, LowRank], *, pack: bool, keep_scales: bool = False):
        """Merges nothing yet.

        Args:
            config: the model.
            factors: the adapter, by matrix, the scale in b.
            pack: experts are rounded to MXFP4; else they become bfloat16 [E, in, out], not rounded any further.
            keep_scales: a block keeps the base's scale where its numbers are nearer to the sums so. The rule takes the
                largest number alone: where that was 4 and falls to 3.99, it becomes 3 under half the scale.

        Raises:
            GptossError: adapters that are not of this model, or hold NaN or infinity.
        """
        adapters.check(config, factors)
        for path, pair in factors.items():
            if not all(np.isfinite(factor).all() for factor in pair):
                raise GptossError(f"adapter of {path}: holds NaN or infinity: take one from before training diverged")
        targets = adapters.targets(config)
        self._matrices = {targets[path].weight.removesuffix("/blocks"): path for path in factors}
        self._factors, self._pack, self._keep_scales = factors, pack, keep_scales
        self.losses: dict[str, Loss] = {}

    def __call__(self, path: str, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """See `export_leaves.Change`: what it is given is changed in place where it can be."""
        if path not in self._matrices:
            return arrays
        matrix = self._matrices[path]
        a, b = (np.asarray(factor, np.float32) for factor in self._factors[matrix])
        if len(arrays) == 1:
            parts = _merge_rows(arrays[0].reshape(-1, math.prod(a.shape[1:])), _flat(a), b.reshape(-1, b.shape[-1]))
        elif self._pack:
            parts = _merge_packed(arrays[0], arrays[1], a, b, keep_scales=self._keep_scales)
        else:
            experts, out, blocks, _ = arrays[0].shape
            merged = np.empty((experts, blocks * BLOCK, out), _BFLOAT16)
            parts, arrays = _merge_unpacked(arrays[0], arrays[1], a, b, merged), (merged,)
        total = Loss()
        for part in parts:
            total = total.plus(part)
        self.losses[matrix] = total
        return arrays


def _flat(a: np.ndarray) -> np.ndarray:
    return a.reshape(len(a), -1)


def _merge_rows(weights: np.ndarray, a: np.ndarray, b: np.ndarray) -> Iterator[Loss]:
    """Merges into bfloat16 [out, in], some rows at a time."""
    for first in range(0, len(weights), ROWS):
        rows = weights[first : first + ROWS]
        base, delta = rows.astype(np.float32), b[first : first + ROWS] @ a
        rows[...] = base + delta
        yield _loss(base, delta, rows.astype(np.float32))


def _merge_packed(
    blocks: np.ndarray, scales: np.ndarray, a: np.ndarray, b: np.ndarray, *, keep_scales: bool
) -> Iterator[Loss]:
    """Merges into blocks and scales, expert by expert.

    A block whose values are what they were keeps its bytes: they may be written in two ways (see `packing.pack`).
    """

    def merge(expert: int) -> Loss:
        of_blocks, of_scales = blocks[expert], scales[expert]
        base, delta = _base_and_delta(of_blocks, of_scales, a[expert], b[expert])
        made = _packed(base + delta, of_scales if keep_scales else None)
        rounded = packing.unpack(*made).astype(np.float32)
        same = (rounded == base).reshape(-1, BLOCK, base.shape[1]).all(axis=1).T  # [out, in / 32]
        made = _where(same, (of_blocks, of_scales), made)
        flipped = made[0] ^ of_blocks
        nibbles = int(np.count_nonzero(flipped & 15) + np.count_nonzero(flipped >> 4))
        scales_changed = int(np.count_nonzero(made[1] != of_scales))
        of_blocks[...], of_scales[...] = made
        return _loss(base, delta, rounded)._replace(packed=base.size, nibbles=nibbles, scales=scales_changed)

    return _each(merge, len(blocks))


def _each(merge: Callable[[int], Loss], experts: int) -> Iterator[Loss]:
    """Of all experts, in their order: some at once, as NumPy computes in several threads."""
    with ThreadPoolExecutor(EXPERTS_AT_ONCE) as threads:
        yield from threads.map(merge, range(experts))


Bytes = tuple[np.ndarray, np.ndarray]
"""Blocks and scales of one expert."""


def _packed(sums: np.ndarray, scales: np.ndarray | None) -> Bytes:
    """float32 [in, out] rounded to MXFP4: by the rule, or under `scales` where numbers are nearer so."""
    odd = _to_odd(sums)
    by_rule = packing.pack(odd)[:2]
    if scales is None:
        return by_rule
    kept = packing.pack(odd, scales)[0], scales
    errors = [_block_powers(packing.unpack(*made).astype(np.float32) - sums) for made in (kept, by_rule)]
    return _where(errors[0] < errors[1], kept, by_rule)


def _block_powers(values: np.ndarray) -> np.ndarray:
    """Sums of squares over blocks, [out, in / 32], of values [in, out]."""
    return np.square(values).reshape(-1, BLOCK, values.shape[1]).sum(axis=1).T


def _where(condition: np.ndarray, one: Bytes, other: Bytes) -> Bytes:
    """Of each block, where the condition [out, in / 32] holds, the one."""
    return np.where(condition[..., None], one[0], other[0]), np.where(condition, one[1], other[1])


def _merge_unpacked(
    blocks: np.ndarray, scales: np.ndarray, a: np.ndarray, b: np.ndarray, merged: np.ndarray
) -> Iterator[Loss]:
    """Merges into `merged`, bfloat16 [E, in, out], expert by expert."""

    def merge(expert: int) -> Loss:
        base, delta = _base_and_delta(blocks[expert], scales[expert], a[expert], b[expert])
        merged[expert] = base + delta
        return _loss(base, delta, merged[expert].astype(np.float32))

    return _each(merge, len(merged))


def _base_and_delta(
    blocks: np.ndarray, scales: np.ndarray, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One expert's matrix and what the adapter adds to it, float32 [in, out]."""
    return packing.unpack(blocks, scales).astype(np.float32), a.T @ b.T


def _to_odd(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 whose last bit says whether anything was cut off.

    What is rounded from there to MXFP4, which has five bits less, is rounded as from the float32 numbers themselves.
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits >> 16) | (bits & 0xFFFF != 0)).astype(np.uint16).view(_BFLOAT16)


def _loss(base: np.ndarray, delta: np.ndarray, rounded: np.ndarray) -> Loss:
    """Of one part of a matrix, all three float32 of one shape."""
    moved = rounded - base
    error = moved - delta
    return Loss(
        weights=base.size,
        changed=int(np.count_nonzero(moved)),
        delta_power=_dot(delta, delta),
        base_power=_dot(base, base),
        kept_power=_dot(moved, delta),
        error_power=_dot(error, error),
    )


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.vdot(x, y))
