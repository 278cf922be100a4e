"""What a run trains, between a checkpoint and the model: all weights, or adapters beside weights that stay as they are.

A trained tree is flat: arrays by path, float32. `params` puts one among the weights of a model, for a traced step.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from gptoss_jax.checkpoints.opening import StoredWeights
from gptoss_jax.model import adapted, adapters, transformer
from gptoss_jax.model.adapters import LowRank
from gptoss_jax.model.layers import Dropout
from gptoss_jax.model.sharding import Axes, Sharding
from gptoss_jax.model.transformer import Model, Params
from gptoss_jax.runtime import weight_transforms
from gptoss_jax.training.options import LoraOptions
from pallas_kernels import mxfp4

Trained = dict[str, Any]
"""Arrays by path: the parts of a run that learn."""

TABLES = ("embedding", "unembedding")
_EXPERTS = adapters.GROUPS["experts"]


class UsedRows(NamedTuple):
    """The rows of both tables that a run keeps, and one row that stands for all others, which are equal.

    A softmax over these rows, the last counted as often as there are rows that it stands for, is the softmax over all.
    """

    ids: np.ndarray  # int32: those of the data first, then others that differ, then the one that stands for the rest
    equal: int  # rows that the last one stands for, itself included

    @classmethod
    def of(cls, used: np.ndarray, tables: Iterable[np.ndarray]) -> "UsedRows":
        """The rows of `tables`, [V, D] each, where data use the ids `used`, ascending."""
        both = np.concatenate([np.asarray(table).view(np.uint8) for table in tables], axis=1)
        unused = np.setdiff1d(np.arange(len(both), dtype=np.int32), used)
        as_bytes = np.ascontiguousarray(both[unused]).view(np.dtype((np.void, both.shape[1])))[:, 0]
        _, first, kind, counts = np.unique(as_bytes, return_index=True, return_inverse=True, return_counts=True)
        commonest = int(np.argmax(counts))
        others = unused[kind != commonest]
        ids = np.concatenate([used, others, unused[first[commonest]][None]]).astype(np.int32)
        return cls(ids, int(counts[commonest]))

    def log_counts(self) -> np.ndarray:
        """What is added to each row's logit, float32: the logarithm of how many rows it stands for."""
        counts = np.zeros(len(self.ids), np.float32)
        counts[-1] = np.log(self.equal)
        return counts

    def put_back(self, rows: np.ndarray, vocab_size: int) -> np.ndarray:
        """The whole table."""
        table = np.broadcast_to(rows[-1], (vocab_size, rows.shape[1])).copy()
        table[self.ids] = rows
        return table


class FullWeights:
    """All weights are trained, float32; those of experts as the matrices that their MXFP4 bytes stand for."""

    def __init__(self, model: Model, weights: StoredWeights, sharding: Sharding, rows: UsedRows | None):
        """Reads nothing yet: a run that goes on needs none of `weights`."""
        self._model, self._weights, self._sharding, self._rows = model, weights, sharding, rows

    def initial(self, key: Array) -> Trained:
        """The weights to begin with, read; nothing of them is drawn.

        Raises:
            GptossError: whatever speaks against the checkpoint.
        """
        del key
        return dict(self._read())

    def _read(self) -> Iterator[tuple[str, Any]]:
        blocks: dict[str, Any] = {}
        for path, array in self._weights.read(self._model.leaves, self._sharding):
            matrix, _, name = path.rpartition("/")
            if not matrix.endswith(_EXPERTS) or name == "bias":
                if self._rows is not None and path in TABLES:
                    array = np.asarray(array)[self._rows.ids]
                yield path, self._sharding.put(jnp.asarray(array, jnp.float32), self.axes(path))
                continue
            blocks[path] = array
            both = f"{matrix}/blocks", f"{matrix}/scales"
            if all(part in blocks for part in both):
                codes, scales = (self._sharding.put(blocks.pop(part), self._model.leaves[part].axes) for part in both)
                yield f"{matrix}/weight", mxfp4.dequantize(codes, scales, jnp.float32)

    def axes(self, path: str) -> Axes:
        """The logical axes of a trained array."""
        matrix, _, name = path.rpartition("/")
        if matrix.endswith(_EXPERTS) and name == "weight":
            return self._model.leaves[f"{matrix}/blocks"].axes[:3]
        return (None, None) if self._rows is not None and path in TABLES else self._model.leaves[path].axes

    @property
    def frozen(self) -> Trained:
        """The weights that stay as they are: none."""
        return {}

    def params(self, frozen: Trained, trained: Trained, *, quantize: bool, key: Array | None) -> Params:
        """The model's weights; with `quantize` rounded as a checkpoint holds them, the gradient passing straight."""
        del frozen, key
        leaves: dict[str, Any] = {}
        for path, array in trained.items():
            matrix, _, name = path.rpartition("/")
            if matrix.endswith(_EXPERTS) and name == "weight":
                leaves[f"{matrix}/blocks"] = _straight_through(mxfp4.rounded, array) if quantize else array
                leaves[f"{matrix}/scales"] = jnp.zeros((0,), jnp.uint8)  # dense weights have none
            else:
                leaves[path] = _straight_through(_bfloat16, array) if quantize else array
        return transformer.nest(leaves)

    def published(self, trained: Trained) -> Iterator[tuple[str, np.ndarray]]:
        """Every leaf as the model declares it, rounded to bfloat16 and MXFP4, with all rows of the tables."""
        for path, array in trained.items():
            matrix, _, name = path.rpartition("/")
            if matrix.endswith(_EXPERTS) and name == "weight":
                blocks, scales = jax.jit(mxfp4.quantize)(array)
                yield f"{matrix}/blocks", np.asarray(blocks)
                yield f"{matrix}/scales", np.asarray(scales)
                continue
            rounded = np.asarray(array).astype(jnp.bfloat16)
            if self._rows is not None and path in TABLES:
                rounded = self._rows.put_back(rounded, self._model.leaves[path].shape[0])
            yield path, rounded


