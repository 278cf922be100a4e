"""Write a gpt-oss checkpoint of seeded random weights in a published layout, streamed in bounded memory.

    python -m converters.random_weights DST --config configs/tiny.json --layout huggingface --seed 0

Every tensor is a function of the seed, its name in the Hugging Face MXFP4 layout, and its shape, so that all
layouts of one config and seed hold the same model. The gains keep every part of the network at work, so that
a mistake in any of them shows in the logits. Knows no model code, no JAX and no trained weights.
"""

import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import flags

from gptoss_jax.cli import command
from gptoss_jax.errors import GptossError
from gptoss_jax.model.config import read_config

LAYOUTS = ("huggingface", "openai", "huggingface-bf16")
SHARD_BYTES = 4_800_000_000  # the published 20b has files of this size
PIECE_ELEMENTS = 1 << 22  # elements generated at a time
NAMED_TOKENS = 200_019  # o200k_harmony names the ids below; a smaller vocabulary lacks the published stop ids
STOP_IDS = (200_002, 199_999, 200_012)
# E2M1 in the OCP Microscaling Formats v1.0
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


# ---- what a checkpoint holds ----

# Columns: name; shape in the letters of `_sizes`; content; mean; gain.
# content "normal": bfloat16 of standard deviation `gain`. "matrix": the same, over sqrt(fan-in). "blocks":
# uniform FP4 codes. "scales": E8M0 exponents (three neighbours) that give the codes the deviation
# gain / sqrt(fan-in). The gains give attention scores a deviation of about 2 against sinks of about 3, spread
# the router, drive the SwiGLU into its clamp at times, and let each block add about what the residual holds.
# Larger inputs to the experts would make 24 random layers chaotic, and bfloat16 would then say nothing.
_MODEL_TABLE = (
    ("model.embed_tokens.weight", "V D", "normal", 0.0, 1.0),
    ("lm_head.weight", "V D", "matrix", 0.0, 2.5),
    ("model.norm.weight", "D", "normal", 1.0, 0.2),
)
_LAYER_TABLE = (
    ("input_layernorm.weight", "D", "normal", 1.0, 0.2),
    ("self_attn.q_proj.weight", "NH D", "matrix", 0.0, 1.0),
    ("self_attn.q_proj.bias", "NH", "normal", 0.0, 0.3),
    ("self_attn.k_proj.weight", "KH D", "matrix", 0.0, 1.0),
    ("self_attn.k_proj.bias", "KH", "normal", 0.0, 0.3),
    ("self_attn.v_proj.weight", "KH D", "matrix", 0.0, 1.0),
    ("self_attn.v_proj.bias", "KH", "normal", 0.0, 0.3),
    ("self_attn.o_proj.weight", "D NH", "matrix", 0.0, 3.0),
    ("self_attn.o_proj.bias", "D", "normal", 0.0, 0.1),
    ("self_attn.sinks", "N", "normal", 3.0, 2.0),
    ("post_attention_layernorm.weight", "D", "normal", 1.0, 0.2),
    ("mlp.router.weight", "E D", "matrix", 0.0, 2.0),
    ("mlp.router.bias", "E", "normal", 0.0, 0.5),
    ("mlp.experts.gate_up_proj_blocks", "E 2F D/32 16", "blocks", 0.0, 0.0),
    ("mlp.experts.gate_up_proj_scales", "E 2F D/32", "scales", 0.0, 1.5),
    ("mlp.experts.gate_up_proj_bias", "E 2F", "normal", 0.0, 1.5),
    ("mlp.experts.down_proj_blocks", "E D F/32 16", "blocks", 0.0, 0.0),
    ("mlp.experts.down_proj_scales", "E D F/32", "scales", 0.0, 0.3),
    ("mlp.experts.down_proj_bias", "E D", "normal", 0.0, 0.2),
)

