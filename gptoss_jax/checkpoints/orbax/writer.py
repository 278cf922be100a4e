"""Writes a checkpoint leaf by leaf, so that whatever interrupts it, another run goes on where it stopped."""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.checkpoints.orbax import zarr
from gptoss_jax.checkpoints.orbax.manifest import (
    CONFIG,
    DTYPES,
    FORMAT_VERSION,
    GENERATION_CONFIG,
    MANIFEST,
    ORBAX_METADATA,
    ORIGIN,
    PROVENANCE,
    CheckpointError,
    LeafRecord,
    Manifest,
    partial_folder,
)
from gptoss_jax.errors import Fault, listed, shortened
from gptoss_jax.files import FileError, parse_json
from gptoss_jax.model.config import ModelConfig, to_huggingface

CHUNK_BYTES = 8 << 20  # bytes hashed and written at a time


def _write_synced(path: Path, text: str | bytes) -> None:
    with open(path, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
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


_JOURNAL = "journal.jsonl"
_TREE = "checkpoint"


class Writer:
    """Writes a checkpoint leaf by leaf into `<dst>.partial`; `finish` moves it to `dst` in one step.

    A journal names the leaves that are complete on disk, each line synced, so whatever kills the process, a Writer of
    the same `identity` goes on after the last of them. What lies at `dst` is whole or absent, and `<dst>.partial` is
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
        if os.path.lexists(self.partial) and not self.partial.is_dir():
            raise CheckpointError(f"{self.partial}: in the way: expected nothing there, or what was begun; remove it")
        above = next(parent for parent in self.dst.parents if parent.exists())
        if not above.is_dir():
            raise CheckpointError(f"{self.dst}: cannot be made in {above}, which is no folder")
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
            self._take_up(lines if resume else [], journal)
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

    def _take_up(self, lines: list[dict[str, Any]], journal: Path) -> None:
        """Keeps what the journal's lines vouch for, removes everything else."""
        self._journal.truncate(sum(len(_line(line)) for line in lines))
        for number, line in enumerate(lines[1:], 2):
            try:
                if "note" in line:
                    self.notes[line["note"]] = line["value"]
                elif _is_whole(self.tree, record := LeafRecord.from_json(line)):
                    self.finished[record.path] = record
            except (CheckpointError, KeyError, TypeError):
                raise _damaged(journal, number) from None
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
        tail = zarr.index(array.shape, dtype)
        record = LeafRecord(path, tuple(array.shape), dtype, "", array.nbytes + len(tail))
        folder = self.tree / record.folder
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        _write_synced(folder / "zarr.json", zarr.zarr_json(record.shape, dtype))
        digest = _write_hashed(self.tree / record.file, _bytes(array), tail)
        _sync_folder(folder)
        _sync_folder(self.tree)
        record = dataclasses.replace(record, sha256=digest)
        self._append(dataclasses.asdict(record))
        self.finished[path] = record
        return record

    def finish(
        self, config: ModelConfig, provenance: Mapping[str, Any], origin: Mapping[str, bytes] | None = None
    ) -> Path:
        """Writes what lies beside the leaves, the manifest last, and moves the checkpoint to `dst`.

        Args:
            config: the model.
            provenance: where it comes from, as JSON holds it.
            origin: what is kept of its source, by name: see `checkpoints.origin`.
        """
        shapes = {path: record.shape for path, record in self.finished.items()}
        _write_synced(self.tree / ORBAX_METADATA, zarr.orbax_metadata(shapes))
        _write_synced(self.tree / CONFIG, zarr.to_json(to_huggingface(config)))
        _write_synced(self.tree / GENERATION_CONFIG, zarr.to_json(generation_config(config)))
        _write_synced(self.tree / PROVENANCE, zarr.to_json(provenance))
        hashes = self._write_origin(origin or {})
        _write_synced(self.tree / MANIFEST, Manifest(self.finished, hashes).to_json())
        _sync_folder(self.tree)
        os.rename(self.tree, self.dst)
        _sync_folder(self.dst.parent)
        self.discard()
        return self.dst

    def _write_origin(self, origin: Mapping[str, bytes]) -> dict[str, str]:
        """The hashes of what was written."""
        folder = self.tree / ORIGIN
        if origin:
            folder.mkdir(exist_ok=True)
            for name, content in sorted(origin.items()):
                _write_synced(folder / name, content)
            _sync_folder(folder)
        return {name: hashlib.sha256(content).hexdigest() for name, content in origin.items()}

    def discard(self) -> None:
        """Removes `<dst>.partial` and all in it; the journal after what it vouches for, should this be interrupted."""
        shutil.rmtree(self.tree, ignore_errors=True)
        shutil.rmtree(self.partial, ignore_errors=True)


def _is_whole(tree: Path, record: LeafRecord) -> bool:
    file = tree / record.file
    return file.is_file() and file.stat().st_size == record.file_bytes


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _journal_lines(raw: bytes, path: Path) -> list[dict[str, Any]]:
    """The journal's lines. The last one may be torn, and then was never vouched for; no other may."""
    *whole, torn = raw.split(b"\n")
    del torn
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            line = parse_json(text, path)
        except FileError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        elif number < len(whole):
            raise _damaged(path, number)
    return lines


def _damaged(journal: Path, number: int) -> CheckpointError:
    return CheckpointError(f"{journal}: line {number} is damaged; remove {journal.parent} to start again")


def _check_identity(partial: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found != wanted:
        differs = [
            Fault(str(partial), f"{name} was {_as_json(before)}, is now {_as_json(now)}")
            for name, before, now in _differences(found, wanted)
        ]
        hint = f"begun from something else; go on with that, or remove {partial} to start again"
        raise CheckpointError(listed([Fault(str(partial), hint), *differs]))


def _as_json(value: Any) -> str:
    return shortened(json.dumps(value))


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
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES].data
            digest.update(chunk)
            _write_all(file.fileno(), chunk)
        _write_all(file.fileno(), memoryview(tail))
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write_all(descriptor: int, left: memoryview) -> None:
    while left:
        left = left[os.write(descriptor, left) :]


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """Defaults for sampling. <|end|> (200007) is no stop: it closes analysis, and the answer follows."""
    stops = {"eos_token_id": list(config.stop_ids), "pad_token_id": config.pad_id}
    return {"do_sample": True, "temperature": 1.0, "top_p": 1.0} | stops


def save(
    dst: str | Path,
    leaves: Mapping[str, Any],
    config: ModelConfig,
    provenance: Mapping[str, Any] | None = None,
    origin: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes arrays, of NumPy or JAX, as a checkpoint at `dst`; its bytes do not depend on their sharding.

    One leaf at a time is gathered to the host. An interrupted save starts again from nothing.

    Args:
        dst: the folder to be.
        leaves: by path.
        config: the model.
        provenance: where it comes from.
        origin: small files that exports are to have, as a tokenizer's: `checkpoints.origin.small_files`.

    Raises:
        CheckpointError: `dst` exists, or another writer's `<dst>.partial` does.
    """
    with Writer(dst, {"written by": "gptoss_jax.checkpoint.save"}, resume=False) as writer:
        for path in sorted(leaves):
            writer.write(path, np.asarray(leaves[path]))
        return writer.finish(config, provenance or {}, origin)
