"""The parity gate: small models, and what their logits may differ from the reference, by ranges of positions.

One function decides, so that the product's test and the mutation suite, which must fail it, ask the same question.
Another, far stricter, holds the reference itself against transformers.
"""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from converters.random_checkpoint import write_checkpoint
from converters.random_model import random_tensors
from tests.goldens.make import divergence

MAX_KL = 1e-6  # nats, mean over a range; float32 against the reference
MAX_DIFFERENCE = 2e-3  # of a logit; measured 3.3e-4 at position 9,000, where float32 angles have drifted most
EDGES = (0, 128, 4096, 8192, 1 << 30)


class TinyModel(NamedTuple):
    """A small model, as the reference takes it and as a published checkpoint."""

    config: dict
    seed: int = 0

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return random_tensors(self.config, self.seed)

    def write(self, folder: Path, format: str = "huggingface") -> Path:
        write_checkpoint(folder / "published", self.config, format=format, seed=self.seed)
        return folder / "published"


def published_tensor(tensors: dict[str, np.ndarray], path: str) -> np.ndarray:
    """The published tensor of a leaf, by a mapping of the tests' own."""
    parts = path.split("/")
    if parts[0] != "layers":
        return tensors[
            {"embedding": "model.embed_tokens", "unembedding": "lm_head", "norm": "model.norm"}[path] + ".weight"
        ]
    prefix, block, rest = f"model.layers.{parts[1]}.", parts[2], parts[3:]
    if rest == ["norm"]:
        norm = "input_layernorm" if block == "attention" else "post_attention_layernorm"
        return tensors[f"{prefix}{norm}.weight"]
    if rest[0] in ("gate_up", "down"):
        return tensors[f"{prefix}mlp.experts.{rest[0]}_proj_{rest[1]}"]
    if block == "moe":
        return tensors[f"{prefix}mlp.router.{rest[1]}"]
    if rest == ["sinks"]:
        return tensors[f"{prefix}self_attn.sinks"]
    return tensors[f"{prefix}self_attn.{'o' if rest[0] == 'out' else rest[0]}_proj.{rest[1]}"]


def failures(logits: np.ndarray, reference: np.ndarray, positions: np.ndarray) -> list[str]:
    """Why `logits` [P, V], computed in float32, are not the reference's; empty if they are.

    Top-1 agreement must be 100 %, the mean KL divergence of each range of positions at most MAX_KL, and no logit off
    by more than MAX_DIFFERENCE: a divergence alone forgives an error in what the softmax barely looks at.
    """
    faults = []
    for low, high in pairwise(EDGES):
        here = (positions >= low) & (positions < high)
        if not here.any():
            continue
        ours, theirs = logits[here], reference[here]
        kl = divergence(theirs, ours).mean()
        top1 = (ours.argmax(-1) == theirs.argmax(-1)).mean()
        off = np.abs(ours - theirs).max()
        if not (kl <= MAX_KL and top1 == 1 and off <= MAX_DIFFERENCE):
            faults.append(f"positions {low} to {high}: KL {kl:.2e}, top-1 {top1:.4f}, largest difference {off:.2e}")
    return faults


def assert_agrees(logits: np.ndarray, golden: np.ndarray, max_abs: float, max_kl: float) -> None:
    """Of the float64 reference `logits` [P, V] and transformers' in float32: at every position, KL in nats."""
    assert (logits.argmax(axis=-1) == golden.argmax(axis=-1)).all()
    assert np.abs(logits - golden).max() <= max_abs
    assert divergence(logits, golden).max() <= max_kl
