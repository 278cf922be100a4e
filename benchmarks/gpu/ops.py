"""One op at the sizes of decoding and of prefill: the whole of it, and its kernels alone, beside its roofline.

Inputs rotate among more than a second-level cache holds. What is timed is compared with float32 first, each row by
itself, and is not timed if it is wrong.
"""

import concurrent.futures
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from benchmarks.gpu import kernels_alone, limits, timing, weights
from benchmarks.gpu.comparing import row_errors
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.options import numbers, sizes
from benchmarks.gpu.results import Results
from benchmarks.gpu.timing import Loop
from gptoss_jax.model import kv_cache
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.layers import Kernels
from pallas_kernels import attention as attention_op
from pallas_kernels import expert_mlp as expert_op

SWIGLU_LIMIT = 7.0
BF16_ERROR = 2e-2  # ||out - expected|| / ||expected|| of a row, bfloat16 operands; a wrong block is off by far more
POOL_BYTES = 256 << 20  # among which inputs rotate: several times the 50 to 126 MB of second-level caches
MOST_TURNS = 8  # calls in a turn of a loop, each with inputs of its own


class Case(NamedTuple):
    """One call of an op.

    Attributes:
        name: for tables.
        run: (one of varying, fixed) -> the op's output.
        varying: what differs from one call to the next, so that other bytes are read.
        fixed: what does not.
        expected: (one of varying, fixed) -> rows in float32, and which rows of the output they are.
        num_bytes: that one call has to read or write.
        operations: multiplications and additions of one call.
    """

    name: str
    run: Callable[[Any, Any], jax.Array]
    varying: list[Any]
    fixed: Any
    expected: Callable[[Any, Any], tuple[jax.Array, Any]]
    num_bytes: int
    operations: int


def measure(results: Results, options: flags.FlagValues, config: ModelConfig, kernels: Kernels) -> None:
    """The section: all programs are compiled before the first one is timed."""
    known = limits.of(results)

    def prepare(make: Callable[[], Case]) -> list[tuple[str, Case, Loop]]:
        try:
            case = make()
            if _is_right(results, case):
                return [(part, case, loop) for part, loop in _loops(case, known, options.loop_ms / 1e3)]
        except Exception as error:  # of the compiler or the device: the other cases are to be measured
            results.judge({"error": str(error)[:2000]}, make.__name__, str(error)[:300], ok=False)
        return []

    with concurrent.futures.ThreadPoolExecutor(timing.COMPILING_THREADS) as pool:
        prepared = list(itertools.chain(*pool.map(prepare, _cases(options, config, kernels))))
    compiled = timing.compile_loops([loop for *_, loop in prepared])
    for (part, case, _), loop in zip(prepared, compiled, strict=True):
        if isinstance(loop, Exception):
            results.judge({"error": str(loop)[:2000]}, f"{case.name}, {part}", str(loop)[:300], ok=False)
        else:
            _report(results, part, case, timing.measure(loop, options.dispatches), known)


def _cases(options: flags.FlagValues, config: ModelConfig, kernels: Kernels) -> Iterator[Callable[[], Case]]:
    """Of all sizes, each made when it is its turn."""
    layout = kernels.expert_mlp.layout
    packed = weights.random_experts(config, layout) if options.op_tokens else None
    published = weights.published_experts(layout, packed) if packed else None
    for tokens in numbers(options.op_tokens):
        yield _named(f"expert_mlp, {tokens} tokens", lambda t=tokens: experts(config, kernels, packed, published, t))
    for form, made, flag in (("paged", paged, options.op_attention), ("window", windowed, options.op_windows)):
        for size in sizes(flag):
            name = f"{form} attention, {size[0]} x {size[1]} tokens after {size[2]}"
            yield _named(name, lambda size=size, made=made, name=name: made(config, kernels.attention, name, *size))


def _named(name: str, make: Callable[[], Case]) -> Callable[[], Case]:
    make.__name__ = name
    return make


def _is_right(results: Results, case: Case) -> bool:
    """Whether the output is that of float32, row by row; if not, that is kept and said."""
    expected, rows = jax.jit(case.expected)(case.varying[0], case.fixed)
    found = jax.jit(case.run)(case.varying[0], case.fixed)[np.asarray(rows)]
    error = float(row_errors(found, expected).max())
    if ok := error < BF16_ERROR:
        results.add("error", {"op": case.name, "error": error}, f"{case.name:48} worst row off by {error:.1e}")
    else:
        said = f"a row is off by {error:.1e}, at most {BF16_ERROR:.0e} expected: it is not timed"
        results.judge({"error": error}, case.name, said, ok=False)
    return ok


