"""Every implementation of every op against NumPy in float64, on shapes and routings made to break it."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cpu_kernels
from gptoss_jax.model.config import read_config
from gptoss_jax.runtime.program_memory import program_memory
from pallas_kernels import attention as attention_op
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels import linear as linear_op
from pallas_kernels import mxfp4
from pallas_kernels.choice import KERNELS_OF, Hardware, why_not
from pallas_kernels.expert_mlp import tiles as tiles_of
from tests import reference
from tests.structures import attended, expert_weights, paged_kv, ring_kv

CONFIGS = Path(__file__).parents[2] / "configs"


def all_of(implementations) -> list:
    """The names in an op's table; kernels for other devices are skipped, and C++ where it was not built."""
    here = Hardware.of(jax.devices()[0])
    missing = {name: why_not(name, here) for name in KERNELS_OF}
    marks = {name: pytest.mark.skip(reason=reason) for name, reason in missing.items() if reason}
    return [pytest.param(name, marks=marks.get(name, ())) for name in implementations]


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


def test_weights_may_be_constants_of_a_program():
    """Guards jitted functions that close over weights: XLA misreads such constants when it folds them."""
    blocks, scales = map(jnp.asarray, _every_byte_under_every_scale())
    found = jax.jit(lambda: mxfp4.dequantize(blocks, scales, jnp.float32))()
    np.testing.assert_array_equal(found, mxfp4.dequantize(blocks, scales, jnp.float32))


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

SHAPES = {  # tokens, hidden, expert hidden, experts, top_k: no two sizes alike
    "one token": (1, 96, 160, 7, 4),
    "fewer tokens than experts": (3, 64, 96, 8, 2),
    "many tokens": (150, 96, 64, 5, 3),
}
ROUTINGS = ("random", "all to one expert", "with skipped assignments", "everything skipped")


