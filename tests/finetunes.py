"""Runs of fine-tuning for tests: a narrow model with the real vocabulary, a few conversations, the command."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors

from converters.random_checkpoint import write_checkpoint
from gptoss_jax.training import corpus
from gptoss_jax.training.vocabulary import ALWAYS
from tests import processes
from tests.goldens.make import two_layers_config

FINETUNE = "gptoss_jax.finetune"
NARROW = two_layers_config() | {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 201_088}
NARROW |= {"eos_token_id": 200_002, "pad_token_id": 199_999}
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def chats(path: Path, count: int = 24, first: int = 0) -> Path:
    """Sums as conversations, a line each."""
    lines = []
    for a in range(first, first + count):
        said = {"role": "assistant", "thinking": f"{a} plus {a % 7}.", "content": str(a + a % 7)}
        lines.append({"messages": [{"role": "user", "content": f"What is {a} + {a % 7}?"}, said]})
    return write_lines(path, lines)


def write_lines(path: Path, documents: Iterable[Any]) -> Path:
    """A JSONL file; what is text already stands there as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in documents))
    return path


def model(folder: Path, data: Path) -> Path:
    """Random weights whose embeddings' rows are equal where `data` uses none; as a fresh model has them."""
    path = folder / "model"
    write_checkpoint(path, NARROW)
    used = np.unique(corpus.read([str(data)], row_tokens=4096).ids)
    others = np.setdiff1d(np.arange(NARROW["vocab_size"]), [*used, *ALWAYS])
    for name in path.glob("*.safetensors"):
        tensors = safetensors.load_file(name)
        for table in TABLES:
            tensors[table] = tensors[table].astype(ml_dtypes.bfloat16)
            tensors[table][others] = 0
        safetensors.save_file(tensors, name, {"weights": "random", "format": "pt"})
    return path


def run(*arguments: Any, **options: Any) -> processes.Done:
    """`python -m gptoss_jax.finetune arguments`."""
    return processes.run(FINETUNE, *arguments, **options)


def digest(folder: Path) -> str:
    """Of all files of a result: names and bytes; not of what says when and where it was made."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "provenance.json")
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.relative_to(folder)} ".encode() + path.read_bytes())
    return found.hexdigest()