def _loops(case: Case, known: Limits, loop_seconds: float) -> list[tuple[str, Loop]]:
    """The whole op, and each of its kernels, lowered."""
    calls = timing.calls_for(known.roofline(case.num_bytes, case.operations), loop_seconds)
    turns, others = len(case.varying), (case.varying, case.fixed)

    def whole(i: Any, carry: Any, others: Any) -> Any:
        varying, fixed = others
        for one in varying:
            carry = carry * 0.5 + case.run(*timing.tied((one, fixed), carry)).astype(jnp.float32)
        return carry

    def beside(i: Any, carry: Any, others: Any) -> Any:
        varying, fixed = others
        for one in varying:
            small = timing.smallest(timing.tied((one, fixed), carry))
            carry = lax.optimization_barrier(carry * 0.5 + timing.first(small))
        return carry

    carry = jnp.zeros(jax.eval_shape(case.run, case.varying[0], case.fixed).shape, jnp.float32)
    found = [("whole", timing.lowered(whole, beside, carry, others, calls, turns))]
    for kernel in kernels_alone.find(case.run, case.varying, case.fixed):
        step, empty = kernels_alone.step(kernel), kernels_alone.beside(kernel)
        others = (kernel.varying, kernel.fixed)
        found.append((kernel.name, timing.lowered(step, empty, jnp.float32(0), others, calls, turns)))
    return found


def _report(results: Results, part: str, case: Case, timed: timing.Timed, known: Limits) -> None:
    entry = {"op": case.name, "part": part, **timed._asdict(), "bytes": case.num_bytes, "operations": case.operations}
    share = ""
    if part == "whole":
        roofline = known.roofline(case.num_bytes, case.operations)
        entry |= {"roofline_seconds": roofline, "share_of_roofline": roofline / timed.seconds}
        share = f", roofline {roofline * 1e6:8.1f}, {roofline / timed.seconds:6.1%}"
    results.add("op", entry, f"{case.name:48} {part:24} {timed.said}{share}")


# ---- experts ----


