"""Reads a published folder that was exported again, and compares it with the checkpoint, or with the first source."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from gptoss_jax.checkpoints import export_leaves, packing
from gptoss_jax.checkpoints.orbax import integrity
from gptoss_jax.checkpoints.orbax.manifest import LeafRecord
from gptoss_jax.checkpoints.published import Source, open_source
from gptoss_jax.checkpoints.safetensors_reader import library_faults
from gptoss_jax.errors import Fault


def file_faults(dst: Path, sha256: Mapping[str, str], report_bytes: Callable[[int], object]) -> Iterator[Fault]:
    """Where files at `dst` have another sha256 than is expected, by name."""
    for name, expected in sha256.items():
        digest = hashlib.sha256()
        with open(dst / name, "rb", buffering=0) as file:
            while chunk := file.read(integrity.CHUNK_BYTES):
                digest.update(chunk)
                report_bytes(len(chunk))
        if digest.hexdigest() != expected:
            yield Fault(str(dst / name), f"sha256 {digest.hexdigest()}, expected {expected}")


def leaf_faults(
    dst: Path, checkpoint: Path, records: Mapping[str, LeafRecord], report_bytes: Callable[[int], object]
) -> Iterator[Fault]:
    """Where leaves, read from the folder at `dst` as a conversion would, are not the checkpoint's.

    Raises:
        SourceError, ConfigError: it is no published folder, or its headers are at fault.
        CheckpointError: a leaf of the checkpoint is damaged.
    """
    source = open_source(dst)
    source.check_headers()
    for file in source.files.values():
        yield from library_faults(file)
    for path in export_leaves.paths(records):
        leaves = export_leaves.leaves_of(path, records)
        is_packed = bool(source.recipes[leaves[0]].pack)
        same = _unpacked_is_same if is_packed else _is_same
        if not same(source, checkpoint, [records[leaf] for leaf in leaves]):
            yield Fault(f"{dst}: leaf {path}", "is not as in the checkpoint")
        report_bytes(sum(records[leaf].size_bytes for leaf in leaves))


def _is_same(source: Source, checkpoint: Path, records: Sequence[LeafRecord]) -> bool:
    """By the hashes of the manifest."""
    del checkpoint
    return all(_sha256(source, record) == record.sha256 for record in records)


def _sha256(source: Source, record: LeafRecord) -> str:
    recipe, digest = source.recipes[record.path], hashlib.sha256()
    entry, first = source.tensors[recipe.tensor], recipe.leaf_offset_bytes
    for start in range(first, first + record.size_bytes, integrity.CHUNK_BYTES):
        digest.update(entry.read(start, min(integrity.CHUNK_BYTES, first + record.size_bytes - start)).data)
    return digest.hexdigest()


def _unpacked_is_same(source: Source, checkpoint: Path, records: Sequence[LeafRecord]) -> bool:
    """Expert by expert: the same numbers as those that blocks and scales stand for."""
    entry = source.tensors[source.recipes[records[0].path].tensor]
    expert_bytes = entry.size_bytes // entry.shape[0]
    halves = [integrity.read_verified(checkpoint, record, math.prod(record.shape[1:])) for record in records]
    same = True
    for i, expert in enumerate(zip(*halves, strict=True)):
        blocks, scales = (part.reshape(record.shape[1:]) for part, record in zip(expert, records, strict=True))
        weights = packing.unpack(blocks, scales).reshape(-1).view(np.uint8)
        same &= np.array_equal(weights, entry.read(i * expert_bytes, expert_bytes))
    return bool(same)
