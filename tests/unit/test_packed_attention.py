"""Attention over packed rows and its gradient: against a loop in float64, conversations alone, and C++ against jnp."""

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import cpu_kernels
from pallas_kernels.attention import PACKED, Places, attend_packed, choose_packed
from pallas_kernels.choice import Hardware, KernelError

ROOT = Path(__file__).parents[2]
MISSING = cpu_kernels.why_not()
INSTRUCTION_SETS: tuple[str, ...] = () if MISSING else cpu_kernels.instruction_sets()
needs_cpp = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


class Part(NamedTuple):
    """A conversation's own tokens, and whether it continues the row's head."""

    tokens: int
    continues: bool = True


class Row(NamedTuple):
    """What a row is packed of; the rest is padding."""

    head: int
    parts: tuple[Part, ...]


ROWS = (
    Row(5, (Part(9), Part(1), Part(12, continues=False), Part(6))),
    Row(0, (Part(30, continues=False),)),
    Row(0, ()),
    Row(17, ()),
)
TOKENS = 37  # the longest row and padding


def places_of(rows: tuple[Row, ...], tokens: int) -> Places:
    """Position, first and head of every token of `rows`, [B, T]."""
    places = np.zeros((3, len(rows), tokens), np.int32)
    places[0] = -1
    for i, row in enumerate(rows):
        places[0, i, : row.head] = np.arange(row.head)
        first = row.head
        for part in row.parts:
            head, own = row.head if part.continues else 0, slice(first, first + part.tokens)
            places[:, i, own] = np.stack(np.broadcast_arrays(head + np.arange(part.tokens), first, head))
            first += part.tokens
        assert first <= tokens
    return Places(*map(jnp.asarray, places))


class Sizes(NamedTuple):
    """Query heads, key/value heads, head size."""

    heads: int
    kv_heads: int
    head_size: int


SMALL = Sizes(6, 2, 10)


def draw(sizes: Sizes, rows: int, tokens: int, dtype: Any = jnp.float32, seed: int = 0) -> tuple[Any, ...]:
    """Random q, k, v and sinks."""
    rng = np.random.default_rng(seed)
    shapes = [(rows, tokens, heads, sizes.head_size) for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
    q, k, v, sinks = (rng.standard_normal(shape).astype(np.float32) for shape in (*shapes, (sizes.heads,)))
    return tuple(jnp.asarray(array, dtype) for array in (2 * q, k, v, sinks))


def in_float64(q, k, v, places, sinks, window) -> np.ndarray:
    """What attention over packed rows is, token by token."""
    q, k, v, sinks = (np.asarray(array, np.float64) for array in (q, k, v, sinks))
    position, first, head = map(np.asarray, places)
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        if position[b, t] < 0:
            continue
        kv_head = n * k.shape[2] // q.shape[2]
        seen = [
            s
            for s in range(t + 1)
            if position[b, s] >= 0
            and (s >= first[b, t] or s < head[b, t])
            and (window is None or position[b, t] - position[b, s] < window)
        ]
        logits = k[b, seen, kv_head] @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(logits)
        out[b, t, n] = weights @ v[b, seen, kv_head] / (weights.sum() + np.exp(sinks[n]))
    return out


def _implementations() -> list[Any]:
    return [pytest.param("reference"), pytest.param("cpu", marks=needs_cpp)]


@functools.cache
def _with_gradients(name: str, window: int | None):
    """A function of (q, k, v, sinks), places and a cotangent: the output, and the gradients of the four."""

    def run(differentiated, places, cotangent):
        def attend(q, k, v, sinks):
            return PACKED[name](q, k, v, places, sinks, window=window)

        out, pull = jax.vjp(attend, *differentiated)
        return out, *pull(cotangent)

    return jax.jit(run)


def gradients(name: str, arrays, places, window: int | None = None, cotangent=None) -> list[np.ndarray]:
    """The output and the gradients by q, k, v and the sinks, for a random cotangent."""
    if cotangent is None:
        cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(arrays[0].shape), jnp.float32)
    found = _with_gradients(name, window)(arrays, places, cotangent)
    assert [array.dtype for array in found] == [jnp.float32, *(array.dtype for array in arrays)]
    return [np.asarray(array, np.float32) for array in found]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    """Each array within `tolerance` of the largest number expected in it."""
    for name, one, other in zip(("out", "dq", "dk", "dv", "d_sinks"), found, expected, strict=False):
        assert np.isfinite(one).all(), name
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * (np.abs(other).max() + 1e-6), err_msg=name)


