"""The checkpoint on disk: same bytes from any number of devices and back, and nothing damaged or foreign is opened."""

import functools
import hashlib
import json
import math
import mmap
import operator
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.checkpoints import host_memory
from gptoss_jax.checkpoints.opening import open_weights
from gptoss_jax.checkpoints.orbax import integrity, manifest, reader, zarr
from gptoss_jax.checkpoints.orbax.manifest import CheckpointError, Manifest
from gptoss_jax.checkpoints.orbax.writer import Writer, generation_config, save
from gptoss_jax.model import config, sharding, transformer

ROOT = Path(__file__).parents[2]
CHANGES = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "vocab_size": 512}
CHANGES |= {"eos_token_id": 510, "pad_token_id": 511, "num_local_experts": 8, "intermediate_size": 192}
CONFIG = config.parse_config(json.loads((ROOT / "configs" / "tiny.json").read_text()) | CHANGES)
MESHES = {1: "", 2: "tensor=2", 4: "expert=2,tensor=2", 8: "expert=4,tensor=2"}
LEAVES = transformer.declare(CONFIG, sharding.make()).leaves
BLOCKS = "layers/0/moe/gate_up/blocks"


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Random bytes in every leaf but one, which is all zeros."""
    rng = np.random.default_rng(0)
    out = {}
    for path, leaf in LEAVES.items():
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        out[path] = rng.integers(0, 256, size, np.uint8).view(leaf.dtype).reshape(leaf.shape)
    out["layers/1/moe/down/bias"] = np.zeros_like(out["layers/1/moe/down/bias"])
    return out


@pytest.fixture(scope="module")
def saved(arrays, tmp_path_factory) -> Path:
    """The arrays as a checkpoint, for reading only."""
    return save(tmp_path_factory.mktemp("saved") / "checkpoint", arrays, CONFIG, {"from": "a test"})


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def hashes(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def restore(path, leaves, laid) -> dict[str, jax.Array]:
    """What is read of a checkpoint, on the devices where it belongs."""
    return {
        name: jax.device_put(array, laid.named(leaves[name].axes)) for name, array in reader.read(path, leaves, laid)
    }


def assert_equal(restored, arrays):
    """The same bytes: NaN among random bits is not equal to itself."""
    assert restored.keys() == arrays.keys()
    for path, array in arrays.items():
        got = np.asarray(restored[path])
        assert got.dtype == array.dtype and got.shape == array.shape, path
        assert got.tobytes() == array.tobytes(), path


def at(tree: dict, path: str):
    """A leaf of Orbax's nested dict."""
    return functools.reduce(operator.getitem, path.split("/"), tree)


def orbax_target(mesh: str = "") -> dict:
    """The tree of ShapeDtypeStructs that a stranger hands to Orbax."""
    laid = sharding.make(mesh)
    tree: dict = {}
    for path, leaf in LEAVES.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=laid.named(leaf.axes))
    return tree


# ---- there and back ----


@pytest.mark.parametrize("devices", MESHES)
def test_bytes_do_not_depend_on_the_devices_written_from(devices, arrays, saved, tmp_path):
    """Guards against a file per shard, a chunk shape taken from the sharding, a time or a host name somewhere."""
    laid = sharding.make(MESHES[devices])
    spread = {path: jax.device_put(arrays[path], laid.named(leaf.axes)) for path, leaf in LEAVES.items()}
    dst = save(tmp_path / "checkpoint", spread, CONFIG, {"from": "a test"})
    assert hashes(dst) == hashes(saved)
    assert not (tmp_path / "checkpoint.partial").exists()


@pytest.mark.parametrize("devices", MESHES)
def test_restores_equal_bytes_straight_into_shardings(devices, arrays, saved):
    """Guards against a leaf restored whole and never cut, a shard in another's place."""
    laid = sharding.make(MESHES[devices])
    restored = restore(saved, LEAVES, laid)
    assert_equal(restored, arrays)
    for path, leaf in LEAVES.items():
        assert restored[path].sharding == laid.named(leaf.axes), path
        assert restored[path].committed
    cut = restored[BLOCKS].addressable_shards[0].data.size
    assert cut * laid.size("experts") * laid.size("expert_hidden") == arrays[BLOCKS].size


