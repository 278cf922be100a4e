"""Experts with dense weights, which can be trained: right, with right gradients, and rounded as they are exported."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import cpu_kernels
from gptoss_jax.checkpoints import packing
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels import mxfp4
from pallas_kernels.choice import Hardware
from tests import reference
from tests.structures import expert_weights
from tests.unit.test_gradients import assert_close
from tests.unit.test_kernels import all_of, assignments_of

LIMIT = 7.0
ROUTINGS = ("random", "all to one expert", "with skipped assignments", "everything skipped")
SHAPES = {  # tokens, hidden, expert hidden, experts, top_k: no two sizes alike
    "one token": (1, 96, 160, 7, 4),
    "sizes that nothing divides": (33, 29, 37, 5, 3),
    "more tokens than a tile": (150, 64, 96, 3, 2),
}
MISSING = cpu_kernels.why_not()
UNBUILT = {"cpu-dense": pytest.mark.skip(reason=str(MISSING))} if MISSING else {}
NAMES = [pytest.param(name, marks=UNBUILT.get(name, ())) for name in expert_op.DENSE_IMPLEMENTATIONS]
WITH_ADAPTERS = ["reference", "all-experts"]


def dense_call(shape: str, routing: str = "random", bias: type = np.float32):
    """x, expert ids, routing weights and dense weights, as NumPy arrays."""
    tokens, hidden, inner, experts, top_k = SHAPES[shape]
    rng = np.random.default_rng(3)

    def normal(*sizes: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(sizes)).astype(np.float32)

    gate_up, down = normal(experts, 2 * inner, hidden, scale=0.3), normal(experts, hidden, inner, scale=0.1)
    biases = normal(experts, 2 * inner).astype(bias), normal(experts, hidden).astype(bias)
    weights = expert_weights(gate_up, None, biases[0], down, None, biases[1])
    ids = assignments_of(rng, routing, tokens, experts, top_k)
    return normal(tokens, hidden), ids, rng.random((tokens, top_k)).astype(np.float32), weights


def on_device(call):
    """The call as JAX's arrays."""
    return jax.tree.map(jnp.asarray, call)


def in_float64(x, ids, routing_weights, weights, limit: float = LIMIT) -> np.ndarray:
    """What the call means, assignment by assignment."""
    out = np.zeros(x.shape)
    w = jax.tree.map(lambda array: np.asarray(array, np.float64), weights)
    for token, slot in np.ndindex(ids.shape):
        expert = ids[token, slot]
        if 0 <= expert < len(w.down_bias):
            h = w.gate_up_blocks[expert] @ x[token].astype(float) + w.gate_up_bias[expert]
            y = w.down_blocks[expert] @ reference.swiglu(h[None], limit)[0] + w.down_bias[expert]
            out[token] += routing_weights[token, slot] * y
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_dense_experts(name, shape, routing):
    """Guards drops and duplicates: every assignment counts once whatever the imbalance, skipped ones not at all."""
    call = dense_call(shape, routing)
    run = jax.jit(functools.partial(expert_op.DENSE_IMPLEMENTATIONS[name].run, limit=LIMIT))
    found, expected = np.asarray(run(*on_device(call))), in_float64(*call)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def _value_and_gradients(name: str, call, towards: np.ndarray) -> list:
    """The output, then the gradients of a weighted sum of it: to x, routing weights and the weights."""
    gradients, y = _gradients_of(name)(*on_device(call), jnp.asarray(towards, jnp.float32))
    return [y, *jax.tree.leaves(gradients)]