# OpenAI's name -> the Hugging Face tensors whose rows it holds, one under another.
_OPENAI_MODEL = {
    "embedding.weight": ["model.embed_tokens.weight"],
    "unembedding.weight": ["lm_head.weight"],
    "norm.scale": ["model.norm.weight"],
}
_OPENAI_LAYER = {
    "attn.norm.scale": ["input_layernorm.weight"],
    "attn.qkv.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "attn.qkv.bias": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    "attn.out.weight": ["self_attn.o_proj.weight"],
    "attn.out.bias": ["self_attn.o_proj.bias"],
    "attn.sinks": ["self_attn.sinks"],
    "mlp.norm.scale": ["post_attention_layernorm.weight"],
    "mlp.gate.weight": ["mlp.router.weight"],
    "mlp.gate.bias": ["mlp.router.bias"],
    "mlp.mlp1_weight.blocks": ["mlp.experts.gate_up_proj_blocks"],
    "mlp.mlp1_weight.scales": ["mlp.experts.gate_up_proj_scales"],
    "mlp.mlp1_bias": ["mlp.experts.gate_up_proj_bias"],
    "mlp.mlp2_weight.blocks": ["mlp.experts.down_proj_blocks"],
    "mlp.mlp2_weight.scales": ["mlp.experts.down_proj_scales"],
    "mlp.mlp2_bias": ["mlp.experts.down_proj_bias"],
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the Hugging Face MXFP4 layout; its content follows from these fields and the seed."""

    name: str
    shape: tuple[int, ...]
    content: str  # "normal", "blocks" or "scales"
    mean: float
    std: float

    @property
    def dtype(self) -> np.dtype:
        """bfloat16, or uint8 for MXFP4 blocks and scales."""
        return np.dtype(ml_dtypes.bfloat16 if self.content == "normal" else np.uint8)


def _sizes(config: dict) -> dict[str, int]:
    """The letters of the tables' shapes."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    for name in ("hidden_size", "intermediate_size"):
        if config[name] % 32:
            raise GptossError(f"{name} is {config[name]}, expected a multiple of the MXFP4 block of 32")
    sizes = {"V": config["vocab_size"], "D": hidden, "E": config["num_local_experts"], "2F": 2 * inner}
    sizes |= {"N": config["num_attention_heads"], "D/32": hidden // 32, "F/32": inner // 32, "16": 16}
    sizes |= {"NH": config["num_attention_heads"] * head, "KH": config["num_key_value_heads"] * head}
    return sizes


def _tensors(config: dict) -> dict[str, Tensor]:
    """Every tensor of the Hugging Face MXFP4 layout, by name."""
    sizes = _sizes(config)
    rows = [("", row) for row in _MODEL_TABLE]
    rows += [(f"model.layers.{i}.", row) for i in range(config["num_hidden_layers"]) for row in _LAYER_TABLE]
    tensors = {}
    for prefix, (name, letters, content, mean, gain) in rows:
        shape = tuple(sizes[letter] for letter in letters.split())
        fan_in = {"matrix": shape[-1], "scales": 32 * shape[-1]}.get(content, 1)
        content = "normal" if content == "matrix" else content
        tensors[prefix + name] = Tensor(prefix + name, shape, content, mean, gain / math.sqrt(fan_in))
    return tensors


# ---- content ----


@functools.cache
def _normal_quantiles() -> np.ndarray:
    """65,536 equally likely values of the standard normal distribution, all within 4.4 of zero."""
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)])


def _bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float64 -> bfloat16 bits by way of float32, to nearest even; no library's version matters."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _scale_bytes(std: float) -> np.ndarray:
    """The exponent that gives uniform FP4 codes this deviation, and its neighbours, as a table of 256."""
    codes_rms = math.sqrt(float(np.mean(FP4.astype(np.float64) ** 2)))
    neighbours_rms = math.sqrt((0.5**2 + 1**2 + 2**2) / 3)
    exponent = 127 + round(math.log2(std / (codes_rms * neighbours_rms)))
    return np.array([exponent - 1 + i % 3 for i in range(256)], np.uint8)


