"""The collectives of a step, from the mesh alone: which, of how many bytes, over how many devices. Knows no JAX.

Sums over heads and positions and the exchange of the experts are written in the model (`Sharding.sum_over`,
`model/exchange.py`); the others are what XLA's partitioner makes of an embedding and logits that are cut by vocabulary,
and of slots that are cut by data shards. Tests read the same from compiled programs: all of it for CPUs, what is not
sampling for GPUs and TPUs, whose compilers treat the few bytes of sampling each in their way (XLA for GPUs gathers
logits for top-p).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from gptoss_jax.engine.sampling_params import MAX_TOP_LOGPROBS
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.mesh import RAGGED_PLATFORMS, MeshShape
from gptoss_jax.planner.chips import Chip
from gptoss_jax.planner.memory import Workload

ALWAYS = "every step"
DISPATCH = "every dispatch"  # of up to 64 decoding steps
DRAWN, TOP_K, TOP_P, TOP_LOGPROBS = "temperature", "top-k", "top-p", "top_logprobs"
_FLOAT32, _BFLOAT16, _INT32, _BOOL = 4, 2, 4, 1
_TILE_BYTES = 512  # 128 words: the width of a tile of a TPU
_SEARCH = 31  # passes of the search for the threshold of top-k and top-p


class Collective(NamedTuple):
    """Arrays that devices send one another at one place of a step.

    Attributes:
        kind: of `gptoss_jax.hlo.sent.KINDS`.
        where: what needs it: embedding, attention, experts or sampling.
        when: ALWAYS, DISPATCH, or what some slot has to ask for.
        devices: that take part in each.
        bytes: of one array on a device, after it.
        arrays: of a step; a compiler may send several at once.
        filled: which part of the bytes is sent, where tokens draw experts evenly: of a ragged all-to-all not all.
    """

    kind: str
    where: str
    when: str
    devices: int
    bytes: int
    arrays: int
    filled: float = 1.0

    @property
    def total_bytes(self) -> int:
        """Of all arrays."""
        return self.bytes * self.arrays

    @property
    def sent_bytes(self) -> float:
        """That each device sends to others: twice around a ring for a sum, once for a gathered or scattered array."""
        rounds = {"all-reduce": 2, "reduce-scatter": self.devices}.get(self.kind, 1)  # bytes are those after it
        return rounds * (self.devices - 1) / self.devices * self.total_bytes * self.filled


def decode_step(config: ModelConfig, mesh: MeshShape, chip: Chip, workload: Workload) -> list[Collective]:
    """Of one decoding step, those first that every step has."""
    return _step(config, mesh, chip, workload, 1)


def prefill_chunk(config: ModelConfig, mesh: MeshShape, chip: Chip, workload: Workload) -> list[Collective]:
    """Of one chunk of every slot's prompt."""
    return _step(config, mesh, chip, workload, workload.prefill_tokens)


def _step(config: ModelConfig, mesh: MeshShape, chip: Chip, workload: Workload, width: int) -> list[Collective]:
    slots = workload.slots // mesh.size("batch")
    numbers = slots * width * config.hidden_size
    stream = _FLOAT32 * numbers
    found = [
        Collective("all-reduce", "embedding", ALWAYS, mesh.size("vocab"), _activation_bytes(chip) * numbers, 1),
        Collective("all-reduce", "attention", ALWAYS, mesh.size("heads"), stream, config.num_layers),
        *_merges(config, mesh, slots * width),
        *_EXCHANGES[mesh.exchange_name](config, mesh, chip, slots * width),
        *_sampling(config, mesh, workload.slots, decodes=width == 1),
        *_top_logprobs(config, mesh, chip, workload.slots),
    ]
    return [collective for collective in found if collective.devices > 1]


def _activation_bytes(chip: Chip) -> int:
    """Of one number: XLA for CPUs sends no bfloat16."""
    return _FLOAT32 if chip.platform == "cpu" else _BFLOAT16


def _merges(config: ModelConfig, mesh: MeshShape, tokens: int) -> Iterator[Collective]:
    """Of attentions to parts of the positions: the largest of their sums, the sums, and the weighted values."""
    heads, shards = config.num_heads // mesh.size("heads"), mesh.size("positions")
    by_head, merges = _FLOAT32 * tokens * heads, sum(not config.has_sliding_window(i) for i in range(config.num_layers))
    yield Collective("all-reduce", "attention", ALWAYS, shards, by_head, 2 * merges)
    yield Collective("all-reduce", "attention", ALWAYS, shards, by_head * config.head_dim, merges)


def _experts(
    config: ModelConfig, kind: str, devices: int, itemsize: int, numbers: int, filled: float = 1
) -> Collective:
    """One array of every layer's exchange."""
    return Collective(kind, "experts", ALWAYS, devices, itemsize * numbers, config.num_layers, filled)


def _summed(config: ModelConfig, mesh: MeshShape, chip: Chip, tokens: int) -> Iterator[Collective]:
    del chip
    yield _experts(config, "all-reduce", mesh.size("experts", "expert_hidden"), _FLOAT32, tokens * config.hidden_size)


