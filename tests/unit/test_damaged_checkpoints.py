"""Checkpoints damaged at random: each ends in few readable lines, or is one that works; nothing half-written is left.

Seeded. The mutations are those that people, disks and other tools make, and worse: of config.json, index, headers,
manifest, provenance, journal and what lies beside the leaves.
"""

import copy
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from converters.random_checkpoint import with_vocab_size, write_checkpoint
from gptoss_jax.checkpoints import published
from gptoss_jax.checkpoints.conversion import Conversion, declared_leaves
from gptoss_jax.checkpoints.leaf import Leaf
from gptoss_jax.checkpoints.opening import open_weights
from gptoss_jax.checkpoints.orbax import integrity
from gptoss_jax.checkpoints.orbax.manifest import partial_folder
from gptoss_jax.checkpoints.orbax.writer import Writer
from gptoss_jax.errors import MAX_LINE, MAX_LINES, GptossError
from gptoss_jax.model import sharding

ROOT = Path(__file__).parents[2]
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
SMALL = with_vocab_size(json.loads((ROOT / "configs" / "tiny.json").read_text()), 64) | TWO_LAYERS
SMALL |= {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "head_dim": 16, "num_attention_heads": 2}
SECONDS = 20  # a hundred times more than enough for a model of 200 kB, on a busy machine too
MUTANTS = 8  # in one case

NASTY = (None, True, 0, 1, -1, 3, 1.5, 1e305, 1e-305, 10**400, 2**63, 10**9, 10**12, float("inf"), float("nan"))
NASTY += ("", "x" * 100_000, "a\nb\x1b[2J", "\ud800", "../../etc/passwd", [], {}, [[]] * 9, {"a": 1}, "bfloat16")
NASTY += ([10**12], [10**12] * 40, [2**62] * 8, list(range(2000)), 128.0)
KEYS = ("extra", "x" * 5000, "a\nb", "\x1b]0;title\x07", "..", "layers/9/norm", "model.layers.99999999.x")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12\n"


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:50]) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


def spoil_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with something replaced, removed, or added."""
    value = copy.deepcopy(value)
    *outer, last = rng.choice(list(places(value)))
    parent = value
    for key in outer:
        parent = parent[key]
    match rng.randrange(5):
        case 0 | 1:
            parent[last] = rng.choice(NASTY)
        case 2 if isinstance(parent[last], int | float):
            parent[last] += rng.choice([-32, -1, 1, 32, 1000])
        case 3 if isinstance(parent, dict):
            parent[rng.choice(KEYS)] = rng.choice(NASTY)
        case _:
            del parent[last]
    return value


def spoil_text(rng: random.Random, text: bytes) -> bytes:
    """JSON that is cut, changed in a byte, nested, or another kind of file."""
    at = rng.randrange(len(text) + 1)
    kinds = [
        text[:at],
        text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :],
        text[:at] + b"[" * rng.choice([70, 500, 950, 990, 100_000]) + text[at:],
        b'{"a":' * 100_000,
        text.replace(b"2", b"1" * 5000, 1),
        text.replace(b"{", b'{"num_hidden_layers": 2, "num_hidden_layers": 2,', 1),
        text.decode("latin1").encode("utf-16"),
        LFS_POINTER,
        b"",
    ]
    return rng.choice(kinds)


def spoil_file(rng: random.Random, path: Path):
    """Something in a file's place that is none, or is too large."""
    content = path.read_bytes()
    path.unlink()
    match rng.randrange(6):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(rng.choice(["../../blobs/0123", "/dev/zero", path.name]))
        case 3:
            path.write_bytes(content)
            os.truncate(path, rng.choice([10**12, len(content) + 100]))


def spoil_json(rng: random.Random, path: Path):
    """A JSON file spoilt in one of these ways."""
    match rng.randrange(6):
        case 0:
            spoil_file(rng, path)
        case 1:
            path.write_bytes(spoil_text(rng, path.read_bytes()))
        case _:
            path.write_text(json.dumps(spoil_value(rng, json.loads(path.read_bytes()))))


def spoil_header(rng: random.Random, path: Path):
    """A safetensors file's header spoilt in one of these ways, or its length."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    text, length = raw[8:start], None
    match rng.randrange(6):
        case 0:
            spoil_file(rng, path)
            return
        case 1:
            text = spoil_text(rng, text)
        case 2:
            length = rng.choice([0, 1, 7, 100, 2**31, 2**40, 2**63, 2**64 - 1, len(raw)])
        case _:
            text = json.dumps(spoil_value(rng, json.loads(text))).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + raw[start:])


def in_time(call: Callable[[], object]) -> GptossError | OSError | None:
    """What a call is refused with, if it is; it may take no longer than it should, and say what one can read."""
    began = time.monotonic()
    try:
        call()
        return None
    except (GptossError, OSError) as error:
        lines = str(error).splitlines()
        assert 0 < len(lines) <= MAX_LINES + 1
        assert all(line.isprintable() and len(line) <= MAX_LINE + 50 for line in lines), lines
        return error
    finally:
        assert time.monotonic() - began < SECONDS


def shapes(leaves: Mapping[str, Leaf]) -> dict[str, tuple[int, ...]]:
    """By name."""
    return {name: leaf.shape for name, leaf in leaves.items()}


def silent(*_: object) -> nullcontext[Callable[[int], None]]:
    """Shows no progress."""
    return nullcontext(lambda _: None)


def convert(src: Path, dst: Path):
    """What the command does, without its output."""
    source = published.open_source(src)
    Conversion(source, dst, declared_leaves(source.config), silent, say=lambda _: None).run()


def open_all(folder: Path):
    """Opens whatever lies in a folder, and reads every leaf."""
    weights = open_weights(folder)
    for _ in weights.read(declared_leaves(weights.config), sharding.make()):
        pass


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A published model, for reading only."""
    dst = tmp_path_factory.mktemp("small") / "published"
    write_checkpoint(dst, SMALL, shard_bytes=20_000)
    return dst


