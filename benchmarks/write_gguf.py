"""Writes a GGUF file of a model's weights, so that llama.cpp can run the same model beside ours.

    python -m benchmarks.write_gguf --checkpoint FOLDER --dense bf16 MODEL.gguf
    python -m benchmarks.write_gguf --layers 4 --dense q8_0 MODEL.gguf

FOLDER is as published (safetensors in any format); --layers takes the random weights that `benchmarks.cpu --layers`
makes in memory. Experts keep their MXFP4 bits: a block of llama.cpp is its scale byte, then 16 bytes whose low nibbles
are elements 0 to 15 and whose high nibbles are elements 16 to 31. Dense matrices are bfloat16 as they are, or rounded
to Q8_0; vectors and the router are float32, as llama.cpp's own converter has them. The file's
tokenizer is a placeholder: its ids are ours, and each is spelled as its number. Needs the gguf package.
"""

# pyright: reportMissingImports=false
# (gguf is installed by `make gates` alone, and imported where a file is written)

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks import true_width
from gptoss_jax.checkpoints import huggingface
from gptoss_jax.checkpoints.published import open_source
from gptoss_jax.cli import command
from gptoss_jax.errors import GptossError
from gptoss_jax.model import sharding, transformer
from gptoss_jax.model.config import ModelConfig

DENSE = ("bf16", "q8_0")

# Leaf -> tensor of llama.cpp. The gate's rows are gate_up's even ones, the up projection's the odd ones.
_MODEL = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "unembedding": "output.weight"}
_LAYER = {
    "attention/norm": "attn_norm.weight",
    "attention/q/weight": "attn_q.weight",
    "attention/q/bias": "attn_q.bias",
    "attention/k/weight": "attn_k.weight",
    "attention/k/bias": "attn_k.bias",
    "attention/v/weight": "attn_v.weight",
    "attention/v/bias": "attn_v.bias",
    "attention/sinks": "attn_sinks.weight",
    "attention/out/weight": "attn_output.weight",
    "attention/out/bias": "attn_output.bias",
    "moe/norm": "post_attention_norm.weight",
    "moe/router/weight": "ffn_gate_inp.weight",
    "moe/router/bias": "ffn_gate_inp.bias",
    "moe/down/bias": "ffn_down_exps.bias",
}
_FLOAT32 = ("router/weight", "norm", "bias", "sinks")  # endings of leaves


class Tensor(NamedTuple):
    """One tensor of the file: its array is made when it is written."""

    name: str
    kind: str  # of gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # in elements
    array: Callable[[], np.ndarray]  # of float32 for F32; else of bytes, as stored


class Leaves(NamedTuple):
    """A model, the shapes of its leaves as matrices (as published, that is), and how to read one in any shape."""

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    read_any: Callable[[str], np.ndarray]

    def read(self, path: str) -> np.ndarray:
        """A leaf, as a matrix."""
        return self.read_any(path).reshape(self.shapes[path])


def published(folder: Path) -> Leaves:
    """The leaves of a published checkpoint, each read when asked for."""
    source = open_source(folder)
    declared = transformer.declare(source.config, sharding.make()).leaves
    source.check_headers(declared)
    return Leaves(source.config, _shapes(source.config), lambda path: source.read(path, declared[path]))


def random_leaves(raw: dict[str, Any]) -> Leaves:
    """The leaves of a model with random weights, all in memory."""
    config, pairs = true_width.leaves(raw)
    held = dict(pairs)
    return Leaves(config, _shapes(config), held.__getitem__)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {path: recipe.shape for path, recipe in huggingface.mxfp4_recipes(config).items()}


def repack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 as published (byte j holds elements 2j and 2j + 1) -> llama.cpp's blocks of 17 bytes.

    Args:
        blocks: uint8 [..., B, 16].
        scales: uint8 [..., B].

    Returns:
        uint8 [..., 17 B].
    """
    packed = np.empty((*scales.shape, 17), np.uint8)
    packed[..., 0] = scales
    first, second = blocks[..., :8], blocks[..., 8:]  # elements 0 to 15, and 16 to 31
    packed[..., 1::2] = first & 15 | second << 4
    packed[..., 2::2] = first >> 4 | second & 0xF0
    return packed.reshape(*scales.shape[:-1], -1)


def tensors(leaves: Leaves, dense: str) -> Iterator[Tensor]:
    """Every tensor of the file, in its order."""
    names = dict(_MODEL)
    for i in range(leaves.config.num_layers):
        names |= {f"layers/{i}/{leaf}": f"blk.{i}.{name}" for leaf, name in _LAYER.items()}
    for path, name in names.items():
        yield _whole(leaves, path, name, dense)
    for i in range(leaves.config.num_layers):
        yield from _experts(leaves, f"layers/{i}/moe", f"blk.{i}")


def _whole(leaves: Leaves, path: str, name: str, dense: str) -> Tensor:
    """A leaf that is a tensor of llama.cpp's."""
    if path.endswith(_FLOAT32):
        return Tensor(name, "F32", leaves.shapes[path], lambda: leaves.read(path).astype(np.float32))
    if dense == "bf16":
        return Tensor(name, "BF16", leaves.shapes[path], lambda: leaves.read(path).view(np.uint8))
    return Tensor(name, "Q8_0", leaves.shapes[path], lambda: _q8_0(leaves.read(path)))


