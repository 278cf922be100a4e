"""Writes a random model as a published checkpoint, in any of the published formats, streamed in bounded memory.

The tables that reading uses say which tensor holds which leaf: `gptoss_jax.checkpoints.{huggingface, openai}`.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters.random_model import RandomTensor, dequantized_experts, tensors
from gptoss_jax.checkpoints import huggingface, openai
from gptoss_jax.checkpoints.published import INDEX
from gptoss_jax.checkpoints.recipe import Recipe
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.tokenizer import STARTOFTEXT
from gptoss_jax.model import config_keys
from gptoss_jax.model.config import NAMED_TOKEN_IDS, STOP_IDS, ModelConfig, parse_config

SHARD_BYTES = 4_800_000_000  # the published 20b has files of this size
FORMATS: Mapping[str, Callable[[ModelConfig], dict[str, Recipe]]] = {
    "huggingface": huggingface.mxfp4_recipes,
    "openai": openai.original_recipes,
    "huggingface-bf16": huggingface.bf16_recipes,
}
"""Formats by their names on the command line -> their tables."""

_RETURN, _CALL, _END_OF_TEXT = STOP_IDS


class Entry(NamedTuple):
    """One tensor as stored.

    Attributes:
        dtype: in safetensors' spelling.
        shape: sizes of its axes.
        stream: yields arrays whose bytes follow one another in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    stream: Callable[[], Iterator[np.ndarray]]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, the header left out."""
        return math.prod(self.shape) * (2 if self.dtype == "BF16" else 1)


def write_checkpoint(
    dst: str | Path,
    config: dict[str, Any],
    *,
    format: str = "huggingface",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes a checkpoint of random weights.

    Args:
        dst: a folder, created if missing.
        config: a config.json in the Hugging Face spelling, with its `quantization_config`.
        format: "huggingface" (MXFP4 experts), "openai" (the files of the published `original/` folder, put
            into `dst` itself) or "huggingface-bf16" (experts dequantized and transposed to [E, in, out]).
        seed: any integer; the same seed gives the same model in every format.
        shard_bytes: most bytes of tensors in one file. The openai format is always one file.

    Returns:
        Bytes of tensors written.

    Raises:
        FileExistsError: `dst` holds something already.
        GptossError: an unknown format, or a config that is not a gpt-oss model.
    """
    if format not in FORMATS:
        raise GptossError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    dst = Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise FileExistsError(f"{dst} exists and is not an empty folder: remove it or name another")
    stored = entries(config, format, seed)
    dst.mkdir(parents=True, exist_ok=True)
    if format == "openai":
        _write_openai(dst, config, stored, seed)
    else:
        if format == "huggingface-bf16":
            config = {key: value for key, value in config.items() if key != "quantization_config"}
        _write_huggingface(dst, config, stored, seed, shard_bytes)
    return sum(entry.size_bytes for entry in stored.values())


def entries(config: dict[str, Any], format: str, seed: int) -> dict[str, Entry]:
    """Name -> what is stored under it in `format`; its values are made when they are asked for.

    Raises:
        ConfigError: the config is not a gpt-oss model.
    """
    parsed = parse_config(config)
    recipes, random = FORMATS[format](parsed), tensors(parsed)

    leaves_of: dict[str, list[str]] = {}  # parts of one tensor in their order, as the tables list them
    for leaf, recipe in recipes.items():
        leaves_of.setdefault(recipe.tensor, []).append(leaf)
    stored = {}
    for tensor, leaves in leaves_of.items():
        recipe, parts = recipes[leaves[0]], [random[leaf] for leaf in leaves]
        make = dequantized_experts if recipe.pack else _one_by_one
        stored[tensor] = Entry(recipe.dtype, recipe.shape, functools.partial(make, *parts, seed=seed))
    return stored


def _one_by_one(*parts: RandomTensor, seed: int) -> Iterator[np.ndarray]:
    for part in parts:
        yield from part.chunks(seed)


# ---- configs ----


def with_vocab_size(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The config with another vocabulary; one too small for the published stop ids has its last but one."""
    small = vocab_size < NAMED_TOKEN_IDS
    stop, pad = (vocab_size - 2, vocab_size - 1) if small else (_RETURN, _END_OF_TEXT)
    return config | {"vocab_size": vocab_size, "eos_token_id": stop, "pad_token_id": pad}


def generation_config(config: dict[str, Any]) -> dict[str, Any]:
    """The generation_config.json beside a config: the published one's keys, in its order."""
    parsed = parse_config(config)
    stops = {"do_sample": True, "eos_token_id": list(parsed.stop_ids), "pad_token_id": parsed.pad_id}
    if config["vocab_size"] >= NAMED_TOKEN_IDS:
        stops |= {"bos_token_id": STARTOFTEXT, "eos_token_id": [_RETURN, _END_OF_TEXT, _CALL]}
    return stops | {key: config[key] for key in ("transformers_version",) if key in config}


def _openai_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in the spelling of the published `original/config.json`."""
    parsed = parse_config(config)
    return {key: getattr(parsed, field) for key, field in config_keys.OPENAI.items()}


# ---- files ----


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_safetensors(path: Path, stored: dict[str, Entry], seed: int) -> None:
    """One safetensors file; bfloat16 before bytes, so that every tensor lies aligned."""
    stored = dict(sorted(stored.items(), key=lambda item: (item[1].dtype, item[0])))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "weights": f"random, seed {seed}"}}
    at = 0
    for name, entry in stored.items():
        offsets = [at, at := at + entry.size_bytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in stored.values():
            for chunk in entry.stream():
                file.write(chunk.view(np.uint8).data)


def _shards(stored: dict[str, Entry], shard_bytes: int) -> list[dict[str, Entry]]:
    """Cuts the tensors, in name order, into files of at most `shard_bytes`; a larger tensor has its own."""
    shards, held = [{}], 0
    for name, entry in sorted(stored.items()):
        if shards[-1] and held + entry.size_bytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = entry
        held += entry.size_bytes
    return shards


def _write_huggingface(
    dst: Path, config: dict[str, Any], stored: dict[str, Entry], seed: int, shard_bytes: int
) -> None:
    shards = _shards(stored, shard_bytes)
    weight_map = {}
    for i, shard in enumerate(shards):  # the published 20b, too, counts from 0 and names its last number
        file = f"model-{i:05d}-of-{len(shards) - 1:05d}.safetensors"
        _write_safetensors(dst / file, shard, seed)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(entry.size_bytes for entry in stored.values())
    _write_json(dst / "config.json", config)
    _write_json(dst / "generation_config.json", generation_config(config))
    _write_json(dst / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _write_openai(dst: Path, config: dict[str, Any], stored: dict[str, Entry], seed: int) -> None:
    _write_safetensors(dst / "model.safetensors", stored, seed)
    kinds = {"blocks": "FP4", "scales": "UE8"}
    dtypes = {name: kinds.get(name.rsplit(".", 1)[-1], "BF16") for name in sorted(stored)}
    _write_json(dst / "dtypes.json", dtypes)
    _write_json(dst / "config.json", _openai_config(config))
