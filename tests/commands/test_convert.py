"""The converter: one model from three formats, every fault named, no interruption that costs a byte or a leaf."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import gptoss_jax
from converters import convert
from converters.random_checkpoint import with_vocab_size, write_checkpoint
from gptoss_jax.checkpoints import conversion, packing, published
from gptoss_jax.checkpoints.leaf import leaf_bytes
from gptoss_jax.checkpoints.orbax import manifest, reader
from gptoss_jax.checkpoints.orbax.manifest import CheckpointError, Manifest
from gptoss_jax.checkpoints.orbax.writer import Writer
from gptoss_jax.cli import byte_progress, interrupts
from gptoss_jax.cli import command as command_line
from gptoss_jax.model import sharding, transformer
from gptoss_jax.model.config_ranges import MAX_STOP_IDS
from pallas_kernels import mxfp4

ROOT = Path(__file__).parents[2]
TINY = json.loads((ROOT / "configs" / "tiny.json").read_text())
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
SMALL: dict[str, Any] = with_vocab_size(TINY, 512) | TWO_LAYERS | {"num_local_experts": 8}
# OpenAI's config.json names no special ids, so its vocabulary must be the published one; hence so narrow a model.
NARROW = TINY | TWO_LAYERS | {"hidden_size": 32, "intermediate_size": 64}
SCALES = "model.layers.0.mlp.experts.gate_up_proj_scales"
DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A model in the Hugging Face format, in several shards, for reading only."""
    dst = tmp_path_factory.mktemp("small") / "published"
    write_checkpoint(dst, SMALL, shard_bytes=250_000)
    assert len(list(dst.glob("*.safetensors"))) > 2
    return dst


@pytest.fixture(scope="module")
def small_converted(small, tmp_path_factory) -> Path:
    """The same, converted."""
    dst = tmp_path_factory.mktemp("converted") / "checkpoint"
    convert.run(options(small, dst))
    return dst


@pytest.fixture(scope="module")
def small_bf16(tmp_path_factory) -> Path:
    """The same with bfloat16 experts."""
    dst = tmp_path_factory.mktemp("bf16") / "published"
    write_checkpoint(dst, SMALL, format="huggingface-bf16")
    return dst


@pytest.fixture
def broken(small, tmp_path) -> Path:
    """A published checkpoint that a test may spoil."""
    return Path(shutil.copytree(small, tmp_path / "published"))


@pytest.fixture
def broken_bf16(small_bf16, tmp_path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(small_bf16, tmp_path / "published"))


def options(src: Path, dst: Path, **changes) -> convert.Options:
    """What a command line without flags asks for, and changes."""
    return convert.Options(src, dst, **changes)


def declared(source: published.Source) -> dict:
    """The leaves that a source's model has."""
    return conversion.declared_leaves(source.config)


def conversion_of(source: published.Source, dst: Path) -> conversion.Conversion:
    """The conversion of a source that is open."""
    return conversion.Conversion(source, dst, declared(source), byte_progress.byte_progress)


def command(*arguments: object) -> int:
    """Runs the command in this process; its exit code."""
    if "dry_run" not in flags.FLAGS:
        convert.define_flags()
    with flagsaver.flagsaver():
        try:
            positional = command_line._parse(["convert", *map(str, arguments)], "convert")[1:]
            command_line._guard(lambda: convert.main(positional), "convert")
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            flags.FLAGS.set_gnu_getopt(False)
    return 0


def refusals(capsys, *arguments: object) -> list[str]:
    """The lines on stderr of a command that must end with exit code 2."""
    assert command(*arguments) == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("convert: ")]


