"""An engine's programs of shapes alone: a decoding step or a chunk of prompts, for devices that need not be here.

No array is made: weights, cache and slots are `jax.ShapeDtypeStruct`s that lie on the mesh as an engine's lie. All
slots run in one batch, as where `EngineConfig.deterministic` is off.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.engine import programs, sampling
from gptoss_jax.engine.programs import NO_TOKEN, OPTIONS_AXES, STATE_AXES, Chunks, SlotOptions, SlotState
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model import kv_cache, layers, padding
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.config_ranges import MAX_STOP_IDS
from gptoss_jax.model.layers import Kernels
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.transformer import DTYPE_POLICIES, DtypePolicy, Leaf, Model, Params, declare, nest
from gptoss_jax.runtime import weight_transforms
from pallas_kernels import expert_mlp as expert_op


class AbstractModel(NamedTuple):
    """A model on a mesh, of shapes alone.

    Attributes:
        config: its numbers.
        sharding: the mesh and its rules.
        model: the declaration.
        params: `jax.ShapeDtypeStruct`s, in the formats and layouts in which `load` would hold the weights.
        policy: which number format holds what.
    """

    config: ModelConfig
    sharding: Sharding
    model: Model
    params: Params
    policy: DtypePolicy = DTYPE_POLICIES["bfloat16"]


class StepShape(NamedTuple):
    """Sizes that a program is compiled for.

    Attributes:
        slots: B, sequences at once, over all data shards.
        context_tokens: that each can hold.
        width: T, tokens of each slot: 1 decodes, more are a chunk of its prompt.
    """

    slots: int
    context_tokens: int
    width: int = 1

    @property
    def name(self) -> str:
        """What it is."""
        return "decode" if self.width == 1 else "prefill"


def abstract_model(
    config: ModelConfig,
    sharding: Sharding,
    kernels: Kernels,
    policy: DtypePolicy = DTYPE_POLICIES["bfloat16"],
    dense: str = "bfloat16",
) -> AbstractModel:
    """The model as `load` would make it of these; `dense` names the format of attention and unembedding."""
    model = declare(config, sharding, kernels, policy)
    ways = model.rearrangements(kernels.expert_mlp.layout)
    shapes = {path: padding.shape(config, sharding, leaf.shape, leaf.axes) for path, leaf in model.leaves.items()}
    leaves = {path: leaf._replace(shape=shapes[path]) for path, leaf in model.leaves.items()}
    params = nest({path: _stored(leaf, ways[path], dense, sharding) for path, leaf in leaves.items()})
    if kernels.few_launches:
        params = weight_transforms.join_projections(params, functools.partial(_joined, sharding))
    return AbstractModel(config, sharding, model, params, policy)


def _joined(sharding: Sharding, *projections: Any) -> layers.Joined:
    """What `weight_transforms.joined` makes of three projections."""
    shapes = jax.eval_shape(weight_transforms.joined, *projections)

    def place(x: Any) -> jax.ShapeDtypeStruct:
        return _placed(sharding, x, ("heads", *(None,) * (x.ndim - 1)))

    return jax.tree.map(place, shapes)


def _stored(leaf: Leaf, way: expert_op.Rearrangement, dense: str, sharding: Sharding) -> Any:
    """What `weight_transforms` make of a leaf."""
    array = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if leaf.num_inputs and dense == "int8":
        found = jax.eval_shape(functools.partial(layers.quantize, num_inputs=leaf.num_inputs), array)
        axes = leaf.axes, leaf.axes[: -leaf.num_inputs]
        return layers.Dense8._make(_placed(sharding, x, of) for x, of in zip(found, axes, strict=True))
    placed = sharding.named if way is expert_op.AS_PUBLISHED else sharding.row_major
    packed = jax.eval_shape(way.pack, array)
    return jax.ShapeDtypeStruct(packed.shape, packed.dtype, sharding=placed(way.axes(leaf.axes)))


def _placed(sharding: Sharding, array: Any, axes: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(array), array.dtype, sharding=sharding.named(axes))


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype")


def slots_load(model: AbstractModel, shape: StepShape) -> tuple[Any, SlotOptions, SlotState]:
    """Cache, options and state of the slots, as a program takes them."""
    config, slots = model.config, shape.slots
    sizes = {
        "slots": slots,
        "pages": slots * kv_cache.num_pages(shape.context_tokens),
        "max_context_tokens": shape.context_tokens,
        "dtype": model.policy.cache,
    }
    cache = jax.eval_shape(functools.partial(kv_cache.empty, config, **sizes))
    constants = sampling.constants(SamplingParams(temperature=0.0), (), config.vocab_size, config.num_token_ids)
    options = SlotOptions._make([np.full(MAX_STOP_IDS, NO_TOKEN, np.int32), constants])
    state = SlotState._make([np.int32(0), np.int32(0), np.zeros(config.vocab_size, np.int32)])
    every = jax.tree.map(lambda x: jax.ShapeDtypeStruct((slots, *np.shape(x)), x.dtype), (options, state))
    axes = kv_cache.axes(config), OPTIONS_AXES, STATE_AXES
    place = functools.partial(_placed, model.sharding)
    return jax.tree.map(place, (cache, *every), axes, is_leaf=_is_array)


def lower(model: AbstractModel, shape: StepShape, platform: str = "cpu") -> Any:
    """The program of an engine, sampling included, lowered; `.compile()` compiles it.

    Args:
        model: of shapes alone, on the devices to lower for.
        shape: sizes of the program.
        platform: to lower for: cpu, cuda or tpu.

    Raises:
        MeshError: the mesh does not cut the model and the slots evenly.
    """
    sharding = model.sharding
    sharding.check(model.config, shape.slots)
    load = slots_load(model, shape)
    forms = programs.choose(model.model, model.config, sharding, deterministic=False)

    def ints(sizes: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        return _placed(sharding, jax.ShapeDtypeStruct(sizes, jnp.int32), axes)

    if shape.width == 1:
        program, more = functools.partial(programs.decode, forms.decode), (jax.ShapeDtypeStruct((), jnp.int32),)
    else:
        counts = ints((shape.slots,), "batch")
        chunks = Chunks._make([ints((shape.slots, shape.width), "batch", None), counts, counts])
        program, more = forms.prefill.prefill, (chunks, ints((sharding.size("batch"),), "batch"))
    held = jax.tree.map(lambda x: x.sharding, load)
    results: Mapping[str, Any] = {"out_shardings": (sharding.readable, held[0], held[2])}
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):  # so that kernels see which device it is
        traced = jax.jit(program, donate_argnums=(1, 3), **results).trace(model.params, *load, *more)
        return traced.lower(lowering_platforms=(platform,))
