"""Orbax save and restore of the named tree straight into shardings, under a manifest that is checked first.

A checkpoint is a folder that any Orbax reads: one folder per leaf, in it zarr.json and a single data file, whose bytes
are the tensor's own, little-endian and in C order, followed by zarr3's index of the parts in which it can be read.
Beside the leaves lie config.json, generation_config.json, provenance.json and manifest.json. The manifest is compared
with what the model declares before Orbax is asked for anything, because Orbax casts dtypes without a word and
TensorStore takes a missing file for zeros. Nothing in the folder depends on time, host, or number of devices.

Knows no source layout and no model code: leaves are paths, shapes, dtypes and logical axes.
"""

import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from gptoss_jax.checkpoints import host_memory
from gptoss_jax.errors import GptossError
from gptoss_jax.model import config as config_module
from gptoss_jax.model.config import ModelConfig, to_huggingface
from gptoss_jax.model.sharding import Axes, Sharding

FORMAT_VERSION = 1
MANIFEST, PROVENANCE, CONFIG, GENERATION_CONFIG = (
    "manifest.json",
    "provenance.json",
    "config.json",
    "generation_config.json",
)
ORBAX_METADATA = "_METADATA"
PART_BYTES = 4 << 20  # most bytes in one separately readable part: small enough that a sharded restore reads its own
READERS = 2  # threads that read whole leaves: what they fill has to be cleared first, which one core does alone
PIECE_BYTES = 8 << 20  # bytes hashed and written at a time
DTYPES = ("bfloat16", "float32", "uint8")  # what weights are stored in


class CheckpointError(GptossError):
    """A checkpoint that is absent, unfinished, damaged, or of another model. One fault per line."""


@runtime_checkable
class Leaf(Protocol):
    """One declared weight, as `gptoss_jax.model.declare` gives it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Number format, as stored."""
        ...

    @property
    def axes(self) -> Axes:
        """Logical names of the axes."""
        ...


# ---- the manifest ----


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """What is stored for one leaf.

    Attributes:
        path: as in "layers/0/attention/q/weight".
        shape: sizes of the axes.
        dtype: a NumPy or ml_dtypes name, as in "bfloat16".
        sha256: of the tensor's little-endian bytes in C order.
        file_bytes: size of its data file: the tensor's bytes and the index behind them.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    file_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor itself."""
        return math.prod(self.shape) * _dtype(self.dtype).itemsize

    @property
    def folder(self) -> str:
        """Name of the leaf's folder, as Orbax wants it."""
        return self.path.replace("/", ".")

    @property
    def is_plausible(self) -> bool:
        """Whether each field is of its type: a manifest is a file, and files get damaged."""
        whole = all(isinstance(number, int) for number in (*self.shape, self.file_bytes))
        return isinstance(self.path, str) and isinstance(self.sha256, str) and self.dtype in DTYPES and whole

    @property
    def file(self) -> str:
        """The data file, relative to the checkpoint: zarr3's only chunk."""
        return f"{self.folder}/" + ".".join(["c", *("0" for _ in self.shape)])


