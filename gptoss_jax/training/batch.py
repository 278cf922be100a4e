"""What a training step reads: packed rows side by side, with the token to predict at each place."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float32, Int32

from gptoss_jax.training import rows as packed_rows
from gptoss_jax.training.rows import Row
from gptoss_jax.training.vocabulary import CompactVocabulary
from pallas_kernels.attention.packed import Places


class Batch(NamedTuple):
    """B rows of T tokens, as NumPy or JAX arrays.

    Attributes:
        tokens: ids, or rows of the compact vocabulary; 0 at padding.
        places: which conversation each token belongs to, and where in it.
        targets: the token to predict at each place; 0 where `weights` is 0.
        weights: 1 where the target is learned, else 0.
    """

    tokens: Int32[Array | np.ndarray, "B T"]
    places: Places
    targets: Int32[Array | np.ndarray, "B T"]
    weights: Float32[Array | np.ndarray, "B T"]


def stack(rows: Sequence[Row], batch_rows: int, vocabulary: CompactVocabulary | None = None) -> Batch:
    """A batch of NumPy arrays.

    Args:
        rows: at least one, of the same length.
        batch_rows: rows of the batch; where fewer are given, the others are padding.
        vocabulary: makes rows of the compact embedding of the ids.
    """
    padding = [packed_rows.empty(len(rows[0].tokens))] * (batch_rows - len(rows))
    tokens, position, first, head, targets, learned = map(np.stack, zip(*rows, *padding, strict=True))
    if vocabulary is not None:
        tokens = _mapped(tokens, position >= 0, vocabulary)
        targets = _mapped(targets, learned, vocabulary)
    places = Places(position, first, head)  # pyright: ignore[reportArgumentType]  # NumPy's arrays until the step
    return Batch(tokens, places, targets, learned.astype(np.float32))


def _mapped(ids: np.ndarray, where: np.ndarray, vocabulary: CompactVocabulary) -> np.ndarray:
    """Rows of the compact vocabulary; where nothing is read, 0, which need not be an id that it holds."""
    rows = np.zeros_like(ids)
    rows[where] = vocabulary.rows(ids[where])
    return rows