def hashes(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leaf_hashes(folder: Path) -> dict[str, str]:
    """Leaf -> sha256, from the manifest."""
    return {path: record.sha256 for path, record in Manifest.read(folder).leaves.items()}


def stored(folder: Path, path: str) -> np.ndarray:
    """One leaf, mapped from its file."""
    record = Manifest.read(folder).leaves[path]
    dtype = ml_dtypes.bfloat16 if record.dtype == "bfloat16" else record.dtype
    return np.memmap(folder / record.file, dtype, "r", shape=record.shape)


# ---- spoiling safetensors files ----

Tensors = dict[str, tuple[str, list[int], bytes]]


def read_tensors(path: Path) -> Tensors:
    """Name -> dtype, shape, bytes of a safetensors file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (value["dtype"], value["shape"], raw[start + value["data_offsets"][0] : start + value["data_offsets"][1]])
        for name, value in header.items()
    }


def write_tensors(path: Path, tensors: Tensors, edit_header: Callable[[dict], object] = lambda header: None):
    """Writes a safetensors file, with whatever header the edit makes of the right one."""
    header, at = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at := at + len(content)]}
    edit_header(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(content for _, _, content in tensors.values()))


def file_of(folder: Path, tensor: str) -> Path:
    """The shard that holds a tensor."""
    return folder / json.loads((folder / published.INDEX).read_text())["weight_map"][tensor]


@contextlib.contextmanager
def edited(folder: Path, tensor: str, edit_header: Callable[[dict], object] = lambda header: None):
    """The tensors of the file that holds `tensor`, written back at the end."""
    path = file_of(folder, tensor)
    tensors = read_tensors(path)
    yield tensors
    write_tensors(path, tensors, edit_header)


def reindex(folder: Path, change: Callable[[dict], object]):
    """Changes the index's weight_map."""
    index = json.loads((folder / published.INDEX).read_text())
    change(index["weight_map"])
    (folder / published.INDEX).write_text(json.dumps(index))


def set_bits(content: bytes, bits: dict[int, int]) -> bytes:
    """bfloat16 bytes with some values replaced by these bits."""
    values = np.frombuffer(content, np.uint16).copy()
    for index, value in bits.items():
        values[index] = value
    return values.tobytes()


# ---- three formats, one model ----


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> dict[str, Path]:
    """The narrow model in all formats, converted and verified."""
    folder = tmp_path_factory.mktemp("three")
    for format in ("huggingface", "openai", "huggingface-bf16"):
        write_checkpoint(folder / f"{format}-published", NARROW, format=format, shard_bytes=13_000_000)
        convert.run(options(folder / f"{format}-published", folder / format, verify=True))
    return {format: folder / format for format in ("huggingface", "openai", "huggingface-bf16")}


def test_huggingface_and_openai_formats_give_the_same_bytes(three):
    """Guards against a wrong cut of the fused qkv, mlp1 and mlp2 confused, gate and up reordered."""
    assert leaf_hashes(three["huggingface"]) == leaf_hashes(three["openai"])
    assert manifest.read_config(three["huggingface"]) == manifest.read_config(three["openai"])


def test_mxfp4_bytes_are_those_published(small, small_converted):
    """Guards against blocks dequantised, reordered or padded on the way."""
    for leaf, tensor in {"gate_up/blocks": "gate_up_proj_blocks", "down/scales": "down_proj_scales"}.items():
        name = f"model.layers.1.mlp.experts.{tensor}"
        content = read_tensors(file_of(small, name))[name][2]
        assert stored(small_converted, f"layers/1/moe/{leaf}").tobytes() == content


def test_bf16_format_gives_the_same_values(three):
    """Guards against experts packed along the wrong axis, or changed. Their scales may differ: see `packing.pack`."""
    published, packed = leaf_hashes(three["huggingface"]), leaf_hashes(three["huggingface-bf16"])
    experts = [path for path in published if path.endswith("/blocks")]
    differing = {path for path in published if published[path] != packed[path]}
    assert differing <= {path for blocks in experts for path in (blocks, blocks.replace("blocks", "scales"))}
    for path in experts:
        weights, scales = [], path.replace("blocks", "scales")
        for folder in (three["huggingface"], three["huggingface-bf16"]):
            blocks = jnp.asarray(stored(folder, path)), jnp.asarray(stored(folder, scales))
            weights.append(np.asarray(mxfp4.dequantize(*blocks, jnp.dtype(jnp.bfloat16))))
        assert np.array_equal(*weights), path
        codes = [stored(three[format], path) for format in ("huggingface", "huggingface-bf16")]
        same_scale = stored(three["huggingface"], scales) == stored(three["huggingface-bf16"], scales)
        assert same_scale.mean() > 0.99
        assert np.array_equal(codes[0][same_scale], codes[1][same_scale])


def test_formats_are_named(three, small, tmp_path, capsys):
    """Guards against a format guessed wrong, and not said."""
    for format, name in {
        "huggingface": "Hugging Face, MXFP4 experts",
        "openai": "OpenAI original",
        "huggingface-bf16": "Hugging Face, BF16 experts",
    }.items():
        published = three[format].with_name(f"{format}-published")
        assert command(published, tmp_path / "no", "--dry-run") == 0
        assert f"{published}: format {name}, " in capsys.readouterr().out
        assert manifest.read_provenance(three[format])["source"]["layout"] == name
    both = Path(shutil.copytree(small, tmp_path / "both"))
    shutil.copytree(three["openai"].with_name("openai-published"), both / "original")
    assert command(both, tmp_path / "no", "--dry-run") == 0
    assert "format Hugging Face, MXFP4 experts (its original/ is not read)" in capsys.readouterr().out
    (tmp_path / "parent").mkdir()
    (both / "original").rename(tmp_path / "parent" / "original")
    assert command(tmp_path / "parent", tmp_path / "no", "--dry-run") == 0
    assert "format OpenAI original (found in original/)" in capsys.readouterr().out


def test_provenance_and_what_makes_it_self_contained(small, small_converted):
    """Guards against a checkpoint of which nobody can say where it came from."""
    provenance = manifest.read_provenance(small_converted)
    files = {file["name"]: file for file in provenance["source"]["files"]}
    assert files.keys() == {path.name for path in small.glob("*.safetensors")}
    for name, file in files.items():
        assert file["sha256"] == hashlib.sha256((small / name).read_bytes()).hexdigest()
        assert file["size_bytes"] == (small / name).stat().st_size
        assert file["metadata"]["weights"] == "random, seed 0"
    assert provenance["experts"] == "published MXFP4 bytes"
    assert provenance["layout"] == "published"
    assert json.loads((small_converted / "config.json").read_text())["vocab_size"] == 512
    assert {path.name for path in small_converted.iterdir() if path.is_file()} == {
        "_METADATA",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "provenance.json",
    }


def test_tables_cover_the_model(small):
    """Guards against a leaf without a tensor, or a tensor whose shape letters are wrong at the published sizes."""
    for name in ("gpt-oss-20b.json", "gpt-oss-120b.json"):
        config = published.read_config(ROOT / "configs" / name)
        leaves = transformer.declare(config, sharding.make()).leaves
        for format, table in published.FORMATS.items():
            recipes = table(config)
            assert recipes.keys() == leaves.keys(), format
            taken = sum(leaf_bytes(leaf) for leaf in leaves.values())
            assert taken == sum(_bytes_of(recipe) for recipe in recipes.values()), format


def _bytes_of(recipe) -> int:
    """Bytes of the leaf that a recipe makes."""
    rows = recipe.rows[1] - recipe.rows[0] if recipe.rows else recipe.shape[0]
    elements = rows * int(np.prod(recipe.shape[1:]))
    per = {"": 2 if recipe.dtype == "BF16" else 1, "blocks": 1 / 2, "scales": 1 / 32}[recipe.pack]
    return round(elements * per)


# ---- bfloat16 experts ----


def test_packing_is_mxfp4_quantize():
    """Guards the fast integer form against the format's own: ties, zeros, signs, ranges of exponents."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((96, 320)) * 2.0 ** rng.integers(-20, 20, (1, 320))
    weights[:32, :16] = 0
    weights[64:, 7] = 0
    weights[70:74, 7] = 2.0**-126  # scale byte 0, and zeros beside it
    weights[32:64, ::3] = rng.choice([-0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -5, 4], (32, 107))
    weights = weights.astype(ml_dtypes.bfloat16)
    packed = packing.pack(weights)
    blocks, scales = mxfp4.quantize(jnp.asarray(weights.T))
    assert np.array_equal(packed.blocks, blocks) and np.array_equal(packed.scales, scales)
    rounded = np.asarray(mxfp4.dequantize(blocks, scales, jnp.dtype(jnp.float32))).T.astype(np.float64)
    error = np.sum((rounded - weights.astype(np.float64)) ** 2) / np.sum(weights.astype(np.float64) ** 2)
    assert not packed.exact
    assert packing.relative_rms(packed.error_power, packed.power) == pytest.approx(error**0.5, rel=1e-5)


def test_packing_knows_what_is_exact():
    """Guards against a grid test that passes values between the codes, or refuses codes under another scale."""
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (40, 3, 16), np.uint8)
    scales = rng.integers(60, 200, (40, 3)).astype(np.uint8)
    packed = jnp.asarray(blocks), jnp.asarray(scales)
    weights = np.asarray(mxfp4.dequantize(*packed, jnp.dtype(jnp.bfloat16))).T.copy()
    assert packing.pack(weights).exact
    assert not packing.is_on_grid_untransposed(np.concatenate([weights] * 4, axis=1)[:, :128])
    assert packing.is_on_grid_untransposed(np.ascontiguousarray(weights.T))
    weights[5, 7] = weights[5, 7] * 1.125 if weights[5, 7] else 2.0**-30
    assert not packing.pack(weights).exact


def off_grid(folder: Path, tensors: tuple[str, ...] = (DOWN,)):
    """Random normal weights in place of some experts."""
    for tensor in tensors:
        with edited(folder, tensor) as held:
            dtype, shape, content = held[tensor]
            weights = np.random.default_rng(0).standard_normal(len(content) // 2) / 10
            held[tensor] = (dtype, shape, weights.astype(ml_dtypes.bfloat16).tobytes())


def test_experts_off_the_grid_are_refused(broken_bf16, tmp_path, capsys):
    """Guards against a fine-tuned model rounded to 4 bits without anybody having asked."""
    off_grid(broken_bf16)
    assert refusals(capsys, broken_bf16, tmp_path / "out") == [
        f"convert: {file_of(broken_bf16, DOWN)}: {DOWN}: 8 of 8 experts are not on the MXFP4 grid; "
        "converters.convert --quantize-experts rounds them (relative RMS error 0.118)"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_nan_among_bf16_experts_is_named_as_such(broken_bf16, tmp_path, capsys):
    """Guards against a NaN that is rounded to a number, or reported as being off the grid."""
    with edited(broken_bf16, DOWN) as held:
        dtype, shape, content = held[DOWN]
        held[DOWN] = (dtype, shape, set_bits(content, {5: 0xFFFF, 700: 0x7F80}))
    where = f"convert: {file_of(broken_bf16, DOWN)}: {DOWN}"
    for flag in ([], ["--quantize-experts"]):
        assert refusals(capsys, broken_bf16, tmp_path / "out", *flag) == [f"{where}: 1 NaN", f"{where}: 1 Inf"]


def test_rounding_is_asked_for_printed_and_recorded(broken_bf16, tmp_path, capsys):
    """Guards against an error introduced and not reported, layer by layer."""
    names = (DOWN, DOWN.replace("layers.1", "layers.0"))
    off_grid(broken_bf16, names)
    assert command(broken_bf16, tmp_path / "out", "--quantize-experts", "--verify") == 0
    out = capsys.readouterr().out
    printed = re.findall(r"rounded to MXFP4: (\S+): relative RMS error (\S+)", out)
    assert [name for name, _ in printed] == sorted(names)
    assert all(0.10 < float(error) < 0.13 for _, error in printed)
    provenance = manifest.read_provenance(tmp_path / "out")
    assert provenance["experts"] == "bfloat16 rounded to MXFP4"
    assert [f"{rms:.4f}" for rms in provenance["rounding_relative_rms"].values()] == [x for _, x in printed]
    assert "are equal" in out or "equal the source's by sha256" in out


def test_a_wrongly_transposed_export_is_named(tmp_path, capsys):
    """Guards square down_proj: no shape shows that an export forgot to transpose, and rounding would hide it."""
    square = SMALL | {"intermediate_size": 96}
    write_checkpoint(tmp_path / "published", square, format="huggingface-bf16")
    with edited(tmp_path / "published", DOWN) as held:
        dtype, shape, content = held[DOWN]
        weights = np.frombuffer(content, np.uint16).reshape(shape)
        held[DOWN] = (dtype, shape, weights.transpose(0, 2, 1).tobytes())
    for flag in ([], ["--quantize-experts"]):
        assert refusals(capsys, tmp_path / "published", tmp_path / "out", *flag) == [
            f"convert: {file_of(tmp_path / 'published', DOWN)}: {DOWN}: on the MXFP4 grid when read untransposed, "
            "off it as [E, in, out]: a wrongly transposed export, make it again"
        ]


# ---- refusals ----


def nan_and_inf(folder: Path) -> list[str]:
    """Numbers that are none."""
    with edited(folder, "model.norm.weight") as held:
        dtype, shape, content = held["model.norm.weight"]
        held["model.norm.weight"] = (dtype, shape, set_bits(content, {3: 0x7FC0, 4: 0xFF80, 5: 0x7F80}))
    where = f"{file_of(folder, 'model.norm.weight')}: model.norm.weight"
    return [f"{where}: 1 NaN", f"{where}: 2 Inf"]


def scale_255(folder: Path) -> list[str]:
    """E8M0's NaN."""
    with edited(folder, SCALES) as held:
        dtype, shape, content = held[SCALES]
        held[SCALES] = (dtype, shape, content[:10] + b"\xff\xff" + content[12:])
    return [f"{file_of(folder, SCALES)}: {SCALES}: 2 scale bytes 255 (NaN)"]


def unknown(folder: Path) -> list[str]:
    """A tensor that no table has."""
    with edited(folder, "lm_head.weight") as held:
        held["model.vision.weight"] = ("BF16", [1], b"ab")
    reindex(folder, lambda held: held.update({"model.vision.weight": held["lm_head.weight"]}))
    return [
        f"{file_of(folder, 'lm_head.weight')}: model.vision.weight: unknown, "
        "the format (Hugging Face, MXFP4 experts) has no such tensor"
    ]


def missing(folder: Path) -> list[str]:
    """A tensor that should be there."""
    name = "model.layers.1.self_attn.sinks"
    with edited(folder, name) as held:
        del held[name]
    reindex(folder, lambda held: held.pop(name))
    return [f"{folder}: {name}: missing from all files"]


def misshapen(folder: Path) -> list[str]:
    """The right number of elements in another shape."""
    name = "model.layers.0.self_attn.k_proj.weight"
    with edited(folder, name) as held:
        held[name] = (held[name][0], [96, 128], held[name][2])
    return [f"{file_of(folder, name)}: {name}: shape [96, 128], expected [128, 96]"]


def wrong_dtype(folder: Path) -> list[str]:
    """As many bytes of another format."""
    name = "model.layers.0.mlp.router.bias"
    with edited(folder, name) as held:
        held[name] = ("F16", *held[name][1:])
    cast = "cast it, as transformers does: from_pretrained(SRC, dtype=torch.bfloat16), then save_pretrained"
    return [f"{file_of(folder, name)}: {name}: dtype F16, expected BF16: {cast}"]


def duplicate(folder: Path) -> list[str]:
    """A tensor in two shards."""
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    with edited(folder, next(iter(read_tensors(second)))) as held:
        held["lm_head.weight"] = read_tensors(file_of(folder, "lm_head.weight"))["lm_head.weight"]
    return [
        f"{second}: lm_head.weight: model.safetensors.index.json places it in {first.name}",
        f"{second}: lm_head.weight: duplicate, also in {first.name}",
    ]


def duplicate_in_header(folder: Path) -> list[str]:
    """A tensor twice in one header."""
    path = file_of(folder, SCALES)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    text = raw[8:start].rstrip()[:-1] + b"," + json.dumps({SCALES: json.loads(raw[8:start])[SCALES]}).encode()[1:]
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])
    return [f"{path}: {SCALES}: duplicate in this file's header"]


