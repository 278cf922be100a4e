"""Every implementation of every op against NumPy in float64, on shapes and routings made to break it."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cpu_kernels
from benchmarks.program_memory import program_memory
from pallas_kernels import attention as attention_op
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels import linear as linear_op
from pallas_kernels import mxfp4
from pallas_kernels.choice import KERNELS_OF, Hardware, why_not
from pallas_kernels.expert_mlp import tiles as tiles_of
from pallas_kernels.shapes import MODELS
from tests import reference
from tests.goldens import make as golden


def all_of(implementations, *, interpreted: bool = False) -> list:
    """The names in an op's table; kernels for other devices are skipped, and C++ where it was not built.

    Kernels that are `interpreted`, which takes long, run through these tests in tests/accelerators/test_shared.py.
    """
    here = Hardware.of(jax.devices()[0])
    missing = {name: why_not(name, here) for name in KERNELS_OF}
    marks = {name: pytest.mark.skip(reason=reason) for name, reason in missing.items() if reason}
    names = [name for name in implementations if name.endswith("-interpreted") == interpreted]
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


# ---- the number format ----


def _every_byte_under_every_scale() -> tuple[np.ndarray, np.ndarray]:
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 1, 16), (255, 1, 1))
    scales = np.repeat(np.arange(255, dtype=np.uint8), 16)[:, None]
    return blocks, scales


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_256_bytes_under_all_255_scales(dtype):
    """Guards nibble order, sign, the scale's bias and its ends: every value exact, save what float32 flushes."""
    blocks, scales = _every_byte_under_every_scale()
    found = np.asarray(jax.jit(lambda b, s: mxfp4.dequantize(b, s, dtype))(blocks, scales)).astype(np.float64)
    codes = np.array(mxfp4.CODES)
    expected = np.stack([codes[blocks & 15], codes[blocks >> 4]], axis=-1).reshape(len(scales), 32)
    with np.errstate(over="ignore"):
        expected = (expected * 2.0 ** (scales.astype(float) - 127)).astype(dtype).astype(np.float64)
    normal = (expected == 0) | (np.abs(expected) >= 2.0**-126)
    np.testing.assert_array_equal(found[normal], expected[normal])
    assert (np.abs(found[~normal]) <= 2.0**-126).all()
    assert (~normal).mean() < 0.002  # only codes under scale bytes 0 and 1
    assert (np.signbit(found) == np.signbit(expected)).all()


def test_weights_on_the_grid_come_back_exactly():
    """Guards exact packing of bfloat16 checkpoints: unpack, pack, unpack gives the same values, signed zeros too."""
    blocks, scales = _every_byte_under_every_scale()
    middle = slice(64, -64)  # away from the ends of the scales, where values under- and overflow
    weights = mxfp4.dequantize(jnp.asarray(blocks[middle]), jnp.asarray(scales[middle]), jnp.bfloat16)
    again = mxfp4.dequantize(*mxfp4.quantize(weights), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(again).view(np.uint16), np.asarray(weights).view(np.uint16))


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(-20, 20))
def test_quantisation_takes_the_nearest_code(seed, magnitude):
    """Guards rounding: no code of the block's scale lies nearer than the chosen one, unless it saturates."""
    weights = np.random.default_rng(seed).standard_normal((3, 64)).astype(np.float32) * np.float32(2.0**magnitude)
    blocks, scales = mxfp4.quantize(jnp.asarray(weights))
    chosen = np.asarray(mxfp4.dequantize(blocks, scales, jnp.float32)).reshape(3, 2, 32)
    grid = np.array(mxfp4.CODES) * 2.0 ** (np.asarray(scales).astype(float)[..., None, None] - 127)
    distances = np.abs(grid - weights.reshape(3, 2, 32, 1)).min(axis=-1)
    np.testing.assert_allclose(np.abs(chosen - weights.reshape(3, 2, 32)), distances, rtol=1e-6)


# ---- experts ----