def random_experts(rng: np.random.Generator, hidden: int, inner: int, experts: int) -> expert_op.ExpertWeights:
    """One layer's experts, any codes under scales near 1, as published."""

    def packed(out, inputs):
        blocks = rng.integers(0, 256, (experts, out, inputs // 32, 16), dtype=np.uint8)
        return blocks, rng.integers(121, 125, (experts, out, inputs // 32), dtype=np.uint8)

    def bias(out):
        return rng.standard_normal((experts, out)).astype(ml_dtypes.bfloat16)

    return expert_weights(*packed(2 * inner, hidden), bias(2 * inner), *packed(hidden, inner), bias(hidden))


def assignments_of(rng: np.random.Generator, routing: str, tokens: int, experts: int, top_k: int) -> np.ndarray:
    """The experts that each token is assigned to, under one of ROUTINGS."""
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    if routing == "all to one expert":
        ids[:, 0] = 2
        ids[:, 1:] = -1
    if routing == "with skipped assignments":
        ids[rng.random(ids.shape) < 0.4] = -1
        ids[0, 0] = experts  # lives on the next device
    if routing == "everything skipped":
        ids[:] = -1
    return ids


def expected_of(x, ids, routing_weights, weights: expert_op.ExpertWeights, limit: float) -> np.ndarray:
    """In float64, assignment by assignment, with the parts of the float64 reference."""
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
    """Guards drops and duplicates: every assignment counts once whatever the imbalance, skipped ones not at all."""
    tokens, hidden, inner, experts, top_k = SHAPES[shape]
    rng = np.random.default_rng(0)
    weights = random_experts(rng, hidden, inner, experts)
    ids = assignments_of(rng, routing, tokens, experts, top_k)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    routing_weights = rng.random((tokens, top_k)).astype(np.float32)
    implementation = expert_op.IMPLEMENTATIONS[name]
    run = jax.jit(implementation.run, static_argnames="limit")
    packed = expert_op.packed(implementation.layout, jax.tree.map(jnp.asarray, weights))
    found = np.asarray(run(x, ids, routing_weights, packed, limit=7.0))
    expected = expected_of(x, ids, routing_weights, weights, 7.0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


_tiled = jax.jit(tiles_of.TiledRows.of, static_argnums=(1, 2))
_gather, _combine = jax.jit(tiles_of.TiledRows.gather), jax.jit(tiles_of.TiledRows.combine)
TILED = [(1, 1, 1, 1), (1, 4, 6, 8), (5, 3, 2, 2), (7, 2, 3, 2), (12, 4, 6, 1), (12, 4, 6, 8)]


@pytest.mark.parametrize(("tokens", "top_k", "experts", "rows"), TILED)
@settings(max_examples=20)
@given(st.data())
def test_every_assignment_has_a_row_of_its_own(tokens, top_k, experts, rows, data):
    """Guards the tiles of kernels: each assignment in one row of its expert, none lost, the bound on tiles."""
    ids = np.array(data.draw(st.lists(st.integers(-1, experts), min_size=tokens * top_k, max_size=tokens * top_k)))
    ids = ids.astype(np.int32).reshape(tokens, top_k)
    on_device = _tiled(jnp.asarray(ids), experts, rows)
    tiled = jax.tree.map(np.asarray, on_device)
    taken = (ids >= 0) & (ids < experts)
    assert len(tiled.expert) == tiles_of.max_tiles(ids.size, experts, rows) >= tiled.used
    assert sorted(tiled.assignment[tiled.assignment >= 0]) == list(np.flatnonzero(taken))
    for at in np.argwhere(taken):
        row = tiled.row[tuple(at)]
        assert row // rows < tiled.used
        assert tiled.assignment[row] == at[0] * top_k + at[1]
        assert tiled.expert[row // rows] == ids[tuple(at)]
    assert (tiled.row[~taken] == len(tiled.assignment)).all()
    x = np.arange(1.0, 2 * tokens + 1, dtype=np.float32).reshape(tokens, 2)
    gathered = np.asarray(_gather(on_device, jnp.asarray(x)))
    spoilt = np.where(tiled.assignment[:, None] < 0, np.float32(np.nan), gathered)  # empty rows may hold anything
    routing_weights = np.arange(1.0, ids.size + 1, dtype=np.float32).reshape(ids.shape)
    combined = _combine(on_device, jnp.asarray(spoilt), jnp.asarray(routing_weights))
    np.testing.assert_allclose(combined, x * (routing_weights * taken).sum(axis=1, keepdims=True))


_shared = jax.jit(tiles_of.TokenTiles.of, static_argnums=(1, 2))


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 4, 6), (3, 2, 4), (8, 4, 6)])
@settings(max_examples=20)
@given(st.data())
def test_few_tokens_share_tiles(tokens, top_k, experts, data):
    """Guards decoding: an expert has one tile however many tokens it has, and each assignment finds its token there."""
    ids = np.array(data.draw(st.lists(st.integers(-1, experts), min_size=tokens * top_k, max_size=tokens * top_k)))
    ids = ids.astype(np.int32).reshape(tokens, top_k)
    on_device = _shared(jnp.asarray(ids), experts, 8)
    shared = jax.tree.map(np.asarray, on_device)
    taken = (ids >= 0) & (ids < experts)
    in_use = shared.expert[(shared.expert >= 0) & (shared.expert < experts)]
    assert len(set(in_use)) == len(in_use) or tokens == 1
    assert set(in_use) == set(ids[taken])
    for token, x in np.argwhere(taken):
        tile, row = divmod(int(shared.row[token, x]), 8)
        assert (shared.expert[tile], row) == (ids[token, x], token)
    assert (shared.row[~taken] == ids.size * 8).all()
    x = np.arange(1.0, 2 * tokens + 1, dtype=np.float32).reshape(tokens, 2)
    rows = np.tile(np.asarray(on_device.gather(jnp.asarray(x))), (ids.size, 1))
    used = (np.repeat(shared.expert, 8) >= 0) & (np.repeat(shared.expert, 8) < experts)
    spoilt = np.where(used[:, None], rows, np.float32(np.nan))  # empty tiles hold anything
    routing_weights = np.arange(1.0, ids.size + 1, dtype=np.float32).reshape(ids.shape)
    combined = on_device.combine(jnp.asarray(spoilt), jnp.asarray(routing_weights))
    np.testing.assert_allclose(combined, x * (routing_weights * taken).sum(axis=1, keepdims=True))


def test_reference_visits_the_top_k_experts_only():
    """Guards decoding cost: one token makes X tiles whatever E is, and the dearest routing never more than its rows."""
    for name in ("gpt-oss-20b", "gpt-oss-120b"):
        model = read_config(CONFIGS / f"{name}.json")
        chosen = np.random.default_rng(0).permutation(model.num_experts)[: model.experts_per_token]
        ids = jnp.asarray(chosen[None], jnp.int32)
        tiles = tiles_of.Tiles.of(ids, model.num_experts, tiles_of.tile_rows(ids.size, model.num_experts))
        assert int(tiles.end_tile[-1]) == model.experts_per_token
    ids = jnp.full((512, 4), 3, jnp.int32)
    rows = tiles_of.tile_rows(ids.size, 32)
    assert int(tiles_of.Tiles.of(ids, 32, rows).end_tile[-1]) == ids.size // rows


def random_adapters(rng: np.random.Generator, weights: expert_op.ExpertWeights, rank: int = 5) -> tuple:
    """An adapter for gate_up and one for down, as large as the weights."""
    adapters = []
    for blocks in (weights.gate_up_blocks, weights.down_blocks):
        experts, out, num_blocks, _ = blocks.shape
        a, b = rng.standard_normal((experts, rank, 32 * num_blocks)), rng.standard_normal((experts, out, rank)) / rank
        adapters.append(expert_op.Adapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)))
    return tuple(adapters)


def adapted_call(tokens: int = 5):
    """Arguments of a call with random weights, not yet packed."""
    _, hidden, inner, experts, top_k = SHAPES["fewer tokens than experts"]
    rng = np.random.default_rng(0)
    weights = jax.tree.map(jnp.asarray, random_experts(rng, hidden, inner, experts))
    ids = assignments_of(rng, "with skipped assignments", tokens, experts, top_k)
    x, routing_weights = rng.standard_normal((tokens, hidden)), rng.random((tokens, top_k))
    call = jnp.asarray(x, jnp.float32), jnp.asarray(ids), jnp.asarray(routing_weights, jnp.float32)
    return call, weights, random_adapters(rng, weights)


def dense_experts(x, ids, routing_weights, weights, adapters, limit=7.0):
    """Every expert on every token, then those of its assignments; adapters folded into float32 weights."""
    matrices = []
    for name, adapter in zip(("gate_up", "down"), adapters, strict=True):
        w = mxfp4.dequantize(getattr(weights, f"{name}_blocks"), getattr(weights, f"{name}_scales"), jnp.float32)
        low = jnp.einsum("eor,eri->eoi", adapter.b, adapter.a, precision="highest") if adapter else 0
        matrices.append(w + low)
    h = jnp.einsum("td,efd->tef", x, matrices[0], precision="highest") + weights.gate_up_bias.astype(jnp.float32)
    gate, linear = jnp.minimum(h[..., 0::2], limit), jnp.clip(h[..., 1::2], -limit, limit)
    hidden = gate * jax.nn.sigmoid(1.702 * gate) * (linear + 1)
    y = jnp.einsum("tef,edf->ted", hidden, matrices[1], precision="highest") + weights.down_bias.astype(jnp.float32)
    assigned = jax.nn.one_hot(ids, y.shape[1], dtype=jnp.float32) * routing_weights[..., None]
    return jnp.einsum("txe,ted->td", assigned, y, precision="highest")


@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)])
def test_adapters_are_part_of_the_weights(which):
    """Guards fine-tuned experts: the reference gives what dense weights with b a added to them give, either or both."""
    call, weights, adapters = adapted_call()
    adapters = [adapter if wanted else None for adapter, wanted in zip(adapters, which, strict=True)]
    adapted = weights._replace(gate_up_adapter=adapters[0], down_adapter=adapters[1])
    found = jax.jit(functools.partial(expert_op.IMPLEMENTATIONS["reference"].run, limit=7.0))(*call, adapted)
    expected = dense_experts(*call, weights, adapters)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    plain = dense_experts(*call, weights, (None, None))
    assert np.abs(plain - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("name", all_of([name for name in expert_op.IMPLEMENTATIONS if name != "reference"]))
@pytest.mark.parametrize("which", ["gate_up_adapter", "down_adapter"])
def test_kernels_without_adapters_refuse_them(name, which):
    """Guards against a fine-tuned model that answers as the plain one: an adapter is never left out silently."""
    call, weights, (adapter, _) = adapted_call()
    implementation = expert_op.IMPLEMENTATIONS[name]
    packed = expert_op.packed(implementation.layout, weights._replace(**{which: adapter}))
    with pytest.raises(NotImplementedError, match="expert_mlp: this kernel has no adapters; the reference has"):
        implementation.run(*call, packed, limit=7.0)


# ---- dense products ----


@pytest.mark.parametrize("name", all_of(linear_op.IMPLEMENTATIONS))
@pytest.mark.parametrize("tokens", [1, 2, 3, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 96), (2050, 40), (1571, 33)])
def test_linear(name, tokens, outputs, inputs):
    """Guards blocks of weights that do not divide evenly, and that bfloat16 products are summed in float32."""
    rng = np.random.default_rng(tokens)
    x, w = rng.standard_normal((tokens, inputs)), rng.standard_normal((outputs, inputs))
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