def _q8_0(weights: np.ndarray) -> np.ndarray:
    """Rounded by the gguf package's own rule, in parts, as it takes room."""
    import gguf

    parts = np.array_split(weights, max(1, weights.size >> 24))
    kind = gguf.GGMLQuantizationType.Q8_0
    return np.concatenate([gguf.quants.quantize(part.astype(np.float32), kind) for part in parts])


def _experts(leaves: Leaves, path: str, name: str) -> Iterator[Tensor]:
    """The matrices of a layer's experts, and the biases of those that are interleaved here and separate there."""
    parts = {"ffn_gate_exps": ("gate_up", np.s_[:, ::2]), "ffn_up_exps": ("gate_up", np.s_[:, 1::2])}
    for tensor, (leaf, rows) in (parts | {"ffn_down_exps": ("down", np.s_[:])}).items():
        experts, out, groups = leaves.shapes[f"{path}/{leaf}/scales"]
        out //= 2 if leaf == "gate_up" else 1

        def matrix(leaf: str = leaf, rows: Any = rows) -> np.ndarray:
            return repack(leaves.read(f"{path}/{leaf}/blocks")[rows], leaves.read(f"{path}/{leaf}/scales")[rows])

        yield Tensor(f"{name}.{tensor}.weight", "MXFP4", (experts, out, 32 * groups), matrix)
        if leaf == "gate_up":
            bias = f"{path}/{leaf}/bias"
            yield Tensor(
                f"{name}.{tensor}.bias",
                "F32",
                (experts, out),
                lambda bias=bias, rows=rows: leaves.read(bias)[rows].astype(np.float32),
            )


def missing() -> str | None:
    """Why no file can be written here, or None."""
    return None if importlib.util.find_spec("gguf") else "the gguf package is not installed: make gates installs it"


def write(path: Path, leaves: Leaves, dense: str) -> int:
    """Writes the file, a tensor at a time, and gives its bytes."""
    import gguf

    writer = gguf.GGUFWriter(path, "gpt-oss")
    _describe(writer, leaves.config)
    entries = list(tensors(leaves, dense))
    for tensor in entries:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        stored = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        dtype = np.dtype(np.float32 if tensor.kind == "F32" else np.uint8)
        # The writer takes the shape of an array of bytes in bytes.
        num_bytes = int(np.prod(stored, dtype=np.int64))
        writer.add_tensor_info(tensor.name, tensor.shape if tensor.kind == "F32" else stored, dtype, num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in entries:
        writer.write_tensor_data(np.ascontiguousarray(tensor.array()))
    writer.close()
    return path.stat().st_size


def _describe(writer: Any, config: ModelConfig) -> None:
    """The hyperparameters, as llama.cpp's own converter writes them for this architecture."""
    import gguf

    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope_scaling_factor)
    writer.add_rope_scaling_orig_ctx_len(config.initial_context_length)
    writer.add_rope_scaling_yarn_beta_fast(config.rope_beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(config.rope_beta_slow)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")  # a placeholder: servers spell what they draw
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["< >"])


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_string("checkpoint", None, "FOLDER: Published safetensors.")
    flags.DEFINE_integer("layers", None, "In place of a checkpoint: layers of true width with random weights, even.")
    flags.DEFINE_string("config", str(true_width.CONFIG), "FILE: With --layers: the config.json that is cut down.")
    flags.DEFINE_enum("dense", "bf16", DENSE, "Number format of attention's matrices, embedding and unembedding.")


def main(arguments: list[str]) -> None:
    """Writes what the flags say."""
    options = flags.FLAGS
    if len(arguments) != 1:
        raise GptossError(f"expected one file to write, got {arguments or 'none'}")
    if reason := missing():
        raise GptossError(reason)
    if (options.checkpoint is None) == (options.layers is None):
        raise GptossError("expected either --checkpoint or --layers")
    began = time.monotonic()
    if options.checkpoint:
        leaves = published(Path(options.checkpoint))
    else:
        leaves = random_leaves(true_width.raw_config(options.layers, Path(options.config)))
    num_bytes = write(Path(arguments[0]), leaves, options.dense)
    print(json.dumps({"file": arguments[0], "bytes": num_bytes, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    define_flags()
    command.run(main, "write_gguf")