def _record(raw: dict[str, Any]) -> LeafRecord:
    return LeafRecord(raw["path"], tuple(raw["shape"]), raw["dtype"], raw["sha256"], raw["file_bytes"])


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Every leaf of a checkpoint, by path in sorted order."""

    leaves: Mapping[str, LeafRecord]

    def to_json(self) -> str:
        """The text of manifest.json."""
        leaves = [dataclasses.asdict(self.leaves[path]) for path in sorted(self.leaves)]
        return _json({"format_version": FORMAT_VERSION, "leaves": leaves})

    @classmethod
    def read(cls, path: str | Path) -> "Manifest":
        """The manifest of the checkpoint at `path`.

        Raises:
            CheckpointError: there is no finished checkpoint, its manifest is damaged or of another version.
        """
        file = Path(path) / MANIFEST
        if not file.is_file():
            raise CheckpointError(_why_absent(Path(path)))
        try:
            raw = json.loads(file.read_text())
            if raw["format_version"] != FORMAT_VERSION:
                raise CheckpointError(
                    f"{file}: format version {raw['format_version']!r}, expected {FORMAT_VERSION}: convert again"
                )
            records = [_record(leaf) for leaf in raw["leaves"]]
            if faulty := [record.path for record in records if not record.is_plausible]:
                raise CheckpointError(f"{file}: damaged (leaf {faulty[0]!r}): convert again")
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: damaged ({error!r}): convert again") from None
        return cls({record.path: record for record in records})


def is_checkpoint(path: str | Path) -> bool:
    """Whether a finished checkpoint of this format lies at `path`."""
    return (Path(path) / MANIFEST).is_file()


def read_config(path: str | Path) -> ModelConfig:
    """The model that the checkpoint at `path` holds.

    Raises:
        ConfigError: its config.json is absent or damaged.
    """
    return config_module.read_config(Path(path) / CONFIG)


def read_provenance(path: str | Path) -> dict[str, Any]:
    """Where the checkpoint at `path` comes from, as its writer recorded it.

    Raises:
        CheckpointError: the record is absent or damaged.
    """
    file = Path(path) / PROVENANCE
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: absent or damaged ({error})") from None


def partial_folder(dst: str | Path) -> Path:
    """Where a checkpoint that is to be at `dst` is written until it is whole."""
    dst = Path(os.path.abspath(dst))
    return dst.with_name(dst.name + ".partial")


def is_unfinished(path: str | Path) -> bool:
    """Whether a checkpoint at `path` was begun and not finished: there, or in the folder where it is written."""
    path = Path(os.path.abspath(path))
    begun = path.name.endswith(".partial") or path.parent.name.endswith(".partial") or partial_folder(path).exists()
    return not is_checkpoint(path) and (begun or (path / ORBAX_METADATA).exists())


def _why_absent(path: Path) -> str:
    if path.name.endswith(".partial") or path.parent.name.endswith(".partial"):
        return f"{path}: an unfinished checkpoint: run the command that writes it again, it resumes"
    if partial_folder(path).exists():
        return f"{path}: not finished (see {partial_folder(path)}): run the command that writes it again, it resumes"
    if not path.exists():
        return f"{path}: no such folder"
    if not path.is_dir():
        return f"{path}: a file, expected the folder of a checkpoint"
    return f"{path}: has no {MANIFEST}, so it is no finished checkpoint; python -m converters.convert makes one"


# ---- bytes on disk: zarr3 with one chunk per tensor, cut into parts by its sharding codec ----


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"


def _part_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Largest slab (1, ..., 1, n, whole, ...) of at most PART_BYTES, or one row, that divides the tensor.

    Slabs of this form follow one another in the file exactly as in the tensor.
    """
    part = [1] * len(shape)
    size = itemsize
    for axis in reversed(range(len(shape))):
        fits = [n for n in range(1, shape[axis] + 1) if shape[axis] % n == 0 and n * size <= PART_BYTES]
        part[axis] = max(fits, default=1)
        size *= part[axis]
        if part[axis] < shape[axis]:
            break
    return tuple(part)


def _zarr_json(shape: tuple[int, ...], dtype: str) -> str:
    """zarr.json of one leaf (Zarr v3 core specification; sharding codec, version 1.0)."""
    bytes_codec = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": list(_part_shape(shape, _dtype(dtype).itemsize)),
        "codecs": [bytes_codec if _dtype(dtype).itemsize > 1 else {"name": "bytes"}],
        "index_codecs": [bytes_codec, {"name": "crc32c"}],
        "index_location": "end",
    }
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
        }
    )


def _index(shape: tuple[int, ...], dtype: str) -> bytes:
    """What follows the tensor's bytes in its file: offset and size of every part, and a checksum of that."""
    itemsize = _dtype(dtype).itemsize
    part_bytes = math.prod(_part_shape(shape, itemsize)) * itemsize
    parts = math.prod(shape) * itemsize // part_bytes
    index = b"".join(struct.pack("<QQ", i * part_bytes, part_bytes) for i in range(parts))
    return index + struct.pack("<I", _crc32c(index))