def _gathered(config: ModelConfig, mesh: MeshShape, chip: Chip, tokens: int) -> Iterator[Collective]:
    """Activations, ids and weights of all batch shards' tokens; outputs are scattered, and summed over other axes."""
    pooled, hidden, per_token = mesh.pooled_batches, config.hidden_size, config.experts_per_token
    yield _experts(config, "all-gather", pooled, _activation_bytes(chip), pooled * tokens * hidden)
    yield _experts(config, "all-gather", pooled, _INT32, pooled * tokens * per_token)
    yield _experts(config, "all-gather", pooled, _FLOAT32, pooled * tokens * per_token)
    yield _experts(config, "reduce-scatter", pooled, _FLOAT32, tokens * hidden)
    others = mesh.size("experts", "expert_hidden") // pooled
    yield _experts(config, "all-reduce", others, _FLOAT32, tokens * hidden)


def _sent(config: ModelConfig, mesh: MeshShape, chip: Chip, tokens: int) -> Iterator[Collective]:
    """How many rows; activations, ids and weights there, outputs back; then what the tokens' other devices need."""
    hidden, per_token, shards = config.hidden_size, config.experts_per_token, mesh.size("experts")
    alike = shards // mesh.pooled_batches
    own = -(-tokens // alike)
    is_ragged = chip.platform in RAGGED_PLATFORMS
    kind, filled = ("ragged-all-to-all", hit(config, shards)) if is_ragged else ("all-to-all", 1.0)
    yield _experts(config, "all-to-all", shards, _INT32, shards)
    for itemsize, numbers in (
        (_activation_bytes(chip), hidden),
        (_INT32, per_token),
        (_FLOAT32, per_token),
        (_FLOAT32, hidden),
    ):
        yield _experts(config, kind, shards, _row_bytes(chip, itemsize * numbers), shards * own, filled)
    yield _experts(config, "all-reduce", mesh.size("expert_hidden"), _FLOAT32, own * hidden)
    yield _experts(config, "all-gather", alike, _FLOAT32, alike * own * hidden)


def _row_bytes(chip: Chip, num_bytes: int) -> int:
    """Of a row that a ragged all-to-all sends: the compiler for TPUs fills them up to whole tiles."""
    return -(-num_bytes // _TILE_BYTES) * _TILE_BYTES if chip.platform == "tpu" else num_bytes


_EXCHANGES = {"sum": _summed, "gather": _gathered, "all_to_all": _sent}


def hit(config: ModelConfig, shards: int) -> float:
    """How likely a token has an expert on a device, where it draws them evenly and each has 1 / shards of them."""
    elsewhere = config.num_experts - config.num_experts // shards
    return 1 - math.comb(elsewhere, config.experts_per_token) / math.comb(config.num_experts, config.experts_per_token)


def _sampling(config: ModelConfig, mesh: MeshShape, slots: int, *, decodes: bool) -> Iterator[Collective]:
    """Of logits cut by vocabulary, a number for each slot; of slots cut by data shards, what any of them asks for."""
    vocab, data = mesh.size("vocab"), mesh.size("batch")
    own = slots // data

    def by_slot(when: str, itemsize: int, count: int) -> Collective:
        return Collective("all-reduce", "sampling", when, vocab, itemsize * own, count)

    yield by_slot(
        ALWAYS, _FLOAT32, 5
    )  # two maxima, a sum, the least id of the largest, the drawn one's log probability
    yield by_slot(ALWAYS, _BOOL, 1)  # whether all logits are finite
    yield Collective("all-gather", "sampling", ALWAYS, data, _INT32 * slots, 1)  # what is drawn, to be counted
    yield Collective("all-gather", "sampling", ALWAYS, data, 2 * _INT32 * slots, 1)
    if decodes:
        yield Collective("all-reduce", "sampling", ALWAYS, data, _BOOL, 1)  # whether any goes on
    yield Collective("all-reduce", "sampling", DISPATCH if decodes else ALWAYS, data, _BOOL, 2)  # what any asks for
    yield by_slot(DRAWN, _FLOAT32, 3)
    yield Collective("all-reduce", "sampling", DRAWN, data, _BOOL, 2)
    yield by_slot(TOP_K, _FLOAT32, _SEARCH)
    yield by_slot(TOP_P, _FLOAT32, _SEARCH + 1)


def _top_logprobs(config: ModelConfig, mesh: MeshShape, chip: Chip, slots: int) -> Iterator[Collective]:
    """XLA for CPUs brings all logits to every device; those for GPUs and TPUs the likeliest of each shard, with ids."""
    vocab, data = mesh.size("vocab"), mesh.size("batch")
    if chip.platform == "cpu":
        logprobs = _FLOAT32 * config.vocab_size
        yield Collective("all-gather", "sampling", TOP_LOGPROBS, vocab, logprobs * slots // data, 1)
        yield Collective("all-gather", "sampling", TOP_LOGPROBS, data, logprobs * slots, 1)
    else:
        likeliest = _FLOAT32 * MAX_TOP_LOGPROBS
        yield Collective("all-gather", "sampling", TOP_LOGPROBS, vocab, likeliest * vocab * slots // data, 2)
        yield Collective("all-gather", "sampling", TOP_LOGPROBS, data, likeliest * slots, 2)
