"""What merging an adapter costs: the KL divergence between the adapter's model, the merged one and the base, on a text.

All of them go through a checkpoint together, layer by layer, teacher-forced: one layer's weights are in memory at a
time, whatever the size of the model, and nothing has been written yet. Portable kernels, float32 throughout: two models
that differ in nothing have a divergence of 0.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from gptoss_jax.checkpoints import export_leaves
from gptoss_jax.checkpoints.export_leaves import Change
from gptoss_jax.checkpoints.orbax.manifest import LeafRecord
from gptoss_jax.model import adapted, adapters, layers, rope, transformer
from gptoss_jax.model import sharding as sharding_module
from gptoss_jax.model.adapters import LowRank
from gptoss_jax.model.attention import Positions
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.layers import Kernels
from gptoss_jax.model.transformer import DTYPE_POLICIES, Params

TOKENS_AT_ONCE = 32  # whose logits are on the host together, of each model, in float64
BASE, ADAPTER = "base", "adapter"
_POLICY = DTYPE_POLICIES["float32"]

Leaves = dict[str, tuple[np.ndarray, ...]]
"""What a checkpoint holds of a layer, as changes name and take it."""


class Text(NamedTuple):
    """B rows of up to T tokens."""

    tokens: Int32[np.ndarray, "B T"]  # padding 0
    counts: Int32[np.ndarray, "B"]  # tokens of each row
    measured: Bool[np.ndarray, "B T"]  # after which tokens the predictions are compared

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], measured: Sequence[Sequence[bool]] | None = None) -> "Text":
        """Token ids of each row, and after which of them to compare: None: after all."""
        shape = len(rows), max(map(len, rows))
        tokens, compared = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            compared[i, : len(row)] = True if measured is None else measured[i]
        return cls(tokens, np.array(list(map(len, rows)), np.int32), compared)


class Divergence(NamedTuple):
    """Of a model m, means over the measured tokens.

    Attributes:
        from_adapter: KL(adapter || m), nats.
        from_base: KL(base || m), nats.
        agrees: the share of tokens after which m and the adapter's model find the same one likeliest.
    """

    from_adapter: float
    from_base: float
    agrees: float

    @property
    def is_nearer_the_base(self) -> bool:
        """Whether m is further from the adapter's model than from the one that the adapter was trained on."""
        return self.from_adapter > self.from_base


def measure(
    checkpoint: Path,
    config: ModelConfig,
    records: Mapping[str, LeafRecord],
    factors: Mapping[str, LowRank],
    merges: Mapping[str, Change],
    text: Text,
    report_bytes: Callable[[int], object] = lambda _: None,
) -> dict[str, Divergence]:
    """How far each model of `merges`, and the base, is from the base with the adapter beside it.

    Args:
        checkpoint: the base: a checkpoint of ours.
        config: its model.
        records: its leaves.
        factors: the adapter, by matrix, the scale in b.
        merges: name -> what becomes of a leaf in the merged model; BASE and ADAPTER are taken.
        text: on what.
        report_bytes: called with bytes of the checkpoint as they are read.

    Raises:
        CheckpointError: a leaf is not as its manifest says.
    """
    read = functools.partial(_read, checkpoint, records, report_bytes)
    models = _Models(config, factors, merges)
    sharding = sharding_module.make(None)
    embedded = jnp.asarray(read("embedding")["embedding"][0][text.tokens].astype(np.float32))
    streams = dict.fromkeys(models.names, embedded)
    ordinal = np.arange(text.tokens.shape[1], dtype=np.int32)
    of_tokens = jnp.asarray(np.where(ordinal < text.counts[:, None], ordinal, -1))
    positions = Positions(of_tokens, *rope.rotation(config, of_tokens))
    kinds = [
        _layer(config, i, sharding) for i in range(min(2, config.num_layers))
    ]  # with a sliding window, and without
    for i in range(config.num_layers):
        leaves = read(f"layers/{i}/")
        for name in models.names:
            params = models.params(name, leaves, f"layers/{i}/")
            streams[name] = jax.block_until_ready(kinds[i % 2](params, streams[name], positions))
    norm = read("norm")["norm"][0]
    last = {name: _normed(config, norm, x)[jnp.asarray(text.measured)] for name, x in streams.items()}
    leaves = read("unembedding")
    tables = {name: models.params(name, leaves, "")["unembedding"] for name in models.names}
    return _divergences(last, tables, sharding)


