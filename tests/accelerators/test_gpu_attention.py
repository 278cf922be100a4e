"""What attention for Hopper GPUs could get wrong beyond the shared tests: its window, its splits, its shared memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interpreter
from pallas_kernels.attention import gpu, reference

HEAD = 16


def _run(attend, *arguments, detect_races: bool = False) -> np.ndarray:
    """`attend` in the interpreter, whose many TMA threads tell apart which copy a barrier was waited on for."""
    interpret = interpreter.InterpretGPUParams(detect_races=detect_races, num_tma_threads_per_device=16)
    return np.asarray(jax.jit(functools.partial(attend, interpret=interpret))(*arguments)).astype(np.float32)


def _pages(rng: np.random.Generator, lengths: list[int], tokens: int, page: int, pages_per_row: int, dtype=np.float32):
    """Arguments of a paged call. Whatever no row owns is NaN; rows may be of length 0, and then all padding."""
    rows, heads, kv_heads = len(lengths), 6, 2
    table = rng.permutation(rows * pages_per_row).reshape(rows, pages_per_row).astype(np.int32)
    k, v = np.full((2, rows * pages_per_row, page, kv_heads, HEAD), np.nan, np.float32)
    for row, length in enumerate(lengths):
        for position in range(length):
            at = table[row, position // page], position % page
            k[at], v[at] = rng.standard_normal((2, kv_heads, HEAD))
    positions = np.array(lengths)[:, None] - tokens + np.arange(tokens)
    q = rng.standard_normal((rows, tokens, heads, HEAD)) * 2
    sinks = rng.standard_normal(heads).astype(np.float32)
    return (*(x.astype(dtype) for x in (q, k, v)), table, np.maximum(positions, -1).astype(np.int32), sinks)


def _band(rng: np.random.Generator, start: list[int], tokens: int, window: int):
    """Arguments of a banded call of 2 query heads and 1 key/value head. Slots that hold no key are NaN."""
    rows = len(start)
    rings = np.full((2, rows, window, 1, HEAD), np.nan, np.float32)
    for row, first in enumerate(start):
        for position in range(max(0, first - window), first):
            rings[:, row, position % window] = rng.standard_normal((2, 1, HEAD))
    new = rng.standard_normal((2, rows, tokens, 1, HEAD)).astype(np.float32)
    positions = np.array(start, np.int32)[:, None] + np.arange(tokens, dtype=np.int32)
    q, sinks = rng.standard_normal((rows, tokens, 2, HEAD)).astype(np.float32), np.zeros(2, np.float32)
    return q, *rings, *new, np.array(start, np.int32), positions, sinks


@pytest.mark.parametrize(("start", "tokens"), [(200, 1), (0, 140)])
def test_the_window_ends_between_distances_127_and_128(start, tokens):
    """Guards the window's edge, from the ring and among new keys: 128 positions are seen, one further is not."""
    window, last = 128, start + tokens - 1
    values = np.zeros((last + 1, 1, HEAD), np.float32)
    values[last - 127, 0, 0] = values[last - 128, 0, 1] = 1
    ring = np.zeros((1, window, 1, HEAD), np.float32)
    for position in range(max(0, start - window), start):
        ring[0, position % window] = values[position]
    q, new = np.zeros((1, tokens, 4, HEAD), np.float32), values[None, start:]
    positions = np.arange(start, start + tokens, dtype=np.int32)[None]
    arguments = (q, np.zeros_like(ring), ring, np.zeros_like(new), new, positions[:, 0], positions)
    found = _run(gpu.banded_attention, *arguments, np.full(4, -1e9, np.float32))
    np.testing.assert_allclose(found[0, -1, :, :2], np.tile([1 / window, 0], (4, 1)), rtol=1e-6)