def test_a_cpu_takes_what_was_read_without_a_copy(saved, addresses_given):
    """Guards against weights twice in memory while they load, or off the huge pages that make them fast to read."""
    restored = restore(saved, LEAVES, sharding.make())
    assert {array.unsafe_buffer_pointer() for array in restored.values()} == addresses_given
    assert len(addresses_given) == len(LEAVES)
    assert all(address % host_memory.HUGE_PAGE_BYTES == 0 for address in addresses_given)


def test_a_file_cut_while_it_is_read_is_named(saved, copy, monkeypatch):
    """Guards against whatever the memory held before, taken for weights."""
    data_file(copy).write_bytes(data_file(copy).read_bytes()[:1000])
    monkeypatch.setattr(integrity, "problems", lambda *_: [])  # as if it was whole when that was asked
    with pytest.raises(CheckpointError, match=r"/c\S*: ends at byte 1,000: it was truncated while being read"):
        restore(copy, LEAVES, sharding.make())


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_whole_huge_pages_are_asked_for_and_memory_is_given_back():
    """Guards against pages of 4 KiB, which cost a fifth of the speed; or every model ever loaded still in memory."""

    def found() -> dict[str, str]:
        maps = re.search(rf"^{address:x}-\S+ (.*?)^VmFlags: (.*?)$", Path("/proc/self/smaps").read_text(), re.S | re.M)
        return {"permissions": maps[1].split()[0], "flags": maps[2]} if maps else {}

    memory = host_memory.empty(3 * host_memory.HUGE_PAGE_BYTES + 5)
    address = memory.ctypes.data
    memory[:] = 1
    assert found()["permissions"] == "rw-p"  # shared memory is a file system's, and has no huge pages by default
    assert "hg" in found()["flags"].split() or not Path("/sys/kernel/mm/transparent_hugepage").exists()
    held = memory[1:].view()
    del memory
    assert held.sum() == 3 * host_memory.HUGE_PAGE_BYTES + 4
    del held
    assert not found()


def test_host_holds_no_more_than_the_largest_leaf_at_a_time():
    """Guards against batches of the restore that together exceed one tensor, or that leave a leaf out."""
    size = {path: math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in LEAVES.items()}
    batches = list(reader._batches(LEAVES))
    assert sorted(path for batch in batches for path in batch) == sorted(LEAVES)
    assert all(sum(size[path] for path in batch) <= max(size.values()) for batch in batches)


@pytest.mark.parametrize("mesh", [MESHES[1], MESHES[4]])
def test_orbax_alone_restores_it(mesh, arrays, saved):
    """Guards against a folder that only this project's own code can open."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(saved, orbax_target(mesh))
    assert_equal({path: at(tree, path) for path in LEAVES}, arrays)


def test_data_files_can_be_mapped(arrays, saved):
    """Guards against compression, a header, or parts out of order: the bytes must lie at offset 0 as in memory."""
    for record in Manifest.read(saved).leaves.values():
        assert record.file_bytes == (saved / record.file).stat().st_size
        array = arrays[record.path]
        mapped = np.memmap(saved / record.file, array.dtype, "r", shape=array.shape)
        assert mapped.tobytes() == array.tobytes(), record.path
        assert record.sha256 == hashlib.sha256(array.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("shape", "itemsize", "part"),
    [
        ((201_088, 2880), 2, (128, 2880)),
        ((32, 5760, 90, 16), 1, (1, 2880, 90, 16)),
        ((128, 5760, 90, 16), 1, (1, 2880, 90, 16)),
        ((2880, 64, 64), 2, (480, 64, 64)),
        ((64, 64, 2880), 2, (8, 64, 2880)),
        ((2880,), 2, (2880,)),
        ((), 4, ()),
    ],
)
def test_parts_of_the_published_shapes(shape, itemsize, part):
    """Guards against parts of a few bytes (a million reads), or one part (every device reads the whole tensor)."""
    assert zarr.part_shape(shape, itemsize) == part


@given(st.lists(st.integers(1, 40), max_size=4), st.sampled_from([1, 2, 4]), st.integers(1, 5000))
def test_parts_divide_and_follow_one_another(shape, itemsize, most):
    """Guards against a part that does not divide the tensor, or whose bytes are not one run of the file."""
    kept, zarr.PART_BYTES = zarr.PART_BYTES, most
    try:
        part = zarr.part_shape(tuple(shape), itemsize)
    finally:
        zarr.PART_BYTES = kept
    assert all(size % step == 0 for size, step in zip(shape, part, strict=True))
    cut = [axis for axis, (size, step) in enumerate(zip(shape, part, strict=True)) if step < size]
    assert all(step == 1 for step in part[: max(cut, default=0)])
    assert math.prod(part) * itemsize <= most or math.prod(part) == 1


def test_checksum_of_the_index():
    """Guards against another CRC than Castagnoli's (RFC 3720 gives this value)."""
    assert zarr.crc32c(b"123456789") == 0xE3069283