@pytest.fixture(scope="module")
def converted(small, tmp_path_factory) -> Path:
    """The same, converted."""
    dst = tmp_path_factory.mktemp("converted") / "checkpoint"
    convert(small, dst)
    return dst


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_source_is_refused_or_converts_to_what_opens(seed, small, tmp_path):
    """Guards the converter and loading: tracebacks, hangs, half-written folders, checkpoints that nobody can open."""
    rng = random.Random(seed)
    for i in range(MUTANTS):
        src, dst = Path(shutil.copytree(small, tmp_path / f"{i}")), tmp_path / f"{i}-out"
        for _ in range(rng.choice([1, 1, 2])):
            name = rng.choice(["config.json", "config.json", published.INDEX, "header", "header"])
            path = rng.choice(sorted(src.glob("*.safetensors"))) if name == "header" else src / name
            if path.is_file() and path.stat().st_size < 10**6:
                try:
                    (spoil_header if name == "header" else spoil_json)(rng, path)
                except (ValueError, IndexError, RecursionError):
                    continue  # it was spoilt before, and is no JSON any more
        direct, refused = in_time(lambda src=src: open_all(src)), in_time(lambda src=src, dst=dst: convert(src, dst))
        assert (direct is None) == (refused is None), (seed, i)
        assert not partial_folder(dst).exists() and dst.exists() == (refused is None), (seed, i)
        if refused is None:
            open_all(dst)
            assert integrity.problems(dst, declared_leaves(open_weights(dst).config)) == []


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_checkpoint_is_refused_or_whole(seed, converted, tmp_path):
    """Guards loading and verifying: nothing that differs from what was written passes the one and the other."""
    rng = random.Random(1000 + seed)
    leaves = declared_leaves(open_weights(converted).config)
    for i in range(MUTANTS):
        folder = Path(shutil.copytree(converted, tmp_path / f"{i}"))
        beside = [folder / name for name in ("config.json", "manifest.json", "manifest.json", "provenance.json")]
        path = rng.choice([*beside, folder / "_METADATA", rng.choice(sorted(folder.glob("*/zarr.json")))])
        content = path.read_bytes()
        spoil_json(rng, path)
        same = path.is_file() and path.stat().st_size < 10**6 and path.read_bytes() == content
        opened = in_time(lambda folder=folder: open_all(folder))
        verified = in_time(lambda folder=folder: integrity.verify(folder, leaves))
        if path.name == "provenance.json":
            assert verified is None
        elif path.name == "config.json":
            # Else what was changed shows in no leaf's shape.
            assert opened is not None or shapes(declared_leaves(open_weights(folder).config)) == shapes(leaves)
        else:
            # A hash is the manifest's alone to say: loading does not read for it, verifying does.
            assert same or verified is not None or json.loads(path.read_bytes()) == json.loads(content), (seed, i)


def test_a_flipped_byte_is_found_in_whichever_file_it_is(converted, tmp_path):
    """Guards every file of a leaf: data, index, zarr.json."""
    rng = random.Random(0)
    leaves = declared_leaves(open_weights(converted).config)
    folder = Path(shutil.copytree(converted, tmp_path / "copy"))
    for path in rng.sample(sorted(path for path in folder.glob("*/*") if path.is_file()), 20):
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(GptossError, match="the checkpoint is damaged, convert again"):
            integrity.verify(folder, leaves)
        path.write_bytes(whole)
    integrity.verify(folder, leaves)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_journal_is_refused_or_taken_up(seed, small, converted, tmp_path, monkeypatch):
    """Guards an interrupted conversion whose journal was damaged: tracebacks, leaves that are not there."""

    def interrupt(*_: object):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "finish", interrupt)
        convert(small, tmp_path / "begun")
    rng = random.Random(2000 + seed)
    for i in range(6):
        dst = tmp_path / f"{i}"
        journal = Path(shutil.copytree(partial_folder(tmp_path / "begun"), partial_folder(dst))) / "journal.jsonl"
        lines = journal.read_bytes().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = (
            spoil_text(rng, lines[at]).replace(b"\n", b" ")
            if rng.random() < 0.4
            else json.dumps(spoil_value(rng, json.loads(lines[at]))).encode()
        )
        journal.write_bytes(b"\n".join([*lines, b""]))
        if in_time(lambda dst=dst: convert(small, dst)) is None:
            in_time(lambda dst=dst: integrity.verify(dst, declared_leaves(open_weights(dst).config)))
        else:
            assert not dst.exists()
