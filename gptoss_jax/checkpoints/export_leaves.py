"""The leaves of a checkpoint into the tensors of published files: read, compared with their hashes, changed, written.

One leaf at a time is in memory where something changes it, else one chunk, or one expert where experts are unpacked.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from gptoss_jax.checkpoints import host_memory, packing
from gptoss_jax.checkpoints.orbax import integrity, zarr
from gptoss_jax.checkpoints.orbax.manifest import LeafRecord
from gptoss_jax.checkpoints.recipe import Recipe
from gptoss_jax.checkpoints.safetensors_writer import Shard
from gptoss_jax.checkpoints.unfinished import UnfinishedFolder
from gptoss_jax.errors import GptossError

Change = Callable[[str, tuple[np.ndarray, ...]], tuple[np.ndarray, ...]]
"""What becomes of a leaf before it is written: takes its path and arrays, gives arrays of the same shapes and dtypes.

The arrays are (weight,), bfloat16 as the model declares it; of the experts' "layers/i/moe/gate_up" and
"layers/i/moe/down" (blocks, scales), in whose place the bfloat16 format takes (weight,), bfloat16 [E, in, out], as
well. What it is given may be changed in place.
"""

_HALVES = ("/blocks", "/scales")


class ChangeError(GptossError):
    """What a change gave in place of a leaf's arrays, and what was expected."""


def paths(leaves: Mapping[str, object]) -> list[str]:
    """Leaves as changes name them: blocks and scales are one."""
    return list(dict.fromkeys(path.removesuffix(_HALVES[0]).removesuffix(_HALVES[1]) for path in leaves))


def leaves_of(path: str, leaves: Mapping[str, object]) -> list[str]:
    """The leaf, or the two halves of it, that a path of `paths` stands for."""
    return [path] if path in leaves else [path + half for half in _HALVES]


def read(checkpoint: Path, record: LeafRecord, report_bytes: Callable[[int], object] = lambda _: None) -> np.ndarray:
    """A whole leaf as the model declares it.

    Raises:
        CheckpointError: it is not as its manifest says.
    """
    content, at = host_memory.empty(record.size_bytes), 0
    for chunk in integrity.read_verified(checkpoint, record, integrity.CHUNK_BYTES):
        content[at : at + chunk.nbytes] = chunk
        at += chunk.nbytes
        report_bytes(chunk.nbytes)
    return content.view(zarr.dtype_of(record.dtype)).reshape(record.shape)


class LeafWriter:
    """Writes leaves, one after the other, where their tensors lie in the files."""

    def __init__(
        self,
        checkpoint: Path,
        records: Mapping[str, LeafRecord],
        recipes: Mapping[str, Recipe],
        shards: Sequence[Shard],
        folder: UnfinishedFolder,
        report_bytes: Callable[[int], object],
    ):
        self._checkpoint, self._records, self._recipes = checkpoint, records, recipes
        self._folder, self._report_bytes = folder, report_bytes
        self._places = {tensor: (shard.name, at) for shard in shards for tensor, at in shard.offsets.items()}

    def write(self, path: str, change: Change | None) -> None:
        """Writes one leaf, or both halves of one.

        Args:
            path: of `paths`.
            change: what becomes of it; None: it is written as it is.

        Raises:
            CheckpointError: it is not as its manifest says.
            ChangeError: the change gave something else than a leaf's arrays.
        """
        leaves = leaves_of(path, self._records)
        if change is not None:
            self._write_changed(path, leaves, change)
        elif self._recipes[leaves[0]].pack:
            self._write_unpacked(leaves)
        else:
            for leaf in leaves:
                self._copy(leaf)

    def _put(self, leaf: str, content: np.ndarray, offset_bytes: int) -> None:
        """Writes bytes of a leaf's tensor."""
        file, at = self._places[self._recipes[leaf].tensor]
        self._folder.write(file, content, at + offset_bytes)

    def _copy(self, leaf: str) -> None:
        at = self._recipes[leaf].leaf_offset_bytes
        for chunk in self._chunks(leaf):
            self._put(leaf, chunk, at)
            at += chunk.nbytes

    def _chunks(self, leaf: str, chunk_bytes: int = integrity.CHUNK_BYTES) -> Iterator[np.ndarray]:
        for chunk in integrity.read_verified(self._checkpoint, self._records[leaf], chunk_bytes):
            yield chunk
            self._report_bytes(chunk.nbytes)

    def _write_unpacked(self, leaves: Sequence[str]) -> None:
        """Blocks and scales, expert by expert, as bfloat16."""
        shapes = [self._records[leaf].shape for leaf in leaves]
        experts = [self._chunks(leaf, math.prod(shape[1:])) for leaf, shape in zip(leaves, shapes, strict=True)]
        at = 0
        for expert in zip(*experts, strict=True):
            blocks, scales = (part.reshape(shape[1:]) for part, shape in zip(expert, shapes, strict=True))
            at = self._put_unpacked(leaves[0], blocks, scales, at)

    def _put_unpacked(self, leaf: str, blocks: np.ndarray, scales: np.ndarray, at: int) -> int:
        """Writes one expert at an offset of its tensor, and gives the next one's."""
        try:
            weights = packing.unpack(blocks, scales)
        except GptossError as error:
            raise ChangeError(f"{self._checkpoint}: leaf {leaf}: {error}") from None
        self._put(leaf, weights, at)
        return at + weights.nbytes

    def _write_changed(self, path: str, leaves: Sequence[str], change: Change) -> None:
        given = tuple(map(self._read, leaves))
        wanted = [(array.shape, array.dtype) for array in given]
        is_packed = bool(self._recipes[leaves[0]].pack)
        changed = change(path, given)
        del given
        found = [(array.shape, array.dtype) for array in changed]
        if is_packed and found == [(self._recipes[leaves[0]].shape, np.dtype(ml_dtypes.bfloat16))]:
            self._put(leaves[0], np.ascontiguousarray(changed[0]), 0)
        elif found != wanted:
            raise ChangeError(f"{path}: changed to {_spelled(found)}, expected {_spelled(wanted)}")
        elif is_packed:
            at = 0
            for blocks, scales in zip(*changed, strict=True):
                at = self._put_unpacked(leaves[0], blocks, scales, at)
        else:
            for leaf, array in zip(leaves, changed, strict=True):
                self._put(leaf, np.ascontiguousarray(array), self._recipes[leaf].leaf_offset_bytes)

    def _read(self, leaf: str) -> np.ndarray:
        return read(self._checkpoint, self._records[leaf], self._report_bytes)


def _spelled(arrays: Sequence[tuple[tuple[int, ...], np.dtype]]) -> str:
    return ", ".join(f"{dtype.name} {list(shape)}" for shape, dtype in arrays) or "nothing"