def test_what_lies_beside_the_leaves(saved):
    """Guards against a checkpoint that needs its source, or that stops at <|end|>."""
    assert manifest.read_config(saved) == CONFIG
    assert manifest.read_provenance(saved) == {"from": "a test"}
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [510]
    published = config.read_config(ROOT / "configs" / "gpt-oss-20b.json")
    generation = generation_config(published)
    assert sorted(generation["eos_token_id"]) == [199_999, 200_002, 200_012]
    assert 200_007 not in generation["eos_token_id"]
    assert (generation["temperature"], generation["top_p"]) == (1.0, 1.0)


# ---- refused ----


def test_mismatches_are_refused_all_of_them_in_one_error(saved):
    """Guards against Orbax, which casts bfloat16 to float32 without a word, and stops at the first missing leaf."""
    wanted = dict(LEAVES)
    wanted["norm"] = wanted["norm"]._replace(dtype=jnp.dtype(jnp.float32))
    wanted["layers/1/moe/norm"] = wanted["layers/1/moe/norm"]._replace(shape=(95,))
    wanted["layers/2/norm"] = wanted["norm"]
    del wanted["layers/0/attention/sinks"]
    with pytest.raises(CheckpointError) as error:
        restore(saved, wanted, sharding.make())
    assert str(error.value).splitlines() == [
        f"{saved}: leaf layers/0/attention/sinks: unexpected, the model has none of that name",
        f"{saved}: leaf layers/1/moe/norm: shape (96,), expected (95,)",
        f"{saved}: leaf layers/2/norm: missing",
        f"{saved}: leaf norm: dtype bfloat16, expected float32",
    ]


def test_orbax_does_cast_without_a_word(saved):
    """Guards the reason for comparing the manifest: should Orbax refuse one day, the comparison may go."""
    target = orbax_target()
    target["norm"] = jax.ShapeDtypeStruct((96,), jnp.float32, sharding=target["norm"].sharding)
    with ocp.StandardCheckpointer() as checkpointer:
        assert checkpointer.restore(saved, target)["norm"].dtype == jnp.float32


def data_file(folder: Path) -> Path:
    """The file of one leaf."""
    return folder / Manifest.read(folder).leaves[BLOCKS].file


def cut_short(folder: Path):
    """A download or a copy that broke off."""
    with open(data_file(folder), "r+b") as file:
        file.truncate(1000)


def cut_and_padded(folder: Path):
    """The right size, but its end is a hole."""
    size = data_file(folder).stat().st_size
    cut_short(folder)
    with open(data_file(folder), "r+b") as file:
        file.truncate(size)


def zarr_json_changed(folder: Path):
    """Another fill value: TensorStore would read other numbers."""
    path = data_file(folder).with_name("zarr.json")
    path.write_text(path.read_text().replace('"fill_value": 0', '"fill_value": 1'))