@functools.cache
def _gradients_of(name: str):
    """Compiled once for all calls of a shape."""
    run = expert_op.DENSE_IMPLEMENTATIONS[name].run

    def loss(x, ids, routing_weights, weights, towards):
        y = run(x, ids, routing_weights, weights, limit=LIMIT)
        return jnp.sum(y * towards), y

    return jax.jit(jax.grad(loss, argnums=(0, 2, 3), has_aux=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(name):
    """Guards training: the derivative along random directions, in float64, of x, routing weights and every weight."""
    call = x, ids, routing_weights, weights = dense_call("sizes that nothing divides", "with skipped assignments")
    rng = np.random.default_rng(4)
    towards = rng.standard_normal(x.shape)
    _, *found = _value_and_gradients(name, call, towards)
    points, tree = jax.tree.flatten((x, routing_weights, weights))
    for i, gradient in enumerate(found):
        direction = rng.standard_normal(points[i].shape)

        def loss(step, i=i, direction=direction):
            moved = [p + step * direction if j == i else p.astype(float) for j, p in enumerate(points)]
            x, routing_weights, weights = jax.tree.unflatten(tree, moved)
            return (in_float64(x, ids, routing_weights, weights) * towards).sum()

        step = 1e-6
        expected = (loss(step) - loss(-step)) / (2 * step)
        scale = np.linalg.norm(np.asarray(gradient, float)) * np.linalg.norm(direction)
        assert scale > 0
        assert abs((np.asarray(gradient, float) * direction).sum() - expected) < 1e-5 * scale, i


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("routing", ROUTINGS[:3])
def test_gradients_are_the_references(name, shape, routing):
    """Guards every element of every gradient: experts without tokens have zeros, whatever the routing."""
    call = dense_call(shape, routing)
    towards = np.random.default_rng(5).standard_normal(call[0].shape).astype(np.float32)
    found, expected = (_value_and_gradients(each, call, towards) for each in (name, "reference"))
    assert len(found) == 7
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_biases(name):
    """Guards checkpoints whose biases are bfloat16: the same result, and gradients in that dtype."""
    call = x, *_ = dense_call("sizes that nothing divides", bias=ml_dtypes.bfloat16)
    y, *gradients = _value_and_gradients(name, call, np.ones_like(x))
    np.testing.assert_allclose(y, in_float64(*call), rtol=1e-4, atol=1e-4)
    assert {str(gradient.dtype) for gradient in gradients} == {"float32", "bfloat16"}


@pytest.mark.parametrize("name", NAMES)
def test_padding_may_hold_anything(name):
    """Guards training on padded rows: a NaN in a token that has no expert reaches no result and no gradient."""
    x, ids, routing_weights, weights = dense_call("sizes that nothing divides")
    ids[[3, 7]] = -1
    call = x.copy(), ids, routing_weights.copy(), weights
    _, *expected = _value_and_gradients(name, call, np.ones_like(x))
    call[0][3], call[2][7] = np.nan, np.nan
    _, *found = _value_and_gradients(name, call, np.ones_like(x))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", WITH_ADAPTERS)
def test_bfloat16_activations(name):
    """Guards mixed precision: products of bfloat16 are added up in float32."""
    call = x, ids, routing_weights, weights = dense_call("more tokens than a tile")
    run = jax.jit(functools.partial(expert_op.DENSE_IMPLEMENTATIONS[name].run, limit=LIMIT))
    found = run(jnp.asarray(x, jnp.bfloat16), *on_device((ids, routing_weights, weights)))
    expected = in_float64(*call)
    assert found.dtype == jnp.float32
    assert np.abs(np.asarray(found) - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("name", WITH_ADAPTERS)
def test_adapters(name):
    """Guards LoRA beside dense experts: the result of W + b a, and gradients to both factors of both."""
    x, ids, routing_weights, weights = on_device(dense_call("sizes that nothing divides", "with skipped assignments"))
    rng = np.random.default_rng(6)

    def adapter(w) -> expert_op.Adapter:
        (experts, out, inputs), rank = w.shape, 4
        a, b = rng.standard_normal((experts, rank, inputs)), rng.standard_normal((experts, out, rank)) / 20
        return expert_op.Adapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))

    adapters = adapter(weights.gate_up_blocks), adapter(weights.down_blocks)
    towards = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    def beside(adapters):
        adapted = weights._replace(gate_up_adapter=adapters[0], down_adapter=adapters[1])
        found = expert_op.DENSE_IMPLEMENTATIONS[name].run(x, ids, routing_weights, adapted, limit=LIMIT)
        return jnp.sum(found * towards), found

    def merged(adapters):
        gate_up, down = (jnp.einsum("eor,eri->eoi", b, a, precision="highest") for a, b in adapters)
        w = weights._replace(gate_up_blocks=weights.gate_up_blocks + gate_up, down_blocks=weights.down_blocks + down)
        found = expert_op.DENSE_IMPLEMENTATIONS["reference"].run(x, ids, routing_weights, w, limit=LIMIT)
        return jnp.sum(found * towards), found

    (found, y), (expected, z) = (jax.jit(jax.grad(f, has_aux=True))(adapters) for f in (beside, merged))
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4 * np.abs(z).max())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close([a], [b])


# ---- what refuses what ----


@pytest.mark.parametrize("name", all_of([name for name in expert_op.IMPLEMENTATIONS if name != "reference"]))
def test_kernels_of_packed_weights_refuse_dense_ones(name):
    """Guards kernels that would read floats as codes."""
    *_, weights = call = on_device(dense_call("one token"))
    implementation = expert_op.IMPLEMENTATIONS[name]
    with pytest.raises(NotImplementedError, match="takes packed MXFP4, got dense weights; the reference takes both"):
        implementation.run(*call, limit=LIMIT)
    if implementation.layout != expert_op.WeightLayout():
        with pytest.raises(NotImplementedError, match="takes packed MXFP4, got dense weights"):
            expert_op.packed(implementation.layout, weights)


