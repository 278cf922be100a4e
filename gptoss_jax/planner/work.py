"""What one device does in a step: operations, bytes of memory, collectives, launches. Knows no JAX.

A lower bound, as `ModelConfig.decode_bytes` is: weights are read once a step, of the experts those that are expected to
be hit when every token draws its experts evenly; activations stay where they are computed.
"""

from collections.abc import Callable
from typing import NamedTuple

from gptoss_jax.model import keys
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.config_ranges import MXFP4_BLOCK
from gptoss_jax.model.mesh import MeshShape
from gptoss_jax.planner import collectives
from gptoss_jax.planner.chips import Chip
from gptoss_jax.planner.collectives import ALWAYS, Collective
from gptoss_jax.planner.memory import Workload, key_width, memory

DISPATCH_STEPS = 64  # most of a dispatch: of gptoss_jax.engine.programs, which imports JAX
_BFLOAT16 = 2
_BY_ID = 4 + 1 + 4 + 2 * 4  # bytes that drawing reads of each id: bias, prompted, drawn; logits, written and read


class Work(NamedTuple):
    """One device's part of a step.

    Attributes:
        tokens: of the step, over all devices.
        flops: multiplications and additions.
        weight_bytes: read from memory.
        kv_bytes: keys and values, read as they lie, padded on TPUs; and of each slot what drawing reads.
        copy_bytes: read and written where a TPU's compiler copies embedding, keys and values into another order: in a
            prefill; of what is copied around the loop of a dispatch the share of one of its steps, if it has them all.
        collectives: all that the program has, those that only some slots ask for too.
        launches: kernels, copies and library calls; None: not counted on this chip.
    """

    tokens: int
    flops: float
    weight_bytes: float
    kv_bytes: float
    copy_bytes: float
    collectives: tuple[Collective, ...]
    launches: int | None

    @property
    def hbm_bytes(self) -> float:
        """That go through memory."""
        return self.weight_bytes + self.kv_bytes + self.copy_bytes

    @property
    def always(self) -> list[Collective]:
        """Collectives that every step has."""
        return [each for each in self.collectives if each.when == ALWAYS]

    @property
    def sent_bytes(self) -> float:
        """That the device sends to others in every step."""
        return sum((each.sent_bytes for each in self.always), 0.0)


def decode_step(config: ModelConfig, mesh: MeshShape, chip: Chip, workload: Workload) -> Work:
    """A token of every slot, each with its whole context in the cache."""
    found = tuple(collectives.decode_step(config, mesh, chip, workload))
    return _work(config, mesh, chip, workload, 1, found)


def prefill_chunk(config: ModelConfig, mesh: MeshShape, chip: Chip, workload: Workload) -> Work:
    """A chunk of every slot's prompt, the last of a prompt as long as the context: the one with most keys before it."""
    found = tuple(collectives.prefill_chunk(config, mesh, chip, workload))
    return _work(config, mesh, chip, workload, workload.prefill_tokens, found)


def _work(
    config: ModelConfig, mesh: MeshShape, chip: Chip, workload: Workload, width: int, found: tuple[Collective, ...]
) -> Work:
    slots = workload.slots // mesh.size("batch")
    tokens = slots * width
    routed = tokens * mesh.pooled_batches  # that the experts of this device and its like are for
    seen = _of_layers(keys.seen, config, mesh, workload.context_tokens, width)
    read = _of_layers(keys.read, config, mesh, workload.context_tokens, width)
    heads, vocab = mesh.size("heads"), mesh.size("vocab")
    expert = 3 * mesh.expert_width(config) * config.hidden_size  # a device's part of one
    router = config.num_layers * config.num_experts * config.hidden_size
    flops = 2 * tokens * (config.attention_bytes / _BFLOAT16 / heads + router)
    flops += 2 * routed * config.num_layers * config.experts_per_token * expert / mesh.size("experts")
    flops += 4 * slots * seen * config.num_heads * config.head_dim / heads
    flops += slots * config.unembedding_bytes / vocab
    launches = None
    if chip.launches is not None:
        per_layer, beside = chip.launches
        launches = round(per_layer * config.num_layers + beside + sum(c.arrays for c in found if c.when == ALWAYS))
    return Work(
        tokens=workload.slots * width,
        flops=flops,
        weight_bytes=_weights_read(config, mesh, tokens),
        kv_bytes=slots * (2 * _BFLOAT16 * read * key_width(config, mesh, chip))
        + slots * _BY_ID * config.vocab_size / vocab,
        copy_bytes=memory(config, mesh, chip, workload).copied_bytes(width) / (DISPATCH_STEPS if width == 1 else 1),
        collectives=found,
        launches=launches,
    )


def _weights_read(config: ModelConfig, mesh: MeshShape, tokens: int) -> float:
    """Bytes of attention, routers, unembedding, the tokens' embeddings, and of the experts that they hit."""
    missed = (1 - config.experts_per_token / config.num_experts) ** (tokens * mesh.pooled_batches)
    weights = 3 * mesh.expert_width(config) * config.hidden_size * config.num_experts
    experts = config.num_layers * (1 - missed) * (weights / 2 + weights / MXFP4_BLOCK)
    routers = _BFLOAT16 * config.num_layers * config.num_experts * config.hidden_size
    embedded = _BFLOAT16 * tokens * config.hidden_size / mesh.size("vocab")
    return (
        experts / mesh.size("experts")
        + config.attention_bytes / mesh.size("heads")
        + routers
        + config.unembedding_bytes / mesh.size("vocab")
        + embedded
    )


def _of_layers(
    count: Callable[[ModelConfig, int, int, int], int], config: ModelConfig, mesh: MeshShape, context: int, width: int
) -> float:
    """A device's part of the keys that `count` counts of a layer, over all layers: positions cut full attention."""
    counts = ((layer, count(config, layer, context, width)) for layer in range(config.num_layers))
    shards = mesh.size("positions")
    return sum(n if config.has_sliding_window(layer) else n / shards for layer, n in counts)