class Adapters:
    """Pairs of factors of low rank are trained, float32, beside weights that stay as they are, packed."""

    def __init__(self, model: Model, weights: StoredWeights, sharding: Sharding, options: LoraOptions):
        """Reads the weights.

        Raises:
            GptossError: whatever speaks against the checkpoint.
        """
        self._options, self._sharding, self._config = options, sharding, weights.config
        self._targets = adapters.targets(weights.config, options.targets)
        read = weights.read(model.leaves, sharding)
        self._frozen = dict(weight_transforms.apply([weight_transforms.to_devices(model, sharding)], read))

    @property
    def frozen(self) -> Trained:
        """The weights that stay as they are, as a checkpoint holds them."""
        return self._frozen

    def initial(self, key: Array) -> Trained:
        """Factors a drawn evenly from +-1 / sqrt(inputs), as PEFT draws them, and b = 0: at first nothing changes."""
        found = {}
        for number, (path, target) in enumerate(self._targets.items()):
            shapes, axes = target.shapes(self._options.rank), target.axes
            bound = float(np.prod(target.inputs)) ** -0.5
            drawn = jax.random.uniform(jax.random.fold_in(key, number), shapes.a, jnp.float32, -bound, bound)
            found[f"{path}/a"] = self._sharding.put(drawn, axes.a)
            found[f"{path}/b"] = self._sharding.put(jnp.zeros(shapes.b, jnp.float32), axes.b)
        return found

    def axes(self, path: str) -> Axes:
        """The logical axes of a trained array."""
        target, _, factor = path.rpartition("/")
        return getattr(self._targets[target].axes, factor)

    def params(self, frozen: Trained, trained: Trained, *, quantize: bool, key: Array | None) -> Params:
        """The model's weights, with the adapters beside them; `key` draws what dropout leaves out (None: nothing)."""
        del quantize
        scale = self._options.alpha / self._options.rank
        pairs = {path: LowRank(trained[f"{path}/a"], scale * trained[f"{path}/b"]) for path in self._targets}
        return transformer.nest(dict(adapted.beside(self._config, frozen.items(), pairs, self._dropouts(key))))

    def _dropouts(self, key: Array | None) -> dict[str, Dropout]:
        """Of all adapters but the experts', which have none, as in PEFT."""
        rate = self._options.dropout
        if key is None or not rate:
            return {}
        plain = [path for path, target in self._targets.items() if not target.experts]
        return {path: Dropout(jax.random.fold_in(key, i), rate) for i, path in enumerate(plain)}

    def factors(self, trained: Trained) -> dict[str, LowRank]:
        """The trained factors on the host, unscaled, by the matrix that they stand beside."""
        return {
            path: LowRank(*(np.asarray(trained[f"{path}/{factor}"]) for factor in LowRank._fields))
            for path in self._targets
        }


def _straight_through(rounding: Any, array: Float[Array, "..."]) -> Float[Array, "..."]:
    """`array` rounded, its gradient as if it were not (Bengio et al., arXiv:1308.3432)."""
    return array + lax.stop_gradient(rounding(array) - array)


def _bfloat16(array: Float[Array, "..."]) -> Float[Array, "..."]:
    return array.astype(jnp.bfloat16).astype(jnp.float32)