@pytest.mark.parametrize("name", NAMES[1:])
def test_dense_implementations_refuse_packed_weights(name):
    """Guards against codes that are read as numbers."""
    x, ids, routing_weights, weights = on_device(dense_call("one token"))
    blocks, scales = mxfp4.quantize(weights.gate_up_blocks)
    packed = weights._replace(gate_up_blocks=blocks, gate_up_scales=scales, down_scales=scales)
    with pytest.raises(NotImplementedError, match="takes dense weights, got packed MXFP4; the reference takes both"):
        expert_op.DENSE_IMPLEMENTATIONS[name].run(x, ids, routing_weights, packed, limit=LIMIT)


def test_choice_for_training():
    """Guards a choice that cannot train what it is given: adapters and many dense experts need the reference."""
    gpu = Hardware("gpu", "NVIDIA A100", "8.0")
    choose = expert_op.choose_for_training
    assert choose(gpu, dense=True, num_experts=8, adapters=False).name == "all-experts"
    assert choose(gpu, dense=True, num_experts=8, adapters=True).name == "all-experts"
    assert choose(gpu, dense=True, num_experts=32, adapters=False).name == "reference"
    assert choose(gpu, dense=False, num_experts=32, adapters=True).name == "reference"
    assert choose(gpu, dense=False, num_experts=32, adapters=False).name == "reference"  # no Hopper here
    cpu, best = Hardware("cpu"), "all-experts" if MISSING else "cpu-dense"
    assert choose(cpu, dense=True, num_experts=8, adapters=False).name == best
    assert choose(cpu, dense=True, num_experts=8, adapters=True).name == "all-experts"
    assert choose(cpu, dense=True, num_experts=8, adapters=False, dtype=jnp.bfloat16).name == "all-experts"


# ---- rounding ----

ROUNDED = jax.jit(mxfp4.rounded)


def _bits(values) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.uint32)


def _unpacked(weights: np.ndarray) -> np.ndarray:
    """bfloat16 [O, I] packed as a checkpoint's experts are, and unpacked."""
    found = packing.pack(np.ascontiguousarray(weights.T))
    return np.asarray(mxfp4.dequantize(jnp.asarray(found.blocks), jnp.asarray(found.scales), jnp.float32))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-37, 1e-39, 1e30])
def test_rounding_is_what_packing_does(scale):
    """Guards quantisation-aware training: what is trained is what is exported, bit for bit, signed zeros too."""
    rng = np.random.default_rng(7)
    weights = (scale * rng.standard_normal((40, 96)) * 10.0 ** rng.integers(-4, 3, (40, 96))).astype(ml_dtypes.bfloat16)
    weights[3], weights[4, 32:64], weights[5, ::3] = 0, -0.0, 0
    found = ROUNDED(jnp.asarray(weights, jnp.float32))
    np.testing.assert_array_equal(_bits(found), _bits(_unpacked(weights)))
    np.testing.assert_array_equal(np.asarray(ROUNDED(jnp.asarray(weights)), np.float32), np.asarray(found))


def test_ties_round_to_even():
    """Guards round-to-nearest-even by the OCP MX specification, on each tie of E2M1 and of either sign."""
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 4.0] + [0.0] * 23, np.float32)
    even = np.array([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 4.0] + [0.0] * 23, np.float32)
    np.testing.assert_array_equal(ROUNDED(jnp.asarray([ties, -8 * ties])), [even, -8 * even])


def test_rounded_float32_weights_pack_exactly():
    """Guards the export of float32 weights: once rounded they are bfloat16s on the grid, and rounding ends there."""
    weights = jnp.asarray(np.random.default_rng(8).standard_normal((2, 24, 64)), jnp.float32)
    rounded = ROUNDED(weights)
    np.testing.assert_array_equal(_bits(ROUNDED(rounded)), _bits(rounded))
    np.testing.assert_array_equal(_bits(mxfp4.dequantize(*mxfp4.quantize(weights), jnp.float32)), _bits(rounded))
    for expert in np.asarray(rounded):
        assert packing.pack(np.ascontiguousarray(expert.T).astype(ml_dtypes.bfloat16)).exact
        np.testing.assert_array_equal(_unpacked(expert.astype(ml_dtypes.bfloat16)), expert)


def test_rounding_straight_through():
    """Guards the gradient that passes the rounding unchanged, and NaN, which must stop a run, not become a number."""

    def straight_through(w):
        return w + jax.lax.stop_gradient(ROUNDED(w) - w)

    w = jnp.asarray(np.random.default_rng(9).standard_normal((3, 32)), jnp.float32)
    np.testing.assert_array_equal(
        jax.grad(lambda w: jnp.sum(straight_through(w) * w[0]))(w)[1:], jnp.tile(w[0], (2, 1))
    )
    assert np.isnan(ROUNDED(w.at[1, 4].set(jnp.nan))[1, 4])
