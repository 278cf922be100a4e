"""The TPU's attention, interpreted: what the bodies shared by all implementations do not reach, and races of copies."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import Attended, reference, tpu
from tests.structures import attended, paged_kv, ring_kv

REAL = (16, 4, 64)  # query heads, key/value heads, head size: two groups of two, as the real models' four of two
SHAPES = [  # heads, their dtype, a window
    (REAL, jnp.bfloat16, 128),
    ((6, 2, 16), jnp.float32, 12),
    ((5, 1, 40), jnp.bfloat16, 70),
    ((6, 3, 48), jnp.float32, 50),
]
CAREFUL = pltpu.InterpretParams(detect_races=True)


@pytest.fixture(autouse=True)
def _fresh_interpreter(monkeypatch):
    """An interpreter that was left by an exception, or that found a race, remembers it; loops compile faster for it."""
    monkeypatch.setattr(tpu, "UNROLLED_PAGES", 2)
    yield
    pltpu.reset_tpu_interpret_mode_state()


def _interpreted(arguments) -> Attended:
    found = jax.jit(functools.partial(tpu.attend, interpret=CAREFUL))(*jax.tree.map(jnp.asarray, arguments))
    return attended(*map(np.asarray, found))


def _races_found() -> bool:
    """Whether the last kernel that was interpreted raced; JAX 0.10 and 0.11 say so in different places."""
    module: Any = interpret_pallas_call
    return (module.get_races() if hasattr(module, "get_races") else module.races).races_found


def _positions(start: list[int], counts: list[int], tokens: int) -> np.ndarray:
    ordinal = np.arange(tokens)
    sequences = zip(start, counts, strict=True)
    return np.array([np.where(ordinal < count, first + ordinal, -1) for first, count in sequences], np.int32)


def _draw(rng: np.random.Generator, dtype: jnp.dtype, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def _paged(heads: tuple[int, int, int], dtype: jnp.dtype, positions: np.ndarray, page: int = 48) -> tuple:
    """A call on shuffled pages; slots that no query sees are NaN, table entries beyond a sequence are nonsense."""
    (num_heads, kv_heads, size), sequences = heads, len(positions)
    rng = np.random.default_rng(positions.size)
    pages = int(positions.max()) // page + 2
    table = rng.permutation(sequences * pages).reshape(sequences, pages).astype(np.int32)
    pools = _draw(rng, dtype, 2, sequences * pages, page, kv_heads, size)
    for i, last in enumerate(positions.max(1)):
        owned, in_page = divmod(last + 1, page)
        pools[:, table[i, owned], in_page:] = np.nan
        pools[:, table[i, owned + 1 :]] = np.nan
        table[i, owned + 1 :] = 2**31 - 1
    q = 2 * _draw(rng, dtype, sequences, positions.shape[1], num_heads, size)
    return q, paged_kv(*pools, table), positions, 2 * _draw(rng, jnp.bfloat16, num_heads)


def _windowed(heads: tuple[int, int, int], dtype: jnp.dtype, start: list[int], positions: np.ndarray, window: int):
    """A call with NaN in slots that were never written and in new tokens that are padding."""
    (num_heads, kv_heads, size), (sequences, tokens) = heads, positions.shape
    rng = np.random.default_rng(positions.size)
    rings = _draw(rng, dtype, 2, sequences, window, kv_heads, size)
    rings[:, np.arange(window) >= np.array(start)[:, None]] = np.nan
    new = _draw(rng, dtype, 2, sequences, tokens, kv_heads, size)
    new[:, positions < 0] = np.nan
    q = 2 * _draw(rng, dtype, sequences, tokens, num_heads, size)
    return q, ring_kv(*rings, *new, np.array(start, np.int32)), positions, 2 * _draw(rng, jnp.bfloat16, num_heads)


def _check(arguments):
    """The kernel gives what the reference gives, 0 and -inf where padding is, and is free of races."""
    q, _, positions, _ = arguments
    found, expected = _interpreted(arguments), jax.jit(reference.attend)(*jax.tree.map(jnp.asarray, arguments))
    tolerance = 2e-6 if q.dtype == np.float32 else 2e-2  # a weight has 8 bits in bfloat16
    real = positions >= 0
    assert found.out.dtype == found.lse.dtype == np.float32
    np.testing.assert_allclose(found.out[real], expected.out[real], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found.lse, expected.lse, rtol=2e-6, atol=2e-6)
    assert (found.out[~real] == 0).all() and np.isneginf(found.lse[~real]).all()
    assert not _races_found()


@pytest.mark.parametrize(("heads", "dtype"), [shape[:2] for shape in SHAPES])
@pytest.mark.parametrize("tokens", [1, 20])
def test_paged_is_the_reference(heads, dtype, tokens):
    """Guards heads packed into registers, sequences of no tokens, blocks partly there, NaN in free slots."""
    start, counts = [0, 3, 64, 0, 1100], [tokens, max(1, tokens - 2), 0, 0, tokens]
    _check(_paged(heads, dtype, _positions(start, counts, tokens)))


def test_a_prompt_of_several_tiles():
    """Guards tiles of one sequence: keys that all of a tile see are taken unmasked, and padding in a tile is not."""
    positions = _positions([700, 0], [150, 100], 150)
    _check(_paged((6, 2, 16), jnp.float32, positions))


@pytest.mark.parametrize(("heads", "dtype", "window"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 150])
def test_the_sliding_window_is_the_reference(heads, dtype, window, tokens):
    """Guards the ring: unwritten slots, wrap-around, tiles that see the ring and tiles that do not, padding."""
    start = [0, 5, 128, 1020]
    positions = _positions(start, [tokens, max(1, tokens - 3), 0, tokens], tokens)
    _check(_windowed(heads, dtype, start, positions, window))


@pytest.mark.parametrize("distance", [127, 128])
@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_the_window_ends_where_it_should(tokens, distance):
    """Guards the window's far edge, an error of one key in 128 that no tolerance sees: only that key has a value."""
    last, window = 300, 128
    start = [last + 1 - tokens]
    q, kv, positions, sinks = _windowed((2, 1, 16), jnp.float32, start, _positions(start, [tokens], tokens), window)
    kv.v[:], kv.v_new[:] = 0, 0
    at = last - distance
    if at >= start[0]:
        kv.v_new[0, at - start[0]] = 1e6
    else:
        kv.v[0, at % window] = 1e6 if at >= start[0] - window else 0
    found = _interpreted((q, kv, positions, sinks))
    assert (found.out[0, -1] > 0).all() == (distance < window)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_sink_counts_once(tokens):
    """Guards a sink taken in with each block of keys: beside n equal keys a sink of ln(n) takes one half, not more."""
    keys = 2500
    positions = _positions([keys - tokens], [tokens], tokens)
    q, kv, _, _ = _paged((2, 1, 16), jnp.float32, positions)
    sinks = np.full(2, np.log(keys), np.float32)
    found = _interpreted((0 * q, kv._replace(v=np.ones_like(kv.v)), positions, sinks))
    np.testing.assert_allclose(found.out[0, -1], 0.5, rtol=1e-4)
    np.testing.assert_allclose(found.lse[0, -1], np.log(2 * keys), rtol=1e-5)


