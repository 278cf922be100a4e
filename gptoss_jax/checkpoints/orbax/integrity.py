"""Whether a checkpoint is what it was when it was written, and what a model needs: compared before anything is read."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from gptoss_jax.checkpoints import host_memory
from gptoss_jax.checkpoints.leaf import Leaf
from gptoss_jax.checkpoints.orbax import zarr
from gptoss_jax.checkpoints.orbax.manifest import (
    MANIFEST,
    ORBAX_METADATA,
    ORIGIN,
    CheckpointError,
    LeafRecord,
    Manifest,
)
from gptoss_jax.errors import Fault, listed

CHUNK_BYTES = 8 << 20  # bytes read and hashed at a time
_AGAIN = "the checkpoint is damaged, convert again"


def problems(path: str | Path, leaves: Mapping[str, Leaf]) -> list[Fault]:
    """What speaks against restoring `leaves` from the checkpoint at `path`; nothing if all is well.

    Compares the manifest with the leaves and, once they agree, the files with the manifest: presence, size, zarr.json
    and the index. The tensors' own bytes are `verify`'s business.
    """
    path, manifest = Path(path), Manifest.read(path)
    return _manifest_problems(path, manifest, leaves) or file_problems(path, manifest)


def _manifest_problems(path: Path, manifest: Manifest, leaves: Mapping[str, Leaf]) -> list[Fault]:
    faults = []
    for name in sorted(manifest.leaves.keys() | leaves.keys()):
        record, leaf, where = manifest.leaves.get(name), leaves.get(name), f"{path}: leaf {name}"
        if record is None:
            faults.append(Fault(where, "missing"))
        elif leaf is None:
            faults.append(Fault(where, "unexpected, the model has none of that name"))
        else:
            if record.dtype != leaf.dtype.name:
                faults.append(Fault(where, f"dtype {record.dtype}, expected {leaf.dtype.name}"))
            if record.shape != tuple(leaf.shape):
                faults.append(Fault(where, f"shape {record.shape}, expected {tuple(leaf.shape)}"))
    return faults


def file_problems(path: Path, manifest: Manifest) -> list[Fault]:
    """Where the files of the checkpoint at `path` are not what its manifest describes."""
    faults = []
    shapes = {name: record.shape for name, record in manifest.leaves.items()}
    if not _has_text(path / ORBAX_METADATA, zarr.orbax_metadata(shapes)):
        faults.append(Fault(str(path / ORBAX_METADATA), f"missing, or not what {MANIFEST} describes: {_AGAIN}"))
    for record in manifest.leaves.values():
        faults += _leaf_problems(path / record.file, record)
    return faults


def _leaf_problems(file: Path, record: LeafRecord) -> Iterator[Fault]:
    size_bytes = file.stat().st_size if file.is_file() else None
    if size_bytes is None:
        yield Fault(str(file), f"missing: {_AGAIN}")
        return
    if size_bytes != record.file_bytes:  # asked first: what a file must hold beside the tensor takes time to work out
        yield Fault(str(file), f"{size_bytes:,} bytes, expected {record.file_bytes:,}: {_AGAIN}")
        return
    tail = zarr.index(record.shape, record.dtype)
    if size_bytes != record.size_bytes + len(tail) or _read(file, record.size_bytes, len(tail)) != tail:
        yield Fault(str(file), f"its index, the last {len(tail)} bytes, is not as written: {_AGAIN}")
    metadata = file.with_name("zarr.json")
    if not _has_text(metadata, zarr.zarr_json(record.shape, record.dtype)):
        yield Fault(str(metadata), f"missing, or not as written: {_AGAIN}")


def _origin_problems(path: Path, manifest: Manifest) -> Iterator[Fault]:
    """What is kept of the source is asked for by an export alone, so that no model is refused for it."""
    for name, sha256 in manifest.origin.items():
        file = path / ORIGIN / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            yield Fault(str(file), f"missing, or not as written: {_AGAIN}")
    there = {file.name for file in (path / ORIGIN).iterdir()} if (path / ORIGIN).is_dir() else set()
    for name in sorted(there - manifest.origin.keys()):
        yield Fault(str(path / ORIGIN / name), f"not named in {MANIFEST}: {_AGAIN}")


def _has_text(path: Path, text: str) -> bool:
    content = text.encode()
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _read(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


def stored_sha256(path: str | Path, record: LeafRecord, report: Callable[[int], object] = lambda _: None) -> str:
    """The sha256 of a leaf's bytes as they lie on disk.

    Args:
        path: the checkpoint.
        record: the leaf.
        report: called with the number of bytes that were read since its last call.
    """
    digest, left = hashlib.sha256(), record.size_bytes
    with open(Path(path) / record.file, "rb", buffering=0) as file:
        while left and (chunk := file.read(min(left, CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
            report(len(chunk))
    return digest.hexdigest()


def read_verified(path: Path, record: LeafRecord, chunk_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
    """A leaf's bytes, chunk by chunk, in the same memory each time; whether they were as written shows after the last.

    Raises:
        CheckpointError: their sha256 is not the manifest's.
    """
    digest, left, buffer = hashlib.sha256(), record.size_bytes, np.empty(min(chunk_bytes, record.size_bytes), np.uint8)
    with open(path / record.file, "rb", buffering=0) as file:
        while left:
            chunk = buffer[: min(chunk_bytes, left)]
            count = host_memory.read_into(chunk, file.fileno(), record.size_bytes - left)
            if count < chunk.nbytes:
                raise CheckpointError(
                    f"{path / record.file}: ends at byte {record.size_bytes - left + count:,}: {_AGAIN}"
                )
            digest.update(chunk.data)
            left -= count
            yield chunk
    if digest.hexdigest() != record.sha256:
        raise CheckpointError(f"{path / record.file}: sha256 {digest.hexdigest()}, expected {record.sha256}: {_AGAIN}")


def verify(path: str | Path, leaves: Mapping[str, Leaf], report: Callable[[int], object] = lambda _: None) -> None:
    """Reads every leaf of a checkpoint and compares its sha256 with the manifest's.

    Args:
        path: the checkpoint.
        leaves: what its model needs.
        report: called with the number of bytes that were read since its last call.

    Raises:
        CheckpointError: leaves are missing, of another shape, or damaged, or hashes differ: all listed.
    """
    faults = problems(path, leaves)
    manifest = Manifest.read(path)
    faults += _origin_problems(Path(path), manifest)
    for record in manifest.leaves.values() if not faults else ():
        digest = stored_sha256(path, record, report)
        if digest != record.sha256:
            faults.append(Fault(str(Path(path) / record.file), f"sha256 {digest}, expected {record.sha256}: {_AGAIN}"))
    if faults:
        raise CheckpointError(listed(faults))
