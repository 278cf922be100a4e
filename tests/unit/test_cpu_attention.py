"""The CPU's attention on every instruction set of this machine: against the reference, and bit against bit."""

import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import cpu_kernels
from cpu_kernels.attention import attend
from gptoss_jax.model.config import read_config
from gptoss_jax.runtime.program_memory import program_memory
from pallas_kernels.attention import reference
from tests.structures import paged_kv, ring_kv

if reason := cpu_kernels.why_not():
    pytest.skip(reason, allow_module_level=True)

ROOT = Path(__file__).parents[2]
MODEL = read_config(ROOT / "configs" / "gpt-oss-20b.json")
REAL = (MODEL.num_heads, MODEL.num_kv_heads, MODEL.head_dim)
HEADS = [REAL, (6, 2, 16), (5, 1, 40), (3, 3, 33), (130, 1, 8)]  # query heads, key/value heads, head size
DTYPES = [jnp.float32, jnp.bfloat16]


@pytest.fixture(params=cpu_kernels.instruction_sets())
def instructions(request):
    """Every path that this machine can run."""
    with cpu_kernels.instruction_set(request.param):
        yield request.param


@dataclasses.dataclass
class Sequences:
    """Random tokens, by position, and how they look to either form of attention."""

    heads: tuple[int, int, int]
    dtype: jnp.dtype
    number: int
    context: int
    seed: int = 0

    def __post_init__(self):
        num_heads, kv_heads, size = self.heads
        rng = np.random.default_rng(self.seed)

        def draw(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        self.q = (2 * draw(self.number, self.context, num_heads, size)).astype(self.dtype)
        self.k, self.v = draw(2, self.number, self.context, kv_heads, size).astype(self.dtype)
        self.sinks = jnp.asarray(2 * draw(num_heads), jnp.bfloat16)
        self.rng = rng

    def positions(self, start: np.ndarray, tokens: int, counts: np.ndarray | None = None) -> np.ndarray:
        ordinal = np.arange(tokens)
        counts = np.full(self.number, tokens) if counts is None else counts
        return np.where(ordinal < counts[:, None], start[:, None] + ordinal, -1).astype(np.int32)

    def queries(self, positions: np.ndarray) -> np.ndarray:
        return np.take_along_axis(self.q, np.maximum(positions, 0)[:, :, None, None], axis=1)

    def paged(self, positions: np.ndarray, page: int = 64) -> tuple[Any, ...]:
        """A call on shuffled pages, NaN in all slots that no query sees."""
        pages = -(-self.context // page)
        table = self.rng.permutation(self.number * pages).reshape(self.number, pages).astype(np.int32)
        stored = []
        for by_position in (self.k, self.v):
            pool = np.full((self.number * pages, page, *by_position.shape[2:]), np.nan, by_position.dtype)
            for i in range(self.number):
                seen = np.arange(positions[i].max() + 1)
                pool[table[i, seen // page], seen % page] = by_position[i, seen]
            stored.append(pool)
        return self.queries(positions), paged_kv(*stored, table), positions, self.sinks

    def windowed(self, start: np.ndarray, positions: np.ndarray, window: int) -> tuple[Any, ...]:
        """A call over a sliding window: NaN in slots never written and in the new tokens that are padding."""
        stored, new = [], []
        for by_position in (self.k, self.v):
            ring = np.full((self.number, window, *by_position.shape[2:]), np.nan, by_position.dtype)
            for i, first in enumerate(start):
                held = np.arange(max(0, first - window), first)
                ring[i, held % window] = by_position[i, held]
            fresh = np.take_along_axis(by_position, np.maximum(positions, 0)[:, :, None, None], axis=1)
            stored.append(ring)
            new.append(np.where((positions >= 0)[:, :, None, None], fresh, np.nan).astype(by_position.dtype))
        return self.queries(positions), ring_kv(*stored, *new, start), positions, self.sinks


_jitted = functools.cache(jax.jit)


def _run(function, arguments) -> np.ndarray:
    """The output, and beside it the log-sum-exp: [B, T, N, H + 1]."""
    out, lse = _jitted(function)(*jax.tree.map(jnp.asarray, arguments))
    assert out.dtype == lse.dtype == jnp.float32
    return np.concatenate([out, lse[..., None]], axis=-1)


def _on_every_instruction_set(arguments) -> Iterator[np.ndarray]:
    for name in cpu_kernels.instruction_sets():
        with cpu_kernels.instruction_set(name):
            yield _run(attend, arguments)


def _same_bits(found: np.ndarray, expected: np.ndarray):
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def _close(found: np.ndarray, expected: np.ndarray, positions: np.ndarray):
    np.testing.assert_allclose(found[positions >= 0], expected[positions >= 0], rtol=2e-5, atol=2e-6)
    assert (found[positions < 0] == [0] * (found.shape[-1] - 1) + [-np.inf]).all()


# ---- against the reference ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "page"), list(zip(HEADS, (64, 24, 8, 64, 64), strict=True)))
@pytest.mark.parametrize("tokens", [1, 20])
def test_paged_is_the_reference(heads, page, dtype, tokens):
    """Guards page tables, ragged and empty sequences, odd sizes, spans of keys; what no query sees may be NaN."""
    start = np.array([0, 3, 64, 1100])
    sequences = Sequences(heads, dtype, number=4, context=1152)
    positions = sequences.positions(start, tokens, np.array([tokens, max(1, tokens - 2), 0, tokens]))
    arguments = sequences.paged(positions, page)
    expected = _run(reference.attend, arguments)
    for found in _on_every_instruction_set(arguments):
        _close(found, expected, positions)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "window"), [(REAL, 128), ((6, 2, 16), 40), ((5, 1, 40), 70), ((3, 3, 33), 50)])
@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_the_sliding_window_is_the_reference(heads, window, dtype, tokens):
    """Guards the ring: unwritten slots, wrap-around, chunks shorter and longer than the window, padding."""
    start = np.array([0, 5, 128, 1020], np.int32)
    sequences = Sequences(heads, dtype, number=4, context=1200)
    positions = sequences.positions(start, tokens, np.array([tokens, max(1, tokens - 3), 0, tokens]))
    arguments = sequences.windowed(start, positions, window)
    expected = _run(reference.attend, arguments)
    for found in _on_every_instruction_set(arguments):
        _close(found, expected, positions)


@pytest.mark.parametrize("distance", [127, 128])
def test_the_window_ends_where_it_should(instructions, distance):
    """Guards the window's far edge, an error of one key in 128 that no tolerance sees: only that key has a value."""
    sequences = Sequences((2, 1, 16), jnp.float32, number=1, context=400)
    sequences.v[:] = 0
    sequences.v[0, 300 - distance] = 1e6
    for start in (300, 250):
        positions = sequences.positions(np.array([start]), 301 - start)
        found = _run(attend, sequences.windowed(np.array([start], np.int32), positions, 128))
        assert (found[0, -1, :, :-1] > 0).all() == (distance < 128)


def test_extreme_sinks(instructions):
    """Guards the sink's place in the maximum: one of minus infinity takes nothing, a huge one everything."""
    sequences = Sequences((4, 2, 16), jnp.float32, number=1, context=100)
    sequences.sinks = jnp.array([-jnp.inf, 0, 1e4, -1e4], jnp.float32)
    positions = sequences.positions(np.array([90]), 10)
    arguments = sequences.paged(positions)
    found = _run(attend, arguments)
    _close(found, _run(reference.attend, arguments), positions)
    assert (found[:, :, 2, :-1] == 0).all() and (found[:, :, 2, -1] == 1e4).all()


def test_a_query_that_is_nan_gives_nan(instructions):
    """Guards against hiding a broken layer: what is not a number stays so, and stays in its own head and token."""
    sequences = Sequences((4, 2, 16), jnp.float32, number=1, context=100)
    sequences.q[0, 95, 1, 3] = np.nan
    found = _run(attend, sequences.paged(sequences.positions(np.array([90]), 10)))
    assert np.isnan(found[0, 5, 1]).all()
    assert np.isfinite(np.delete(found.reshape(40, 17), 5 * 4 + 1, axis=0)).all()


# ---- bit against bit ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [REAL, (5, 1, 40)])
def test_a_chunk_is_its_tokens_one_by_one(instructions, heads, dtype):
    """Guards that prefill is decode, bit by bit: across blocks and spans of keys, over pages and over the ring."""
    first, tokens, window = 1000, 40, 128
    sequences = Sequences(heads, dtype, number=1, context=1100)
    start = np.array([first], np.int32)
    positions = sequences.positions(start, tokens)
    paged = _run(attend, sequences.paged(positions))
    windowed = _run(attend, sequences.windowed(start, positions, window))
    for token in range(tokens):
        alone = sequences.positions(start + token, 1)
        _same_bits(_run(attend, sequences.paged(alone))[:, 0], paged[:, token])
        found = _run(attend, sequences.windowed(start + token, alone, window))
        _same_bits(found[:, 0], windowed[:, token])


def test_neighbours_change_no_bit(instructions):
    """Guards batch invariance: whatever sequences run beside one, and however many, its bits are those it has alone."""
    start = np.array([2300, 0, 1023, 2047, 70, 2399])
    batch = Sequences((16, 2, 64), jnp.bfloat16, number=6, context=2400)
    positions = batch.positions(start, 1)
    together = batch.paged(positions)
    found = _run(attend, together)
    q, kv, _, sinks = together
    for i in range(batch.number):
        one = slice(i, i + 1)
        alone = (q[one], kv._replace(page_table=kv.page_table[one]), positions[one], sinks)
        _same_bits(_run(attend, alone), found[one])


def test_instruction_sets_agree():
    """Guards one definition of every sum: fused ones have the same bits, but for pairs of bfloat16s, whose second comes
    first; that, and portable code, which rounds a product before it is added, are the same to rounding.
    """
    sequences = Sequences(REAL, jnp.bfloat16, number=2, context=1500)
    arguments = sequences.paged(sequences.positions(np.array([1400, 30]), 9))
    found = {}
    for name in cpu_kernels.instruction_sets():
        with cpu_kernels.instruction_set(name):
            found[name] = _run(attend, arguments)
    alike = [bits for name, bits in found.items() if name not in ("avx512bf16", "portable")]
    for other in alike:
        _same_bits(other, alike[0])
    for other in found.values():
        np.testing.assert_allclose(other, found["portable"], rtol=1e-5, atol=1e-6)


def digest() -> str:
    """What one call of each kind amounts to, on this process's threads."""
    sequences = Sequences((16, 2, 64), jnp.bfloat16, number=2, context=2400)
    start = np.array([2300, 1100], np.int32)
    found = hashlib.sha256()
    for tokens in (1, 24):
        positions = sequences.positions(start, tokens)
        found.update(_run(attend, sequences.paged(positions)).tobytes())
        found.update(_run(attend, sequences.windowed(start, positions, 128)).tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_threads_change_no_bit(threads):
    """Guards reproducibility from one machine to the next: many threads cut a sequence into spans, one does not."""
    program = "from tests.unit.test_cpu_attention import digest; print(digest())"
    environment = os.environ | {"NPROC": str(threads)}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == digest(), run.stderr


# ---- inside programs ----


def test_loops_branches_and_devices(instructions):
    """Guards use as the model uses it: in a loop under jit, under a condition, and on several devices at once."""
    sequences = Sequences((8, 4, 16), jnp.bfloat16, number=2, context=1200)
    arguments = jax.tree.map(jnp.asarray, sequences.paged(sequences.positions(np.array([1100, 40]), 3)))
    expected = _run(attend, arguments)[..., :-1]

    @jax.jit
    def looped(q, *others):
        def step(i, total):
            return total + jax.lax.cond(
                i % 2 == 0, lambda: attend(q, *others)[0], lambda: jnp.zeros(q.shape, jnp.float32)
            )

        return jax.lax.fori_loop(0, 4, step, jnp.zeros(q.shape, jnp.float32))

    _same_bits(np.asarray(looped(*arguments)), 2 * expected)

    mesh = jax.make_mesh((2,), ("tensor",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    by_head, whole = PartitionSpec(None, None, "tensor"), PartitionSpec()
    specs = (by_head, paged_kv(by_head, by_head, whole), whole, PartitionSpec("tensor"))
    sharded = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(by_head, by_head), check_vma=False))
    _same_bits(np.asarray(sharded(*arguments)[0]), expected)


def test_what_it_does_not_take_is_refused():
    """Guards against a silent cast: other dtypes, and keys of one dtype with values of another, are refused."""
    sequences = Sequences((4, 2, 16), jnp.float32, number=1, context=64)
    q, kv, *others = jax.tree.map(jnp.asarray, sequences.paged(sequences.positions(np.array([5]), 1)))
    with pytest.raises(TypeError, match="q of float16, expected one dtype, float32 or bfloat16"):
        attend(q.astype(jnp.float16), kv, *others)
    with pytest.raises(TypeError, match="keys and values of bfloat16 and float32, expected one dtype"):
        attend(q, kv._replace(v=kv.v.astype(jnp.bfloat16)), *others)
    three = jnp.zeros((*kv.k.shape[:2], 3, 16))
    with pytest.raises(jax.errors.JaxRuntimeError, match="K that divides N"):
        attend(q, kv._replace(k=three, v=three), *others)


def test_no_logits_in_memory():
    """Guards long contexts: what a chunk needs beside its arguments does not grow with the context."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    pages = shape((2048, 64, *REAL[1:]))
    table, positions = jax.ShapeDtypeStruct((1, 2048), jnp.int32), jax.ShapeDtypeStruct((1, 128), jnp.int32)
    q = shape((1, 128, REAL[0], REAL[2]))
    lowered = jax.jit(attend).lower(q, paged_kv(pages, pages, table), positions, shape((REAL[0],)))
    assert program_memory(lowered.compile()).temporary_bytes < 1e6
