"""gpt-oss-20b cut down to a few layers of its true width, on seeded random weights, where the whole is too much.

What a benchmark reports of it is said of those layers, and of the embedding and unembedding of the whole model.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from converters.random_model import random_tensors
from gptoss_jax.checkpoints import host_memory, huggingface
from gptoss_jax.errors import GptossError
from gptoss_jax.model import sharding, transformer
from gptoss_jax.model.config import ModelConfig, parse_config

CONFIG = Path(__file__).parents[1] / "configs" / "gpt-oss-20b.json"
SEED = 0


def raw_config(layers: int, path: Path = CONFIG) -> dict[str, Any]:
    """The config.json at `path` with another number of layers, which must be even.

    Raises:
        GptossError: it is odd.
    """
    if layers < 2 or layers % 2:
        raise GptossError(f"{layers} layers, expected an even number of them: sliding and full attention alternate")
    raw = json.loads(path.read_text())
    types = (raw["layer_types"][:2] * layers)[:layers]
    return raw | {"num_hidden_layers": layers, "layer_types": types}


def leaves(raw: dict[str, Any]) -> tuple[ModelConfig, Iterator[tuple[str, np.ndarray]]]:
    """The model of a raw config.json, and its leaves one by one, as declared: those of `converters.random_model`.

    Each lies in memory that a device on this host takes without a copy.
    """
    config = parse_config(raw)
    recipes = huggingface.mxfp4_recipes(config)
    shapes = {path: leaf.shape for path, leaf in transformer.declare(config, sharding.make()).leaves.items()}
    tensors = random_tensors(raw, SEED)
    return config, ((path, _moved(tensors.pop(recipes[path].tensor), shapes[path])) for path in shapes)


def _moved(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    content = host_memory.empty(tensor.nbytes)
    content[:] = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    return content.view(tensor.dtype).reshape(shape)
