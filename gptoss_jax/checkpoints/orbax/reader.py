"""Reads the leaves of a checkpoint, one after the other: whole into host memory, or each device's part by Orbax."""

import collections
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from gptoss_jax.checkpoints import host_memory
from gptoss_jax.checkpoints.leaf import Leaf, leaf_bytes
from gptoss_jax.checkpoints.orbax import integrity, zarr
from gptoss_jax.checkpoints.orbax.manifest import CheckpointError, LeafRecord, Manifest
from gptoss_jax.errors import listed
from gptoss_jax.model import transformer
from gptoss_jax.model.sharding import Sharding

READERS = 2  # threads that read whole leaves: what they fill has to be cleared first, which one core does alone


def read(
    path: str | Path, leaves: Mapping[str, Leaf], sharding: Sharding
) -> Iterator[tuple[str, np.ndarray | jax.Array]]:
    """The leaves of the checkpoint at `path` by name, once all of it has been found to be what they need.

    The only device of a CPU takes host memory as it is: there leaves come as NumPy arrays, in their order, and nothing
    else of the weights' size is ever in memory. Anywhere else leaves come in their sharding, large ones first: every
    device's part is read by itself, and what is in flight on the host is no more than the largest leaf.

    Raises:
        CheckpointError: no finished checkpoint, or its manifest or files are not what `leaves` need: all listed.
    """
    path = Path(os.path.abspath(path))
    if faults := integrity.problems(path, leaves):
        raise CheckpointError(listed(faults))
    if sharding.mesh.size == 1 and sharding.mesh.devices.flat[0].platform == "cpu":
        yield from _read_whole(path, [Manifest.read(path).leaves[name] for name in leaves])
    else:
        for batch in _batches(leaves):
            yield from _restore_batch(path, {name: leaves[name] for name in batch}, sharding).items()


def _read_whole(path: Path, records: list[LeafRecord]) -> Iterator[tuple[str, np.ndarray]]:
    """Every leaf in memory of its own; threads read a few ahead of who takes them."""

    def read_one(record: LeafRecord) -> tuple[str, np.ndarray]:
        content = host_memory.empty(record.size_bytes)
        with open(path / record.file, "rb", buffering=0) as file:
            count = host_memory.read_into(content, file.fileno())
        if count < record.size_bytes:
            raise CheckpointError(f"{path / record.file}: ends at byte {count:,}: it was truncated while being read")
        return record.path, content.view(zarr.dtype_of(record.dtype)).reshape(record.shape)

    ahead = collections.deque()
    with ThreadPoolExecutor(READERS) as readers:
        for record in records:
            ahead.append(readers.submit(read_one, record))
            if len(ahead) > READERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


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


def _restore_batch(path: Path, leaves: Mapping[str, Leaf], sharding: Sharding) -> dict[str, jax.Array]:
    """Orbax's part. Batches, because its own limit on bytes in flight is whole GB and lets freed memory pile up."""
    import orbax.checkpoint as ocp  # here, since a single device on a CPU needs none of it

    declared = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.named(leaf.axes))
        for name, leaf in leaves.items()
    }
    target = transformer.nest(declared)
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
        tree = checkpointer.restore(path, args=args)
    names = jax.tree.leaves(transformer.nest({name: name for name in leaves}))
    return jax.block_until_ready(dict(zip(names, jax.tree.leaves(tree), strict=True)))
