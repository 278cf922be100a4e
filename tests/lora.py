"""Adapters for tests: random factors of any matrices, whose numbers bfloat16 holds, as `gptoss_jax.load` keeps them."""

from collections.abc import Iterable

import ml_dtypes
import numpy as np

from gptoss_jax.model import adapters
from gptoss_jax.model.adapters import LowRank
from gptoss_jax.model.config import ModelConfig

RANK = 3


def factors_of(
    config: ModelConfig,
    groups: Iterable[str] = tuple(adapters.GROUPS),
    *,
    scale: float = 0.1,
    rank: int = RANK,
    seed: int = 0,
    layers: Iterable[int] | None = None,
) -> dict[str, LowRank]:
    """Factors of the matrices that `groups` name, in these layers: a of size 0.3, b of size `scale`, float32."""
    rng = np.random.default_rng(seed)
    asked = None if layers is None else {f"layers/{layer}/" for layer in layers}

    def draw(shape: tuple[int, ...], size: float) -> np.ndarray:
        return (rng.standard_normal(shape) * size).astype(ml_dtypes.bfloat16).astype(np.float32)

    return {
        path: LowRank(draw(target.shapes(rank).a, 0.3), draw(target.shapes(rank).b, scale))
        for path, target in adapters.targets(config, groups).items()
        if asked is None or path.startswith(tuple(asked))
    }
