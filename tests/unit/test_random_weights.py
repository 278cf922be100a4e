"""Random checkpoints: the same model in every format, the same bytes on every machine, bounded memory."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from converters import random_checkpoint, random_model
from converters.random_checkpoint import FORMATS, with_vocab_size, write_checkpoint
from converters.random_model import random_tensors
from tests import reference

CONFIGS = Path(__file__).parents[2] / "configs"
SHARD_BYTES = 300_000


def config_of(name: str) -> dict:
    """A config of the repository."""
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def tiny() -> dict:
    """configs/tiny.json with a small vocabulary."""
    return with_vocab_size(config_of("tiny"), 512)


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory) -> dict[str, Path]:
    """The same model in every format."""
    folder = tmp_path_factory.mktemp("formats")
    for format in FORMATS:
        write_checkpoint(folder / format, tiny, format=format, seed=0, shard_bytes=SHARD_BYTES)
    return {format: folder / format for format in FORMATS}


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder's safetensors files, through the safetensors library."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def assert_same(got: np.ndarray, wanted: np.ndarray):
    """Equal dtype, shape and bytes: -0.0 is not 0.0."""
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert got.tobytes() == wanted.tobytes()


def test_huggingface_format(checkpoints, tiny):
    """Guards the header's offsets and the cut into shards: what the library reads back is what was meant."""
    wanted, got = random_tensors(tiny, 0), read(checkpoints["huggingface"])
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_same(got[name], wanted[name])


def test_openai_format_is_the_same_model(checkpoints, tiny):
    """Guards the table of names and the order q, k, v in the fused projection."""
    wanted, got = random_tensors(tiny, 0), read(checkpoints["openai"])
    for i in range(tiny["num_hidden_layers"]):
        attention, experts = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp.experts"
        for part in ("weight", "bias"):
            fused = np.concatenate([wanted.pop(f"{attention}.{c}_proj.{part}") for c in "qkv"])
            assert_same(got.pop(f"block.{i}.attn.qkv.{part}"), fused)
            assert_same(got.pop(f"block.{i}.attn.out.{part}"), wanted.pop(f"{attention}.o_proj.{part}"))
            router = wanted.pop(f"model.layers.{i}.mlp.router.{part}")
            assert_same(got.pop(f"block.{i}.mlp.gate.{part}"), router)
        for new, old in (("mlp1", "gate_up_proj"), ("mlp2", "down_proj")):
            for part in ("weight.blocks", "weight.scales", "bias"):
                whole = wanted.pop(f"{experts}.{old}_{part.removeprefix('weight.')}")
                assert_same(got.pop(f"block.{i}.mlp.{new}_{part}"), whole)
        assert_same(got.pop(f"block.{i}.attn.sinks"), wanted.pop(f"{attention}.sinks"))
        norms = {"attn": "input_layernorm", "mlp": "post_attention_layernorm"}
        for new, old in norms.items():
            assert_same(got.pop(f"block.{i}.{new}.norm.scale"), wanted.pop(f"model.layers.{i}.{old}.weight"))
    names = {"embedding.weight": "model.embed_tokens.weight", "unembedding.weight": "lm_head.weight"}
    for new, old in (names | {"norm.scale": "model.norm.weight"}).items():
        assert_same(got.pop(new), wanted.pop(old))
    assert not got and not wanted


def test_bf16_format_dequantises_exactly(checkpoints, tiny):
    """Guards nibble order, scale bias and transposition, which square matrices hide in real models."""
    wanted, got = random_tensors(tiny, 0), read(checkpoints["huggingface-bf16"])
    for name in [name for name in wanted if name.endswith("_blocks")]:
        whole = name.removesuffix("_blocks")
        blocks, scales = wanted.pop(name), wanted.pop(f"{whole}_scales")
        experts = np.stack([reference.mxfp4(b, s).T for b, s in zip(blocks, scales, strict=True)])
        wanted[whole] = experts.astype(ml_dtypes.bfloat16)
        assert (wanted[whole].astype(np.float64) == experts).all()
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_same(got[name], wanted[name])


def test_content_is_pinned(tiny):
    """Guards goldens and reports against a silent change of the weights, say by a new NumPy."""
    digest = hashlib.sha256()
    for name, tensor in sorted(random_tensors(tiny, 0).items()):
        digest.update(name.encode() + tensor.tobytes())
    assert digest.hexdigest() == "e572d1ef678d1e67c733a167b1310c047e7435a84d1c0a977367c334848291d5"


def test_seed_matters(tiny):
    """Guards against a seed that is read and not used: every tensor differs between two seeds."""
    a, b = random_tensors(tiny, 0), random_tensors(tiny, 1)
    assert all(a[name].tobytes() != b[name].tobytes() for name in a)


def test_chunks_do_not_matter(tiny, monkeypatch):
    """Guards the stream's seams: chunks of odd length, not of whole 64-bit words, change nothing."""
    whole = random_tensors(tiny, 0)
    monkeypatch.setattr(random_model, "CHUNK_ELEMENTS", 1237)
    for name, tensor in random_tensors(tiny, 0).items():
        assert_same(tensor, whole[name])


