"""How much memory a training step takes on each device, by part, from the model's numbers alone. Knows no JAX.

It counts what has to lie in memory at the same time; a compiler may find less to keep, and keeps buffers of its own.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from gptoss_jax.model import adapters
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.config_ranges import MXFP4_BLOCK
from gptoss_jax.training.options import LoraOptions, TrainOptions

LOGITS_BYTES = 1 << 28  # of gptoss_jax.training.loss, which imports JAX
FEW_EXPERTS = 16  # of pallas_kernels.expert_mlp, which does too
_TRAINED = 4  # bytes of a trained weight, of its gradient, and of each of the optimizer's numbers about it: float32
_STORED = 2  # bytes of a weight that is not trained, experts excepted: bfloat16
_RESIDUAL = 4  # bytes of a number of the residual stream: float32

WHOLE: Mapping[str, int] = {}
"""A mesh of one device, as logical axis -> number of shards."""


class Weights(NamedTuple):
    """Numbers on each device, by what becomes of them.

    Attributes:
        dense: of norms, sinks, biases, routers, embeddings and attention.
        matrices: those of `dense` that Muon would train.
        experts: of the experts' matrices.
    """

    dense: float
    matrices: float
    experts: float


class Memory(NamedTuple):
    """Bytes on each device, by part.

    Attributes:
        base: weights that are not trained, as stored: experts in MXFP4, all else in bfloat16.
        trained: weights that are, in float32: all of them, or adapters.
        gradients: of these; with accumulation their sum too.
        optimizer: its numbers about each trained weight.
        activations: what the backward pass needs of the forward pass.
        logits: of one part of the tokens, and their gradient.
    """

    base: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self)


def memory(
    config: ModelConfig, options: TrainOptions, shards: Mapping[str, int] = WHOLE, *, vocab_rows: int | None = None
) -> Memory:
    """What a training step of these options takes.

    Args:
        config: the model.
        options: method, rows, optimizer and so on.
        shards: logical axis -> into how many shards the mesh cuts it, as `gptoss_jax.model.mesh.num_shards` says.
        vocab_rows: rows of the compact vocabulary; all by default.
    """
    rows = vocab_rows or config.vocab_size
    weights = _weights(config, shards, rows)
    if options.lora is None:
        base, trained, moments = 0.0, weights.dense + weights.experts, _moments(config, options, weights, shards)
    else:
        packed = (MXFP4_BLOCK / 2 + 1) / MXFP4_BLOCK  # bytes of a number: half of one, and a scale for each block
        base, trained = _STORED * weights.dense + packed * weights.experts, _adapters(config, options.lora, shards)
        moments = 2 * trained / shards.get("batch", 1)
    sums = 2 if options.accumulate > 1 else 1
    tokens = options.batch_rows // options.accumulate * options.row_tokens / shards.get("batch", 1)
    return Memory(
        *map(
            math.ceil,
            (
                base,
                _TRAINED * trained,
                _TRAINED * trained * sums,
                _TRAINED * moments,
                tokens * _activations(config, options, shards),
                2 * min(LOGITS_BYTES, 4 * tokens * rows / shards.get("vocab", 1)),
            ),
        )
    )


def _moments(config: ModelConfig, options: TrainOptions, weights: Weights, shards: Mapping[str, int]) -> float:
    """Numbers of the optimizer on each device: the data shards cut them, Muon's matrices excepted."""
    data = shards.get("batch", 1)
    if options.optimizer.name != "muon":
        return 2 * (weights.dense + weights.experts) / data
    over = data if shards.get("experts", 1) == 1 and config.num_experts % data == 0 else 1  # whole experts
    return 2 * (weights.dense - weights.matrices) / data + weights.matrices + weights.experts / over


def _weights(config: ModelConfig, shards: Mapping[str, int], vocab_rows: int) -> Weights:
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
    heads, expert, width = (shards.get(name, 1) for name in ("heads", "experts", "expert_hidden"))
    attention = 2 * config.head_dim * (config.num_heads + config.num_kv_heads) * hidden / heads
    biases = config.head_dim * (config.num_heads + 2 * config.num_kv_heads) / heads + config.num_heads / heads + hidden
    expert_biases = experts / expert * (2 * inner / width + hidden)
    router = experts * (hidden + 1)
    layer = attention + biases + expert_biases + router + 2 * hidden
    embeddings = 2 * vocab_rows * hidden / shards.get("vocab", 1)
    matrices = experts / expert * 3 * inner / width * hidden
    layers = config.num_layers
    return Weights(layers * layer + embeddings + hidden, layers * attention, layers * matrices)


def _adapters(config: ModelConfig, lora: LoraOptions, shards: Mapping[str, int]) -> float:
    """Numbers of the adapters on each device."""
    count = 0.0
    for target in adapters.targets(config, lora.targets).values():
        for shape, axes in zip(target.shapes(lora.rank), target.axes, strict=True):
            count += math.prod(shape) / math.prod(shards.get(axis, 1) for axis in axes if axis)
    return count


def _activations(config: ModelConfig, options: TrainOptions, shards: Mapping[str, int]) -> float:
    """Bytes a token: of all layers what their backward passes need; or where each begins, and all of one layer."""
    hidden, heads, itemsize = config.hidden_size, shards.get("heads", 1), 4 if options.dtype == "float32" else 2
    attention = 2 * config.head_dim * (config.num_heads + config.num_kv_heads) / heads  # q, k, v and what comes out
    layer = 2 * _RESIDUAL * hidden + itemsize * (2 * hidden + attention) + 4 * config.num_experts
    layer += _of_all_experts(config, options, shards)
    if options.rematerialize:
        return config.num_layers * _RESIDUAL * hidden + layer
    return config.num_layers * layer


def _of_all_experts(config: ModelConfig, options: TrainOptions, shards: Mapping[str, int]) -> float:
    """Bytes a token and layer inside the experts: none where their gradient runs them again, a few rows at a time.

    Few experts that are trained themselves all see every token, as two products, except in float32, where a CPU has
    its own kernel: of each element six float32 numbers are kept (measured of XLA for CPUs).
    """
    if options.lora is not None or options.dtype == "float32" or config.num_experts > FEW_EXPERTS:
        return 0.0
    experts, width = (shards.get(name, 1) for name in ("experts", "expert_hidden"))
    return 6 * 4 * config.num_experts / experts * config.intermediate_size / width


def table(with_all: Memory, rematerialized: Memory, options: TrainOptions) -> list[str]:
    """Lines for people: bytes of each part per device, and both totals.

    Args:
        with_all: of the options without rematerialisation.
        rematerialized: of the same with it.
        options: says which of the two will run.
    """
    names = {
        "base": "base weights, not trained",
        "trained": "trained weights",
        "gradients": "gradients",
        "optimizer": f"optimizer ({options.optimizer.name})",
        "logits": "logits and their gradient",
    }
    rows = [(text, getattr(with_all, name)) for name, text in names.items()]
    rows += [("activations", with_all.activations), ("activations, rematerialised", rematerialized.activations)]
    here = {True: "  <- these options", False: ""}
    lines = [f"{text:34}{in_gib(count)}" for text, count in rows]
    lines.append(f"{'in all':34}{in_gib(with_all.total)}{here[not options.rematerialize]}")
    lines.append(f"{'in all, --rematerialize':34}{in_gib(rematerialized.total)}{here[options.rematerialize]}")
    return lines


def in_gib(count: int) -> str:
    """Bytes in GiB, 12 characters wide; small counts in MiB."""
    return f"{count / 2**30:8.2f} GiB" if count >= 2**27 else f"{count / 2**20:8.2f} MiB"