DAMAGES = {
    "missing data": (lambda folder: data_file(folder).unlink(), "{data}: missing: the checkpoint is damaged"),
    "missing folder": (lambda folder: shutil.rmtree(data_file(folder).parent), "{data}: missing: the checkpoint"),
    "truncated": (cut_short, "{data}: 1,000 bytes, expected 147,476: the checkpoint is damaged, convert again"),
    "a hole": (cut_and_padded, "{data}: its index, the last 20 bytes, is not as written: the checkpoint is damaged"),
    "zarr.json": (zarr_json_changed, "zarr.json: missing, or not as written: the checkpoint is damaged"),
    "_METADATA": (lambda folder: (folder / "_METADATA").unlink(), "_METADATA: missing, or not what manifest.json"),
    "manifest": (
        lambda folder: (folder / "manifest.json").write_text("{"),
        "manifest.json: damaged (line 1, column 2: ",
    ),
    "digits": (
        lambda folder: (folder / "manifest.json").write_text(f'{{"format_version": {"1" * 5000}}}'),
        "manifest.json: damaged (a number of 5000 digits is out of range",
    ),
    "nesting": (
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
        "manifest.json: damaged (is nested too deeply",
    ),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: damaged (a list, expected"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json, so it is no finished"),
    "version": (
        lambda folder: (folder / "manifest.json").write_text('{"format_version": 0}'),
        "manifest.json: format version 0, expected 1: convert again",
    ),
}


