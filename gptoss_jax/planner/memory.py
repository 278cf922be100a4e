"""Bytes on each device of a mesh: weights, keys and values, slots, temporaries. Knows no JAX.

Weights, keys and values, and slots are arrays whose shapes are known: their bytes are counted, not estimated, and a
test holds them to what a compiled program says of its arguments. Temporaries are the compiler's, and an estimate.
"""

import math
from typing import NamedTuple

from gptoss_jax.engine.sampling_params import OPTIONS
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.config_ranges import MAX_STOP_IDS, MXFP4_BLOCK
from gptoss_jax.model.mesh import PAGE_TOKENS, MeshShape
from gptoss_jax.planner.chips import Chip

LEAST_SNAPSHOTS = 16  # of gptoss_jax.engine.runner, which imports JAX
_BFLOAT16, _WORD = 2, 4
_LANES, _ROWS = 128, {1: 32, 4: 8}  # a TPU's tile: columns, and rows by bytes of an element
_TOP_ARRAYS = 4  # [B, V] float32 or int32: log probabilities of all slots on one device, sorted, where any asks for top


class Workload(NamedTuple):
    """What runs: one engine, all of whose slots are full.

    Attributes:
        slots: B, sequences at once, over all data shards.
        context_tokens: that each can hold, and holds.
        prefill_tokens: T of a chunk of a prompt.
    """

    slots: int
    context_tokens: int
    prefill_tokens: int


class Memory(NamedTuple):
    """Bytes on each device, by part.

    Attributes:
        experts: MXFP4 blocks and scales, and biases, as the chip's kernel wants them.
        attention: projections, biases and sinks.
        embeddings: embedding and unembedding.
        others: routers and norms, which every device has whole.
        kv_cache: pages of the full-attention layers and rings of the sliding-window layers.
        padded_keys: keys and values once more, as a TPU's kernel reads them where they do not fill its tiles.
        slots: page tables, sampling options and counts of drawn ids.
        snapshots: rings that the prefix cache keeps, beside the programs.
        embedding_copy: in another order, as a TPU's compiler makes it: a prefill before its layers, decoding for good.
        retiled_weights: that decoding holds once more on some chips: unembedding, query and output projections.
        activations: of one layer of the widest program, and the residual stream.
        temporaries: of drawing a token.
    """

    experts: int
    attention: int
    embeddings: int
    others: int
    kv_cache: int
    padded_keys: int
    slots: int
    snapshots: int
    embedding_copy: int
    retiled_weights: int
    activations: int
    temporaries: int

    @property
    def weights(self) -> int:
        """Of all weights."""
        return self.experts + self.attention + self.embeddings + self.others

    @property
    def arguments(self) -> int:
        """What a decoding step's program takes."""
        return self.weights + self.kv_cache + self.slots

    def program_bytes(self, width: int) -> int:
        """Arguments and temporaries of a program that takes `width` tokens of each slot: 1 decodes.

        A prefill's copy of the embedding has been read before its layers begin.
        """
        held = self.arguments + self.padded_keys + self.temporaries
        if width == 1:
            return held + self.embedding_copy + self.retiled_weights
        return held + max(self.embedding_copy, self.activations)

    def copied_bytes(self, width: int) -> int:
        """Read and written by a program that copies what it is given into another order, and keys and values back.

        Decoding does so around its loop: once in a dispatch.
        """
        keys = self.kv_cache + self.padded_keys if self.padded_keys else 0
        weights = self.embedding_copy + (self.retiled_weights if width == 1 else 0)
        return 2 * (keys + weights)

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self)