def shard_missing(folder: Path) -> list[str]:
    """A shard that was not fetched."""
    path = file_of(folder, SCALES)
    count = len(read_tensors(path))
    path.unlink()
    return [f"{path}: missing, and with it {count} tensors that model.safetensors.index.json places there"]


def stray_shard(folder: Path) -> list[str]:
    """A shard that the index does not know."""
    write_tensors(folder / "adapter.safetensors", {})
    return [f"{folder / 'adapter.safetensors'}: not named in model.safetensors.index.json: remove it, or name it there"]


def index_disagrees(folder: Path) -> list[str]:
    """A tensor placed where it is not."""
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name = next(iter(read_tensors(second)))
    reindex(folder, lambda held: held.update({name: first.name}))
    return [
        f"{first}: {name}: not in this file, though model.safetensors.index.json places it there",
        f"{second}: {name}: model.safetensors.index.json places it in {first.name}",
    ]


def index_broken(folder: Path) -> list[str]:
    """An index that is none."""
    (folder / published.INDEX).write_text("[]")
    return [f"{folder / published.INDEX}: no index of safetensors: fetch it again"]


def truncated(folder: Path) -> list[str]:
    """A download that broke off."""
    path = file_of(folder, SCALES)
    size = path.stat().st_size
    os.truncate(path, size - 5)
    return [f"{path}: {size - 5:,} bytes, expected {size:,}: truncated, 1 tensors are cut off; fetch it again"]