SHAPES = {  # tokens, hidden, expert hidden, experts, choices: no two sizes alike
    "one token": (1, 96, 160, 7, 4),
    "fewer tokens than experts": (3, 64, 96, 8, 2),
    "many tokens": (150, 96, 64, 5, 3),
}
ROUTINGS = ("random", "all to one expert", "with skipped choices", "everything skipped")


def random_experts(rng: np.random.Generator, hidden: int, inner: int, experts: int) -> expert_op.ExpertWeights:
    """One layer's experts, any codes under scales near 1, as published."""

    def packed(out, inputs):
        blocks = rng.integers(0, 256, (experts, out, inputs // 32, 16), dtype=np.uint8)
        return blocks, rng.integers(121, 125, (experts, out, inputs // 32), dtype=np.uint8)

    bias = lambda out: rng.standard_normal((experts, out)).astype(ml_dtypes.bfloat16)  # noqa: E731
    arrays: list[Any] = [*packed(2 * inner, hidden), bias(2 * inner), *packed(hidden, inner), bias(hidden)]
    return expert_op.ExpertWeights(*arrays)


def choices_of(rng: np.random.Generator, routing: str, tokens: int, experts: int, choices: int) -> np.ndarray:
    """The experts that each token chose, under one of ROUTINGS."""
    ids = np.stack([rng.permutation(experts)[:choices] for _ in range(tokens)]).astype(np.int32)
    if routing == "all to one expert":
        ids[:, 0] = 2
        ids[:, 1:] = -1
    if routing == "with skipped choices":
        ids[rng.random(ids.shape) < 0.4] = -1
        ids[0, 0] = experts  # lives on the next device
    if routing == "everything skipped":
        ids[:] = -1
    return ids


def expected_of(x, ids, routing_weights, weights: expert_op.ExpertWeights, limit: float) -> np.ndarray:
    """In float64, choice by choice, with the parts of the float64 reference."""
    out = np.zeros(x.shape)
    for token, slot in np.ndindex(ids.shape):
        expert = ids[token, slot]
        if 0 <= expert < len(weights.gate_up_blocks):
            gate_up = reference.mxfp4(weights.gate_up_blocks[expert], weights.gate_up_scales[expert])
            down = reference.mxfp4(weights.down_blocks[expert], weights.down_scales[expert])
            h = gate_up @ x[token].astype(float) + weights.gate_up_bias[expert].astype(float)
            y = down @ reference.swiglu(h[None], limit)[0] + weights.down_bias[expert].astype(float)
            out[token] += routing_weights[token, slot] * y
    return out


@pytest.mark.parametrize("name", all_of(expert_op.IMPLEMENTATIONS))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_expert_mlp(name, shape, routing):
    """Guards drops and duplicates: every choice counts once whatever the imbalance, skipped ones not at all."""
    tokens, hidden, inner, experts, choices = SHAPES[shape]
    rng = np.random.default_rng(0)
    weights = random_experts(rng, hidden, inner, experts)
    ids = choices_of(rng, routing, tokens, experts, choices)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    shares = rng.random((tokens, choices)).astype(np.float32)
    implementation = expert_op.IMPLEMENTATIONS[name]
    run = jax.jit(implementation.run, static_argnames="limit")
    packed = expert_op.packed(implementation.layout, jax.tree.map(jnp.asarray, weights))
    found = np.asarray(run(x, ids, shares, packed, limit=7.0))
    expected = expected_of(x, ids, shares, weights, 7.0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@settings(max_examples=60)
@given(st.data())
def test_every_choice_has_a_row_of_its_own(data):
    """Guards the tiles that kernels walk over: each choice in one row of its expert, none lost, the bound on tiles."""
    tokens, choices = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    experts, rows = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([1, 2, 8]))
    ids = np.array(data.draw(st.lists(st.integers(-1, experts), min_size=tokens * choices, max_size=tokens * choices)))
    ids = ids.astype(np.int32).reshape(tokens, choices)
    tiled = jax.tree.map(np.asarray, tiles_of.TiledRows.of(jnp.asarray(ids), experts, rows))
    taken = (ids >= 0) & (ids < experts)
    assert len(tiled.expert) == tiles_of.max_tiles(ids.size, experts, rows) >= tiled.used
    assert sorted(tiled.choice[tiled.choice >= 0]) == list(np.flatnonzero(taken))
    for at in np.argwhere(taken):
        row = tiled.row[tuple(at)]
        assert row // rows < tiled.used
        assert tiled.choice[row] == at[0] * choices + at[1]
        assert tiled.expert[row // rows] == ids[tuple(at)]
    assert (tiled.row[~taken] == len(tiled.choice)).all()
    x = np.arange(1.0, 2 * tokens + 1, dtype=np.float32).reshape(tokens, 2)
    gathered = np.asarray(jax.tree.map(jnp.asarray, tiles_of.TiledRows(*tiled)).gather(jnp.asarray(x)))
    spoilt = jnp.where(jnp.asarray(tiled.choice)[:, None] < 0, jnp.nan, gathered)  # empty rows may hold anything
    shares = np.arange(1.0, ids.size + 1, dtype=np.float32).reshape(ids.shape)
    combined = tiles_of.TiledRows(*tiled).combine(spoilt, jnp.asarray(shares))
    np.testing.assert_allclose(combined, x * (shares * taken).sum(axis=1, keepdims=True))


def test_reference_visits_the_chosen_experts_only():
    """Guards decoding cost: one token makes X tiles whatever E is, and the dearest routing never more than its rows."""
    for model in MODELS.values():
        ids = jnp.asarray(
            np.random.default_rng(0).permutation(model.experts)[None, : model.experts_per_token], jnp.int32
        )
        rows = tiles_of.tile_rows(ids.size, model.experts)
        tiles = tiles_of.Tiles.of(ids, model.experts, rows)
        assert int(tiles.end_tile[-1]) == model.experts_per_token
    ids = jnp.full((512, 4), 3, jnp.int32)
    rows = tiles_of.tile_rows(ids.size, 32)
    assert int(tiles_of.Tiles.of(ids, 32, rows).end_tile[-1]) == ids.size // rows


# ---- dense products ----


@pytest.mark.parametrize("name", all_of(linear_op.IMPLEMENTATIONS))
@pytest.mark.parametrize("rows", [1, 2, 3, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 96), (2050, 40), (1571, 33)])
def test_linear(name, rows, outputs, inputs):
    """Guards blocks of weights that do not divide evenly, and that bfloat16 products are summed in float32."""
    rng = np.random.default_rng(rows)
    x, w = rng.standard_normal((rows, inputs)), rng.standard_normal((outputs, inputs))
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-5)):
        rounded_x, rounded_w = x.astype(dtype), w.astype(ml_dtypes.bfloat16)
        found = jax.jit(linear_op.IMPLEMENTATIONS[name])(jnp.asarray(rounded_x), jnp.asarray(rounded_w))
        expected = rounded_x.astype(np.float64) @ rounded_w.astype(np.float64).T
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(found), expected, rtol=tolerance, atol=tolerance * np.sqrt(inputs))
        whole = np.clip(np.round(40 * w), -127, 127).astype(np.int8)
        found = jax.jit(linear_op.IMPLEMENTATIONS[name])(jnp.asarray(rounded_x), jnp.asarray(whole))
        expected = rounded_x.astype(np.float64) @ whole.astype(np.float64).T
        np.testing.assert_allclose(np.asarray(found), expected, rtol=tolerance, atol=40 * tolerance * np.sqrt(inputs))


def test_streamed_weights_are_never_float32_in_memory():
    """Guards 7 GB of the 20b's memory: in a loop, XLA:CPU keeps a float32 copy of what a plain product multiplies."""

    def loop(linear, x, w):
        return jax.lax.fori_loop(0, 5, lambda _, y: y + linear(x + y[:, :1].astype(x.dtype), w), jnp.zeros((1, 4096)))

    x, w = jax.ShapeDtypeStruct((1, 2880), jnp.bfloat16), jax.ShapeDtypeStruct((4096, 2880), jnp.bfloat16)
    temporaries = {
        name: program_memory(jax.jit(functools.partial(loop, linear)).lower(x, w).compile()).temporary_bytes
        for name, linear in linear_op.IMPLEMENTATIONS.items()
        if name != "cpu" or not cpu_kernels.why_not()
    }
    assert temporaries["streamed"] < 1e6
    assert temporaries.get("cpu", 0) < 1e6
    assert temporaries["reference"] > 4096 * 2880 * 4  # the measurement does see such a copy


# ---- attention ----


def _attend(q, k, v, sinks, visible):
    """In float64: q [T, N, H] over k, v [S, K, H] where `visible` [T, S]."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    logits = np.einsum("tnh,snh->tns", q, np.repeat(k, group, axis=1)) / np.sqrt(q.shape[-1])
    logits = np.where(visible[:, None], logits, -np.inf)
    sink = np.broadcast_to(sinks.astype(np.float64)[None, :, None], (*logits.shape[:2], 1))
    weights = np.exp(np.concatenate([logits, sink], axis=-1))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("tns,snh->tnh", weights[..., :-1], np.repeat(v, group, axis=1))


@pytest.mark.parametrize("name", all_of(attention_op.IMPLEMENTATIONS))
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_paged_attention(name, tokens):
    """Guards page tables, ragged rows and sinks: rows of 0, 3, 70 and 700 earlier tokens on shuffled pages."""
    rng = np.random.default_rng(tokens)
    page, pages_per_row, heads, kv_heads, size = 8, 100, 6, 2, 16
    lengths = np.array([0, 3, 70, 700])
    rows = len(lengths)
    k, v = rng.standard_normal((2, rows * pages_per_row, page, kv_heads, size)).astype(np.float32)
    table = rng.permutation(rows * pages_per_row).reshape(rows, pages_per_row).astype(np.int32)
    q = rng.standard_normal((rows, tokens, heads, size)).astype(np.float32) * 2
    sinks = rng.standard_normal(heads).astype(np.float32) * 2
    counts = np.array([tokens, max(1, tokens - 2), tokens, max(1, tokens // 2)])
    ordinal = np.arange(tokens)
    positions = np.where(ordinal < counts[:, None], lengths[:, None] + ordinal, -1).astype(np.int32)
    found = np.asarray(jax.jit(attention_op.IMPLEMENTATIONS[name].paged)(q, k, v, table, positions, sinks))
    for row in range(rows):
        keys, values = (a[table[row]].reshape(-1, kv_heads, size) for a in (k, v))
        visible = np.arange(len(keys)) <= positions[row][:, None]
        expected = _attend(q[row], keys, values, sinks, visible)
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", all_of(attention_op.IMPLEMENTATIONS))
@pytest.mark.parametrize("tokens", [1, 5, 12, 40])
def test_banded_attention(name, tokens):
    """Guards the ring: slots not yet written, wrap-around, and chunks shorter and longer than the window of 12."""
    rng = np.random.default_rng(tokens)
    window, heads, kv_heads, size = 12, 6, 2, 16
    start = np.array([0, 5, 12, 31], np.int32)
    rows = len(start)
    k, v = rng.standard_normal((2, rows, 80, kv_heads, size)).astype(np.float32)  # by position
    rings = np.full((2, rows, window, kv_heads, size), 1e3, np.float32)  # what was never written must not be seen
    for row, first in enumerate(start):
        for position in range(max(0, first - window), first):
            rings[:, row, position % window] = k[row, position], v[row, position]
    q = rng.standard_normal((rows, tokens, heads, size)).astype(np.float32) * 2
    sinks = rng.standard_normal(heads).astype(np.float32) * 2
    counts = np.array([tokens, max(1, tokens - 3), tokens, tokens])
    ordinal = np.arange(tokens)
    positions = np.where(ordinal < counts[:, None], start[:, None] + ordinal, -1).astype(np.int32)
    new = start[:, None] + ordinal
    k_new, v_new = (np.take_along_axis(a, new[:, :, None, None], axis=1) for a in (k, v))
    run = jax.jit(attention_op.IMPLEMENTATIONS[name].banded)
    found = np.asarray(run(q, rings[0], rings[1], k_new, v_new, start, positions, sinks))
    for row in range(rows):
        distance = positions[row][:, None] - np.arange(80)
        visible = (distance >= 0) & (distance < window) & (positions[row] >= 0)[:, None]
        np.testing.assert_allclose(found[row], _attend(q[row], k[row], v[row], sinks, visible), rtol=1e-4, atol=1e-5)


def test_unknown_implementations_are_refused():
    """Guards against a silent fallback: a kernel asked for by name runs or raises."""
    with pytest.raises(ValueError, match="expert_mlp kernel 'fast', expected auto or one of reference"):
        expert_op.choose("fast", Hardware("cpu"))
    with pytest.raises(ValueError, match="attention kernel 'fast', expected auto or one of reference, cpu"):
        attention_op.choose("fast", Hardware("cpu"))
    with pytest.raises(ValueError, match="linear kernel 'fast', expected auto or one of reference, streamed"):
        linear_op.choose("fast", Hardware("cpu"))


def test_shapes_are_the_configs():
    """Guards the benchmark's shapes against drifting from the models'."""
    for name, shape in MODELS.items():
        raw = json.loads((golden.ROOT / "configs" / f"{name}.json").read_text())
        assert (shape.layers, shape.hidden) == (raw["num_hidden_layers"], raw["hidden_size"])
        assert (shape.heads, shape.kv_heads) == (raw["num_attention_heads"], raw["num_key_value_heads"])
        assert (shape.experts, shape.experts_per_token) == (raw["num_local_experts"], raw["num_experts_per_tok"])
        assert (shape.expert_hidden, shape.vocabulary) == (raw["intermediate_size"], raw["vocab_size"])
        assert (shape.head_size, shape.window) == (raw["head_dim"], raw["sliding_window"])


def test_each_device_gets_the_kernels_written_for_it():
    """Guards the choice at start: Hopper and TPUs by name and reason, older GPUs the portable path, and it is said."""
    hopper, ampere = Hardware("gpu", "NVIDIA H200", "9.0"), Hardware("gpu", "NVIDIA A100", "8.0")
    for op in (attention_op, expert_op):
        assert op.choose("auto", hopper)[::2] == ("gpu", "Mosaic GPU for NVIDIA H200")
        assert op.choose("auto", Hardware("tpu", "TPU v6 lite"))[::2] == ("tpu", "Mosaic TPU for TPU v6 lite")
        older = op.choose("auto", ampere)
        assert older.name == "reference"
        assert older.reason.endswith("it is for Hopper (compute capability 9.x), and NVIDIA A100 has 8.0")
        with pytest.raises(
            ValueError, match="kernel 'tpu' cannot run: it is Mosaic TPU for TPUs, and the devices are gpu"
        ):
            op.choose("tpu", hopper)


def test_exact_attention_is_not_rounded_by_a_gpu():
    """Guards dtype="float32": tensor cores would round it, so it takes the portable path, or is refused by name."""
    hopper = Hardware("gpu", "NVIDIA H200", "9.0")
    exact = attention_op.choose("auto", hopper, jnp.float32)
    assert exact[::2] == ("reference", "portable jnp; a GPU's tensor cores would round float32")
    with pytest.raises(ValueError, match="attention kernel 'gpu' cannot run: a GPU's tensor cores would round float32"):
        attention_op.choose("gpu", hopper, jnp.float32)