def memory(config: ModelConfig, mesh: MeshShape, chip: Chip, workload: Workload) -> Memory:
    """What an engine of `workload` takes on each device; the mesh has to cut the model evenly."""
    tokens = workload.slots // mesh.size("batch") * workload.prefill_tokens
    return Memory(
        experts=config.num_layers * _expert_layer(config, mesh, chip.expert_layout),
        attention=config.num_layers * _attention_layer(config, mesh),
        embeddings=2 * _embedding(config, mesh),
        others=_others(config),
        kv_cache=_kv_cache(config, mesh, workload),
        padded_keys=_padded_keys(config, mesh, chip, workload),
        slots=_slots(config, mesh, workload),
        snapshots=_snapshots(config, mesh, workload),
        embedding_copy=_embedding(config, mesh) if chip.platform == "tpu" else 0,
        retiled_weights=_retiled(config, mesh) if chip.retiles else 0,
        activations=tokens * _activations(config, mesh),
        temporaries=_temporaries(config, mesh, workload),
    )


# ---- weights ----


def _embedding(config: ModelConfig, mesh: MeshShape) -> int:
    return _BFLOAT16 * config.vocab_size * config.hidden_size // mesh.size("vocab")


def _attention_layer(config: ModelConfig, mesh: MeshShape) -> int:
    """q, k, v, their biases, sinks and the output product by heads; its bias is on every device."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    rows = config.head_dim * (heads + 2 * kv_heads)
    cut = rows * (config.hidden_size + 1) + heads + config.head_dim * heads * config.hidden_size
    return _BFLOAT16 * (cut // mesh.size("heads") + config.hidden_size)


def _retiled(config: ModelConfig, mesh: MeshShape) -> int:
    """The unembedding, and of each layer the weights of queries and of the output product."""
    projection = _BFLOAT16 * config.num_heads * config.head_dim * config.hidden_size // mesh.size("heads")
    return _embedding(config, mesh) + config.num_layers * 2 * projection


def _others(config: ModelConfig) -> int:
    """Routers with biases, two norms a layer, and the last norm."""
    router = config.num_experts * (config.hidden_size + 1)
    return _BFLOAT16 * (config.num_layers * (router + 2 * config.hidden_size) + config.hidden_size)


def _expert_layer(config: ModelConfig, mesh: MeshShape, layout: str) -> int:
    """Blocks, scales and biases of a layer's experts on one device, in a weight layout (docs/kernels.md)."""
    experts = config.num_experts // mesh.size("experts")
    inner, hidden = mesh.expert_width(config), config.hidden_size
    if layout == "published":
        weights = 3 * inner * hidden
        return experts * (weights // 2 + weights // MXFP4_BLOCK + _BFLOAT16 * (2 * inner + hidden))
    blocks_in, blocks_inner = hidden // MXFP4_BLOCK, inner // MXFP4_BLOCK
    parts = 4 if layout == "words" else 1
    columns, outputs = _padded(inner // parts, _LANES), _padded(hidden, _LANES)
    gate_up = 2 * parts * columns * (_codes(blocks_in, parts) + _padded(blocks_in, _ROWS[1]) + _BFLOAT16)
    down = outputs * (_codes(blocks_inner, parts) + _padded(blocks_inner, _ROWS[1]) + _BFLOAT16)
    return experts * (gate_up + down)


def _codes(blocks: int, parts: int) -> int:
    """Bytes of a column of codes on a TPU: 32-bit words of a block's part of 8, or the block's 32 codes of 4 bits."""
    if parts == 1:
        return blocks * MXFP4_BLOCK // 2
    return _WORD * _padded(blocks * MXFP4_BLOCK // (2 * _WORD), _ROWS[4])


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to


# ---- sequences ----


def num_pages(tokens: int, mesh: MeshShape) -> int:
    """Pages that hold `tokens` tokens of a sequence: each is 64 tokens on every shard of the positions."""
    return -(-tokens // (PAGE_TOKENS * mesh.size("positions")))


def _kv_cache(config: ModelConfig, mesh: MeshShape, workload: Workload) -> int:
    full = config.num_layers - _sliding_layers(config)
    page_tokens = full * num_pages(workload.context_tokens, mesh) * PAGE_TOKENS
    slots = workload.slots // mesh.size("batch")
    return slots * (page_tokens * _token_bytes(config, mesh) + _rings(config, mesh, workload))


def key_width(config: ModelConfig, mesh: MeshShape, chip: Chip) -> int:
    """Numbers of a token's keys on a device as its kernel reads them: on TPUs a row fills whole tiles of 128 lanes."""
    width = config.num_kv_heads * config.head_dim // mesh.size("heads")
    return _padded(width, _LANES) if chip.platform == "tpu" else width


def _padded_keys(config: ModelConfig, mesh: MeshShape, chip: Chip, workload: Workload) -> int:
    """Where a token's keys on a device do not fill a tile's lanes, as one head of 64 numbers does not.

    The program is given them in another order, without gaps, and copies them.
    """
    width = config.num_kv_heads * config.head_dim // mesh.size("heads")
    read = key_width(config, mesh, chip)
    return _kv_cache(config, mesh, workload) * read // width if read > width else 0


def _rings(config: ModelConfig, mesh: MeshShape, workload: Workload) -> int:
    """Of one slot: the sliding-window layers."""
    window = min(config.sliding_window, workload.context_tokens)
    return _sliding_layers(config) * window * _token_bytes(config, mesh)


def _token_bytes(config: ModelConfig, mesh: MeshShape) -> int:
    """Keys and values of one token and layer."""
    return 2 * _BFLOAT16 * config.num_kv_heads * config.head_dim // mesh.size("heads")


def _sliding_layers(config: ModelConfig) -> int:
    return sum(config.has_sliding_window(i) for i in range(config.num_layers))


def _slots(config: ModelConfig, mesh: MeshShape, workload: Workload) -> int:
    """Page table and length; stop ids, options, a bit per id; and by id: bias, whether prompted, how often drawn."""
    words = num_pages(workload.context_tokens, mesh) + 1 + MAX_STOP_IDS + len(OPTIONS) + -(-config.vocab_size // 32) + 2
    by_id = (_WORD + 1 + _WORD) * config.vocab_size // mesh.size("vocab")
    return workload.slots // mesh.size("batch") * (_WORD * words + by_id)


def _snapshots(config: ModelConfig, mesh: MeshShape, workload: Workload) -> int:
    """As `gptoss_jax.engine.runner.num_snapshots` says, where nobody says otherwise."""
    page_tokens = PAGE_TOKENS * mesh.size("positions")
    block = math.lcm(workload.prefill_tokens, page_tokens)
    if block >= workload.context_tokens:
        return 0
    most = max(1, workload.slots * num_pages(workload.context_tokens, mesh) * page_tokens // block)
    count = min(max(LEAST_SNAPSHOTS, workload.slots), most)
    return -(-count // mesh.size("batch")) * _rings(config, mesh, workload)


# ---- what a program makes while it runs ----


def _activations(config: ModelConfig, mesh: MeshShape) -> int:
    """Bytes a token: the residual stream and what is added to it, and the larger of attention's and experts' arrays.

    Those are q, k, v; and of a token's experts the rows between their products and those after the second. Experts that
    batch shards share have room for the rows of all of their tokens, and so has what an exchange brings.
    """
    hidden, inner, pooled = config.hidden_size, mesh.expert_width(config), mesh.pooled_batches
    stream = 3 * _WORD * hidden
    attention = _WORD * (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim // mesh.size("heads")
    rows = config.experts_per_token * (_BFLOAT16 * inner + _WORD * hidden)
    brought = _BFLOAT16 * hidden if mesh.exchange_name != "sum" and mesh.size("experts") > 1 else 0
    return stream + max(attention, pooled * (rows + brought))


def _temporaries(config: ModelConfig, mesh: MeshShape, workload: Workload) -> int:
    """Logits and their like of each slot, and all of them on one device where any slot asks for top log probabilities.

    The latter where they are cut by vocabulary.
    """
    slots = workload.slots // mesh.size("batch")
    scores = 6 * _WORD * slots * config.vocab_size // mesh.size("vocab")
    return scores + (_TOP_ARRAYS * _WORD * workload.slots * config.vocab_size if mesh.size("vocab") > 1 else 0)
