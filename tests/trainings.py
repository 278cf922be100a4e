"""Training steps for tests: conversations packed into rows, and what the float64 reference makes of each alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from gptoss_jax.model.sharding import Sharding
from gptoss_jax.training import batch as batches
from gptoss_jax.training import rows
from gptoss_jax.training.batch import Batch
from gptoss_jax.training.corpus import Corpus
from gptoss_jax.training.optimizer import BETA1
from gptoss_jax.training.options import LoraOptions, OptimizerOptions, TrainOptions
from gptoss_jax.training.rows import Member
from gptoss_jax.training.step import State, Trainer
from tests import reference
from tests.goldens.make import log_softmax, two_layers_config

CONFIG = two_layers_config() | {"sliding_window": 9}  # shorter than the conversations
ROW_TOKENS = 43
HEAD = 7  # tokens that conversations 0 to 2 begin with
LENGTHS = (19, 17, 12, 25, 14, 31)
PACKED = (  # the last row is padding alone
    (Member(0, 0), Member(1, HEAD), Member(2, HEAD)),
    (Member(3, 0), Member(4, 0)),
    (Member(5, 0),),
)
LORA = LoraOptions(rank=3, alpha=5.0, targets=("attention", "router", "experts", "unembedding"))


class Conversation(NamedTuple):
    """Token ids, and which of them are learned: predicted from those before."""

    ids: np.ndarray
    learned: np.ndarray


def conversations(vocab_size: int = 512, seed: int = 3) -> list[Conversation]:
    """Of LENGTHS tokens; two thirds of those after the head are learned, the first of them never."""
    rng = np.random.default_rng(seed)
    head = rng.integers(0, vocab_size, HEAD)
    found = []
    for number, length in enumerate(LENGTHS):
        ids = rng.integers(0, vocab_size, length).astype(np.int32)
        ids[:HEAD] = head if number < len(PACKED[0]) else ids[:HEAD]
        found.append(Conversation(ids, (rng.random(length) < 2 / 3) & (np.arange(length) > HEAD)))
    return found


def batch(of: Sequence[Conversation], packed: Sequence[Sequence[Member]] = PACKED, batch_rows: int = 4) -> Batch:
    """Rows that hold the conversations as `packed` says."""
    ids, learned = (np.concatenate(arrays) for arrays in zip(*of, strict=True))
    offsets = np.cumsum([0, *(len(conversation.ids) for conversation in of)])
    lines, digests = np.zeros((len(of), 2), np.int32), np.zeros(len(of), np.uint64)
    corpus = Corpus(ids, learned, lines, digests, offsets, ("made",), len(of))
    return batches.stack([rows.fill(corpus, members, ROW_TOKENS) for members in packed], batch_rows)


def options(method: str = "full", **changes: Any) -> TrainOptions:
    """Of four rows of ROW_TOKENS, no clipping, a learning rate that shows."""
    optimizer = OptimizerOptions(learning_rate=1e-3, warmup=0.0, decay_from=1.0, clip=0.0)
    lora = LORA if method == "lora" else None
    defaults = {"batch_rows": 4, "row_tokens": ROW_TOKENS, "steps": 4, "optimizer": optimizer, "lora": lora}
    return TrainOptions(**(defaults | {"method": method} | changes))  # pyright: ignore[reportArgumentType]


def trainer(
    folder: Path, method: str = "full", *, mesh: Sharding | None = None, rows: Any = None, **changes: Any
) -> Trainer:
    """Of four steps."""
    return Trainer.open(folder, options(method, **changes), total_steps=4, mesh=mesh, rows=rows)


def first_gradients(state: State) -> dict[str, np.ndarray]:
    """The gradients of the first step, of the state after it: AdamW's first moments are a share of them."""
    moments = optax.tree.get(state.optimizer, "mu")
    return {path: np.asarray(moment) / (1 - BETA1) for path, moment in moments.items()}


def mean_loss(tensors: Mapping[str, np.ndarray], config: dict, of: Sequence[Conversation]) -> float:
    """Cross entropy of the learned tokens by the reference, each conversation alone."""
    total, learned = 0.0, 0
    for ids, is_learned in of:
        likely = log_softmax(reference.forward(tensors, config, ids)[:-1])
        total -= likely[np.arange(len(ids) - 1), ids[1:]][is_learned[1:]].sum()
        learned += int(is_learned[1:].sum())
    return total / learned


def as_float64(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Published tensors as numbers: experts of their MXFP4 bytes, under the name of the blocks."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            scales = tensors[name.removesuffix("blocks") + "scales"]
            found[name] = np.stack([reference.mxfp4(*expert) for expert in zip(tensor, scales, strict=True)])
        elif not name.endswith("_scales"):
            found[name] = tensor.astype(np.float64)
    return found


def published_name(path: str) -> str:
    """The tensor, as `as_float64` has it, of a weight that is trained."""
    parts = path.split("/")
    if parts[0] != "layers":
        names = {"embedding": "model.embed_tokens", "unembedding": "lm_head", "norm": "model.norm"}
        return f"{names[path]}.weight"
    prefix, block, rest = f"model.layers.{parts[1]}.", parts[2], parts[3:]
    if rest == ["norm"]:
        return f"{prefix}{'input' if block == 'attention' else 'post_attention'}_layernorm.weight"
    if rest == ["sinks"]:
        return f"{prefix}self_attn.sinks"
    if rest[0] in ("gate_up", "down"):
        kind = {"weight": "blocks", "blocks": "blocks", "bias": "bias"}[rest[1]]
        return f"{prefix}mlp.experts.{rest[0]}_proj_{kind}"
    if rest[0] == "router":
        return f"{prefix}mlp.router.{rest[1]}"
    return f"{prefix}self_attn.{'o' if rest[0] == 'out' else rest[0]}_proj.{rest[1]}"


def adapted_name(path: str) -> str:
    """The tensor of the matrix that an adapter stands beside."""
    return published_name(path if path == "unembedding" else f"{path}/weight")


def with_adapters(
    tensors: Mapping[str, np.ndarray], factors: Mapping[str, np.ndarray], options: LoraOptions = LORA
) -> dict[str, np.ndarray]:
    """`tensors`, of `as_float64`, with alpha / rank times the product of each pair of factors added."""
    found = dict(tensors)
    for path in (path.removesuffix("/a") for path in factors if path.endswith("/a")):
        a, b = (np.asarray(factors[f"{path}/{factor}"], np.float64) for factor in "ab")
        experts = path.endswith(("gate_up", "down"))
        added = np.matmul(b, a) if experts else np.tensordot(b, a, 1)
        name = adapted_name(path)
        found[name] = found[name] + (options.alpha / options.rank * added).reshape(found[name].shape)
    return found
