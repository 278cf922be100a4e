"""What the experts' kernel for Hopper GPUs could get wrong beyond the shared tests: bits, threads, shared memory."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import expert_mlp as op
from pallas_kernels import interpreter, mxfp4
from pallas_kernels.expert_mlp import gpu
from pallas_kernels.expert_mlp import reference as plain
from pallas_kernels.expert_mlp.tiles import TiledRows
from pallas_kernels.interpreter import ZERO_FILLING
from tests.unit.test_kernels import random_experts


def _with(**settings):
    return dataclasses.replace(ZERO_FILLING, **settings)


# ---- how the weights lie ----


def test_the_layout_is_undone_to_the_published_bytes():
    """Guards against weights that change at load: every byte under every scale comes back, whatever the shape."""
    weights = jax.tree.map(jnp.asarray, random_experts(np.random.default_rng(0), 96, 160, 3))
    blocks = weights.gate_up_blocks.at[0, :16, 0].set(jnp.arange(256, dtype=jnp.uint8).reshape(16, 16))
    weights = weights._replace(gate_up_blocks=blocks)
    packed = op.packed(gpu.LAYOUT, weights)
    assert packed.gate_up_blocks.dtype == jnp.uint32 and packed.gate_up_blocks.nbytes == blocks.nbytes
    after = op.published(gpu.LAYOUT, packed)
    assert jax.tree.map(lambda array: array.dtype, after) == jax.tree.map(lambda array: array.dtype, weights)
    jax.tree.map(np.testing.assert_array_equal, after, weights)


@pytest.mark.parametrize("axis", ["experts", "expert_hidden"])
def test_each_device_gets_what_it_would_pack_itself(axis):
    """Guards sharded loading: packing and cutting by the named axes are one, whichever comes first."""
    gate_up, down = ("experts", "expert_hidden", None, None), ("experts", None, "expert_hidden", None)
    axes = (gate_up, gate_up[:3], gate_up[:2], down, down[:3], down[:2])
    weights = jax.tree.map(jnp.asarray, random_experts(np.random.default_rng(0), 96, 64, 4))

    def halves(array, names):
        return jnp.split(array, 2, names.index(axis)) if axis in names else [array, array]

    ways = zip(gpu.LAYOUT, *(w[:6] for w in (weights, op.packed(gpu.LAYOUT, weights), axes)), strict=True)
    for way, array, packed, names in ways:
        for half, packed_half in zip(halves(array, names), halves(packed, way.axes(names)), strict=True):
            np.testing.assert_array_equal(way.pack(half), packed_half)


# ---- which thread holds what ----


def _held(layout, shape: tuple[int, ...]) -> np.ndarray:
    """The place in an array of `shape` of each [thread, register, element of it], by the layout's definition."""
    layout = layout.to_mgpu()
    rank = len(layout.tiling.tile_shape(shape))
    sizes = layout.tiled_tiling_shape
    registers = list(np.ndindex(layout.registers_shape(shape)))
    held = np.full((128, len(registers), layout.vector_length), -1)

    def places(dims, index):
        """Indices along `dims` of the thread `index`; replicated ones move nothing."""
        found, counts = {}, [d.times if hasattr(d, "times") else sizes[d] for d in dims]
        for dim, at in zip(dims, np.unravel_index(index, counts), strict=True):
            found.update({} if hasattr(dim, "times") else {dim: at})
        return found

    for thread in range(128):
        moved = places(layout.warp_dims, thread // 32) | places(layout.lane_dims, thread % 32)
        for (at, register), element in itertools.product(enumerate(registers), range(layout.vector_length)):
            tiled = list(register)
            for dim, index in (moved | {layout.vector_dim: element}).items():
                tiled[rank + dim] += index
            held[thread, at, element] = np.ravel_multi_index(layout.tiling.untile_indices(tuple(tiled)), shape)
    return held


@pytest.mark.parametrize("parts", [1, 2])
def test_threads_dequantise_in_place(parts):
    """Guards what the interpreter cannot see: a thread's words and scales are of the row and columns it gives wgmma."""
    columns, words = gpu.GROUP // parts, gpu.WORDS // parts
    given = _held(plgpu.Layout.WGMMA, (64, columns))
    taken = _held(gpu._WORDS_LAYOUTS[parts], (4, 16, gpu.BLOCKS * words))
    scales = _held(gpu._SCALES_LAYOUT, (gpu.BLOCKS, 4, 16))
    for thread, (at, (word, pair, half)) in itertools.product(range(128), enumerate(gpu._registers(parts))):
        row, of_row = divmod(int(taken[thread, half, word]), gpu.BLOCKS * words)
        block, word_of_block = divmod(of_row, words)
        # input (block, pair c, j) of a group is column 8 c + 2 block + j
        column = 8 * (4 * word_of_block + pair) + 2 * block
        assert list(given[thread, at]) == [row * columns + column, row * columns + column + 1]
        assert scales[thread, half, 0] == block * 64 + row


def test_threads_give_their_own_sums():
    """Guards what the interpreter cannot see: accumulators and biases go to the row and output that they are of."""
    rows = 16
    sums = _held(plgpu.Layout.WGMMA, (64, rows))
    bias, paired = (_held(layout, (4, 16)) for layout in (gpu._BIAS_LAYOUT, gpu._PAIRED_BIAS_LAYOUT))
    outputs, hidden = _held(gpu._BIASED_LAYOUT, (rows, 64)), _held(gpu._HIDDEN_LAYOUT, (rows, 32))
    for thread, eight, row, half in itertools.product(range(128), range(rows // 8), (0, 1), (0, 1)):
        output, activation = divmod(int(sums[thread, 2 * eight + half, row]), rows)
        assert bias[thread, half, 0] == output
        assert outputs[thread, (2 * eight + row) * 2 + half, 0] == activation * 64 + output
        warp, part, g = np.unravel_index(output, (4, 2, 8))
        assert part == half and paired[thread, half, 0] == 16 * warp + 2 * g + half
        # gate g of warp (block) q is input 8 phase + g of block q: column 8 (g // 2) + 2 q + g % 2 of the phase's 32
        assert hidden[thread, 2 * eight + row, 0] == activation * 32 + 8 * (g // 2) + 2 * warp + g % 2


# ---- the products ----


def test_every_code_under_every_scale():
    """Guards dequantising: rows of the unit matrix pick each weight, exactly, scale bytes 0 to 254."""
    inputs = gpu.GROUP
    scales = np.minimum(np.arange(256, dtype=np.uint8).reshape(1, 64, 4), 254)
    blocks = np.tile(np.arange(16, dtype=np.uint8) * 0x11 ^ 0x70, (1, 64, 4, 1))
    blocks[scales >= 253] &= 0xBB  # 4 x 2^126 and 2 x 2^127 are more than bfloat16 holds
    expected = np.asarray(mxfp4.dequantize(jnp.asarray(blocks), jnp.asarray(scales), jnp.float32))[0]
    packed = [way.pack(jnp.asarray(array)) for way, array in zip(gpu.LAYOUT[3:5], (blocks, scales), strict=True)]
    tiles = TiledRows.of(jnp.zeros((inputs, 1), jnp.int32), 1, 32)
    x = gpu._in_fragment_order(tiles.gather(jnp.eye(inputs, dtype=jnp.bfloat16)))[None]
    run = functools.partial(gpu._product, tiles.in_use(), 32, interpret=ZERO_FILLING)
    found = np.asarray(jax.jit(run)(x, *packed, jnp.zeros((1, 64), jnp.bfloat16)))[:, :64].T
    normal = (expected == 0) | (np.abs(expected) >= 2.0**-126)
    np.testing.assert_array_equal(found[normal], expected[normal])
    assert (np.abs(found[~normal]) <= 2.0**-126).all() and (~normal).mean() < 0.01


def _call(hidden: int, inner: int, tokens: int):
    """Arguments of a call with one expert, and what comes out."""
    rng = np.random.default_rng(0)
    weights = jax.tree.map(jnp.asarray, random_experts(rng, hidden, inner, 1))
    x = jnp.asarray(rng.standard_normal((tokens, hidden)), jnp.bfloat16)
    arguments = x, jnp.zeros((tokens, 1), jnp.int32), jnp.ones((tokens, 1))
    expected = np.asarray(plain.expert_mlp(*arguments, weights, limit=7.0))
    return (*arguments, op.packed(gpu.LAYOUT, weights)), expected


def _tiling(monkeypatch, **changes):
    of = gpu._Tiling.of
    monkeypatch.setattr(gpu._Tiling, "of", lambda *sizes: of(*sizes)._replace(**changes))


@pytest.mark.parametrize(("warpgroups", "parts"), [(1, 1), (2, 2)])
def test_buffers_are_reused_without_races(warpgroups, parts, monkeypatch):
    """Guards the circle of buffers over more steps than stages and an odd last group, in either form of the kernel."""
    _tiling(monkeypatch, warpgroups=warpgroups, parts=parts, stages=2)
    monkeypatch.setattr(gpu, "INTERPRETED_WARPGROUPS", warpgroups)
    arguments, expected = _call(hidden=32 * 17, inner=32, tokens=2)  # 17 blocks: 2 steps and one group
    run = functools.partial(gpu.expert_mlp, limit=7.0, interpret=_with(detect_races=True))
    found = np.asarray(jax.jit(run)(*arguments))
    assert not interpreter.races_found()
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())


def test_prefill_in_its_own_form(monkeypatch):
    """Guards the form that prefill takes, in shared tests with one warpgroup: four, each with its outputs."""
    monkeypatch.setattr(gpu, "INTERPRETED_WARPGROUPS", 4)
    tilings, of = [], gpu._Tiling.of
    monkeypatch.setattr(gpu._Tiling, "of", lambda *sizes: tilings.append(of(*sizes)) or tilings[-1])
    arguments, expected = _call(hidden=32 * 9, inner=160, tokens=70)  # five units of down, two blocks of four
    found = np.asarray(jax.jit(functools.partial(gpu.expert_mlp, limit=7.0, interpret=ZERO_FILLING))(*arguments))
    assert {tiling.warpgroups for tiling in tilings} == {4}
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())


def test_a_forgotten_wait_is_seen(monkeypatch):
    """Guards the test above: with nothing waiting for copies the interpreter reports a race."""
    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
    arguments, _ = _call(hidden=32, inner=32, tokens=2)
    run = functools.partial(gpu.expert_mlp, limit=7.0, interpret=_with(detect_races=True))
    jax.block_until_ready(jax.jit(run)(*arguments))
    assert interpreter.races_found()


def test_other_types_are_refused():
    """Guards against a silent loss: float16 has no form here."""
    arguments, _ = _call(hidden=32, inner=32, tokens=1)
    with pytest.raises(TypeError, match="x is float16, expected bfloat16 or float32"):
        gpu.expert_mlp(arguments[0].astype(jnp.float16), *arguments[1:], limit=7.0)