def _attend(q, k, v, sinks, visible) -> attention_op.Attended:
    """In float64: q [T, N, H] over k, v [S, K, H] where `visible` [T, S]; a query that sees nothing is padding."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    logits = np.einsum("tnh,snh->tns", q, np.repeat(k, group, axis=1)) / np.sqrt(q.shape[-1])
    logits = np.where(visible[:, None], logits, -np.inf)
    sink = np.broadcast_to(sinks.astype(np.float64)[None, :, None], (*logits.shape[:2], 1))
    weights = np.exp(np.concatenate([logits, sink], axis=-1))
    total = weights.sum(-1)
    total[total == 0] = 1  # padding without a sink
    out = np.einsum("tns,snh->tnh", weights[..., :-1] / total[..., None], np.repeat(v, group, axis=1))
    return attended(out, np.where(visible.any(-1)[:, None], np.log(total), -np.inf))


def _assert_close(found: attention_op.Attended, expected: attention_op.Attended, tolerance: float = 1e-4):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance / 10)


class Pages(NamedTuple):
    """A paged call of sequences of 0, 3, 70 and 700 earlier tokens on shuffled pages, and what comes out."""

    q: np.ndarray
    kv: attention_op.PagedKV
    positions: np.ndarray
    sinks: np.ndarray
    expected: attention_op.Attended


def paged_call(tokens: int, page: int = 8) -> Pages:
    """One with ragged numbers of new tokens; some sinks take nothing."""
    rng = np.random.default_rng(tokens)
    pages_per_sequence, heads, kv_heads, size = 800 // page, 6, 2, 16
    lengths = np.array([0, 3, 70, 700])
    sequences = len(lengths)
    k, v = rng.standard_normal((2, sequences * pages_per_sequence, page, kv_heads, size)).astype(np.float32)
    table = rng.permutation(sequences * pages_per_sequence).reshape(sequences, -1).astype(np.int32)
    q = rng.standard_normal((sequences, tokens, heads, size)).astype(np.float32) * 2
    sinks = rng.standard_normal(heads).astype(np.float32) * 2
    sinks[4] = -np.inf
    counts = np.array([tokens, max(1, tokens - 2), tokens, tokens // 2])
    ordinal = np.arange(tokens)
    positions = np.where(ordinal < counts[:, None], lengths[:, None] + ordinal, -1).astype(np.int32)
    expected = []
    for i in range(sequences):
        keys, values = (a[table[i]].reshape(-1, kv_heads, size) for a in (k, v))
        expected.append(_attend(q[i], keys, values, sinks, np.arange(len(keys)) <= positions[i][:, None]))
    kv = paged_kv(k, v, table)
    return Pages(q, kv, positions, sinks, attended(*map(np.stack, zip(*expected, strict=True))))


@pytest.mark.parametrize("name", all_of(attention_op.IMPLEMENTATIONS))
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_paged_attention(name, tokens):
    """Guards page tables, ragged sequences, sinks, and the lse, which is -inf for padding."""
    *arguments, expected = paged_call(tokens)
    found = jax.jit(attention_op.IMPLEMENTATIONS[name])(*arguments)
    assert isinstance(found, attention_op.Attended) and found.lse.dtype == jnp.float32
    _assert_close(found, expected)


@pytest.mark.parametrize("name", all_of(attention_op.IMPLEMENTATIONS))
@pytest.mark.parametrize("tokens", [1, 5, 12, 40])
def test_sliding_window_attention(name, tokens):
    """Guards the ring: slots not yet written, wrap-around, and chunks shorter and longer than the window of 12."""
    rng = np.random.default_rng(tokens)
    window, heads, kv_heads, size = 12, 6, 2, 16
    start = np.array([0, 5, 12, 31], np.int32)
    sequences = len(start)
    k, v = rng.standard_normal((2, sequences, 80, kv_heads, size)).astype(np.float32)  # by position
    rings = np.full((2, sequences, window, kv_heads, size), 1e3, np.float32)  # what was never written must not be seen
    for i, first in enumerate(start):
        for position in range(max(0, first - window), first):
            rings[:, i, position % window] = k[i, position], v[i, position]
    q = rng.standard_normal((sequences, tokens, heads, size)).astype(np.float32) * 2
    sinks = rng.standard_normal(heads).astype(np.float32) * 2
    sinks[4] = -np.inf
    counts = np.array([tokens, tokens - 1, tokens, max(1, tokens - 3)])
    ordinal = np.arange(tokens)
    positions = np.where(ordinal < counts[:, None], start[:, None] + ordinal, -1).astype(np.int32)
    new = start[:, None] + ordinal
    k_new, v_new = (np.take_along_axis(a, new[:, :, None, None], axis=1) for a in (k, v))
    kv = ring_kv(*rings, k_new, v_new, start)
    found = jax.jit(attention_op.IMPLEMENTATIONS[name])(q, kv, positions, sinks)
    for i in range(sequences):
        distance = positions[i][:, None] - np.arange(80)
        visible = (distance >= 0) & (distance < window) & (positions[i] >= 0)[:, None]
        expected = _attend(q[i], k[i], v[i], sinks, visible)
        _assert_close(attention_op.Attended(found.out[i], found.lse[i]), expected)


@pytest.mark.parametrize("name", all_of(attention_op.IMPLEMENTATIONS))
def test_attentions_to_disjoint_keys_merge(name):
    """Guards split decoding and a sequence axis: parts merged by their lse are the whole, the sink entering once."""
    q, kv, positions, sinks, expected = paged_call(5)
    run, keys = jax.jit(attention_op.IMPLEMENTATIONS[name]), 320  # of the first part: 40 pages of 8
    tables = np.split(kv.page_table, [keys // 8], axis=1)
    parts = (
        run(q, kv._replace(page_table=tables[0]), np.minimum(positions, keys - 1), sinks),
        run(q, kv._replace(page_table=tables[1]), np.maximum(positions - keys, -1), np.full_like(sinks, -np.inf)),
    )
    assert np.isneginf(parts[1].lse[:3]).all() and np.isfinite(parts[1].lse[3, :2]).all()
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=1), *parts)
    _assert_close(attention_op.merge(stacked, axis=1), expected)


MIXED = [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)]  # queries, keys and values


@pytest.mark.parametrize("name", all_of(["reference", "cpu"]))
@pytest.mark.parametrize(("of_queries", "of_keys"), MIXED)
def test_queries_and_keys_of_different_dtypes(name, of_queries, of_keys):
    """Guards caches narrower or wider than activations: operands meet in float32, where bfloat16 is exact."""
    run = jax.jit(attention_op.IMPLEMENTATIONS[name])
    q, kv, positions, sinks, _ = paged_call(5)
    ring = ring_kv(kv.k[:4], kv.v[:4], kv.k[4:8, :5], kv.v[4:8, :5], np.zeros(4, np.int32))
    for keys, where in ((kv, positions), (ring, np.tile(np.arange(5, dtype=np.int32), (4, 1)))):
        narrow = jax.tree.map(lambda x: x.astype(of_keys) if x.dtype == np.float32 else x, keys)
        wide = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == of_keys else x, narrow)
        found = run(jnp.asarray(q, of_queries), jax.tree.map(jnp.asarray, narrow), where, sinks)
        expected = run(jnp.asarray(q, of_queries).astype(jnp.float32), jax.tree.map(jnp.asarray, wide), where, sinks)
        _assert_close(found, jax.tree.map(lambda x: np.asarray(x, np.float64), expected), tolerance=1e-5)


@pytest.mark.parametrize("name", ["gpu-interpreted", "tpu-interpreted"])
@pytest.mark.parametrize(("of_queries", "of_keys"), MIXED)
def test_kernels_that_multiply_one_dtype_say_so(name, of_queries, of_keys):
    """Guards against a silent cast: tensor cores and matrix units take operands of one dtype."""
    q, kv, positions, sinks, _ = paged_call(1)
    kv = attention_op.PagedKV(jnp.asarray(kv.k, of_keys), jnp.asarray(kv.v, of_keys), jnp.asarray(kv.page_table))
    with pytest.raises(TypeError, match=r"attention: .*(bfloat16.* float32|float32.* bfloat16)"):
        attention_op.IMPLEMENTATIONS[name](jnp.asarray(q, of_queries), kv, jnp.asarray(positions), jnp.asarray(sinks))


def test_unknown_implementations_are_refused():
    """Guards against a silent fallback: a kernel asked for by name runs or raises."""
    with pytest.raises(ValueError, match="expert_mlp kernel 'fast', expected auto or one of reference"):
        expert_op.choose("fast", Hardware("cpu"))
    with pytest.raises(ValueError, match="attention kernel 'fast', expected auto or one of reference, cpu"):
        attention_op.choose("fast", Hardware("cpu"))
    with pytest.raises(ValueError, match="linear kernel 'fast', expected auto or one of reference, streamed"):
        linear_op.choose("fast", Hardware("cpu"))


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