def header_corrupt(folder: Path) -> list[str]:
    """A header that is no JSON."""
    path = file_of(folder, SCALES)
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + b"\x00" + raw[9:])
    return [f"{path}: its header is corrupt, or not safetensors: "]


def not_safetensors(folder: Path) -> list[str]:
    """A web page saved under the name."""
    path = file_of(folder, SCALES)
    path.write_bytes(b"<html>Not found</html>")
    return [f"{path}: a web page saved under this name: fetch the file again"]


def overlapping(folder: Path) -> list[str]:
    """Two tensors over the same bytes."""
    path = file_of(folder, SCALES)
    first, second = list(read_tensors(path))[:2]

    def shift(header: dict):
        header[second]["data_offsets"] = [offset - 2 for offset in header[second]["data_offsets"]]

    with edited(folder, SCALES, shift):
        pass
    return [f"{path}: {second}: overlaps {first}"]


def offsets_lie(folder: Path) -> list[str]:
    """A span that the shape does not fill."""
    path = file_of(folder, SCALES)

    def lie(header: dict):
        header[SCALES]["data_offsets"][1] -= 1

    with edited(folder, SCALES, lie):
        pass
    return [f"{path}: {SCALES}: data_offsets ["]


def unknown_dtype(folder: Path) -> list[str]:
    """A number format from elsewhere."""
    path = file_of(folder, SCALES)
    with edited(folder, SCALES, lambda header: header[SCALES].update(dtype="FP3")):
        pass
    return [f"{path}: {SCALES}: unknown dtype 'FP3'"]


def trailing_bytes(folder: Path) -> list[str]:
    """Bytes that no tensor claims."""
    path = file_of(folder, SCALES)
    with open(path, "ab") as file:
        file.write(b"abc")
    return [f"{path}: 3 bytes after "]