def assert_same_bits(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """No bit differs."""
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


# ---- what it means ----


@pytest.mark.parametrize("name", _implementations())
@pytest.mark.parametrize("window", [None, 1, 4, 12])
def test_it_is_the_loop_in_float64(name, window):
    """Guards the meaning: who sees whom across parts, head and padding, the window's edge, the sink, the scale."""
    q, k, v, sinks = draw(SMALL, len(ROWS), TOKENS)
    places = places_of(ROWS, TOKENS)
    found = PACKED[name](q, k, v, places, sinks, window=window)
    np.testing.assert_allclose(found, in_float64(q, k, v, places, sinks, window), rtol=1e-5, atol=2e-6)
    assert (np.asarray(found)[np.asarray(places.position) < 0] == 0).all()


@pytest.mark.parametrize("name", _implementations())
@pytest.mark.parametrize("window", [None, 7])
def test_a_packed_conversation_is_the_one_alone(name, window):
    """Guards against leaks between conversations: each has the output and gradients that it has in a row of its own.

    The head's gradients are then those of all that continue it, summed.
    """
    row, tokens = Row(5, (Part(9), Part(1), Part(12, continues=False), Part(6))), TOKENS
    arrays = draw(SMALL, 1, tokens, seed=3)
    cotangent = np.random.default_rng(4).standard_normal(arrays[0].shape).astype(np.float32)
    cotangent[:, : row.head] = 0  # whose loss it would be is for none of them to say
    packed = gradients(name, arrays, places_of((row,), tokens), window, jnp.asarray(cotangent))
    summed = [np.zeros_like(array) for array in packed]
    first = row.head
    for part in row.parts:
        own = np.arange(first, first + part.tokens)
        index = np.concatenate([np.arange(row.head), own]) if part.continues else own
        padded = np.pad(index, (0, tokens - len(index)))  # one shape, so that it compiles once
        alone = [array[:, padded] for array in arrays[:3]] + [arrays[3]]
        places = places_of((Row(0, (Part(len(index), continues=False),)),), tokens)
        found = gradients(name, alone, places, window, jnp.asarray(cotangent[:, padded]))
        np.testing.assert_allclose(packed[0][:, own], found[0][:, index.searchsorted(own)], rtol=1e-5, atol=1e-6)
        for total, array in zip(summed[1:4], found[1:4], strict=True):
            total[:, index] += array[:, : len(index)]
        summed[4] += found[4]
        first += part.tokens
    assert_close(packed[1:], summed[1:], 2e-6)


@pytest.mark.parametrize("name", _implementations())
def test_gradients_are_finite_differences(name):
    """Guards the gradient itself, which C++ and JAX might both take of something else."""
    arrays = [np.asarray(array, np.float64) for array in draw(SMALL, len(ROWS), TOKENS, seed=5)]
    places, window = places_of(ROWS, TOKENS), 9
    rng = np.random.default_rng(6)
    cotangent = rng.standard_normal(arrays[0].shape)
    found = gradients(name, [jnp.asarray(a, jnp.float32) for a in arrays], places, window, jnp.float32(cotangent))
    for i, gradient in enumerate(found[1:]):
        way = rng.standard_normal(arrays[i].shape)
        ends = []
        for step in (1e-5, -1e-5):
            q, k, v, sinks = (array + step * way if i == j else array for j, array in enumerate(arrays))
            ends.append(np.sum(in_float64(q, k, v, places, sinks, window) * cotangent))
        np.testing.assert_allclose(np.sum(gradient * way), (ends[0] - ends[1]) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", _implementations())
def test_extreme_sinks(name):
    """Guards the sink's place in the maximum: one of -inf takes nothing, a huge one all; no gradient is NaN."""
    q, k, v, _ = draw(Sizes(4, 2, 16), len(ROWS), TOKENS)
    places = places_of(ROWS, TOKENS)
    found = gradients(name, (q, k, v, jnp.array([-jnp.inf, 0, 1e4, -1e4], jnp.float32)), places)
    assert all(np.isfinite(array).all() for array in found)
    assert (found[0][:, :, 2] == 0).all() and (found[4][[0, 2, 3]] == 0).all() and found[4][1] != 0
    sinks = np.array([-np.inf, 0, 300, -300])
    np.testing.assert_allclose(found[0], in_float64(q, k, v, places, sinks, None), rtol=1e-5, atol=2e-6)


# ---- C++ is the reference ----

LONG = (
    Row(100, (Part(61), Part(200), Part(150, continues=False), Part(83), Part(1))),
    Row(3, (Part(590),)),
    Row(0, tuple(Part(tokens, continues=False) for tokens in (128, 64, 5, 129, 250))),
)
CALLS = [  # sizes, rows, tokens of a row, window
    (Sizes(8, 4, 32), LONG[:2], 600, None),
    (Sizes(8, 4, 32), LONG[1:], 600, 70),
    (Sizes(16, 2, 64), LONG[:1], 600, 128),
    (Sizes(3, 1, 33), LONG[1:], 611, None),  # no vector, block or span is whole
    (Sizes(3, 1, 33), LONG[:2], 611, 70),
    (Sizes(6, 2, 16), ROWS, TOKENS, 12),
    (Sizes(5, 1, 40), ROWS, TOKENS, None),
    (Sizes(3, 3, 8), ROWS, TOKENS, 7),
    (Sizes(66, 1, 8), ROWS, TOKENS, None),
    (Sizes(2, 2, 16), (Row(0, (Part(1),)), Row(0, ())), 1, None),
]


@needs_cpp
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("sizes", "rows", "tokens", "window"), CALLS)
def test_cpp_is_the_reference(dtype, sizes, rows, tokens, window):
    """Guards every path of the kernels: values and all gradients, odd sizes, blocks and spans that nobody sees."""
    arrays, places = draw(sizes, len(rows), tokens, dtype), places_of(rows, tokens)
    expected = gradients("reference", arrays, places, window)
    for instructions in INSTRUCTION_SETS:
        with cpu_kernels.instruction_set(instructions):
            found = gradients("cpu", arrays, places, window)
        assert_close(found[:1], expected[:1], 3e-6)
        assert_close(found, expected, 1e-5 if dtype == jnp.float32 else 5e-3)


@needs_cpp
@pytest.mark.parametrize("window", [1, 64, 128])
def test_the_window_ends_where_it_should(window):
    """Guards the window's far edge, one key in many, across blocks: a key has a gradient from its last query alone."""
    places = places_of((Row(70, (Part(80), Part(150))),), 300)
    arrays = draw(Sizes(2, 1, 16), 1, 300)
    for query in (40, 149, 150, 299):
        cotangent = jnp.zeros(arrays[0].shape).at[0, query].set(1)
        dv = gradients("cpu", arrays, places, window, cotangent)[3]
        position, first, head = (np.asarray(array)[0] for array in places)
        index = np.arange(300)
        near = (position >= 0) & (index <= query) & (position[query] - position < window)
        seen = near & ((index >= first[query]) | (index < head[query]))
        np.testing.assert_array_equal((dv[0] != 0).any((1, 2)), seen)


@needs_cpp
def test_what_nobody_sees_has_no_gradient():
    """Guards the gradients' memory, which the kernels get as it is: unseen blocks and padding give 0, not rubbish."""
    places = places_of((Row(0, ()), Row(2, (Part(20),)), Row(0, ())), 700)
    arrays = draw(Sizes(4, 2, 32), 3, 700)
    out, dq, dk, dv, _ = gradients("cpu", arrays, places)
    padding = np.asarray(places.position) < 0
    for array in (out, dq, dk, dv):
        assert (array[padding] == 0).all() and (array[~padding] != 0).any()


@needs_cpp
def test_what_it_does_not_take_is_refused():
    """Guards against a silent cast or a call beyond the arrays: other dtypes, shapes and windows are refused."""
    q, k, v, sinks = draw(SMALL, len(ROWS), TOKENS)
    places, attend = places_of(ROWS, TOKENS), PACKED["cpu"]
    with pytest.raises(TypeError, match="k of float16, expected float32 or bfloat16"):
        attend(q, k.astype(jnp.float16), v, places, sinks, window=None)
    with pytest.raises(ValueError, match="window 0, expected at least 1, or None"):
        attend(q, k, v, places, sinks, window=0)
    four = jnp.zeros((*k.shape[:2], 4, k.shape[3]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="K that divides N"):
        jax.jit(attend, static_argnames="window")(q, four, four, places, sinks, window=None)


# ---- bit against bit ----


def digest() -> str:
    """What output and gradients of one call amount to, on this process's threads."""
    sizes, rows, tokens, _ = CALLS[0]
    found = hashlib.sha256()
    for window in (None, 70):
        for array in gradients("cpu", draw(sizes, len(rows), tokens), places_of(rows, tokens), window):
            found.update(array.tobytes())
    return found.hexdigest()


@needs_cpp
@pytest.mark.parametrize("threads", [1, 16])
def test_threads_change_no_bit(threads):
    """Guards reproducible training: whichever thread comes first, every sum has its order."""
    program = "from tests.unit.test_packed_attention import digest; print(digest())"
    environment = os.environ | {"NPROC": str(threads)}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == digest(), run.stderr


@needs_cpp
def test_devices_at_once_and_rematerialisation():
    """Guards use as training uses it: rows over devices of few threads, in a loop, run again for the gradient."""
    sizes, rows, tokens = Sizes(8, 4, 32), LONG[:2], 600
    arrays, places = draw(sizes, 2, tokens), places_of(rows, tokens)
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    by_row, whole = PartitionSpec("data"), PartitionSpec()

    def loss(q, k, v, places, sinks):
        @jax.checkpoint
        def layer(x, _):
            return PACKED["cpu"](x, k, v, places, sinks, window=None), None

        out, _ = jax.lax.scan(layer, q, length=2)
        return jnp.sum(out**2)

    def per_device(q, k, v, places, sinks):
        gradient = jax.grad(loss, (0, 1, 2, 4))(q, k, v, places, sinks)
        return (*gradient[:3], jax.lax.psum(gradient[3], "data"))

    specs = (by_row, by_row, by_row, by_row, whole)
    sharded = jax.shard_map(
        per_device, mesh=mesh, in_specs=specs, out_specs=(by_row, by_row, by_row, whole), check_vma=False
    )
    found = jax.jit(sharded)(*arrays[:3], places, arrays[3])
    expected = jax.jit(jax.grad(loss, (0, 1, 2, 4)))(*arrays[:3], places, arrays[3])
    assert_same_bits([np.asarray(array) for array in found[:3]], [np.asarray(array) for array in expected[:3]])
    np.testing.assert_allclose(found[3], expected[3], rtol=1e-5)


# ---- the choice ----


def test_the_choice():
    """Guards that training takes the kernel where there is one, and says why where it does not."""
    gpu = choose_packed("auto", Hardware("gpu", "NVIDIA H200", "9.0"))
    assert (gpu.name, gpu.implementation, gpu.reason) == ("reference", attend_packed, "portable jnp")
    assert choose_packed("auto", Hardware("cpu")).name == ("reference" if MISSING else "cpu")
    assert choose_packed("auto", Hardware("cpu"), jnp.float16).reason.endswith("kernels take float32 and bfloat16")
    assert choose_packed("reference", Hardware("cpu")).reason == "asked for by name"
    with pytest.raises(KernelError, match="packed attention kernel 'fast', expected auto or one of reference, cpu"):
        choose_packed("fast", Hardware("cpu"))
    with pytest.raises(KernelError, match="it is C\\+\\+ for CPUs, and the devices are tpu"):
        choose_packed("cpu", Hardware("tpu"))
