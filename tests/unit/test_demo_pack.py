"""The demo model's archive: made from a checkpoint, unpacked once, whole or not at all; and its first weights."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from converters.random_checkpoint import with_vocab_size
from demo import fresh, vocabulary
from demo import pack as pack_command
from gptoss_jax.checkpoints.orbax.manifest import Manifest
from gptoss_jax.cli import model_flags
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.model.config import parse_config
from gptoss_jax.runtime import demo_model

UNKNOWN = 99  # in place of the true one: the tiny vocabulary ends before it
USED = [*range(40), UNKNOWN, 123, 456]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model of whose vocabulary few rows are used."""
    raw = json.loads(Path("configs/tiny.json").read_text())
    raw |= {"hidden_size": 32, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    raw |= {"intermediate_size": 64, "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    folder = tmp_path_factory.mktemp("fresh") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "unknown_id", lambda: UNKNOWN)
        fresh.write(folder, parse_config(with_vocab_size(raw, 20_000)), USED, seed=3)
    return folder


@pytest.fixture(scope="module")
def archive(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint, packed."""
    file = tmp_path_factory.mktemp("packed") / "data" / "demo.zip"
    pack_command.pack(checkpoint, file)
    return file


def test_what_is_unpacked_is_what_was_packed(checkpoint, archive, tmp_path):
    """Guards every byte on its way through the package; and the second use, which must not unpack again."""
    folder = demo_model.folder(archive, tmp_path / "cache")
    files = [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()]
    assert files and all((folder / file).read_bytes() == (checkpoint / file).read_bytes() for file in files)
    before = (folder / "manifest.json").stat().st_mtime_ns, folder.stat().st_ino
    assert demo_model.folder(archive, tmp_path / "cache") == folder
    assert ((folder / "manifest.json").stat().st_mtime_ns, folder.stat().st_ino) == before
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_the_same_checkpoint_gives_the_same_archive(checkpoint, archive, tmp_path):
    """Guards the committed file against changes that mean nothing, and its size: rows that are equal compress away."""
    demo_model.pack(checkpoint, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()
    stored = sum(record.file_bytes for record in Manifest.read(checkpoint).leaves.values())
    assert archive.stat().st_size < stored / 20


def test_a_cache_that_lost_a_file_is_made_anew(archive, tmp_path):
    """Guards users whose cache was half cleaned: the model must come back without a word."""
    folder = demo_model.folder(archive, tmp_path)
    record = next(iter(Manifest.read(folder).leaves.values()))
    (folder / record.file).unlink()
    assert demo_model.folder(archive, tmp_path) == folder and (folder / record.file).is_file()


def test_another_archive_has_another_folder(archive, checkpoint, tmp_path):
    """Guards an upgrade: the old model in the cache must not be taken for the new one."""
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(archive) as packed, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as out:
        for name in packed.namelist():
            out.writestr(name, packed.read(name))
    assert demo_model.folder(other, tmp_path / "cache") != demo_model.folder(archive, tmp_path / "cache")


def damage_a_leaf(archive: Path, damaged: Path) -> None:
    """Writes an archive whose checksums are right and one of whose leaves is not the manifest's."""
    with zipfile.ZipFile(archive) as packed, zipfile.ZipFile(damaged, "w", zipfile.ZIP_DEFLATED) as out:
        for name in packed.namelist():
            content = packed.read(name)
            out.writestr(
                name, bytes([content[0] ^ 1]) + content[1:] if "norm" in name and "json" not in name else content
            )


def test_a_damaged_archive_leaves_nothing(archive, tmp_path):
    """Guards the cache against weights that are not those that were trained."""
    damaged = tmp_path / "damaged.zip"
    damage_a_leaf(archive, damaged)
    with pytest.raises(demo_model.DemoModelError, match=r"is damaged \(.*norm is not what its manifest says"):
        demo_model.folder(damaged, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    damaged.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(demo_model.DemoModelError, match=r"is damaged"):
        demo_model.folder(damaged, tmp_path / "cache")


def test_no_archive_and_no_cache_are_one_line(archive, tmp_path):
    """Guards a first run against a traceback where the package has no model, or the home cannot be written."""
    with pytest.raises(
        demo_model.DemoModelError, match=r"^this installation has no demo model \(none.zip\): expected a"
    ):
        demo_model.folder(tmp_path / "none.zip")
    (tmp_path / "file").write_text("")
    with pytest.raises(demo_model.DemoModelError, match=r"cannot be unpacked into .*: set XDG_CACHE_HOME"):
        demo_model.folder(archive, tmp_path / "file" / "cache")


def test_too_large_an_archive_is_refused(checkpoint, tmp_path, monkeypatch):
    """Guards the repository's size."""
    monkeypatch.setattr(pack_command, "MOST_BYTES", 1000)
    with pytest.raises(GptossError, match=r"bytes, expected 1,000 at most"):
        pack_command.pack(checkpoint, tmp_path / "demo.zip")
    assert not (tmp_path / "demo.zip").exists()


class Notes:
    def __init__(self):
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def test_commands_take_the_demo_model_and_say_so(archive, tmp_path, monkeypatch):
    """Guards a newcomer's first command, which names no checkpoint; one that is named must win."""
    monkeypatch.setattr(demo_model, "ARCHIVE", archive)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options, screen = flags.FlagValues(), Notes()
    flags.DEFINE_string("checkpoint", None, "", flag_values=options)
    options.mark_as_parsed()
    model_flags.default_to_demo_model(options, screen)  # pyright: ignore[reportArgumentType]
    assert options.checkpoint and Manifest.read(options.checkpoint)
    assert len(screen.lines) == 1 and "demo model" in screen.lines[0]
    options.checkpoint = "mine"
    model_flags.default_to_demo_model(options, screen)  # pyright: ignore[reportArgumentType]
    assert options.checkpoint == "mine" and len(screen.lines) == 1
    options.checkpoint = None
    monkeypatch.setattr(demo_model, "ARCHIVE", tmp_path / "none.zip")
    with pytest.raises(GptossError, match=r"^--checkpoint is missing, and this installation has no demo model"):
        model_flags.default_to_demo_model(options, screen)  # pyright: ignore[reportArgumentType]


def test_fresh_weights_are_fit_for_training(monkeypatch):
    """Guards the first weights: rows out of use equal and far below, the first axis constant, sinks and biases 0."""
    monkeypatch.setattr(vocabulary, "unknown_id", lambda: UNKNOWN)
    raw = json.loads(Path("configs/demo.json").read_text())
    config = parse_config(with_vocab_size(raw, 20_000))
    leaves = dict(fresh.leaves(config, USED, seed=0))
    embedding, unembedding = (leaves[name].astype(np.float32) for name in ("embedding", "unembedding"))
    assert (embedding[:, 0] == fresh.CONSTANT).all()
    unused = vocabulary.unused(leaves["unembedding"])
    assert unused.sum() == config.vocab_size - len(USED) and not unused[USED].any()
    assert (unembedding[unused] == unembedding[unused][0]).all()
    stream = embedding[USED] / np.sqrt(np.square(embedding[USED]).mean(axis=1, keepdims=True))
    logits = stream @ unembedding[USED].T
    assert (stream @ unembedding[unused][0]).max() < logits.min() - 20
    for name, leaf in leaves.items():
        if name.endswith(("sinks", "bias")):
            assert not leaf.any()
        elif name.endswith("norm"):
            assert (leaf == 1).all()
    assert not any(leaves[f"layers/{i}/attention/out/weight"][0].any() for i in range(config.num_layers))
    again = dict(fresh.leaves(config, USED, seed=0))
    assert all((leaves[name] == again[name]).all() for name in leaves)


def test_demo_shapes_divide():
    """Guards the README's sharded example: eight devices, blocks of 32 and heads must come out even."""
    config = parse_config(json.loads(Path("configs/demo.json").read_text()))
    assert config.num_experts == 8 and config.num_kv_heads == 4 and config.intermediate_size % (32 * 4) == 0
    assert config.vocab_size % 8 == 0 and config.layer_types[:2] == ["sliding_attention", "full_attention"]


def test_numbers_begin_as_their_digits():
    """Guards the composed rows: 417 and 418 must share hundreds and tens."""
    encode = load_tokenizer().encode
    ids = [encode(text)[0] for text in ("417", "418", "7", " cat")]
    found = vocabulary.features(ids)
    assert found.shape == (4, vocabulary.NUM_FEATURES) and found.sum(axis=1).tolist() == [4, 4, 2, 5]
    assert found[0] @ found[1] == 3 and found[0] @ found[2] == 1 and found[0] @ found[3] == 0
