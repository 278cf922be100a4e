"""Exports: the same bytes as the source had, the same model in every format, nothing damaged or half written."""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors

from converters import convert
from converters.random_checkpoint import with_vocab_size, write_checkpoint
from gptoss_jax.checkpoints import export, export_files, origin, packing, published, safetensors_writer
from gptoss_jax.checkpoints.export import ExportError, open_export
from gptoss_jax.checkpoints.export_leaves import ChangeError
from gptoss_jax.checkpoints.huggingface import mxfp4_recipes
from gptoss_jax.checkpoints.opening import open_weights
from gptoss_jax.checkpoints.orbax import integrity
from gptoss_jax.checkpoints.orbax.manifest import CheckpointError, Manifest, partial_folder, read_config
from gptoss_jax.checkpoints.orbax.writer import save
from gptoss_jax.checkpoints.unfinished import UnfinishedError, UnfinishedFolder
from gptoss_jax.model.config import ConfigError, parse_config

ROOT = Path(__file__).parents[2]
TINY = json.loads((ROOT / "configs" / "tiny.json").read_text())
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
SMALL: dict[str, Any] = with_vocab_size(TINY, 512) | TWO_LAYERS
LAYOUTS = {"huggingface": "huggingface", "openai": "openai", "bf16": "huggingface-bf16"}  # ours -> random_weights'
TOKENIZER = b'{"model": {"type": "BPE"}, "note": "\xc3\xa9"}\n'


def hashes(folder: Path) -> dict[str, str]:
    """File -> sha256."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def published_folder(dst: Path, format: str) -> Path:
    """A random model in one of our formats, with what a tokenizer has; its files are not split as ours are."""
    write_checkpoint(dst, SMALL, format=LAYOUTS[format], shard_bytes=250_000)
    (dst / "tokenizer.json").write_bytes(TOKENIZER)
    (dst / "chat_template.jinja").write_bytes(b"{{ messages }}")
    return dst


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """The same model in the three formats; OpenAI's config.json names no ends of an answer, all else is the same."""
    folder = tmp_path_factory.mktemp("sources")
    return {format: published_folder(folder / format, format) for format in LAYOUTS}