def test_extreme_sinks():
    """Guards the sink's place in the maximum: one of minus infinity takes nothing, a huge one everything."""
    *call, _ = _paged((4, 2, 16), jnp.float32, _positions([90], [10], 10))
    arguments = (*call, np.array([-np.inf, 0, 1e4, -1e4], np.float32))
    _check(arguments)
    assert (_interpreted(arguments).out[:, :, 2] == 0).all()


def test_a_missing_wait_is_seen(monkeypatch):
    """Guards the tests above: were keys read before their copies had come, the interpreter would report it."""

    class Impatient:
        def __init__(self, *place):
            self.copy = make(*place)

        def start(self):
            self.copy.start()

        def wait(self):
            pass

    make = pltpu.make_async_copy
    monkeypatch.setattr(pltpu, "make_async_copy", Impatient)
    arguments = _paged((6, 2, 16), jnp.float32, _positions([100], [1], 1))
    found = _interpreted(arguments)
    assert _races_found() or not np.isfinite(found.out).all()


def test_what_the_kernels_cannot_take_is_refused():
    """Guards against silent rounding, and against pages whose copies a TPU would tear."""
    call = _paged((6, 2, 16), jnp.float32, _positions([9], [1], 1), page=24)
    q, kv, *others = jax.tree.map(jnp.asarray, call)
    half = q.astype(jnp.bfloat16)
    with pytest.raises(TypeError, match=r"float32 or bfloat16, the same for all, got q bfloat16, k float32"):
        tpu.attend(half, kv, *others, interpret=CAREFUL)
    small = kv._replace(k=kv.k.astype(jnp.bfloat16), v=kv.v.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"k has 24 tokens a page, expected a multiple of 16"):
        tpu.attend(half, small, *others)