@pytest.mark.parametrize("format", FORMATS)
def test_memory_is_bounded(format):
    """Guards against generating a whole tensor at once: the 20b's largest comes in small chunks."""
    entries = random_checkpoint.entries(config_of("gpt-oss-20b"), format, 0)
    largest = max(entries.values(), key=lambda entry: entry.size_bytes)
    assert largest.size_bytes > 1e9
    assert next(largest.stream()).nbytes <= 64 * 2**20


@pytest.mark.parametrize(("name", "size"), [("gpt-oss-20b", 13_761_264_768), ("gpt-oss-120b", 65_248_815_744)])
def test_true_sizes(name, size):
    """Guards the configs and the shapes: the bytes are those of the published checkpoints' index files."""
    entries = random_checkpoint.entries(config_of(name), "huggingface", 0)
    assert sum(entry.size_bytes for entry in entries.values()) == size


def test_shards(checkpoints):
    """Guards shard sizes, their numbering from 0 to the last, and an index that names each tensor's file."""
    folder = checkpoints["huggingface"]
    files = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-{len(files) - 1:05d}.safetensors" for i in range(len(files))
    ]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes = {}
    for path in files:
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt", "weights": "random, seed 0"}
            names = list(file.keys())
            sizes[path.name] = sum(file.get_tensor(name).nbytes for name in names)
        assert sizes[path.name] <= SHARD_BYTES
        assert {index["weight_map"].pop(name) for name in names} == {path.name}
    assert not index["weight_map"]
    assert sum(sizes.values()) == index["metadata"]["total_size"]


def test_stop_ids(tiny):
    """Guards generation defaults: the published stop ids if the vocabulary has them, else one it has."""
    small = random_checkpoint.generation_config(tiny)
    assert (small["eos_token_id"], small["pad_token_id"]) == ([510], 511)
    full = random_checkpoint.generation_config(config_of("tiny"))
    assert (full["eos_token_id"], full["pad_token_id"]) == ([200002, 199999, 200012], 199999)
    assert with_vocab_size(tiny, 201_088) == config_of("tiny")


def test_gains(tiny):
    """Guards the gains: a model in which a block adds nothing, or never clamps, would hide mistakes there."""
    tensors = random_tensors(tiny, 0)
    token_ids = np.arange(200) * 7 % 512
    clamped = 0
    *inputs, _ = reference.residuals(tensors, tiny, token_ids)
    for layer, x in enumerate(inputs):
        weights = reference.layer_weights(tensors, layer)
        attention = reference.attention_layer(x, weights, tiny, sliding=layer % 2 == 0)
        experts = reference.moe_layer(x + attention, weights, tiny)
        assert 0.3 < attention.std() / x.std() < 2
        assert 0.1 < experts.std() / x.std() < 2
        unclamped = reference.moe_layer(x + attention, weights, tiny | {"swiglu_limit": np.inf})
        clamped += np.any(unclamped != experts, axis=-1).sum()
        chosen, _ = reference.route(x, weights, tiny)
        assert set(np.unique(chosen)) == set(range(7))
    assert 0.02 < clamped / (200 * 5) < 0.98


def run(*arguments) -> subprocess.CompletedProcess:
    """The command, as a user runs it."""
    command = [sys.executable, "-m", "converters.random_weights", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent)


def test_command(checkpoints, tmp_path):
    """Guards the flags: the command writes what the function writes."""
    arguments = ("--config", CONFIGS / "tiny.json", "--vocab-size", 512, "--shard_bytes", SHARD_BYTES)
    done = run(tmp_path / "new", *arguments)
    assert done.returncode == 0, done.stderr
    assert "2,081,890 bytes of random weights, seed 0" in done.stdout
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == sorted(path.name for path in checkpoints["huggingface"].iterdir())
    for name in files:
        assert (tmp_path / "new" / name).read_bytes() == (checkpoints["huggingface"] / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/tiny.json"], "expected one folder to write, DST, got none"),
        (["DST", "--config", "absent.json"], "absent.json: no such file"),
        (["DST", "--config", "README.md"], "README.md, line 1, column 1: Expecting value; expected JSON"),
        (
            ["DST", "--config", "configs/tiny.json", "--layout", "onnx"],
            "expected one of huggingface, openai, huggingface-bf16",
        ),
        (["DST", "--config", "configs/tiny.json", "--sed", "1"], "unknown flag --sed: did you mean --seed?"),
        (["configs", "--config", "configs/tiny.json"], "configs exists and is not an empty folder"),
        (
            ["DST", "--config", "configs/tiny.json", "--layout=openai", "--shard-bytes=9"],
            "--shard-bytes is for the Hugging Face formats",
        ),
    ],
)
def test_usage_errors(arguments, message, tmp_path):
    """Guards against tracebacks, and against writing before the arguments are known to be good."""
    (tmp_path / "README.md").write_text("no JSON")
    places = {"DST": tmp_path / "new", "README.md": tmp_path / "README.md"}
    done = run(*[places.get(argument, argument) for argument in arguments])
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()
