"""Shardings of arrays as pictures in text, as `jax.debug.visualize_array_sharding` draws them."""

import contextlib
import io
from typing import Any

WIDTH = 72


def drawn(shape: tuple[int, ...], sharding: Any) -> str:
    """Which device holds which part of an array, in a box of text.

    Of an array of more than two axes, the plane of the two that are cut, or of a cut one and its neighbour; shards are
    squares, whatever their shape.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    spec = (*getattr(sharding, "spec", ()), *(None,) * len(shape))[: len(shape)]
    cut = [axis for axis, mesh_axes in enumerate(spec) if _is_cut(sharding, mesh_axes)]
    shown = sorted({*cut, *range(len(shape))}, key=lambda axis: (axis not in cut, axis))[:2]
    shown.sort()
    plane = NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in shown)))
    shards = [shape[axis] // sharding.shard_shape(shape)[axis] for axis in shown]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):  # of squares: of the true shape many a box would have no room for its name
        jax.debug.visualize_sharding(tuple(8 * count for count in shards), plane, use_color=False, max_width=WIDTH)
    return text.getvalue().rstrip("\n")


def _is_cut(sharding: Any, mesh_axes: Any) -> bool:
    names = mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)
    return any(name is not None and sharding.mesh.shape[name] > 1 for name in names)