FAULTS = [nan_and_inf, scale_255, unknown, missing, misshapen, wrong_dtype, duplicate, duplicate_in_header]
FAULTS += [shard_missing, stray_shard, index_disagrees, index_broken, truncated, header_corrupt, not_safetensors]
FAULTS += [overlapping, offsets_lie, unknown_dtype, trailing_bytes]


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_faults_are_refused_and_name_file_and_tensor(spoil, broken, tmp_path, capsys):
    """Guards against a fault that passes, that another hides, or that leaves something behind."""
    expected = spoil(broken)
    lines = refusals(capsys, broken, tmp_path / "out")
    for text in expected:
        assert any(line.startswith(f"convert: {text}") for line in lines), (text, lines)
    if spoil is not overlapping:  # it leaves bytes that belong to no tensor, which is a fault as well
        assert len(lines) == len(expected), lines
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_all_faults_of_headers_and_contents_are_listed_together(broken, tmp_path, capsys):
    """Guards against one fault a run: a night of downloads, one at a time."""
    spoils = (nan_and_inf, scale_255, unknown, missing, misshapen, wrong_dtype, stray_shard)
    expected = [f"convert: {line}" for spoil in spoils for line in spoil(broken)]
    assert sorted(refusals(capsys, broken, tmp_path / "out")) == sorted(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_transposed_shape_is_explained(broken_bf16, tmp_path, capsys):
    """Guards against `[8, 320, 96]` refused without a word on which way round it should be."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with edited(broken_bf16, name) as held:
        held[name] = (held[name][0], [8, 320, 96], held[name][2])
    assert refusals(capsys, broken_bf16, tmp_path / "out") == [
        f"convert: {file_of(broken_bf16, name)}: {name}: shape [8, 320, 96], expected [8, 96, 320]: "
        "transposed, this format has [E, in, out]"
    ]


def test_what_is_no_published_checkpoint_is_refused(small, small_converted, tmp_path, capsys):
    """Guards against a traceback for a mistyped path."""
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "nothing": "nothing: no such folder, expected a checkpoint's folder",
        small / "config.json": "config.json: a file, expected a checkpoint's folder",
        tmp_path
        / "empty": "empty: no *.safetensors and no model.safetensors.index.json, neither here nor in original/",
        small_converted: "checkpoint: converted already (it holds manifest.json), expected published safetensors",
    }
    for path, text in cases.items():
        (line,) = refusals(capsys, path, tmp_path / "out")
        assert text in line
    for arguments in ([small], [small, tmp_path / "a", tmp_path / "b"]):
        (line,) = refusals(capsys, *arguments)
        assert line.startswith("convert: expected two folders, SRC DST, got ")
    (line,) = refusals(capsys, small, tmp_path / "out", "--dry-rum")
    assert "unknown flag --dry-rum: did you mean --dry-run?" in line
    assert not (tmp_path / "out").exists()


def test_config_faults_are_one_line(broken, tmp_path, capsys):
    """Guards against another model's weights under gpt-oss names."""
    raw = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    (line,) = refusals(capsys, broken, tmp_path / "out")
    assert "config.json: model_type is 'llama', expected 'gpt_oss'" in line


EDGES = {  # the narrowest and the widest of what config.json may say; a mixture of both where they exclude each other
    "narrow": {"sliding_window": 1, "max_position_embeddings": 2, "rope_theta": 10, "swiglu_limit": 1e-3}
    | {"rms_norm_eps": 1e-12, "head_dim": 2, "num_experts_per_tok": 1, "eos_token_id": list(range(MAX_STOP_IDS))},
    "wide": {"sliding_window": 1 << 24, "max_position_embeddings": 1 << 24, "rope_theta": 1e12, "swiglu_limit": 1e12}
    | {"rms_norm_eps": 0.1, "head_dim": 256, "num_experts_per_tok": 8, "eos_token_id": None},
}
ROPES = {
    "narrow": {"factor": 1.0, "beta_fast": 0.00102, "beta_slow": 1e-3, "original_max_position_embeddings": 1},
    "wide": {"factor": 1e4, "beta_fast": 1e6, "beta_slow": 9e5, "original_max_position_embeddings": 1 << 24},
}


@pytest.mark.parametrize("edge", EDGES)
def test_what_converts_also_runs(edge, tmp_path):
    """Guards against ranges so wide that a checkpoint is written which nobody can run."""
    config = SMALL | EDGES[edge] | {"rope_scaling": TINY["rope_scaling"] | ROPES[edge]}
    config = {key: value for key, value in config.items() if key not in ("experts_per_token", "initial_context_length")}
    write_checkpoint(tmp_path / "published", config)
    convert.run(options(tmp_path / "published", tmp_path / "out", verify=True))
    model = gptoss_jax.load(tmp_path / "out")
    request = gptoss_jax.Request((1,), model.config.stop_ids, max_new_tokens=1)
    engine = model.engine(gptoss_jax.EngineConfig(max_context_tokens=min(model.config.max_context_tokens, 200)))
    engine.submit(request)
    (event,) = engine.run()
    assert len(event.token_ids) == 1 and event.finish_reason in ("length", "stop")


# ---- the destination ----


def test_a_finished_checkpoint_of_the_same_source_is_kept(small, small_converted, capsys):
    """Guards against hours of work repeated, or `exists` as an error to whoever repeats the command."""
    before = {path: path.stat().st_mtime_ns for path in small_converted.rglob("*")}
    assert command(small, small_converted, "--verify") == 0
    out = capsys.readouterr().out
    assert f"{small_converted}: finished already, from this very source: nothing to convert" in out
    assert f"{small_converted}: verified: all 41 leaves, " in out
    assert {path: path.stat().st_mtime_ns for path in small_converted.rglob("*")} == before


def test_anything_else_at_the_destination_is_refused(broken, small_converted, tmp_path, capsys):
    """Guards against somebody's folder overwritten; a checkpoint of other weights in the same shapes taken for this."""
    copy = Path(shutil.copytree(small_converted, tmp_path / "copy"))
    with edited(broken, "model.norm.weight") as held:
        dtype, shape, content = held["model.norm.weight"]
        held["model.norm.weight"] = (dtype, shape, set_bits(content, {3: 0x3F80}))
    (line,) = refusals(capsys, broken, copy)
    assert line.endswith("copy: holds a checkpoint made from something else; remove it or name another folder")
    changed = json.loads((copy / "config.json").read_text()) | {"swiglu_limit": 8.0}
    (copy / "config.json").write_text(json.dumps(changed))
    (line,) = refusals(capsys, broken, copy)
    assert line == f"convert: {copy / 'config.json'}: not as this source's: convert again, or mend it"
    (tmp_path / "folder").mkdir()
    (line,) = refusals(capsys, broken, tmp_path / "folder")
    assert line.endswith("folder: exists and is no finished checkpoint; remove it or name another folder")
    (tmp_path / "file").write_text("")
    (line,) = refusals(capsys, broken, tmp_path / "file")
    assert "exists and is no finished checkpoint" in line


def test_destination_may_not_be_or_hold_the_source(broken, capsys):
    """Guards against a message that says of the only copy of the weights: remove it."""
    links = broken.parent.parent / "links"
    links.mkdir()
    (links / "published").symlink_to(broken)
    (links / "parent").symlink_to(broken.parent)
    before = hashes(broken)
    for destination in (broken, broken.parent, links / "published", links / "parent"):
        (line,) = refusals(capsys, broken, destination)
        assert line.endswith("is or holds SRC: name a folder of its own for the checkpoint")
    for source in (broken, links / "published"):
        for folder in (broken, links / "published", links / "parent" / "published"):
            for destination in (folder / "checkpoint", folder / "deep" / "out"):
                (line,) = refusals(capsys, source, destination)
                assert line == f"convert: DST {destination} lies in SRC: name a folder outside of it for the checkpoint"
    assert hashes(broken) == before


def test_what_is_being_written_may_not_be_the_source(broken, capsys):
    """Guards against SRC named like the folder in which DST grows: a message says of it, remove it."""
    source = broken.rename(broken.with_name("out.partial"))
    (line,) = refusals(capsys, source, source.with_name("out"))
    assert line.endswith("is or holds SRC: name a folder of its own for the checkpoint")


def test_verify_finds_a_changed_byte_on_either_side(small, small_converted, broken, tmp_path, capsys):
    """Guards against a verification that compares a file with itself, or with what was remembered of it."""
    copy = Path(shutil.copytree(small_converted, tmp_path / "copy"))
    file = copy / Manifest.read(copy).leaves["embedding"].file
    content = bytearray(file.read_bytes())
    content[9] ^= 1
    file.write_bytes(content)
    (line,) = refusals(capsys, small, copy, "--verify")
    assert re.search(r"leaf embedding: sha256 \w{64} on disk, (\w{64}) in the manifest, \1 from the source", line)
    opened = published.open_source(broken)
    norm = opened.tensors["model.norm.weight"]
    with open(norm.file, "r+b") as file:
        file.seek(norm.offset)
        file.write(b"\x11")
    with pytest.raises(CheckpointError, match=r"leaf norm: sha256 (\w{64}) on disk, \1 in the manifest"):
        conversion_of(opened, small_converted).verify()


def test_verify_asks_the_safetensors_library_too(small, small_converted):
    """Guards our own reader of headers, of which a mistake would be in what was converted and in what is compared."""
    opened = published.open_source(small)
    [(name, file)] = list(opened.files.items())[:1]
    tensor, entry = next(iter(file.tensors.items()))
    misread = dataclasses.replace(entry, shape=entry.shape[::-1] if entry.shape[::-1] != entry.shape else (1,))
    opened.files[name] = dataclasses.replace(file, tensors={**file.tensors, tensor: misread})
    with pytest.raises(CheckpointError, match=f"{re.escape(tensor)}: .* by the safetensors library"):
        conversion_of(opened, small_converted).verify()


def test_verify_of_the_checkpoint_alone(small, small_converted, tmp_path, capsys):
    """Guards data that rots after its source is gone: loading reads sizes and indices, and no hash."""
    assert command("--verify", small_converted) == 0
    said = r"checkpoint: verified: all 41 leaves, [\d,]+ bytes, have the sha256 that its manifest names"
    assert re.search(said, capsys.readouterr().out)
    copy = Path(shutil.copytree(small_converted, tmp_path / "copy"))
    file = copy / Manifest.read(copy).leaves["embedding"].file
    content = bytearray(file.read_bytes())
    content[9] ^= 1
    file.write_bytes(content)
    (line,) = refusals(capsys, copy, "--verify")
    damaged = r"sha256 \w{64}, expected \w{64}: the checkpoint is damaged, convert again"
    assert re.fullmatch(rf"convert: {re.escape(str(file))}: {damaged}", line)
    shutil.rmtree(file.parent)
    (line,) = refusals(capsys, copy, "--verify")
    assert line == f"convert: {file}: missing: the checkpoint is damaged, convert again"
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | {"hidden_size": 128}))
    assert all("expected" in line for line in refusals(capsys, copy, "--verify"))
    for folder, text in {
        small: "has no manifest.json, so it is no finished",
        tmp_path / "no": "no such folder",
    }.items():
        (line,) = refusals(capsys, "--verify", folder)
        assert text in line
    for flags_beside in (["--dry-run"], ["--quantize-experts"]):
        (line,) = refusals(capsys, "--verify", small_converted, *flags_beside)
        assert "expected two folders, SRC DST, got [" in line