def _read(
    checkpoint: Path, records: Mapping[str, LeafRecord], report_bytes: Callable[[int], object], prefix: str
) -> Leaves:
    """The leaves below `prefix`, or the one of that name."""
    paths = [path for path in export_leaves.paths(records) if path.startswith(prefix)]
    return {
        path: tuple(
            export_leaves.read(checkpoint, records[leaf], report_bytes)
            for leaf in export_leaves.leaves_of(path, records)
        )
        for path in paths
    }


class _Models:
    """The models that are compared, as weights of one layer."""

    def __init__(self, config: ModelConfig, factors: Mapping[str, LowRank], merges: Mapping[str, Change]):
        self._config, self._factors, self._merges = config, factors, merges
        self.names = (BASE, ADAPTER, *merges)

    def params(self, name: str, leaves: Leaves, prefix: str) -> Params:
        """What `transformer.Layer` takes, or the unembedding, from leaves below `prefix`."""
        change = self._merges.get(name)
        if change is not None:
            leaves = {path: change(path, tuple(map(np.copy, arrays))) for path, arrays in leaves.items()}
        placed = _by_leaf(leaves)
        if name == ADAPTER:
            placed = adapted.beside(self._config, placed, self._of(leaves))
        return transformer.nest({path.removeprefix(prefix): array for path, array in placed})

    def _of(self, leaves: Leaves) -> dict[str, LowRank]:
        """The adapters of the matrices among `leaves`, float32."""
        targets = adapters.targets(self._config)
        return {
            path: LowRank(*(jnp.asarray(factor, jnp.float32) for factor in pair))
            for path, pair in self._factors.items()
            if targets[path].weight.removesuffix("/blocks") in leaves
        }


def _by_leaf(leaves: Leaves) -> Iterator[tuple[str, Any]]:
    """Arrays on the device, as the model names them; experts that are not packed as the matrices that training has."""
    for path, arrays in leaves.items():
        if not path.endswith(adapters.GROUPS["experts"]):
            yield path, jnp.asarray(arrays[0])
        elif len(arrays) == 1:
            yield f"{path}/blocks", jnp.asarray(arrays[0]).transpose(0, 2, 1)  # [E, out, in]
            yield f"{path}/scales", jnp.zeros((0,), jnp.uint8)
        else:
            yield f"{path}/blocks", jnp.asarray(arrays[0])
            yield f"{path}/scales", jnp.asarray(arrays[1])


def _layer(config: ModelConfig, layer: int, sharding: sharding_module.Sharding) -> Any:
    """The layer of this number, compiled once for each kind of weights."""
    graph, _ = nnx.split(transformer.Layer(config, layer, sharding, Kernels(), _POLICY))

    @jax.jit
    def run(params: Params, x: Float[Array, "B T D"], positions: Positions) -> Float[Array, "B T D"]:
        return nnx.merge(graph, params)(x, positions, None, lambda place, activation: None)[0]

    return run


def _normed(config: ModelConfig, scale: np.ndarray, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return layers.rms_norm(x, jnp.asarray(scale), config.rms_norm_eps)


def _divergences(
    last: Mapping[str, Float[Array, "M D"]], tables: Mapping[str, Any], sharding: sharding_module.Sharding
) -> dict[str, Divergence]:
    """Of what all models predict after each of M tokens."""
    unembed = jax.jit(layers.Product(("vocab",), (None,), sharding, Kernels().linear).__call__)
    count = len(last[BASE])
    sums = {name: np.zeros(3) for name in last if name != ADAPTER}
    for first in range(0, count, TOKENS_AT_ONCE):
        logs = {
            name: _log_softmax(np.asarray(unembed(x[None, first : first + TOKENS_AT_ONCE], tables[name])[0]))
            for name, x in last.items()
        }
        for name, of_model in sums.items():
            of_model += _compared(logs[ADAPTER], logs[BASE], logs[name])
    return {name: Divergence(*(float(value) for value in found / count)) for name, found in sums.items()}


def _compared(adapter: np.ndarray, base: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Sums over tokens of what `Divergence` has means of."""
    from_adapter = np.sum(np.exp(adapter) * (adapter - model))
    from_base = np.sum(np.exp(base) * (base - model))
    return np.array([from_adapter, from_base, np.sum(adapter.argmax(-1) == model.argmax(-1))])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