@functools.cache
def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _crc32c(data: bytes) -> int:
    """Castagnoli's CRC (RFC 3720, appendix B.4)."""
    table, crc = _crc32c_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _orbax_metadata(records: Mapping[str, LeafRecord]) -> str:
    """The text of _METADATA: the tree as Orbax reads it (every key a string in a dict)."""
    tree = {}
    for path in sorted(records):
        keys = tuple(path.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(records[path].shape),
            },
        }
    return _json(
        {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
    )


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(array: np.ndarray) -> str:
    """The hash that a manifest records: of the little-endian bytes in C order."""
    return hashlib.sha256(_bytes(array).data).hexdigest()


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


# ---- writing ----

_JOURNAL = "journal.jsonl"
_TREE = "checkpoint"


class Writer:
    """Writes a checkpoint leaf by leaf into `<dst>.partial`; `finish` moves it to `dst` in one step.

    A journal names the leaves that are complete on disk, each line synced, so whatever kills the process, a Writer of
    the same `identity` goes on behind the last of them. What lies at `dst` is whole or absent, and `<dst>.partial` is
    nothing that can be opened. Use as a context manager.

    Attributes:
        finished: leaves complete on disk, by path.
        notes: what `note` has recorded, across interruptions.
    """

    finished: dict[str, LeafRecord]
    notes: dict[str, Any]

    def __init__(self, dst: str | Path, identity: Mapping[str, Any], *, resume: bool = True):
        """Takes up or starts the writing of `dst`.

        Args:
            dst: the folder to be; nothing may exist there.
            identity: what is being written (source, config, options), as JSON holds it.
            resume: whether leaves from an interrupted run of the same identity are kept.

        Raises:
            CheckpointError: `dst` exists, or `<dst>.partial` holds something else or is in use.
        """
        self.dst = Path(os.path.abspath(dst))
        self.partial = partial_folder(dst)
        self.tree = self.partial / _TREE
        self.finished, self.notes = {}, {}
        if os.path.lexists(self.dst):
            raise CheckpointError(f"{self.dst}: exists; remove it or name another folder")
        self._open(json.loads(json.dumps({"format_version": FORMAT_VERSION, **identity})), resume)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.finished and not self.notes:
            self.discard()
        self._journal.close()

    def _open(self, identity: dict[str, Any], resume: bool) -> None:
        journal = self.partial / _JOURNAL
        if self.partial.exists() and not journal.is_file() and any(self.partial.iterdir()):
            raise CheckpointError(f"{self.partial}: exists and has no {_JOURNAL}; remove it or name another folder")
        self.partial.mkdir(parents=True, exist_ok=True)
        self._journal = open(journal, "a+b", buffering=0)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._journal.seek(0)
            lines = _journal_lines(self._journal.read(), journal)
            if lines:
                _check_identity(self.partial, lines[0], identity)
            self._take_up(lines if resume else [])
            if not lines or not resume:
                self._append(identity)
            self.tree.mkdir(exist_ok=True)
            _sync_folder(self.partial)
        except BlockingIOError:
            self._journal.close()
            raise CheckpointError(f"{self.partial}: another process is writing it") from None
        except (CheckpointError, OSError):
            self._journal.close()
            raise

    def _take_up(self, lines: list[dict[str, Any]]) -> None:
        """Keeps what the journal's lines vouch for, removes everything else."""
        self._journal.truncate(sum(len(_line(line)) for line in lines))
        for line in lines[1:]:
            if "note" in line:
                self.notes[line["note"]] = line["value"]
            elif _file_bytes(self.tree / (record := _record(line)).file) == record.file_bytes:
                self.finished[record.path] = record
        kept = {record.folder for record in self.finished.values()}
        for entry in self.tree.iterdir() if self.tree.exists() else ():
            if entry.name not in kept:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _append(self, line: Mapping[str, Any]) -> None:
        _write_all(self._journal.fileno(), memoryview(_line(line)))
        os.fsync(self._journal.fileno())

    def note(self, key: str, value: Any) -> None:
        """Records a finding (a source file's hash, say), so that a resumed run need not find it again."""
        self._append({"note": key, "value": value})
        self.notes[key] = value

    def write(self, path: str, array: np.ndarray) -> LeafRecord:
        """Writes one leaf; when this returns, it is on disk and journalled.

        Raises:
            CheckpointError: a dtype that no checkpoint has.
            OSError: as the file system raises it (ENOSPC, say); the leaf is then redone by the next run.
        """
        dtype = array.dtype.name
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: dtype {dtype}, expected one of {', '.join(DTYPES)}")
        tail = _index(array.shape, dtype)
        record = LeafRecord(path, tuple(array.shape), dtype, "", array.nbytes + len(tail))
        folder = self.tree / record.folder
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        _write_synced(folder / "zarr.json", _zarr_json(record.shape, dtype))
        digest = _write_hashed(self.tree / record.file, _bytes(array), tail)
        _sync_folder(folder)
        _sync_folder(self.tree)
        record = dataclasses.replace(record, sha256=digest)
        self._append(dataclasses.asdict(record))
        self.finished[path] = record
        return record

    def finish(self, config: ModelConfig, provenance: Mapping[str, Any]) -> Path:
        """Writes what lies beside the leaves, the manifest last, and moves the checkpoint to `dst`."""
        _write_synced(self.tree / ORBAX_METADATA, _orbax_metadata(self.finished))
        _write_synced(self.tree / CONFIG, _json(to_huggingface(config)))
        _write_synced(self.tree / GENERATION_CONFIG, _json(_generation_config(config)))
        _write_synced(self.tree / PROVENANCE, _json(provenance))
        _write_synced(self.tree / MANIFEST, Manifest(self.finished).to_json())
        _sync_folder(self.tree)
        os.rename(self.tree, self.dst)
        _sync_folder(self.dst.parent)
        self.discard()
        return self.dst

    def discard(self) -> None:
        """Removes `<dst>.partial` and all in it; the journal after what it vouches for, should this be interrupted."""
        shutil.rmtree(self.tree, ignore_errors=True)
        shutil.rmtree(self.partial, ignore_errors=True)


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _journal_lines(raw: bytes, path: Path) -> list[dict[str, Any]]:
    """The journal's lines. The last one may be torn, and then was never vouched for; no other may."""
    *whole, torn = raw.split(b"\n")
    del torn
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            lines.append(json.loads(text))
        except ValueError:  # JSONDecodeError and UnicodeDecodeError
            if number < len(whole):
                raise CheckpointError(
                    f"{path}: line {number} is damaged; remove {path.parent} to start again"
                ) from None
    return lines


def _check_identity(partial: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found != wanted:
        differs = [
            f"{partial}: {name} was {json.dumps(before)}, is now {json.dumps(now)}"
            for name, before, now in _differences(found, wanted)
        ]
        hint = f"{partial}: begun from something else; go on with that, or remove {partial} to start again"
        raise CheckpointError("\n".join([hint, *differs]))


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def _write_hashed(path: Path, content: np.ndarray, tail: bytes) -> str:
    """Writes content and tail, and gives the sha256 of the content."""
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(content), PIECE_BYTES):
            piece = content[start : start + PIECE_BYTES].data
            digest.update(piece)
            _write_all(file.fileno(), piece)
        _write_all(file.fileno(), memoryview(tail))
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write_all(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    """Defaults for sampling. <|end|> (200007) is no stop: it closes analysis, and the answer follows."""
    stops = {"eos_token_id": list(config.stop_ids), "pad_token_id": config.pad_id}
    return {"do_sample": True, "temperature": 1.0, "top_p": 1.0} | stops


def save(
    dst: str | Path,
    leaves: Mapping[str, jax.Array | np.ndarray],
    config: ModelConfig,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Writes arrays, wherever they lie, as a checkpoint at `dst`; its bytes do not depend on their sharding.

    One leaf at a time is gathered to the host. An interrupted save starts again from nothing.

    Raises:
        CheckpointError: `dst` exists, or another writer's `<dst>.partial` does.
    """
    with Writer(dst, {"written by": "gptoss_jax.checkpoint.save"}, resume=False) as writer:
        for path in sorted(leaves):
            writer.write(path, np.asarray(leaves[path]))
        return writer.finish(config, provenance or {})


# ---- reading ----


def problems(path: str | Path, leaves: Mapping[str, Leaf]) -> list[str]:
    """What speaks against restoring `leaves` from the checkpoint at `path`: one line per fault, none if all is well.

    Compares the manifest with the leaves, and the files with the manifest: presence, size, zarr.json and the index.
    The tensors' own bytes are `verify`'s business.
    """
    path, manifest = Path(path), Manifest.read(path)
    return _manifest_problems(path, manifest, leaves) + _file_problems(path, manifest)


def _manifest_problems(path: Path, manifest: Manifest, leaves: Mapping[str, Leaf]) -> list[str]:
    faults = []
    for name in sorted(manifest.leaves.keys() | leaves.keys()):
        record, leaf = manifest.leaves.get(name), leaves.get(name)
        if record is None:
            faults.append(f"{path}: leaf {name} is missing")
        elif leaf is None:
            faults.append(f"{path}: leaf {name} is unexpected: the model has none of that name")
        else:
            if record.dtype != leaf.dtype.name:
                faults.append(f"{path}: leaf {name} has dtype {record.dtype}, expected {leaf.dtype.name}")
            if record.shape != tuple(leaf.shape):
                faults.append(f"{path}: leaf {name} has shape {record.shape}, expected {tuple(leaf.shape)}")
    return faults


def _file_bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _file_problems(path: Path, manifest: Manifest) -> list[str]:
    again = "the checkpoint is damaged, convert again"
    faults = []
    if not _has_text(path / ORBAX_METADATA, _orbax_metadata(manifest.leaves)):
        faults.append(f"{path / ORBAX_METADATA}: missing, or not what {MANIFEST} describes: {again}")
    for record in manifest.leaves.values():
        file = path / record.file
        tail = _index(record.shape, record.dtype)
        size, expected = _file_bytes(file), record.size_bytes + len(tail)
        if size is None:
            faults.append(f"{file}: missing: {again}")
        elif size != expected:
            faults.append(f"{file}: {size:,} bytes, expected {expected:,}: {again}")
        elif _read(file, record.size_bytes, len(tail)) != tail:
            faults.append(f"{file}: its index, the last {len(tail)} bytes, is not as written: {again}")
        if not _has_text(file.with_name("zarr.json"), _zarr_json(record.shape, record.dtype)):
            faults.append(f"{file.with_name('zarr.json')}: missing, or not as written: {again}")
    return faults


def _has_text(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _read(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


def restore(
    path: str | Path,
    leaves: Mapping[str, Leaf],
    sharding: Sharding,
    report: Callable[[int], object] = lambda _: None,
) -> dict[str, jax.Array]:
    """The leaves of the checkpoint at `path`, each read straight into its sharding.

    The only device of a CPU takes what was read as it is: nothing else of the weights' size is ever in memory. Anywhere
    else every device's part is read by itself, and what is in flight on the host is no more than the largest leaf.

    Args:
        path: the checkpoint.
        leaves: what to read.
        sharding: the mesh.
        report: called with the number of bytes that were read since its last call.

    Raises:
        CheckpointError: no finished checkpoint, or its manifest or files are not what `leaves` need: all listed.
    """
    path = Path(os.path.abspath(path))
    if faults := problems(path, leaves):
        raise CheckpointError("\n".join(faults))
    if sharding.mesh.size == 1 and sharding.mesh.devices.flat[0].platform == "cpu":
        return _read_whole(path, leaves, sharding, report)
    arrays: dict[str, jax.Array] = {}
    for batch in _batches(leaves):
        arrays |= _restore_batch(path, {name: leaves[name] for name in batch}, sharding)
        report(sum(leaf_bytes(leaves[name]) for name in batch))
    return {name: arrays[name] for name in leaves}


def _read_whole(
    path: Path, leaves: Mapping[str, Leaf], sharding: Sharding, report: Callable[[int], object]
) -> dict[str, jax.Array]:
    """Every leaf in memory of its own, which a device on this host takes without a copy."""
    records = Manifest.read(path).leaves

    def read(name: str) -> jax.Array:
        record = records[name]
        content = host_memory.empty(record.size_bytes)
        with open(path / record.file, "rb", buffering=0) as file:
            count = host_memory.read_into(content, file.fileno())
        if count < record.size_bytes:
            raise CheckpointError(f"{path / record.file}: ends at byte {count:,}: it was truncated while being read")
        array = content.view(_dtype(record.dtype)).reshape(record.shape)
        return jax.device_put(array, sharding.named(leaves[name].axes))

    arrays = {}
    with ThreadPoolExecutor(READERS) as readers:
        for name, array in zip(leaves, readers.map(read, leaves), strict=True):
            arrays[name] = jax.block_until_ready(array)
            report(leaf_bytes(leaves[name]))
    return arrays


def _batches(leaves: Mapping[str, Leaf]) -> Iterator[list[str]]:
    """Leaves in groups as large as the largest of them, large ones first, while there is most room."""
    size_bytes = {name: leaf_bytes(leaf) for name, leaf in leaves.items()}
    batch, held = [], 0
    for name in sorted(leaves, key=lambda name: size_bytes[name], reverse=True):
        if batch and held + size_bytes[name] > max(size_bytes.values()):
            yield batch
            batch, held = [], 0
        batch.append(name)
        held += size_bytes[name]
    yield batch


def leaf_bytes(leaf: Leaf) -> int:
    """Bytes of a declared leaf."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _restore_batch(path: Path, leaves: Mapping[str, Leaf], sharding: Sharding) -> dict[str, jax.Array]:
    """Orbax's part. Batches, because its own limit on bytes in flight is whole GB and lets freed memory pile up."""
    target = _nest(
        {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.named(leaf.axes))
            for name, leaf in leaves.items()
        }
    )
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
        tree = checkpointer.restore(path, args=args)
    return jax.block_until_ready({name: _at(tree, name) for name in leaves})


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path -> a nested dict whose keys are all strings, layer numbers too, as Orbax stores them."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def _at(tree: Any, path: str) -> Any:
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)


def stored_sha256(path: str | Path, record: LeafRecord, report: Callable[[int], object] = lambda _: None) -> str:
    """The sha256 of a leaf's bytes as they lie on disk.

    Args:
        path: the checkpoint.
        record: the leaf.
        report: called with the number of bytes that were read since its last call.
    """
    digest, left = hashlib.sha256(), record.size_bytes
    with open(Path(path) / record.file, "rb", buffering=0) as file:
        while left and (piece := file.read(min(left, PIECE_BYTES))):
            digest.update(piece)
            left -= len(piece)
            report(len(piece))
    return digest.hexdigest()


def verify(path: str | Path, report: Callable[[int], object] = lambda _: None) -> int:
    """Reads every leaf of a checkpoint and compares its sha256 with the manifest's.

    Returns:
        Number of leaves.

    Raises:
        CheckpointError: files are missing or damaged, or hashes differ: all listed.
    """
    manifest = Manifest.read(path)
    faults = _file_problems(Path(path), manifest)
    for record in manifest.leaves.values() if not faults else ():
        digest = stored_sha256(path, record, report)
        if digest != record.sha256:
            faults.append(
                f"{Path(path) / record.file}: sha256 {digest}, expected {record.sha256}: "
                "the checkpoint is damaged, convert again"
            )
    if faults:
        raise CheckpointError("\n".join(faults))
    return len(manifest.leaves)