def test_what_contradicts_comes_before_the_disk(broken, tmp_path, capsys, monkeypatch):
    """Guards against `make room first` where the config is of another model, and a folder left behind for it."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    (broken / "config.json").write_text(json.dumps(SMALL | {"num_hidden_layers": 36, "layer_types": None}))
    (line,) = refusals(capsys, broken, tmp_path / "out")
    assert line.endswith("num_hidden_layers is 36, but the safetensors hold 2 layers: of another model")
    (broken / "config.json").write_text(json.dumps(SMALL | {"num_local_experts": 9}))
    lines = refusals(capsys, broken, tmp_path / "deep" / "out")
    assert lines and all(": shape [8" in line for line in lines)
    (broken / "config.json").write_text(json.dumps(SMALL))
    (line,) = refusals(capsys, broken, tmp_path / "out")
    assert re.search(r"out: [\d,]+ bytes more are needed, 0 are free: make room first$", line)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_something_in_the_place_of_what_is_written_is_named(small, tmp_path, capsys):
    """Guards against `[Errno 20] Not a directory` for a name that nobody typed."""
    (tmp_path / "out.partial").write_text("mine")
    (line,) = refusals(capsys, small, tmp_path / "out")
    assert line.endswith("out.partial: in the way: expected nothing there, or what was begun; remove it")
    assert (tmp_path / "out.partial").read_text() == "mine"
    (line,) = refusals(capsys, small, tmp_path / "out.partial" / "deep" / "out")
    assert line.endswith(f"out: cannot be made in {tmp_path / 'out.partial'}, which is no folder")
    (tmp_path / "loop").symlink_to("loop")
    (line,) = refusals(capsys, tmp_path / "loop", tmp_path / "out")
    assert line.endswith("loop: a link to loop, which is not there, expected a checkpoint's folder")


def test_the_same_fault_in_many_tensors_is_one_line(broken, tmp_path, capsys):
    """Guards against ten thousand lines for a header that was written by another tool."""
    path = file_of(broken, SCALES)

    def add(header: dict):
        header |= {f"model.extra.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}

    with edited(broken, SCALES, add):
        pass
    (broken / published.INDEX).unlink()
    (line,) = refusals(capsys, broken, tmp_path / "out")
    assert line == (
        f"convert: {path}: model.extra.0: unknown, the format (Hugging Face, MXFP4 experts) has no such tensor "
        "(and 9,999 more like it)"
    )


@pytest.mark.parametrize("spelling", ["--dry-run", "--dry_run"])
def test_dry_run_prints_the_plan_and_touches_nothing(spelling, small, tmp_path, capsys):
    """Guards against a dry run that makes folders."""
    before = {path: path.stat().st_mtime_ns for path in (*small.rglob("*"), tmp_path, *tmp_path.rglob("*"))}
    assert command(spelling, small, tmp_path / "deep" / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in small.glob("*.safetensors")) / 1e6
    files = len(list(small.glob("*.safetensors")))
    assert lines[0] == f"{small}: format Hugging Face, MXFP4 experts, {files} files, 41 tensors"
    assert lines[1] == f"would read    41 tensors, {size:.3f} MB in {files} files"
    assert re.fullmatch(rf"would write   41 leaves, 1\.\d+ MB, to {tmp_path}/deep/out", lines[2])
    assert lines[3] == "largest leaf  layers/0/moe/gate_up/blocks, 0.123 MB"
    assert re.fullmatch(r"disk          3\.\d+ MB needed, [\d.]+ GB free", lines[4])
    assert re.fullmatch(r"time          about \d+ s", lines[5])
    after = {path: path.stat().st_mtime_ns for path in (*small.rglob("*"), tmp_path, *tmp_path.rglob("*"))}
    assert after == before


def test_dry_run_refuses_what_headers_show(broken, tmp_path, capsys):
    """Guards against a plan for a checkpoint that cannot be converted."""
    expected = missing(broken)
    assert expected == [
        line.removeprefix("convert: ") for line in refusals(capsys, broken, tmp_path / "o", "--dry-run")
    ]


def test_progress_shows_bytes_rate_and_remaining_time(capsys, monkeypatch):
    """Guards against hours of silence in a log file."""
    monkeypatch.setattr(byte_progress, "LINE_SECONDS", 0)
    with byte_progress.byte_progress("writing", 400_000_000) as report_bytes:
        report_bytes(100_000_000)
        report_bytes(300_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"writing: 0\.100 GB of 0\.400 GB \(25 %\), [\d,]+ MB/s, .*\d+ s left", lines[0])
    assert re.fullmatch(r"writing: 0\.400 GB of 0\.400 GB \(100 %\), [\d,]+ MB/s", lines[-1])


# ---- interruption ----

# Runs the conversion in forked children, each killed with SIGKILL at another of its writes, fsyncs and renames (a write
# that is cut short, too), and each time resumes it. Forked before JAX has threads, so that a child costs a fraction of
# a second.
KILLER = """
import hashlib, json, os, random, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from converters import convert
from gptoss_jax.checkpoints import conversion
from gptoss_jax.checkpoints.orbax import manifest

