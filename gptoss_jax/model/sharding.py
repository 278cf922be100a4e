"""A mesh of devices, and where on it an array lies whose axes have names.

Weights, caches and activations name their axes logically ("heads", "experts", ...); only here do those names meet
devices, by the table in `mesh.py`. A cut that does not come out even is refused, with the sizes that would: MXFP4
blocks of 32 are never split.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptoss_jax.errors import short
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.mesh import (
    AUTO,
    MESH_AXES,
    RULES,
    MeshError,
    MeshShape,
    check_even,
    check_rules,
    choose_exchange,
    read,
    unknown_axis,
)

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Devices in a mesh, and the rules by which logical axes are laid over it.

    Attributes:
        mesh: devices, with axes named as in MESH_AXES.
        rules: logical axis -> mesh axes.
        exchange: how tokens meet experts of other devices, as `mesh.choose_exchange` takes it.
    """

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: RULES)
    exchange: str = AUTO

    def __post_init__(self):
        check_rules(self.rules, self.mesh.axis_names)
        choose_exchange(self.exchange, self.mesh_axes)

    @property
    def exchange_name(self) -> str:
        """Which exchange that is."""
        return choose_exchange(self.exchange, self.mesh_axes)

    def mesh_axes(self, logical: str) -> tuple[str, ...]:
        """Mesh axes that cut `logical`; where the rules do not say, those of RULES that the mesh has."""
        usual = tuple(axis for axis in RULES[logical] if axis in self.mesh.shape)
        return self.rules.get(logical, usual)

    def size(self, logical: str) -> int:
        """Shards into which `logical` is cut."""
        return math.prod(self.mesh.shape[axis] for axis in self.mesh_axes(logical))

    def even_slots(self, at_least: int) -> int:
        """The fewest slots that the data shards hold alike, of `at_least` so many."""
        shards = self.size("batch")
        return -(-at_least // shards) * shards

    def spec(self, axes: Axes) -> PartitionSpec:
        """The partition of an array whose axes are named `axes`.

        Raises:
            MeshError: two axes of the array would be cut by the same mesh axis.
        """
        used = [axis for logical in axes if logical for axis in self.mesh_axes(logical)]
        if len(set(used)) < len(used):
            raise MeshError(
                f"array axes {axes} are cut by mesh axes {short(used)}: a mesh axis can cut one of them only"
            )
        return PartitionSpec(*(self.mesh_axes(logical) if logical else None for logical in axes))

    def named(self, axes: Axes) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(axes))

    def put(self, array: Any, axes: Axes) -> jax.Array:
        """An array on the mesh as `axes` say; over several hosts, each of which has it, none waits for another."""
        if not self.mesh.is_multi_process or isinstance(array, jax.Array):
            return jax.device_put(array, self.named(axes))
        return jax.make_array_from_callback(array.shape, self.named(axes), lambda part: array[part])

    @property
    def readable(self) -> NamedSharding:
        """Where results for slots lie so that the host can read them: over several hosts, whole on every device."""
        return self.named((None,) if self.mesh.is_multi_process else ("batch",))

    def row_major(self, axes: Axes) -> Format:
        """`named`, with the last axis innermost in memory.

        That is how a kernel reads its operands. A TPU's compiler prefers whatever order pads an array least, and would
        then copy it before each call.
        """
        return Format(Layout(major_to_minor=tuple(range(len(axes)))), self.named(axes))

    def named_tree(self, axes: Any) -> Any:
        """`named` of every array in a tree of axes."""
        return jax.tree.map(self.named, axes, is_leaf=is_axes)

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """x, which the compiler has to lay over the mesh as `axes` say."""
        return x if self.mesh.size == 1 else jax.lax.with_sharding_constraint(x, self.named(axes))

    def map(self, function: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
        """`function` run on every device's own shard of its arguments: how a kernel meets a mesh."""
        if self.mesh.size == 1:
            return function
        in_specs, out_specs = (jax.tree.map(self.spec, axes, is_leaf=is_axes) for axes in (in_axes, out_axes))
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def sum_over(self, x: Any, *logical: str) -> Any:
        """Inside `map`: the sum of every shard's x, over the mesh axes that cut any of `logical`, in one collective."""
        cut = self.cut(*logical)
        return jax.lax.psum(x, cut) if cut else x

    def max_over(self, x: jax.Array, *logical: str) -> jax.Array:
        """Inside `map`: as `sum_over`, the greatest of every shard's x. It has no gradient."""
        cut = self.cut(*logical)
        return jax.lax.pmax(x, cut) if cut else x

    def cut(self, *logical: str) -> tuple[str, ...]:
        """Mesh axes of more than one device that cut any of `logical`."""
        return tuple(axis for name in logical for axis in self.mesh_axes(name) if self.mesh.shape[axis] > 1)

    def index(self, logical: str) -> jax.Array | int:
        """Inside `map`: which shard of `logical` this device holds."""
        return 0 if self.mesh.size == 1 else jax.lax.axis_index(self.mesh_axes(logical))

    def take_slot(self, tree: Any, at: jax.Array, axes: Any) -> Any:
        """One slot from each data shard: the arrays of `tree` that have a batch axis, cut to it; the others whole.

        Args:
            tree: arrays, the batch axis first where they have one.
            at: for each shard, which of its own slots, counted within the shard; int32, sharded as the batch is.
            axes: the logical axes of each array of `tree`.
        """

        def take(tree, at):
            def cut(axes, x):
                return jax.lax.dynamic_slice_in_dim(x, at[0], 1) if axes[0] == "batch" else x

            return jax.tree.map(cut, axes, tree, is_leaf=is_axes)

        return self.map(take, in_axes=(axes, ("batch",)), out_axes=axes)(tree, at)

    def put_slot(self, tree: Any, new: Any, at: jax.Array, axes: Any) -> Any:
        """`tree` with the slots that `take_slot` gave replaced by those of `new`, and its other arrays by new's."""

        def put(tree, new, at):
            def paste(axes, x, y):
                return jax.lax.dynamic_update_slice_in_dim(x, y, at[0], 0) if axes[0] == "batch" else y

            return jax.tree.map(paste, axes, tree, new, is_leaf=is_axes)

        return self.map(put, in_axes=(axes, axes, ("batch",)), out_axes=axes)(tree, new, at)

    def check(self, config: ModelConfig, slots: int = 1, *, pads: bool = True) -> None:
        """Refuses a mesh that does not cut this model and `slots` slots into equal shards.

        `pads`: whether experts may be padded, as where they are loaded to be run, not trained.

        Raises:
            MeshError: names each axis that does not come out even and the sizes that would.
        """
        check_even(config, self.mesh_axes, self.size, slots, pads=pads)


def is_axes(x: Any) -> bool:
    """Whether x names the axes of one array (a leaf of a tree of axes)."""
    return isinstance(x, tuple) and not hasattr(x, "_fields") and all(a is None or isinstance(a, str) for a in x)


def make(
    mesh: str | Path | Mesh | MeshShape | Sharding | None = None, devices: Sequence[Any] | None = None
) -> Sharding:
    """A Sharding over the first of `devices`, as many as `mesh` asks for.

    Args:
        mesh: "data=2,expert=4,tensor=1" (axes left out are 1); a JSON file {"axes": {...}, "rules": {...},
            "exchange": "..."}; a mesh with some of the axes of MESH_AXES, or its shape; or None for a single device.
        devices: all that JAX has by default.

    Raises:
        MeshError: unknown axis, malformed text, or more devices wanted than there are.
    """
    if isinstance(mesh, Sharding):
        return mesh
    if isinstance(mesh, Mesh):
        return Sharding(_with_all_axes(mesh))
    return _build(mesh if isinstance(mesh, MeshShape) else read(mesh or ""), devices or jax.devices())


def _with_all_axes(mesh: Mesh) -> Mesh:
    """`mesh` with those of MESH_AXES that it lacks, of size 1, and the axis types that the model is written for."""
    for name in mesh.axis_names:
        if name not in MESH_AXES:
            raise unknown_axis(name)
    names = (*mesh.axis_names, *(name for name in MESH_AXES if name not in mesh.axis_names))
    devices = mesh.devices.reshape(mesh.devices.shape + (1,) * (len(names) - mesh.devices.ndim))
    # Explicit axes, make_mesh's default, would have every operation name its output's sharding.
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def _too_few(wanted: int, devices: Sequence[Any]) -> str:
    message = f"a mesh of {wanted} devices, but there are {len(devices)}"
    if devices[0].platform != "cpu":
        return message
    of_each = -(-wanted // jax.process_count())
    return f"{message}; to simulate them on a CPU: XLA_FLAGS=--xla_force_host_platform_device_count={of_each}"


def _build(wanted: MeshShape, devices: Sequence[Any]) -> Sharding:
    shape = [wanted.axes.get(name, 1) for name in MESH_AXES]
    if math.prod(shape) > len(devices):
        raise MeshError(_too_few(math.prod(shape), devices))
    grid = np.array(devices[: math.prod(shape)]).reshape(shape)
    if idle := set(range(jax.process_count())) - {device.process_index for device in grid.flat}:
        raise MeshError(
            f"a mesh of {grid.size} of the {len(devices)} devices leaves processes {short(sorted(idle))} "
            "without one: expected some of each"
        )
    mesh = Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    return Sharding(mesh, {**RULES, **wanted.rules}, wanted.exchange)