def _random_bytes(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """Bytes [start, start + count) of the stream that belongs to this seed and name."""
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = np.random.PCG64(np.random.SeedSequence(int.from_bytes(key, "little")))
    generator.advance(start // 8)
    words = (start % 8 + count + 7) // 8
    return generator.random_raw(words).astype("<u8", copy=False).view(np.uint8)[start % 8 :][:count]


def _elements(tensor: Tensor, seed: int, start: int, count: int) -> np.ndarray:
    """Elements [start, start + count) of the flattened tensor."""
    itemsize = tensor.dtype.itemsize
    raw = _random_bytes(seed, tensor.name, start * itemsize, count * itemsize)
    if tensor.content == "blocks":
        return raw
    if tensor.content == "scales":
        return _scale_bytes(tensor.std)[raw]
    table = _bfloat16_bits(tensor.mean + tensor.std * _normal_quantiles())
    return table[raw.view("<u2")].view(tensor.dtype)


def _pieces(tensor: Tensor, seed: int) -> Iterator[np.ndarray]:
    size = math.prod(tensor.shape)
    for start in range(0, size, PIECE_ELEMENTS):
        yield _elements(tensor, seed, start, min(PIECE_ELEMENTS, size - start))


def _expert(tensor: Tensor, seed: int, expert: int) -> np.ndarray:
    """One expert's part of a tensor whose leading axis is E."""
    size = math.prod(tensor.shape[1:])
    return _elements(tensor, seed, expert * size, size).reshape(tensor.shape[1:])


def _dequantised_experts(blocks: Tensor, scales: Tensor, seed: int) -> Iterator[np.ndarray]:
    """Expert by expert, the weights as bfloat16 [in, out]: exact, since a code has two significant bits."""
    for expert in range(blocks.shape[0]):
        packed = _expert(blocks, seed, expert)
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 32)
        exponents = _expert(scales, seed, expert).astype(np.int32) - 127
        weights = np.ldexp(FP4[codes], exponents[..., None]).astype(ml_dtypes.bfloat16)
        yield np.ascontiguousarray(weights.reshape(len(weights), -1).T)


def random_tensors(config: dict, seed: int) -> dict[str, np.ndarray]:
    """All tensors of a random model in memory, in the Hugging Face MXFP4 layout.

    Args:
        config: a config.json in the Hugging Face spelling.
        seed: any integer.

    Returns:
        Name -> array, of `ml_dtypes.bfloat16`, or of uint8 for MXFP4 blocks and scales.
    """
    return {
        name: np.concatenate(list(_pieces(tensor, seed))).reshape(tensor.shape)
        for name, tensor in _tensors(config).items()
    }


# ---- layouts: what is stored under which name ----


@dataclass(frozen=True)
class Entry:
    """One tensor as stored: `stream()` yields arrays whose bytes follow one another."""

    dtype: str  # in safetensors' spelling
    shape: tuple[int, ...]
    stream: Callable[[], Iterator[np.ndarray]]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, the header left out."""
        return math.prod(self.shape) * (2 if self.dtype == "BF16" else 1)


def _entry(parts: list[Tensor], seed: int) -> Entry:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    dtype = "BF16" if parts[0].content == "normal" else "U8"
    return Entry(dtype, shape, lambda: (piece for part in parts for piece in _pieces(part, seed)))


def _huggingface_entries(config: dict, seed: int) -> dict[str, Entry]:
    return {name: _entry([tensor], seed) for name, tensor in _tensors(config).items()}


def _bf16_entries(config: dict, seed: int) -> dict[str, Entry]:
    entries = _huggingface_entries(config, seed)
    tensors = _tensors(config)
    for name in [name for name in entries if name.endswith("_blocks")]:
        whole = name.removesuffix("_blocks")
        blocks, scales = tensors[name], tensors[f"{whole}_scales"]
        experts, rows, groups, _ = blocks.shape
        del entries[name], entries[f"{whole}_scales"]
        stream = functools.partial(_dequantised_experts, blocks, scales, seed)
        entries[whole] = Entry("BF16", (experts, 32 * groups, rows), stream)
    return entries


def _openai_entries(config: dict, seed: int) -> dict[str, Entry]:
    tensors = _tensors(config)
    entries = {name: _entry([tensors[part] for part in parts], seed) for name, parts in _OPENAI_MODEL.items()}
    for i in range(config["num_hidden_layers"]):
        for name, parts in _OPENAI_LAYER.items():
            entries[f"block.{i}.{name}"] = _entry([tensors[f"model.layers.{i}.{part}"] for part in parts], seed)
    return entries


# ---- configs ----


def with_vocab_size(config: dict, vocab_size: int) -> dict:
    """The config with another vocabulary; one too small for the published stop ids has its last but one."""
    small = vocab_size < NAMED_TOKENS
    stop, pad = (vocab_size - 2, vocab_size - 1) if small else (STOP_IDS[0], STOP_IDS[1])
    return config | {"vocab_size": vocab_size, "eos_token_id": stop, "pad_token_id": pad}


def _generation_config(config: dict) -> dict:
    stops = {
        "do_sample": True,
        "eos_token_id": [config["eos_token_id"]],
        "pad_token_id": config["pad_token_id"],
    }
    if config["vocab_size"] >= NAMED_TOKENS:
        stops |= {"bos_token_id": 199_998, "eos_token_id": list(STOP_IDS)}
    return stops | {"transformers_version": config["transformers_version"]}


def _openai_config(config: dict) -> dict:
    """The same numbers in the spelling of the published `original/config.json`."""
    same = "num_hidden_layers experts_per_token vocab_size hidden_size intermediate_size swiglu_limit head_dim"
    same += " num_attention_heads num_key_value_heads sliding_window initial_context_length rope_theta"
    yarn = config["rope_scaling"]
    return {name: config[name] for name in same.split()} | {
        "num_experts": config["num_local_experts"],
        "rope_scaling_factor": yarn["factor"],
        "rope_ntk_alpha": yarn["beta_slow"],
        "rope_ntk_beta": yarn["beta_fast"],
    }


# ---- files ----


def _write_json(path: Path, content: Any):
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_safetensors(path: Path, entries: dict[str, Entry], seed: int):
    """One safetensors file; bfloat16 before bytes, so that every tensor lies aligned."""
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].dtype, item[0])))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "weights": f"random, seed {seed}"}}
    at = 0
    for name, entry in entries.items():
        offsets = [at, at := at + entry.size_bytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries.values():
            for piece in entry.stream():
                file.write(piece.view(np.uint8).data)


def _shards(entries: dict[str, Entry], shard_bytes: int) -> list[dict[str, Entry]]:
    """Cuts the tensors, in name order, into files of at most `shard_bytes`; a larger tensor has its own."""
    shards, held = [{}], 0
    for name, entry in sorted(entries.items()):
        if shards[-1] and held + entry.size_bytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = entry
        held += entry.size_bytes
    return shards


def _write_huggingface(dst: Path, config: dict, entries: dict[str, Entry], seed: int, shard_bytes: int):
    shards = _shards(entries, shard_bytes)
    weight_map = {}
    for i, shard in enumerate(shards):  # the published 20b, too, counts from 0 and names its last number
        file = f"model-{i:05d}-of-{len(shards) - 1:05d}.safetensors"
        _write_safetensors(dst / file, shard, seed)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(entry.size_bytes for entry in entries.values())
    _write_json(dst / "config.json", config)
    _write_json(dst / "generation_config.json", _generation_config(config))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(dst / "model.safetensors.index.json", index)


def _write_openai(dst: Path, config: dict, entries: dict[str, Entry], seed: int):
    _write_safetensors(dst / "model.safetensors", entries, seed)
    kinds = {"blocks": "FP4", "scales": "UE8"}
    dtypes = {name: kinds.get(name.rsplit(".", 1)[-1], "BF16") for name in sorted(entries)}
    _write_json(dst / "dtypes.json", dtypes)
    _write_json(dst / "config.json", _openai_config(config))


def write_checkpoint(
    dst: str | Path,
    config: dict,
    *,
    layout: str = "huggingface",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes a checkpoint of random weights.

    Args:
        dst: a folder, created if missing.
        config: a config.json in the Hugging Face spelling, with its `quantization_config`.
        layout: "huggingface" (MXFP4 experts), "openai" (the files of the published `original/` folder, put
            into `dst` itself) or "huggingface-bf16" (experts dequantised and transposed to [E, in, out]).
        seed: any integer; the same seed gives the same model in every layout.
        shard_bytes: most bytes of tensors in one file. The openai layout is always one file.

    Returns:
        Bytes of tensors written.

    Raises:
        FileExistsError: `dst` holds something already.
        GptossError: an unknown layout, or sizes that MXFP4 blocks do not divide.
    """
    if layout not in LAYOUTS:
        raise GptossError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
    dst = Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise FileExistsError(f"{dst} exists and is not an empty folder: remove it or name another")
    make = {
        "huggingface": _huggingface_entries,
        "openai": _openai_entries,
        "huggingface-bf16": _bf16_entries,
    }[layout]
    entries = make(config, seed)
    dst.mkdir(parents=True, exist_ok=True)
    if layout == "openai":
        _write_openai(dst, config, entries, seed)
    else:
        if layout == "huggingface-bf16":
            config = {key: value for key, value in config.items() if key != "quantization_config"}
        _write_huggingface(dst, config, entries, seed, shard_bytes)
    return sum(entry.size_bytes for entry in entries.values())


# ---- the command ----


def _define_flags():
    flags.DEFINE_string("config", None, "config.json of the model, in the Hugging Face spelling", required=True)
    flags.DEFINE_enum("layout", "huggingface", LAYOUTS, "published layout to write")
    flags.DEFINE_integer("seed", 0, "seed of the weights; all layouts of one seed hold the same model")
    flags.DEFINE_integer("vocab_size", None, "vocabulary size in place of the config's", lower_bound=3)
    flags.DEFINE_integer(
        "shard_bytes",
        None,
        "most bytes in one file (Hugging Face layouts; 4.8e9 if not given)",
        lower_bound=1,
    )


def main(arguments: list[str]):
    """Writes what the flags say."""
    options = flags.FLAGS
    if len(arguments) != 1:
        raise GptossError(f"expected one folder to write, DST, got {arguments or 'none'}")
    if options.layout == "openai" and options.shard_bytes is not None:
        raise GptossError("--shard-bytes is for the Hugging Face layouts: --layout openai is one file")
    started = time.monotonic()
    config = _read_config(Path(options.config), options.vocab_size)
    size = write_checkpoint(
        arguments[0],
        config,
        layout=options.layout,
        seed=options.seed,
        shard_bytes=options.shard_bytes or SHARD_BYTES,
    )
    seconds = time.monotonic() - started
    what = f"{options.layout} layout, {size:,} bytes of random weights, seed {options.seed}"
    print(f"{arguments[0]}: {what}, {seconds:.1f} s")


def _read_config(path: Path, vocab_size: int | None) -> dict:
    """The raw config, checked by the product's own reader."""
    read_config(path)
    config = json.loads(path.read_text())
    return config if vocab_size is None else with_vocab_size(config, vocab_size)


def cli():
    """Entry point of the command."""
    _define_flags()
    command.run(main, "random_weights")


if __name__ == "__main__":
    cli()