src, folder = Path(sys.argv[1]), Path(sys.argv[2])
real = {name: getattr(os, name) for name in ("write", "fsync", "rename")}

def child(dst, kill_at=None):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    calls = 0
    def counted(name):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                if name == "write":
                    real["write"](args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*args)
        return call
    for name in real:
        setattr(os, name, counted(name))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    convert.run(convert.Options(src, dst))
    if kill_at is None:
        (folder / "total").write_text(str(calls))
    os._exit(0)

def tree(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}

def stamps(partial):
    lines = (partial / "journal.jsonl").read_bytes().split(b"\\n")[:-1] if partial.exists() else []
    leaves = [json.loads(line) for line in lines[1:]]
    files = [partial / "checkpoint" / manifest.LeafRecord.from_json(x).file for x in leaves if "path" in x]
    return {p.parent.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}

assert child(folder / "whole") == 0
total = int((folder / "total").read_text())
whole = tree(folder / "whole")
moments = [1, 2, 3, 5, total - 40, total - 4, total - 2, total - 1, total]
moments += random.Random(0).sample(range(6, total - 5), 12)
out = []
for moment in moments:
    dst = folder / f"killed-{moment}"
    partial = manifest.partial_folder(dst)
    died = child(dst, moment)
    opens = manifest.is_checkpoint(dst) or manifest.is_checkpoint(partial)
    whole_now = dst.exists() and tree(dst) == whole
    finished = stamps(partial) if not dst.exists() else {}
    resumed = child(dst)
    after = {p.parent.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in dst.rglob("c*.0")}
    out.append(dict(moment=moment, died=died, opens=opens, whole=whole_now, resumed=resumed, finished=len(finished),
        redone=sorted(n for n, s in finished.items() if after[n] != s), equal=tree(dst) == whole,
        left=partial.exists()))
print(json.dumps(dict(total=total, runs=out)))
"""


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(small, tmp_path):
    """Guards against a half-written folder that opens, finished leaves redone, bytes that depend on the moment."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, small, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["total"] > 41 * 5
    for run in result["runs"]:
        assert run["died"] == -9, run
        assert not run["opens"] or run["whole"], run
        assert run["resumed"] == 0 and run["equal"] and run["redone"] == [] and not run["left"], run
    assert sum(run["finished"] > 0 for run in result["runs"]) > 10


def test_checked_files_are_not_checked_again(small, tmp_path, monkeypatch):
    """Guards against a resumed conversion of 60 GB that first reads all of it again."""
    opened = published.open_source(small)
    written, checked = [], []
    real_write, real_check = Writer.write, published.Source.check_file

    def write(self, path, array):
        if len(written) == 7:
            raise OSError(errno.EIO, "Input/output error")
        written.append(path)
        return real_write(self, path, array)

    monkeypatch.setattr(Writer, "write", write)
    monkeypatch.setattr(published.Source, "check_file", lambda *args: checked.append(args[1]) or real_check(*args))
    with pytest.raises(OSError, match="Input/output error"):
        conversion_of(opened, tmp_path / "out").run()
    assert checked == list(opened.files)
    monkeypatch.setattr(Writer, "write", real_write)
    conversion_of(opened, tmp_path / "out").run()
    assert checked == list(opened.files)


def test_a_changed_source_is_not_resumed(small, broken, tmp_path, capsys, monkeypatch):
    """Guards against half of one download and half of another."""
    monkeypatch.setattr(Writer, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(broken, tmp_path / "out") == interrupts.EXIT_CODE
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("convert: ")]
    assert line.endswith("out: interrupted: run the same command again, it goes on where it stopped")
    name = sorted(path.name for path in broken.glob("*.safetensors"))[0]
    os.utime(broken / name, ns=(1, 1))
    lines = refusals(capsys, broken, tmp_path / "out")
    assert "begun from something else" in lines[0]
    assert re.search(rf"source\.files\.{re.escape(name)}\.mtime_ns was \d+, is now 1$", lines[1])


def fill_up(monkeypatch, most_bytes: int):
    """A disk with room for `most_bytes` more."""
    real, left = os.write, most_bytes

    def write(descriptor: int, chunk) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(descriptor, chunk[:left])
        left -= count
        return count

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("most_bytes", [0, 700, 300_000, 600_000])
def test_a_full_disk_is_one_line_and_resumes(most_bytes, small, small_converted, tmp_path, capsys, monkeypatch):
    """Guards against a traceback at 95 %, and the start over."""
    with monkeypatch.context() as patch:
        fill_up(patch, most_bytes)
        assert refusals(capsys, small, tmp_path / "out") == [
            f"convert: {tmp_path / 'out'}: the disk is full: make room and run the same command again, "
            "it goes on where it stopped"
        ]
    assert not (tmp_path / "out").exists()
    assert command(small, tmp_path / "out") == 0
    if most_bytes == 600_000:
        assert re.search(r"resuming: \d+ of 41 leaves are finished", capsys.readouterr().out)
    assert hashes(tmp_path / "out") == hashes(small_converted)