def with_record(folder: Path, **changes: object):
    """The manifest with other values in one leaf's record."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    record = next(leaf for leaf in content["leaves"] if leaf["path"] == BLOCKS)
    record |= changes
    path.write_text(json.dumps(content))


RECORDS = {
    "an endless axis": ({"shape": [10**12]}, f"leaf {BLOCKS}: shape "),
    "an endless product": ({"shape": [2**62] * 8}, "manifest.json: damaged (no record of a leaf: "),
    "a long shape": ({"shape": [1] * 10_000}, "manifest.json: damaged (no record of a leaf: "),
    "a negative size": ({"file_bytes": -1}, "manifest.json: damaged (no record of a leaf: "),
    "a truth": ({"file_bytes": True}, "manifest.json: damaged (no record of a leaf: "),
    "no shape": ({"shape": None}, "manifest.json: damaged (no record of a leaf: "),
    "another dtype": ({"dtype": "float64"}, "manifest.json: damaged (no record of a leaf: "),
    "a path out of the folder": ({"path": "../../../etc"}, "manifest.json: damaged (no record of a leaf: "),
    "a leaf twice": ({"path": "norm"}, "manifest.json: damaged (a leaf is listed twice)"),
    "a long path": ({"path": "x" * 10_000}, "manifest.json: damaged (no record of a leaf: "),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_cannot_be_are_refused_at_once(name, copy):
    """Guards against a shape of 10^12 whose parts are counted, file by file, before anybody compares it."""
    changes, text = RECORDS[name]
    if name == "an endless axis":
        changes = changes | {"file_bytes": 10**12 + 20}
    with_record(copy, **changes)
    for call in (lambda: restore(copy, LEAVES, sharding.make()), lambda: integrity.verify(copy, LEAVES)):
        with pytest.raises(CheckpointError) as error:
            call()
        assert text in str(error.value) and len(str(error.value)) < 500


def test_a_config_of_another_depth_is_refused_before_anything_is_declared(copy):
    """Guards against a thousand layers made of one number, and a line for each leaf of them."""
    raw = json.loads((copy / "config.json").read_text()) | {"num_hidden_layers": 1000, "layer_types": None}
    (copy / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"leaf layers/10/\S+: missing \(and \d\d,\d\d\d more like it\)$"):
        open_weights(copy)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_with_the_reason(damage, copy):
    """Guards against a model that runs and says nothing sensible: TensorStore gives zeros for a missing file."""
    inflict, text = DAMAGES[damage]
    expected = text.format(data=data_file(copy))
    inflict(copy)
    with pytest.raises(CheckpointError) as error:
        restore(copy, LEAVES, sharding.make())
    assert expected in str(error.value)


def test_all_damaged_files_are_listed(copy):
    """Guards against one fault a run, a run an hour."""
    records = list(Manifest.read(copy).leaves.values())
    for record in records[:5]:
        (copy / record.file).unlink()
    with pytest.raises(CheckpointError) as error:
        integrity.verify(copy, LEAVES)
    assert len(str(error.value).splitlines()) == 5


def test_verify_finds_one_flipped_bit(copy):
    """Guards against a checker that believes sizes."""
    read = []
    integrity.verify(copy, LEAVES, read.append)
    assert sum(read) == sum(record.size_bytes for record in Manifest.read(copy).leaves.values())
    content = bytearray(data_file(copy).read_bytes())
    content[77] ^= 4
    data_file(copy).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"layers\.0\.moe\.gate_up\.blocks/c\S*: sha256 \w{64}, expected \w{64}"):
        integrity.verify(copy, LEAVES)


def test_absent_checkpoints_are_explained(tmp_path):
    """Guards against `No such file or directory: manifest.json` for a path that was mistyped."""
    (tmp_path / "file").write_text("")
    (tmp_path / "begun.partial").mkdir()
    for name, text in {
        "nothing": "no such folder",
        "file": "a file, expected the folder of a checkpoint",
        "begun": "not finished (see",
        "begun.partial": "an unfinished checkpoint: run the command that writes it again, it resumes",
    }.items():
        assert not manifest.is_checkpoint(tmp_path / name)
        with pytest.raises(CheckpointError) as error:
            restore(tmp_path / name, LEAVES, sharding.make())
        assert text in str(error.value)


# ---- the writer ----

IDENTITY = {"source": {"a.safetensors": {"size": 1}}, "option": False}


def write_all(writer: Writer, arrays, *, but: int = 0):
    """Writes the leaves that are not finished, leaving out the last `but`."""
    paths = sorted(arrays)
    for path in paths[: len(paths) - but]:
        if path not in writer.finished:
            writer.write(path, arrays[path])


def test_interrupted_writing_goes_on_and_ends_in_the_same_bytes(arrays, tmp_path):
    """Guards against finished leaves written again, unfinished ones kept, or a journal left in the checkpoint."""
    with Writer(tmp_path / "whole", IDENTITY) as writer:
        write_all(writer, arrays)
        writer.finish(CONFIG, {})
    with Writer(tmp_path / "cut", IDENTITY) as writer:
        writer.note("a", {"b": 1})
        write_all(writer, arrays, but=10)
    tree = tmp_path / "cut.partial" / "checkpoint"
    (tree / "unembedding").mkdir()
    (tree / "unembedding" / "c.0.0").write_bytes(b"half")
    with open(tmp_path / "cut.partial" / "journal.jsonl", "ab") as journal:
        journal.write(b'{"path": "unembedd')  # torn
    stamps = {path: path.stat().st_mtime_ns for path in tree.rglob("c.*")}
    with Writer(tmp_path / "cut", IDENTITY) as writer:
        assert writer.notes == {"a": {"b": 1}}
        assert len(writer.finished) == len(arrays) - 10
        assert not (tree / "unembedding").exists()
        write_all(writer, arrays, but=5)  # and a third run, after the torn line
    with Writer(tmp_path / "cut", IDENTITY) as writer:
        assert len(writer.finished) == len(arrays) - 5
        write_all(writer, arrays)
        kept = {path: path.stat().st_mtime_ns for path in stamps if path.parent.name != "unembedding"}
        assert kept.items() <= stamps.items()
        writer.finish(CONFIG, {})
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_journalled_leaf_whose_file_is_gone_is_written_again(arrays, tmp_path):
    """Guards against a journal believed against the disk."""
    with Writer(tmp_path / "cut", IDENTITY) as writer:
        record = writer.write("norm", arrays["norm"])
        writer.write("embedding", arrays["embedding"])
    (tmp_path / "cut.partial" / "checkpoint" / record.file).unlink()
    with Writer(tmp_path / "cut", IDENTITY) as writer:
        assert list(writer.finished) == ["embedding"]


def test_unfinished_checkpoints_cannot_be_opened(arrays, tmp_path):
    """Guards against a half-written folder that Orbax opens, with zeros for the leaves that are not there yet."""
    with Writer(tmp_path / "cut", IDENTITY) as writer:
        write_all(writer, arrays, but=1)
    for folder in (tmp_path / "cut", tmp_path / "cut.partial", tmp_path / "cut.partial" / "checkpoint"):
        with pytest.raises(CheckpointError):
            restore(folder, LEAVES, sharding.make())
        with ocp.StandardCheckpointer() as checkpointer, pytest.raises((OSError, ValueError)):
            checkpointer.restore(folder, orbax_target())


def test_a_journal_of_something_else_is_refused_naming_what_differs(arrays, tmp_path):
    """Guards against half of one model and half of another in one checkpoint."""
    with Writer(tmp_path / "cut", IDENTITY) as writer:
        writer.write("norm", arrays["norm"])
    other = {"source": {"a.safetensors": {"size": 2}}, "option": True}
    partial = tmp_path / "cut.partial"
    with pytest.raises(CheckpointError) as error:
        Writer(tmp_path / "cut", other)
    assert str(error.value).splitlines() == [
        f"{partial}: begun from something else; go on with that, or remove {partial} to start again",
        f"{partial}: option was false, is now true",
        f"{partial}: source.a.safetensors.size was 1, is now 2",
    ]
    with pytest.raises(CheckpointError, match="begun from something else"):
        save(tmp_path / "cut", arrays, CONFIG)


def test_a_damaged_journal_is_refused(arrays, tmp_path):
    """Guards against a damaged line skipped, and with it the leaf it vouched for."""
    with Writer(tmp_path / "cut", IDENTITY) as writer:
        write_all(writer, arrays, but=20)
    journal = tmp_path / "cut.partial" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], b"\xff\n", *lines[3:]]))
    with pytest.raises(CheckpointError, match=r"journal\.jsonl: line 3 is damaged; remove .*cut\.partial to start"):
        Writer(tmp_path / "cut", IDENTITY)


def test_what_is_in_the_way_is_refused(arrays, saved, tmp_path):
    """Guards against somebody's folder overwritten, or two processes writing into each other's files."""
    with pytest.raises(CheckpointError, match="exists; remove it or name another folder"):
        Writer(saved, IDENTITY)
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match=r"exists and has no journal\.jsonl"):
        Writer(tmp_path / "mine", IDENTITY)
    assert (tmp_path / "mine.partial" / "thesis.tex").exists()
    with Writer(tmp_path / "cut", IDENTITY), pytest.raises(CheckpointError, match="another process is writing it"):
        Writer(tmp_path / "cut", IDENTITY)
    assert not (tmp_path / "cut.partial").exists()  # nothing was finished, nothing is left


def test_an_interrupted_save_starts_again(arrays, tmp_path):
    """Guards against leaves of an earlier training step kept because their paths are the same."""
    old = {path: np.zeros_like(array) for path, array in arrays.items()}
    old["norm"] = np.zeros(96, np.complex64)
    with pytest.raises(CheckpointError, match="norm: dtype complex64, expected one of bfloat16, float32, uint8"):
        save(tmp_path / "checkpoint", old, CONFIG)
    assert (tmp_path / "checkpoint.partial").exists()
    save(tmp_path / "checkpoint", arrays, CONFIG)
    assert_equal(restore(tmp_path / "checkpoint", LEAVES, sharding.make()), arrays)


def test_other_dtypes_and_scalars(tmp_path):
    """Guards an adapter's float32 leaves, and a step counter."""
    odd = {"scale": np.array(3.5, np.float32), "a/b": np.ones((3, 5), ml_dtypes.bfloat16)}
    dst = save(tmp_path / "odd", odd, CONFIG)
    leaves = {path: transformer.Leaf(array.shape, array.dtype, (None,) * array.ndim) for path, array in odd.items()}
    assert_equal(restore(dst, leaves, sharding.make()), odd)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "damaged (line 1, column 2: "),
        ("[]", "damaged (a list, expected an object): convert again"),
        ('{"source": []}', "damaged, convert again"),
        ('{"source": {"files": [1]}}', "damaged, convert again"),
        (None, "damaged (no such file): convert again"),
    ],
)
def test_a_damaged_provenance_is_refused(content, text, copy):
    """Guards against a model of unknown origin, whose random weights would pass for trained ones."""
    (copy / "provenance.json").unlink()
    if content is not None:
        (copy / "provenance.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        open_weights(copy)
    assert str(error.value).startswith(f"{copy / 'provenance.json'}: {text}")
