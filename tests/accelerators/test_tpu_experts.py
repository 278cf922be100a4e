"""The expert kernel for TPUs, in the interpreter: what the body that all implementations share does not ask."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # races found have no public name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gptoss_jax.model import layers, sharding
from gptoss_jax.model.config import parse_config
from gptoss_jax.model.transformer import declare
from gptoss_jax.runtime import weight_transforms
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels import mxfp4
from pallas_kernels.choice import Hardware
from pallas_kernels.expert_mlp import tpu, tpu_forms
from pallas_kernels.mxfp4 import BLOCK
from tests.goldens.make import tiny_config
from tests.structures import expert_weights
from tests.unit.test_kernels import assignments_of, expected_of, random_experts

LIMIT = 7.0
FORMS = pytest.mark.parametrize("form", tpu_forms.FORMS.values(), ids=tpu_forms.FORMS)
AXES: Any = expert_weights(  # as in gptoss_jax/model/experts.py
    ("experts", "expert_hidden", None, None),
    ("experts", "expert_hidden", None),
    ("experts", "expert_hidden"),
    ("experts", None, "expert_hidden", None),
    ("experts", None, "expert_hidden"),
    ("experts", None),
)


def _bits(tree):
    return jax.tree.map(lambda a: np.asarray(a).view(np.uint8), tree)


def _shard(array, names, axis: str, shard: int):
    """What one of two devices holds of an array whose axes are called `names`, if they share `axis`."""
    return jnp.split(array, 2, axis=names.index(axis))[shard] if axis in names else array


def _cut(weights, axes, axis: str, shard: int) -> expert_op.ExpertWeights:
    """What one of two devices holds of a layer's experts."""
    shards = (_shard(array, names, axis, shard) for array, names in zip(weights[:6], axes[:6], strict=True))
    return expert_weights(*shards)


# ---- the forms ----


def _unpacked(form: tpu_forms.Form, blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weights [32 B, O] that a kernel makes of published blocks [O, B, 16], inputs in their natural order."""
    codes = form.layout.down_blocks.pack(jnp.asarray(blocks[None]))[0]
    scales_packed = form.layout.down_scales.pack(jnp.asarray(scales[None]))[0]
    outputs, num_blocks = scales.shape

    def kernel(codes, scales, out, scratch):
        for part, weights in enumerate(form.unpack(codes, scales, slice(0, outputs), scratch)):
            out[part] = weights

    rows = BLOCK // form.parts
    parts = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((form.parts, num_blocks * rows, outputs), jnp.bfloat16),
        scratch_shapes=[
            pltpu.VMEM((pl.cdiv(outputs, tpu_forms.LANES), tpu_forms.WORDS * num_blocks, tpu_forms.LANES), jnp.int32)
        ],
        interpret=pltpu.InterpretParams(),
    )(codes, scales_packed)
    return np.moveaxis(np.asarray(parts).reshape(form.parts, num_blocks, rows, outputs), 0, 1).reshape(-1, outputs)


@FORMS
def test_every_code_under_every_scale(form):
    """Guards each form's arithmetic: all bytes under all scale bytes, also where its range of scales ends."""
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (255, 1, 1))
    scales = np.repeat(np.arange(255, dtype=np.uint8)[:, None], 16, axis=1)
    found = _unpacked(form, blocks, scales).astype(np.float64)
    codes = np.array(mxfp4.CODES)
    published = np.stack([codes[blocks & 15], codes[blocks >> 4]], axis=-1).reshape(255, -1).T
    expected = published * 2.0 ** (np.clip(scales[:, 0], *tpu_forms.SCALES).astype(float) - mxfp4.SCALE_BIAS)
    normal = (expected == 0) | (np.abs(expected) >= 2.0**-126)
    assert (~normal).mean() < 0.002  # 0.5 under scale bytes 0 and 1 only
    np.testing.assert_array_equal(found[normal], expected[normal])
    assert (np.abs(found[~normal]) <= 2.0**-126).all()


@FORMS
def test_layouts_are_undone_to_the_published_bytes(form):
    """Guards every nibble and the order of every row: what a kernel reads is what was published, signed zeros too."""
    weights = jax.tree.map(jnp.asarray, random_experts(np.random.default_rng(0), 96, 160, 3))
    packed = expert_op.packed(form.layout, weights)
    assert jax.tree.map(jnp.shape, packed) != jax.tree.map(jnp.shape, weights)
    jax.tree.map(np.testing.assert_array_equal, _bits(expert_op.published(form.layout, packed)), _bits(weights))


@FORMS
@pytest.mark.parametrize("axis", ["experts", "expert_hidden"])
def test_a_shard_of_a_layout_is_the_layout_of_a_shard(form, axis):
    """Guards sharding: cut along the axes that the layout names, each device has what its own experts would give."""
    weights = jax.tree.map(jnp.asarray, random_experts(np.random.default_rng(0), 64, 192, 4))
    axes = expert_op.packed_axes(form.layout, AXES)
    packed = expert_op.packed(form.layout, weights)
    for shard in range(2):
        cut_weights = _cut(weights, AXES, axis, shard)  # 96 of 192: an odd number of blocks
        found = _cut(packed, axes, axis, shard)
        jax.tree.map(np.testing.assert_array_equal, _bits(found), _bits(expert_op.packed(form.layout, cut_weights)))