def test_a_disk_that_is_really_full(small, small_converted, tmp_path, capsys, monkeypatch):
    """Guards against what a real file system does, which may fail in other calls than write."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mount.stderr.strip()}")
    try:
        (line,) = refusals(capsys, small, disk / "out")
        assert re.search(r"out: [\d,]+ bytes more are needed, [\d,]+ are free: make room first$", line)
        assert list(disk.iterdir()) == []
        monkeypatch.setattr(conversion, "_check_space", lambda *_: None)
        assert refusals(capsys, small, disk / "out") == [
            f"convert: {disk / 'out'}: the disk is full: make room and run the same command again, "
            "it goes on where it stopped"
        ]
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        assert command(small, disk / "out") == 0
        assert re.search(r"resuming: \d+ of 41 leaves are finished", capsys.readouterr().out)
        assert hashes(disk / "out") == hashes(small_converted)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_memory_stays_within_twice_the_largest_tensor(tmp_path):
    """Guards against a whole checkpoint, a mapped file or three copies of a tensor in memory."""
    wide = with_vocab_size(TINY, 150_000) | TWO_LAYERS | {"hidden_size": 1024}
    write_checkpoint(tmp_path / "published", wide)
    largest = 150_000 * 1024 * 2
    code = (
        "import sys; from pathlib import Path; from converters import convert; from tests.memory import peak_bytes\n"
        "options = convert.Options(Path(sys.argv[1]), Path(sys.argv[2]), verify=True)\n"
        "convert.open_conversion(options); before = peak_bytes(); convert.run(options)\n"
        "print(peak_bytes() - before, before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "published", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    added, before = map(int, done.stdout.splitlines()[-1].split())
    shutil.rmtree(tmp_path / "published")
    shutil.rmtree(tmp_path / "out")
    assert added < 1.3 * largest, (added, before)
    assert before < 1 << 30


# ---- straight from safetensors ----


def placed(arrays, leaves, laid) -> dict[str, jax.Array]:
    """Leaves on the devices where they belong."""
    return {path: jax.device_put(array, laid.named(leaves[path].axes)) for path, array in arrays}


@pytest.mark.parametrize("mesh", ["", "expert=4"])
def test_safetensors_load_without_conversion(mesh, small, small_converted, small_bf16):
    """Guards against another way in that differs from the converted one."""
    laid = sharding.make(mesh)
    opened = published.open_source(small)
    leaves = transformer.declare(opened.config, laid).leaves
    arrays = placed(opened.read_all(leaves), leaves, laid)
    restored = placed(reader.read(small_converted, leaves, laid), leaves, laid)
    before = set(os.listdir(small))
    for path, leaf in leaves.items():
        assert arrays[path].sharding == restored[path].sharding == laid.named(leaf.axes)
        assert np.asarray(arrays[path]).tobytes() == np.asarray(restored[path]).tobytes(), path
    packed = placed(published.open_source(small_bf16).read_all(leaves), leaves, laid)
    experts = [
        mxfp4.dequantize(tree["layers/0/moe/down/blocks"], tree["layers/0/moe/down/scales"], jnp.dtype(jnp.float32))
        for tree in (restored, packed)
    ]
    assert np.array_equal(experts[0], experts[1])
    assert set(os.listdir(small)) == before


@pytest.mark.parametrize("format", ["mxfp4", "bf16"])
def test_a_cpu_takes_safetensors_without_a_copy(format, small, small_bf16, addresses_given):
    """Guards against weights twice in memory while they load."""
    opened = published.open_source({"mxfp4": small, "bf16": small_bf16}[format])
    laid = sharding.make()
    leaves = transformer.declare(opened.config, laid).leaves
    arrays = placed(opened.read_all(leaves), leaves, laid)
    assert {array.unsafe_buffer_pointer() for array in arrays.values()} <= addresses_given


def test_loading_safetensors_refuses_as_converting_does(broken):
    """Guards against NaN weights that only the converter notices."""
    expected = nan_and_inf(broken) + scale_255(broken)
    opened = published.open_source(broken)
    leaves = declared(opened)
    with pytest.raises(published.SourceError) as error:
        list(opened.read_all(leaves))
    assert sorted(str(error.value).splitlines()) == sorted(expected)
    missing(broken)
    with pytest.raises(published.SourceError, match="missing from all files"):
        list(published.open_source(broken).read_all(leaves))


def test_loading_bf16_experts_refuses_as_converting_does(broken_bf16):
    """Guards against experts rounded, or NaN packed as a number, where nothing is written and nobody looks."""
    off_grid(broken_bf16, (DOWN,))
    other = DOWN.replace("layers.1", "layers.0")
    with edited(broken_bf16, other) as held:
        held[other] = (*held[other][:2], set_bits(held[other][2], {5: 0x7FC0}))
    opened = published.open_source(broken_bf16)
    with pytest.raises(published.SourceError) as error:
        list(opened.read_all(declared(opened)))
    lines = str(error.value).splitlines()
    assert f"{file_of(broken_bf16, other)}: {other}: 1 NaN" in lines
    assert any("8 of 8 experts are not on the MXFP4 grid" in line for line in lines) and len(lines) == 2


def test_a_file_truncated_while_it_is_read_is_named(broken):
    """Guards against an endless loop, or zeros in place of what is gone."""
    opened = published.open_source(broken)
    leaves = declared(opened)
    path = opened.tensors["lm_head.weight"].file
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(
        published.SourceError, match=r"ends at byte [\d,]+: it has been truncated since its header was read"
    ):
        for leaf in leaves:
            opened.read(leaf, leaves[leaf])


def test_the_command_itself(small, small_converted, tmp_path):
    """Guards against an entry point that works in tests only; accelerators taken by a command that needs none."""
    done = subprocess.run(
        [sys.executable, "-m", "converters.convert", small, tmp_path / "out", "--verify"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("equal the source's by sha256")
    assert re.search(r"^writing: [\d.]+ MB of [\d.]+ MB \(100 %\), \d+ MB/s$", done.stderr, re.M)
    assert hashes(tmp_path / "out") == hashes(small_converted)
    assert jax.default_backend() == "cpu"
