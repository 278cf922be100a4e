"""What attention for Hopper GPUs could get wrong beyond the shared tests: its window, its splits, its shared memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interpreter
from pallas_kernels.attention import Attended, gpu, reference
from tests.structures import attended, paged_kv, ring_kv

HEAD = 16


def _run(*arguments, detect_races: bool = False) -> Attended:
    """The kernel in the interpreter, whose many TMA threads show which copy a barrier was waited on for."""
    interpret = interpreter.InterpretGPUParams(detect_races=detect_races, num_tma_threads_per_device=16)
    found = jax.jit(functools.partial(gpu.attend, interpret=interpret))(*arguments)
    return attended(*(np.asarray(x).astype(np.float32) for x in found))


def _assert_reference(found: Attended, arguments, rtol: float = 1e-5, atol: float = 1e-5):
    expected = jax.jit(reference.attend)(*arguments)
    np.testing.assert_allclose(found.out, expected.out, rtol=rtol, atol=atol)
    np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-5, atol=1e-5)


def _paged(rng: np.random.Generator, lengths: list[int], tokens: int, page: int, pages: int, dtype=np.float32):
    """A paged call. Whatever no sequence owns is NaN; sequences may be of length 0, and then all padding."""
    sequences, heads, kv_heads = len(lengths), 6, 2
    table = rng.permutation(sequences * pages).reshape(sequences, pages).astype(np.int32)
    k, v = np.full((2, sequences * pages, page, kv_heads, HEAD), np.nan, np.float32)
    for i, length in enumerate(lengths):
        for position in range(length):
            at = table[i, position // page], position % page
            k[at], v[at] = rng.standard_normal((2, kv_heads, HEAD))
    positions = np.array(lengths)[:, None] - tokens + np.arange(tokens)
    q = rng.standard_normal((sequences, tokens, heads, HEAD)) * 2
    sinks = rng.standard_normal(heads).astype(np.float32)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    return q, paged_kv(k, v, table), np.maximum(positions, -1).astype(np.int32), sinks


def _windowed(rng: np.random.Generator, start: list[int], tokens: int, window: int):
    """A call over a sliding window, of 2 query heads and 1 key/value head. Slots that hold no key are NaN."""
    sequences = len(start)
    rings = np.full((2, sequences, window, 1, HEAD), np.nan, np.float32)
    for i, first in enumerate(start):
        for position in range(max(0, first - window), first):
            rings[:, i, position % window] = rng.standard_normal((2, 1, HEAD))
    new = rng.standard_normal((2, sequences, tokens, 1, HEAD)).astype(np.float32)
    positions = np.array(start, np.int32)[:, None] + np.arange(tokens, dtype=np.int32)
    q, sinks = rng.standard_normal((sequences, tokens, 2, HEAD)).astype(np.float32), np.zeros(2, np.float32)
    return q, ring_kv(*rings, *new, np.array(start, np.int32)), positions, sinks


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
    kv = ring_kv(np.zeros_like(ring), ring, np.zeros_like(new), new, positions[:, 0])
    found = _run(q, kv, positions, np.full(4, -np.inf, np.float32))
    np.testing.assert_allclose(found.lse[0, -1], np.log(window), rtol=1e-6)
    np.testing.assert_allclose(found.out[0, -1, :, :2], np.tile([1 / window, 0], (4, 1)), rtol=1e-6)


@pytest.mark.parametrize(("blocks", "splits"), [(1, 1), (gpu.BLOCKS, 3)])
def test_the_sink_is_counted_once(blocks, splits, monkeypatch):
    """Guards the merge: n equal logits, values of 1 and a sink give n / (n + e^sink), however many splits there are."""
    merged, merge = [], gpu._merged
    monkeypatch.setattr(gpu, "_merged", lambda parts: merged.append(parts.lse.shape[2]) or merge(parts))
    monkeypatch.setattr(gpu, "BLOCKS", blocks)
    lengths, page, pages = np.array([700, 5, 1], np.int32), 64, 12
    keys = np.ones((3 * pages, page, 1, HEAD), np.float32)
    table = np.arange(3 * pages, dtype=np.int32).reshape(3, pages)
    sinks, q = np.array([-2, 0, 3], np.float32), np.zeros((3, 1, 3, HEAD), np.float32)
    found = _run(q, paged_kv(keys, keys, table), lengths[:, None] - 1, sinks)
    assert merged == [splits]
    total = lengths[:, None] + np.exp(sinks)
    np.testing.assert_allclose(found.out[:, 0, :, 0], lengths[:, None] / total, rtol=1e-5)
    np.testing.assert_allclose(found.lse[:, 0], np.log(total), rtol=1e-5)


@pytest.mark.parametrize("page", [8, 64, 128])
def test_what_no_sequence_owns_may_be_nan(page):
    """Guards masking of values, where 0 x NaN is NaN; sequences of length 0 and padding, whose output is 0."""
    arguments = _paged(np.random.default_rng(page), [0, 2, 67, 130], tokens=3, page=page, pages=260 // page)
    found = _run(*arguments)
    _assert_reference(found, arguments)
    assert (found.out[0] == 0).all() and (found.out[1, 0] == 0).all()
    assert np.isneginf(found.lse[0]).all() and np.isneginf(found.lse[1, 0]).all()


@pytest.mark.parametrize(("start", "tokens"), [([0, 3, 90], 2), ([5], 200)])
def test_slots_not_yet_written_may_be_nan(start, tokens):
    """Guards the same in the ring, and which tiles a block reads where a chunk is longer than the window."""
    arguments = _windowed(np.random.default_rng(0), start, tokens, window=72)
    _assert_reference(_run(*arguments), arguments)


def test_bfloat16_is_summed_in_float32():
    """Guards the numbers of the real model: the error is that of rounding weights and outputs to bfloat16."""
    q, kv, *others = _paged(np.random.default_rng(1), [130, 70], tokens=2, page=64, pages=4, dtype=jnp.bfloat16)
    wide = kv._replace(k=kv.k.astype(np.float32), v=kv.v.astype(np.float32))
    _assert_reference(_run(q, kv, *others), (q.astype(np.float32), wide, *others), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("form", ["paged", "sliding window"])
@pytest.mark.parametrize("planted", [False, True])
def test_races(form, planted, monkeypatch):
    """Guards the circle of buffers: no read races with a copy; without the wait for copies, the interpreter sees it."""
    if planted:
        monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
    rng = np.random.default_rng(0)
    if form == "paged":
        _run(*_paged(rng, [70], tokens=2, page=8, pages=50), detect_races=True)
    else:
        _run(*_windowed(rng, [90], tokens=2, window=72), detect_races=True)
    assert interpreter.races_found() == planted


def test_refusals():
    """Guards against a silent loss: tensor cores would round float32, and sizes that no tile fits are named."""
    call = _paged(np.random.default_rng(0), [5], tokens=1, page=8, pages=2)
    q, kv, *rest = jax.tree.map(jnp.asarray, call)
    with pytest.raises(TypeError, match="q, k and v are float32, expected bfloat16 for the GPU kernel"):
        gpu.attend(q, kv, *rest)
    interpret = interpreter.InterpretGPUParams()
    with pytest.raises(ValueError, match="pages of 4 tokens, expected 8, 16, 32 or a multiple of 64"):
        gpu.attend(q, kv._replace(k=kv.k[:, :4], v=kv.v[:, :4]), *rest, interpret=interpret)
    with pytest.raises(ValueError, match="head_dim 8, expected a multiple of 16"):
        gpu.attend(q[..., :8], kv._replace(k=kv.k[..., :8], v=kv.v[..., :8]), *rest, interpret=interpret)
