"""Whether a checkpoint is what it was when it was written, and what a model needs: compared before anything is read."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from gptoss_jax.checkpoints.leaf import Leaf
from gptoss_jax.checkpoints.orbax import zarr
from gptoss_jax.checkpoints.orbax.manifest import MANIFEST, ORBAX_METADATA, CheckpointError, LeafRecord, Manifest

CHUNK_BYTES = 8 << 20  # bytes read and hashed at a time


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
    shapes = {name: record.shape for name, record in manifest.leaves.items()}
    if not _has_text(path / ORBAX_METADATA, zarr.orbax_metadata(shapes)):
        faults.append(f"{path / ORBAX_METADATA}: missing, or not what {MANIFEST} describes: {again}")
    for record in manifest.leaves.values():
        file = path / record.file
        tail = zarr.index(record.shape, record.dtype)
        size, expected = _file_bytes(file), record.size_bytes + len(tail)
        if size is None:
            faults.append(f"{file}: missing: {again}")
        elif size != expected:
            faults.append(f"{file}: {size:,} bytes, expected {expected:,}: {again}")
        elif _read(file, record.size_bytes, len(tail)) != tail:
            faults.append(f"{file}: its index, the last {len(tail)} bytes, is not as written: {again}")
        if not _has_text(file.with_name("zarr.json"), zarr.zarr_json(record.shape, record.dtype)):
            faults.append(f"{file.with_name('zarr.json')}: missing, or not as written: {again}")
    return faults


def _has_text(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


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