@pytest.mark.parametrize(("blocks", "splits"), [(1, 1), (gpu.BLOCKS, 3)])
def test_the_sink_is_counted_once(blocks, splits, monkeypatch):
    """Guards the merge: n equal logits, values of 1 and a sink give n / (n + e^sink), however many splits there are."""
    merged, merge = [], gpu._merged
    monkeypatch.setattr(gpu, "_merged", lambda out, lse: merged.append(out.shape[2]) or merge(out, lse))
    monkeypatch.setattr(gpu, "BLOCKS", blocks)
    lengths, page, pages_per_row = np.array([700, 5, 1], np.int32), 64, 12
    keys = np.ones((3 * pages_per_row, page, 1, HEAD), np.float32)
    table = np.arange(3 * pages_per_row, dtype=np.int32).reshape(3, pages_per_row)
    sinks, q = np.array([-2, 0, 3], np.float32), np.zeros((3, 1, 3, HEAD), np.float32)
    found = _run(gpu.paged_attention, q, keys, keys, table, lengths[:, None] - 1, sinks)
    assert merged == [splits]
    np.testing.assert_allclose(found[:, 0, :, 0], lengths[:, None] / (lengths[:, None] + np.exp(sinks)), rtol=1e-5)


@pytest.mark.parametrize("page", [8, 64, 128])
def test_what_no_row_owns_may_be_nan(page):
    """Guards masking of values, where 0 x NaN is NaN; rows of length 0 and padding, whose output is 0."""
    arguments = _pages(np.random.default_rng(page), [0, 2, 67, 130], tokens=3, page=page, pages_per_row=260 // page)
    found = _run(gpu.paged_attention, *arguments)
    expected = np.asarray(jax.jit(reference.paged_attention)(*arguments))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert (found[0] == 0).all()
    assert (found[1, 0] == 0).all()


@pytest.mark.parametrize(("start", "tokens"), [([0, 3, 90], 2), ([5], 200)])
def test_slots_not_yet_written_may_be_nan(start, tokens):
    """Guards the same in the ring, and which tiles a block reads where a chunk is longer than the window."""
    arguments = _band(np.random.default_rng(0), start, tokens, window=72)
    found = _run(gpu.banded_attention, *arguments)
    np.testing.assert_allclose(found, np.asarray(jax.jit(reference.banded_attention)(*arguments)), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_summed_in_float32():
    """Guards the numbers of the real model: the error is that of rounding weights and outputs to bfloat16."""
    arguments = _pages(np.random.default_rng(1), [130, 70], tokens=2, page=64, pages_per_row=4, dtype=jnp.bfloat16)
    found = _run(gpu.paged_attention, *arguments)
    widened = [x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for x in arguments]
    np.testing.assert_allclose(found, np.asarray(jax.jit(reference.paged_attention)(*widened)), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("form", ["paged", "banded"])
@pytest.mark.parametrize("planted", [False, True])
def test_races(form, planted, monkeypatch):
    """Guards the circle of buffers: no read races with a copy; without the wait for copies, the interpreter sees it."""
    if planted:
        monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
    rng = np.random.default_rng(0)
    calls = {
        "paged": (gpu.paged_attention, *_pages(rng, [70], tokens=2, page=8, pages_per_row=50)),
        "banded": (gpu.banded_attention, *_band(rng, [90], tokens=2, window=72)),
    }
    _run(*calls[form], detect_races=True)
    assert interpreter.races_found() == planted


def test_refusals():
    """Guards against a silent loss: tensor cores would round float32, and sizes that no tile fits are named."""
    q, k, v, *rest = map(jnp.asarray, _pages(np.random.default_rng(0), [5], tokens=1, page=8, pages_per_row=2))
    with pytest.raises(TypeError, match="q, k and v are float32, expected bfloat16 for the GPU kernel"):
        gpu.paged_attention(q, k, v, *rest)
    interpret = interpreter.InterpretGPUParams()
    with pytest.raises(ValueError, match="pages of 4 tokens, expected 8, 16, 32 or a multiple of 64"):
        gpu.paged_attention(q, k[:, :4], v[:, :4], *rest, interpret=interpret)
    with pytest.raises(ValueError, match="head_dim 8, expected a multiple of 16"):
        gpu.paged_attention(q[..., :8], k[..., :8], v[..., :8], *rest, interpret=interpret)