def experts(config: ModelConfig, kernels: Kernels, packed: Any, published: Any, tokens: int) -> Case:
    """A layer's experts; each call has its tokens assigned to other ones, so that no cache holds them."""
    keys, top_k = jax.random.split(jax.random.key(tokens), 3), config.experts_per_token
    x = jax.random.normal(keys[0], (tokens, config.hidden_size), jnp.float32).astype(jnp.bfloat16)
    scores = jax.random.uniform(keys[1], (tokens, config.num_experts))
    ids = lax.top_k(scores, top_k)[1].astype(jnp.int32)
    shares = jax.nn.softmax(jax.random.normal(keys[2], ids.shape, jnp.float32))
    touched = len(np.unique(np.asarray(ids)))
    read = touched * config.expert_bytes
    rows = np.unique([0, tokens // 2, tokens - 1])

    def run(ids: Any, fixed: Any) -> jax.Array:
        x, shares, packed, _ = fixed
        return kernels.expert_mlp.run(x, ids, shares, packed, limit=SWIGLU_LIMIT)

    def expected(ids: Any, fixed: Any) -> tuple[jax.Array, Any]:
        x, shares, _, published = fixed
        reference = expert_op.IMPLEMENTATIONS["reference"].run
        at = jnp.asarray(rows)
        return reference(x[at].astype(jnp.float32), ids[at], shares[at], published, limit=SWIGLU_LIMIT), at

    turns = _turns(read)
    varying = [(ids + top_k * turn) % config.num_experts for turn in range(turns)]
    expert = 3 * config.hidden_size * config.intermediate_size
    operations = 2 * ids.size * expert
    name = f"expert_mlp, {tokens} tokens"
    fixed = (x, shares, packed, published)  # arguments: what a program closes over would be a constant of it
    return Case(name, run, varying, fixed, expected, read + 6 * x.size, operations)


def _turns(num_bytes: int) -> int:
    return max(2, min(MOST_TURNS, -(-POOL_BYTES // max(num_bytes, 1))))


# ---- attention ----


def paged(
    config: ModelConfig, attend: attention_op.Attend, name: str, sequences: int, tokens: int, context_tokens: int
) -> Case:
    """Over pages: `tokens` queries of each sequence after `context_tokens` others; other pages in each call."""
    capacity = context_tokens + tokens
    num_bytes = _key_bytes(config) * sequences * capacity
    turns, per_sequence = _turns(num_bytes), kv_cache.num_pages(capacity)
    q, positions, sinks = _queries(config, sequences, tokens, context_tokens)
    pages = turns * sequences * per_sequence
    k, v = (_stored(config, seed, pages, kv_cache.PAGE_TOKENS) for seed in (1, 2))
    table = jax.random.permutation(jax.random.key(0), pages).astype(jnp.int32).reshape(turns, sequences, per_sequence)

    def run(table: Any, fixed: Any) -> jax.Array:
        q, k, v, positions, sinks = fixed
        k, v = (kv_cache.by_heads(x, config.num_kv_heads) for x in (k, v))
        kv = attention_op.PagedKV(k, v, table)
        return attend(q, kv, positions, sinks).out

    def expected(table: Any, fixed: Any) -> tuple[jax.Array, Any]:
        """Of the last sequence, on a pool of its own pages."""
        q, k, v, positions, sinks = fixed
        k, v = (kv_cache.by_heads(x[table[-1]], config.num_kv_heads).astype(jnp.float32) for x in (k, v))
        kv = attention_op.PagedKV(k, v, jnp.arange(per_sequence, dtype=jnp.int32)[None])
        return _reference(q, kv, positions, sinks), jnp.arange(sequences - 1, sequences)

    keys = tokens * context_tokens + tokens * (tokens + 1) // 2
    operations = 4 * sequences * keys * config.num_heads * config.head_dim
    fixed = (q, k, v, positions, sinks)
    return Case(name, run, list(table), fixed, expected, num_bytes + 4 * q.size, operations)


def windowed(
    config: ModelConfig, attend: attention_op.Attend, name: str, sequences: int, tokens: int, context_tokens: int
) -> Case:
    """Over a sliding window: a ring that is full, and new tokens; other rings in each call."""
    window = config.sliding_window
    num_bytes = _key_bytes(config) * sequences * (window + tokens)
    turns = _turns(num_bytes)
    q, positions, sinks = _queries(config, sequences, tokens, context_tokens)
    k, v = (_stored(config, seed, turns * sequences, window) for seed in (3, 4))
    k_new, v_new = (_stored(config, seed, sequences, tokens) for seed in (5, 6))
    start = jnp.full(sequences, context_tokens, jnp.int32)

    def rings(ring: Any, fixed: Any, dtype: Any = jnp.bfloat16) -> attention_op.RingKV:
        arrays = (*ring, *fixed[1:3])
        split = (kv_cache.by_heads(x, config.num_kv_heads).astype(dtype) for x in arrays)
        return attention_op.RingKV._make([*split, fixed[3]])

    def run(ring: Any, fixed: Any) -> jax.Array:
        return attend(fixed[0], rings(ring, fixed), fixed[4], fixed[5]).out

    def expected(ring: Any, fixed: Any) -> tuple[jax.Array, Any]:
        kv = jax.tree.map(lambda x: x[-1:], rings(ring, fixed, jnp.float32))
        return _reference(fixed[0], kv, fixed[4], fixed[5]), jnp.arange(sequences - 1, sequences)

    varying = [(k[t * sequences : (t + 1) * sequences], v[t * sequences : (t + 1) * sequences]) for t in range(turns)]
    seen = min(window, context_tokens + 1)
    operations = 4 * sequences * tokens * seen * config.num_heads * config.head_dim
    fixed = (q, k_new, v_new, start, positions, sinks)
    return Case(name, run, varying, fixed, expected, num_bytes + 4 * q.size, operations)


def _reference(q: Any, kv: Any, positions: Any, sinks: Any) -> jax.Array:
    """Of the last sequence, whose keys `kv` has."""
    run = attention_op.IMPLEMENTATIONS["reference"]
    return run(q[-1:].astype(jnp.float32), kv, positions[-1:], sinks.astype(jnp.float32)).out


def _key_bytes(config: ModelConfig) -> int:
    """Of a token's key and value in a layer."""
    return 2 * 2 * config.num_kv_heads * config.head_dim


def _queries(config: ModelConfig, sequences: int, tokens: int, context_tokens: int) -> tuple[Any, Any, Any]:
    shape = (sequences, tokens, config.num_heads, config.head_dim)
    q = jax.random.normal(jax.random.key(8), shape, jnp.bfloat16)
    positions = jnp.broadcast_to(context_tokens + jnp.arange(tokens, dtype=jnp.int32), shape[:2])
    return q, positions, jax.random.normal(jax.random.key(9), shape[2:3], jnp.bfloat16)


def _stored(config: ModelConfig, seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*shape, config.num_kv_heads * config.head_dim), jnp.bfloat16)