@pytest.mark.parametrize("mesh", [None, "expert=2,tensor=2"])
def test_devices_pack_their_own_experts(mesh):
    """Guards loading: packed expert by expert and shard by shard, weights are what packing them whole gives."""
    weights = jax.tree.map(jnp.asarray, random_experts(np.random.default_rng(0), 64, 192, 4))
    layout, laid_out = tpu_forms.FORMS["words, by integers"].layout, sharding.make(mesh)
    for array, axes, way in zip(weights[:6], AXES[:6], layout, strict=True):
        found = weight_transforms.rearrange_experts(way, axes, laid_out)(jax.device_put(array, laid_out.named(axes)))
        assert found.sharding.is_equivalent_to(laid_out.named(way.axes(axes)), found.ndim)
        np.testing.assert_array_equal(_bits(found), _bits(way.pack(array)))


def test_each_generation_gets_a_form_it_can_run():
    """Guards the choice: E2M1 arrays exist on TPU v7x only, and bfloat16 arithmetic since v6e."""
    names = {"TPU v5 lite": "integers", "TPU v5": "integers", "TPU v6 lite": "selection", "TPU7x": "float4"}
    for name, expected in names.items():
        chosen = expert_op.choose("auto", Hardware("tpu", name))
        assert chosen.name == "tpu"
        assert chosen.implementation.layout is tpu_forms.form_for(name).layout
        assert tpu_forms.form_for(name) is next(form for key, form in tpu_forms.FORMS.items() if expected in key)


@pytest.mark.parametrize("form", tpu_forms.FORMS)
def test_packed_codes_are_not_taken_for_dense_weights(form):
    """Guards TPU v7x, whose MXFP4 codes are an array of 4-bit floats: the model took it for trained weights."""
    weights = jax.tree.map(jnp.asarray, random_experts(np.random.default_rng(0), 96, 64, 2))
    packed = expert_op.packed(tpu_forms.FORMS[form].layout, weights)
    found = {name for name, array in packed._asdict().items() if array is not None and expert_op.is_trainable(array)}
    assert found == {"gate_up_bias", "down_bias"}


# ---- the kernel ----


def _run(form: tpu_forms.Form, *arguments) -> np.ndarray:
    interpret = pltpu.InterpretParams(detect_races=True)
    found = jax.jit(functools.partial(tpu.expert_mlp, limit=LIMIT, form=form, interpret=interpret))(*arguments)
    found.block_until_ready()
    module: Any = interpret_pallas_call  # JAX 0.11 asks by a function
    assert not (module.get_races() if hasattr(module, "get_races") else module.races).races_found
    return np.asarray(found)


@pytest.mark.parametrize("form", ["words, by integers", "float4"])  # the third is in the table
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forms(form, dtype, monkeypatch):
    """Guards each form through the whole kernel, several blocks of outputs a matrix, and activations in bfloat16."""
    monkeypatch.setattr(tpu, "MOST_OUTPUTS", 128)
    tokens, hidden, inner, experts, top_k = 5, 160, 544, 4, 3
    rng = np.random.default_rng(0)
    weights = random_experts(rng, hidden, inner, experts)
    ids = assignments_of(rng, "random", tokens, experts, top_k)
    routing_weights = rng.random((tokens, top_k)).astype(np.float32)
    x = rng.standard_normal((tokens, hidden)).astype(dtype)
    packed = expert_op.packed(tpu_forms.FORMS[form].layout, jax.tree.map(jnp.asarray, weights))
    found = _run(tpu_forms.FORMS[form], x, ids, routing_weights, packed)
    expected = expected_of(x, ids, routing_weights, weights, LIMIT)
    tolerance = 1e-4 if dtype == jnp.float32 else 1e-2  # between the products activations are of x's dtype
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_shards_of_experts_add_up():
    """Guards tensor parallelism: two devices, each with an odd number of blocks of every expert's width."""
    rng = np.random.default_rng(0)
    weights = random_experts(rng, 96, 192, 3)
    ids, routing_weights = assignments_of(rng, "random", 2, 3, 2), rng.random((2, 2)).astype(np.float32)
    x = rng.standard_normal((2, 96)).astype(np.float32)
    form, found = tpu_forms.FORMS["words, by selection"], 0
    packed = expert_op.packed(form.layout, jax.tree.map(jnp.asarray, weights))
    axes = expert_op.packed_axes(form.layout, AXES)
    for shard in range(2):
        part = _cut(packed, axes, "expert_hidden", shard)
        part = part._replace(down_bias=part.down_bias * (1 - shard))  # a sum that is split has its bias once
        found += _run(form, x, ids, routing_weights, part)
    expected = expected_of(x, ids, routing_weights, weights, LIMIT)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_scales_that_no_form_can_read_are_refused_at_load():
    """Guards weights above what the forms hold, which they would halve or quarter without a word."""
    laid_out, config = sharding.make(), parse_config(tiny_config())
    kernels, _ = layers.choose_kernels("expert_mlp=tpu-interpreted,attention=reference", Hardware("cpu"))
    declared = declare(config, laid_out, kernels)
    path = "layers/1/moe/down/scales"

    def load(byte: int) -> dict[str, jax.Array]:
        leaves = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in declared.leaves.items()}
        leaves[path] = leaves[path].at[2, 3, 1].set(byte)
        rearranged = weight_transforms.to_weight_layout(declared, kernels.expert_mlp.layout, laid_out)
        return dict(weight_transforms.apply([rearranged], leaves.items()))

    assert load(252)[path].max() == 252
    with pytest.raises(ValueError, match=f"{path} holds the byte 253, and the chosen kernel reads up to 252"):
        load(253)