@pytest.fixture(scope="module")
def checkpoints(sources, tmp_path_factory) -> dict[str, Path]:
    """Each of them, converted; for reading only."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for format, source in sources.items():
        convert.run(convert.Options(source, folder / format))
    return {format: folder / format for format in sources}


@pytest.fixture
def copy(checkpoints, tmp_path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(checkpoints["huggingface"], tmp_path / "copy"))


def tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> dtype, shape and bytes of every tensor of a folder, by the tests' own reader."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, value in header.items():
            begin, end = value["data_offsets"]
            found[name] = (value["dtype"], value["shape"], raw[start + begin : start + end])
    return found


# ---- byte by byte ----


@pytest.mark.parametrize("format", LAYOUTS)
def test_an_untouched_model_comes_out_as_it_came_in(format, sources, checkpoints, tmp_path):
    """Guards every byte: another split, order, header, padding or config, a leaf in another's place."""
    opened = open_export(checkpoints[format], format)
    done = opened.run(tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(sources[format])
    files = len(list(sources[format].glob("*.safetensors")))
    assert opened.verify(tmp_path / "out") == f"all {files} safetensors files equal the source's by sha256"
    assert done.size_bytes == sum(path.stat().st_size for path in sources[format].iterdir()) == opened.size_bytes
    assert not partial_folder(tmp_path / "out").exists()


def reshuffled(source: Path, dst: Path, seed: int) -> Path:
    """The same tensors in files of any order and split, with headers that no library writes."""
    rng = random.Random(seed)
    dst.mkdir()
    held = list(tensors(source).items())
    rng.shuffle(held)
    weight_map = {}
    for i in range(3):
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "of": f"file {i}"}} if i else {}
        entries, at = {}, 0
        for name, (dtype, shape, content) in held[i::3]:
            entries[name] = {"shape": shape, "data_offsets": [at, at := at + len(content)], "dtype": dtype}
            weight_map[name] = f"part{i}.safetensors"
        named = list(entries.items())
        rng.shuffle(named)
        text = json.dumps(header | dict(named), indent=i or None).encode() + b" " * i
        contents = b"".join(content for _, (_, _, content) in held[i::3])
        (dst / f"part{i}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + contents)
    (dst / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(source / "config.json", dst)
    return dst


@pytest.mark.parametrize("format", LAYOUTS)
def test_any_layout_of_the_same_tensors_is_kept(format, sources, tmp_path):
    """Guards sources that others wrote: blocks without their scales in a file, tensors in any order, odd headers."""
    source = reshuffled(sources[format], tmp_path / "source", 5)
    convert.run(convert.Options(source, tmp_path / "checkpoint"))
    opened = open_export(tmp_path / "checkpoint", format)
    opened.run(tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(source)
    opened.run(tmp_path / "changed", lambda _, arrays: tuple(array.copy() for array in arrays), "nothing")
    assert tensors(tmp_path / "changed") == tensors(source)


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("format", LAYOUTS)
def test_every_format_holds_the_same_model(source, format, sources, checkpoints, tmp_path):
    """Guards the tables backwards: q, k and v fused in another order, experts not transposed, blocks for scales."""
    opened = open_export(checkpoints[source], format, shard_bytes=300_000)
    opened.run(tmp_path / "out")
    assert re.fullmatch(r"all 41 leaves, [\d,]+ bytes, equal the checkpoint's", opened.verify(tmp_path / "out"))
    found, wanted = tensors(tmp_path / "out"), tensors(sources[format])
    assert {name: value[:2] for name, value in found.items()} == {name: value[:2] for name, value in wanted.items()}
    differing = {name for name in wanted if found[name][2] != wanted[name][2]}
    if source == "bf16" and format != "bf16":  # whose packing may choose another scale for the same numbers
        assert all(re.search(r"blocks$|scales$", name) for name in differing)
    else:
        assert not differing
    published.open_source(tmp_path / "out").check_headers()


def test_other_formats_have_files_as_the_libraries_write_them(checkpoints, tmp_path):
    """Guards what others' readers rely on: header order and padding, names of files, the index, `format`."""
    open_export(checkpoints["openai"], "huggingface", shard_bytes=300_000).run(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(len(value[2]) for value in tensors(tmp_path / "out").values())
    for name in files:
        with safetensors.safe_open(tmp_path / "out" / name, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt", "weights": "random, seed 0"}
            assert {index["weight_map"][tensor] for tensor in opened.keys()} == {name}
    open_export(checkpoints["huggingface"], "bf16").run(tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == TOKENIZER


def test_header_is_the_safetensors_librarys(tmp_path):
    """Guards against a header that differs from the library's in order, spaces or padding."""
    from safetensors.numpy import save_file

    arrays = {"b.scales": np.zeros((3, 5), np.uint8), "a": np.ones((2, 7), np.uint8), "é": np.ones(4, np.uint8)}
    save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    ours = safetensors_writer.shard(
        "ours", [safetensors_writer.Tensor(name, "U8", array.shape) for name, array in arrays.items()], {"format": "pt"}
    )
    theirs = (tmp_path / "theirs").read_bytes()
    assert theirs[: len(ours.header)] == ours.header and len(theirs) == ours.size_bytes


@pytest.mark.parametrize("scales", [(60, 200), (0, 4), (250, 253), (0, 254)])
def test_unpacking_is_exact(scales):
    """Guards the fast integer form at zeros, signs, subnormal numbers and the largest ones."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (6, 3, 16), np.uint8)
    exponents = rng.integers(scales[0], scales[1], (6, 3)).astype(np.uint8)
    if scales[1] == 254:
        blocks[exponents > 252] = 0x93  # 1.5 and -1/2
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(6, 3, 32)
    expected = np.ldexp(packing.CODES[codes].astype(np.float64), exponents[..., None].astype(np.int32) - 127)
    weights = packing.unpack(blocks, exponents)
    assert weights.dtype == ml_dtypes.bfloat16 and weights.shape == (96, 6) and weights.flags.c_contiguous
    assert np.array_equal(weights.astype(np.float64), expected.reshape(6, 96).T)
    assert np.array_equal(np.signbit(weights.astype(np.float64)), np.signbit(expected.reshape(6, 96).T))


@pytest.mark.parametrize(("scale", "code"), [(255, 0), (254, 7), (253, 6)])
def test_numbers_beyond_bfloat16_are_refused(scale, code):
    """Guards against infinities that nobody had before."""
    with pytest.raises(ValueError, match=f"scale byte {scale}: a value is beyond bfloat16, or NaN"):
        packing.unpack(np.full((1, 1, 16), code, np.uint8), np.full((1, 1), scale, np.uint8))


# ---- config.json ----


@pytest.mark.parametrize("vocab_size", [201_088, 512])
@pytest.mark.parametrize("is_packed", [True, False])
def test_config_reads_back(vocab_size, is_packed):
    """Guards every number, and the key by which transformers takes experts for packed."""
    config = parse_config(with_vocab_size(TINY, vocab_size))
    written = export_files.huggingface_config(config, is_packed=is_packed)
    assert parse_config(json.loads(export_files.to_json(written))) == config
    assert ("quantization_config" in written) == is_packed
    published_keys = {key for key in TINY if key not in ("quantization_config", "transformers_version")}
    assert written.keys() - {"quantization_config", "dtype"} == published_keys
    assert all(written[key] == TINY[key] for key in published_keys - {"vocab_size", "eos_token_id", "pad_token_id"})
    assert written.get("quantization_config", TINY["quantization_config"]) == TINY["quantization_config"]
    small = vocab_size == 512
    assert written["eos_token_id"] == (510 if small else 200_002)
    assert export_files.generation_config(config)["eos_token_id"] == ([510] if small else [200_002, 199_999, 200_012])


def test_openai_has_no_key_for_some_numbers(checkpoints, tmp_path):
    """Guards against a model that becomes another one without a word."""
    opened = open_export(checkpoints["huggingface"], "openai")
    assert [note.split(": ")[1].split(" is ")[0] for note in opened.notes] == ["stop_ids"]
    other = Path(shutil.copytree(checkpoints["huggingface"], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 1e-6}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"no key for it: rms_norm_eps is 1e-06, and 1e-05 there: take another"):
        open_export(other, "openai")
    open_export(other, "huggingface").run(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 1e-6


# ---- changes ----


def test_a_change_sees_and_replaces_every_leaf(checkpoints, tmp_path):
    """Guards LoRA's way in: a leaf that is never offered, half of one, a change that is written elsewhere."""
    seen = {}

    def change(path: str, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        seen[path] = tuple((array.shape, array.dtype.name) for array in arrays)
        if path == "layers/1/moe/down":
            return arrays[0] ^ 1, arrays[1]
        if path == "layers/0/attention/k/weight":
            arrays[0][:] = 3
        return arrays

    before, records = {}, Manifest.read(checkpoints["huggingface"]).leaves
    for format in LAYOUTS:
        open_export(checkpoints["huggingface"], format).run(tmp_path / f"{format}-before")
        before[format] = tensors(tmp_path / f"{format}-before")
        open_export(checkpoints["huggingface"], format).run(tmp_path / format, change, "a test")
        after = tensors(tmp_path / format)
        down, key = {
            "huggingface": ("model.layers.1.mlp.experts.down_proj_blocks", "model.layers.0.self_attn.k_proj.weight"),
            "openai": ("block.1.mlp.mlp2_weight.blocks", "block.0.attn.qkv.weight"),
            "bf16": ("model.layers.1.mlp.experts.down_proj", "model.layers.0.self_attn.k_proj.weight"),
        }[format]
        assert {name for name in after if after[name] != before[format][name]} == {down, key}
        keys = np.frombuffer(after[key][2], ml_dtypes.bfloat16).reshape(after[key][1])
        rows = slice(6 * 64, 8 * 64) if format == "openai" else slice(None)
        assert (keys[rows] == 3).all()
        for path in (tmp_path / format).glob("*.safetensors"):
            with safetensors.safe_open(path, framework="numpy") as opened:
                assert opened.metadata() == {"format": "pt", "changed_by": "a test"}
    assert seen.pop("layers/0/moe/gate_up") == tuple(
        (records[f"layers/0/moe/gate_up/{half}"].shape, "uint8") for half in ("blocks", "scales")
    )
    assert seen["embedding"] == (((512, 96), "bfloat16"),)
    assert len(seen) == len(records) - 4 - 1


def test_bf16_takes_experts_that_are_not_packed(checkpoints, tmp_path):
    """Guards merged experts that are to keep what rounding would take from them."""
    given = np.full((7, 96, 320), 1.0078125, ml_dtypes.bfloat16)  # of no MXFP4 block

    def change(path: str, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return (given,) if path == "layers/1/moe/gate_up" else arrays

    open_export(checkpoints["huggingface"], "bf16").run(tmp_path / "out", change)
    assert tensors(tmp_path / "out")["model.layers.1.mlp.experts.gate_up_proj"][2] == given.tobytes()
    with pytest.raises(ChangeError, match=r"layers/1/moe/gate_up: changed to bfloat16 \[7, 96, 320\], expected uint8"):
        open_export(checkpoints["huggingface"], "huggingface").run(tmp_path / "no", change)
    assert not (tmp_path / "no").exists() and not partial_folder(tmp_path / "no").exists()


# ---- old and changed checkpoints ----


def test_a_checkpoint_without_an_origin_gets_files_of_our_own(sources, checkpoints, copy, tmp_path):
    """Guards checkpoints of earlier versions, which keep nothing of their source."""
    shutil.rmtree(copy / "origin")
    text = json.loads((copy / "manifest.json").read_text())
    del text["origin"]
    (copy / "manifest.json").write_text(json.dumps(text))
    opened = open_export(copy, "huggingface")
    assert not opened.source_sha256
    opened.run(tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(sources["huggingface"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert open_weights(tmp_path / "out").config == read_config(checkpoints["huggingface"])


def test_a_trained_checkpoint_keeps_the_tokenizer(checkpoints, tmp_path):
    """Guards what a training run hands on: small files, and no hashes or headers of weights that are gone."""
    source = checkpoints["huggingface"]
    config = read_config(source)
    records = Manifest.read(source).leaves
    leaves = {
        path: np.fromfile(
            source / record.file,
            np.uint8 if record.dtype == "uint8" else ml_dtypes.bfloat16,
            int(np.prod(record.shape)),
        ).reshape(record.shape)
        for path, record in records.items()
    }
    leaves["norm"] = np.full((96,), 2, ml_dtypes.bfloat16)
    save(tmp_path / "trained", leaves, config, origin=origin.small_files(source))
    opened = open_export(tmp_path / "trained", "huggingface")
    assert not opened.source_sha256
    opened.run(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == TOKENIZER
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    norm = np.frombuffer(tensors(tmp_path / "out")["model.norm.weight"][2], ml_dtypes.bfloat16)
    assert np.array_equal(norm, leaves["norm"])


def test_rounded_experts_are_not_called_the_sources(sources, tmp_path):
    """Guards against a promise of equal bytes where --quantize-experts has rounded."""
    off_grid = Path(shutil.copytree(sources["bf16"], tmp_path / "off"))
    name = "model.layers.1.mlp.experts.down_proj"
    (path,) = (path for path in off_grid.glob("*.safetensors") if name.encode() in path.read_bytes()[:20_000])
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    at = start + json.loads(raw[8:start])[name]["data_offsets"][0]
    raw[at : at + 4] = np.array([1.0078125, 1.0], ml_dtypes.bfloat16).tobytes()
    path.write_bytes(raw)
    convert.run(convert.Options(off_grid, tmp_path / "checkpoint", quantize_experts=True))
    opened = open_export(tmp_path / "checkpoint", "bf16")
    assert not opened.source_sha256
    opened.run(tmp_path / "out")
    assert [shard.name for shard in opened.shards] == sorted(path.name for path in off_grid.glob("*.safetensors"))
    assert {name for name, value in tensors(off_grid).items() if tensors(tmp_path / "out")[name] != value} == {name}


def test_small_files_are_kept_within_bounds(tmp_path, monkeypatch):
    """Guards the size of checkpoints, and against secrets, links to nowhere and pipes that are read for ever."""
    monkeypatch.setattr(origin, "MAX_BYTES", 100)
    monkeypatch.setattr(origin, "MAX_ALL_BYTES", 150)
    for name, size_bytes in {
        "a.json": 101,
        "b.json": 90,
        "c.jinja": 70,
        "d.md": 60,
        "run.py": 1,
        ".env.json": 1,
    }.items():
        (tmp_path / name).write_bytes(b"x" * size_bytes)
    (tmp_path / "gone.json").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    kept, left_out = origin.collect(tmp_path, [])
    assert {name: len(content) for name, content in kept.items()} == {"b.json": 90, "d.md": 60}
    assert [str(fault) for fault in left_out] == [
        f"{tmp_path / 'a.json'}: 101 bytes: too large to be kept for an export",
        f"{tmp_path / 'c.jinja'}: 70 bytes: too large to be kept for an export",
    ]


# ---- refusals ----


def flip(path: Path, at: int) -> None:
    """Damages one byte."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("format", LAYOUTS)
def test_a_damaged_leaf_is_not_exported(format, copy, tmp_path):
    """Guards against bytes that nobody vouches for, published as a model."""
    flip(copy / "layers.1.moe.down.blocks" / "c.0.0.0.0", 77)
    opened = open_export(copy, format)
    for change in (None, lambda _, arrays: arrays):
        with pytest.raises(CheckpointError, match=r"down\.blocks/c\.0\.0\.0\.0: sha256 \w+, expected \w+: .* convert"):
            opened.run(tmp_path / "out", change)
        assert not (tmp_path / "out").exists() and not partial_folder(tmp_path / "out").exists()


def test_a_damaged_origin_is_refused_where_it_matters(copy):
    """Guards against a header, or a tokenizer, that is not the source's; and against a model refused for them."""
    flip(copy / "origin" / "tokenizer.json", 3)
    (copy / "origin" / "config.json").unlink()
    with pytest.raises(CheckpointError) as error:
        open_export(copy, "bf16")
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0].split("/")[-1] for line in lines] == ["config.json", "tokenizer.json"]
    leaves = convert._declared_leaves(read_config(copy))
    assert integrity.problems(copy, leaves) == []
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: missing, or not as written: the checkpoint is damaged"
    ):
        integrity.verify(copy, leaves)


@pytest.mark.parametrize(
    ("origin", "text"),
    [
        (["a"], "no list of origin's files"),
        ({"../a": "0" * 64}, "no list of origin's files"),
        ({"a/b": "0" * 64}, "no list of origin's files"),
        ({"..": "0" * 64}, "no list of origin's files"),
        ({"a": "short"}, "no sha256 of 'a'"),
        ({"a": 1}, "no sha256 of 'a'"),
    ],
)
def test_a_damaged_manifest_names_no_other_files(origin, text, copy):
    """Guards files outside of the checkpoint against being read for its own."""
    manifest = json.loads((copy / "manifest.json").read_text()) | {"origin": origin}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=re.escape(f"manifest.json: damaged ({text}")):
        open_export(copy)


@pytest.mark.parametrize("spoil", ["shape", "hole", "missing", "junk"])
def test_headers_of_another_model_are_refused(spoil, copy):
    """Guards against an origin that somebody edited, hash and all: tensors in holes or on one another."""
    path = sorted((copy / "origin").glob("*.header"))[0]
    raw = path.read_bytes()
    header = json.loads(raw[8:])
    name = next(name for name in header if name != "__metadata__")
    if spoil == "shape":
        header[name]["shape"][0] += 1
    elif spoil == "hole":
        header[name]["data_offsets"] = [offset + 2 for offset in header[name]["data_offsets"]]
    elif spoil == "missing":
        last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
        del header[last]
    else:
        header = ["junk"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["origin"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"origin.*: convert again"):
        open_export(copy)


def test_what_is_no_checkpoint_is_refused(sources, checkpoints, copy, tmp_path):
    """Guards the first mistakes of all: a published folder, no folder, another model's numbers, odd options."""
    with pytest.raises(CheckpointError, match=r"has no manifest\.json, so it is no finished checkpoint"):
        open_export(sources["huggingface"])
    with pytest.raises(CheckpointError, match="no such folder"):
        open_export(tmp_path / "nothing")
    with pytest.raises(ExportError, match="format is 'gguf', expected one of huggingface, openai, bf16"):
        open_export(copy, "gguf")
    with pytest.raises(ExportError, match="shard_bytes is 10, expected at least 1,000"):
        open_export(copy, shard_bytes=10)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(CheckpointError, match=r"not of the model in config\.json"):
        open_export(copy)
    (copy / "config.json").write_text("{}")
    with pytest.raises(ConfigError):
        open_export(copy)
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "norm" / "c.0").unlink()
    with pytest.raises(CheckpointError, match=r"norm/c\.0: missing: the checkpoint is damaged"):
        open_export(copy)


# ---- folders that are written part by part ----


def test_dst_is_written_whole_or_not_at_all(checkpoints, tmp_path, monkeypatch):
    """Guards what lies in the way, and what a run leaves that was killed, failed, or is under way."""
    opened, dst = open_export(checkpoints["huggingface"]), tmp_path / "out"
    for there in (tmp_path / "file", tmp_path / "folder"):
        there.mkdir() if there.name == "folder" else there.write_text("mine")
        with pytest.raises(UnfinishedError, match="exists; remove it or name another folder"):
            opened.run(there)
    with pytest.raises(UnfinishedError, match=r"cannot be made in .*file, which is no folder"):
        opened.run(tmp_path / "file" / "out")
    with pytest.raises(ExportError, match="lies in CHECKPOINT"):
        opened.run(checkpoints["huggingface"] / "out")
    partial_folder(dst).mkdir()
    (partial_folder(dst) / "mine").write_text("")
    with pytest.raises(UnfinishedError, match=r"out\.partial: in the way, and not of an export"):
        opened.run(dst)
    (partial_folder(dst) / "mine").unlink()
    with UnfinishedFolder(dst) as folder:
        folder.add("begun", b"half")
        with pytest.raises(UnfinishedError, match=r"out\.partial: another process is writing it"):
            opened.run(dst)
        shutil.copytree(partial_folder(dst), tmp_path / "killed")
    assert not partial_folder(dst).exists()
    shutil.move(tmp_path / "killed", partial_folder(dst))
    opened.run(dst)
    assert not (dst / "begun").exists() and not partial_folder(dst).exists()


@pytest.mark.parametrize("shard_bytes", [None, 400_000])
@pytest.mark.parametrize("format", LAYOUTS)
def test_verifying_finds_a_flipped_byte(format, shard_bytes, checkpoints, tmp_path):
    """Guards --verify against finding everything equal, whichever way it compares."""
    opened = open_export(checkpoints[format], format, shard_bytes=shard_bytes)
    opened.run(tmp_path / "out")
    for shard in opened.shards:
        flip(tmp_path / "out" / shard.name, len(shard.header) + 5)
    with pytest.raises(ExportError) as error:
        opened.verify(tmp_path / "out")
    assert re.search("sha256 .*, expected " if shard_bytes is None else "leaf .*: is not as in the", str(error.value))
    assert len(str(error.value).splitlines()) in (len(opened.shards), 1)


def test_too_little_room_is_said_before_anything_is_written(checkpoints, tmp_path, monkeypatch):
    """Guards against an hour of writing that ends at 95 %."""
    opened = open_export(checkpoints["huggingface"])
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(ExportError, match=r"out: [\d,]+ bytes are needed, 5 are free: make room first"):
        opened.run(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_byte(checkpoints, tmp_path):
    """Guards the bar against stopping short of its end, or running over it."""
    counted = {}

    @contextmanager
    def progress(what: str, total_bytes: int, done_bytes: int) -> Iterator:
        counted[what] = [total_bytes, done_bytes]

        def add(size_bytes: int) -> None:
            counted[what][1] += size_bytes

        yield add

    for format in LAYOUTS:
        opened = open_export(checkpoints[format], format, shard_bytes=None if format == "openai" else 300_000)
        opened.run(tmp_path / format, progress=progress)
        opened.verify(tmp_path / format, progress)
        assert counted.keys() == {"writing", "verifying"}
        assert all(total == done > 0 for total, done in counted.values()), (format, counted)


def test_recipes_cover_the_leaves():
    """Guards sizes and dtypes that are compared without declaring a model, at the published sizes."""
    for name in ("gpt-oss-20b.json", "gpt-oss-120b.json"):
        config = parse_config(json.loads((ROOT / "configs" / name).read_text()))
        declared = convert._declared_leaves(config)
        packed = mxfp4_recipes(config)
        for table in published.FORMATS.values():
            for path, recipe in table(config).items():
                assert recipe.leaf_dtype == packed[path].leaf_dtype == declared[path].dtype.name
                assert recipe.leaf_bytes == packed[path].leaf_bytes
                assert recipe.leaf_bytes == int(np.prod(declared[path].shape)) * declared[path].dtype.itemsize, path
