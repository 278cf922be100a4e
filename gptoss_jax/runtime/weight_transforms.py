"""What becomes of a leaf between the disk and the model: a list of steps, each from an array to an array.

Leaves go through all steps one by one, so that little is in memory twice. To load another format of weights, or to put
something beside them, write one more step here and add it to the list in `loading.load`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.errors import GptossError
from gptoss_jax.model import layers, padding
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.sharding import Axes, Sharding
from gptoss_jax.model.transformer import Leaf, Model, Params
from pallas_kernels import expert_mlp as expert_op

Transform = Callable[[str, Any], Any]
"""The path of a leaf, and its array -> what takes the array's place."""


def apply(transforms: Sequence[Transform], leaves: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Each leaf after all `transforms`, finished before the next one is taken."""
    for path, array in leaves:
        for transform in transforms:
            array = transform(path, array)
        yield path, jax.block_until_ready(array)
        del array  # while the next one is read


def to_devices(model: Model, sharding: Sharding, config: ModelConfig | None = None) -> Transform:
    """Puts each leaf where its axes belong on the mesh; a device on a CPU takes host memory as it is.

    With `config`, experts that the mesh does not cut into whole blocks are padded (`model/padding.py`).
    """
    compiled: dict[Axes, Callable[[jax.Array], jax.Array]] = {}  # once for all layers

    def place(path: str, array: Any) -> jax.Array:
        axes = model.leaves[path].axes
        if config is None or not padding.is_padded(config, sharding, axes):
            return sharding.put(array, axes)
        if axes not in compiled:
            compiled[axes] = padding.padder(config, sharding, axes)
        return compiled[axes](sharding.put(array, padding.stored_axes(config, sharding, axes)))

    return place


def as_stored(model: Model, sharding: Sharding, config: ModelConfig) -> dict[str, Leaf]:
    """The leaves that are read, each laid over the mesh as it can be before it is padded."""
    return {
        path: leaf._replace(axes=padding.stored_axes(config, sharding, leaf.axes))
        for path, leaf in model.leaves.items()
    }


def to_dense_format(model: Model, name: str) -> Transform:
    """Brings the weights of attention and unembedding into the format `name` of `number_formats.DENSE_ITEMSIZE`."""

    def convert(path: str, array: jax.Array) -> Any:
        num_inputs = model.leaves[path].num_inputs
        return _quantize(array, num_inputs) if num_inputs and name == "int8" else array

    return convert


def join_projections(params: Params, join: Callable[..., layers.Joined] | None = None) -> Params:
    """`params` with the query, key and value projections of each layer in one, where none has an adapter.

    The separate ones stay until the caller lets go of them. `join` is `joined`, or what stands for it of shapes alone.
    """
    join = join or jax.jit(joined)
    of_layers = params["layers"]
    for i, layer in of_layers.items():
        projections = [layer["attention"][name] for name in "qkv"]
        if any(isinstance(part["weight"], layers.Adapted) for part in projections):
            continue
        one = join(*projections)
        nothing = {"weight": layers.ELSEWHERE, "bias": layers.ELSEWHERE}
        attention = layer["attention"] | {"q": nothing | {"weight": one}, "k": nothing, "v": nothing}
        of_layers = of_layers | {i: layer | {"attention": attention}}
    return params | {"layers": of_layers}


def joined(q: Params, k: Params, v: Params) -> layers.Joined:
    """The three projections, each a weight and a bias, as `layers.Joined`."""

    def beside(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        by_head = q.reshape(k.shape[0], -1, *q.shape[1:])
        return jnp.concatenate([by_head, k[:, None], v[:, None]], axis=1)

    return layers.Joined(*(jax.tree.map(beside, *(part[name] for part in (q, k, v))) for name in ("weight", "bias")))


_quantize = jax.jit(layers.quantize, static_argnums=1)


def to_weight_layout(model: Model, layout: expert_op.WeightLayout, sharding: Sharding) -> Transform:
    """Rearranges the experts' weights for the kernel that reads them, on the devices that their new axes name.

    The transform raises GptossError for a value that the kernel cannot read.
    """
    rearrangements = model.rearrangements(layout)
    compiled: dict[Any, Callable[[Any], jax.Array]] = {}  # once for all layers

    def rearrange(path: str, array: Any) -> Any:
        way = rearrangements[path]
        if way is expert_op.AS_PUBLISHED:
            return array
        if way.greatest is not None and (found := int(jnp.max(array))) > way.greatest:
            raise GptossError(
                f"{path} holds the byte {found}, and the chosen kernel reads up to {way.greatest}: "
                "--kernels expert_mlp=reference reads any"
            )
        kind = (way, model.leaves[path].axes)
        if kind not in compiled:
            compiled[kind] = rearrange_experts(*kind, sharding)
        return compiled[kind](array)

    return rearrange


def rearrange_experts(way: expert_op.Rearrangement, axes: Axes, sharding: Sharding) -> Callable[[Any], jax.Array]:
    """`way.pack` of an array with these axes, compiled: each device packs its own experts, one after the other.

    All at once, a TPU's compiler takes up to 30 times the array on the way.
    """

    def each_expert(array: jax.Array) -> jax.Array:
        return jax.lax.map(lambda expert: way.pack(expert[None])[0], array)

    to = way.axes(axes)
    return jax.jit(sharding.map(each_expert, in_axes=(axes,), out_axes=to), out_shardings=sharding.row_major(to))
