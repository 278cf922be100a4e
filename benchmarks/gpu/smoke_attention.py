"""Attention over pages and over a sliding window against the reference in float32; what no sequence owns is NaN."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.comparing import Compare, near
from gptoss_jax.model import kv_cache
from pallas_kernels import attention as op

if TYPE_CHECKING:
    from benchmarks.gpu.smoke import Smoke

ROW_ERROR = 1e-2  # of what a query's head attends to
LSE_ERROR = 5e-3  # of its log-sum-exp, absolute


def paged(smoke: "Smoke", what: str, *, lengths: list[int], tokens: int, table: int = 0) -> None:
    """Sequences of `lengths` tokens, the last `tokens` of them queries; page tables are `table` wide (0: as is needed).

    How many blocks share a sequence's keys follows from the table's width.
    """
    config, rng, page = smoke.config, np.random.default_rng(tokens), kv_cache.PAGE_TOKENS
    own = [kv_cache.num_pages(length) for length in lengths]
    shape = (sum(own) + 1, page, config.num_kv_heads, config.head_dim)  # the last page is nobody's
    k, v = (np.full(shape, np.nan, np.float32) for _ in range(2))
    numbers, tables = iter(rng.permutation(sum(own))), np.full((len(lengths), max(table, max(own) + 1)), sum(own))
    for sequence, length in enumerate(lengths):
        for nth in range(own[sequence]):
            at, held = next(numbers), min(page, length - page * nth)
            tables[sequence, nth] = at
            k[at, :held], v[at, :held] = rng.standard_normal((2, held, *shape[2:]), np.float32)
    kv = op.PagedKV(jnp.asarray(k, jnp.bfloat16), jnp.asarray(v, jnp.bfloat16), jnp.asarray(tables, jnp.int32))
    _compare(smoke, what, rng, lengths, tokens, kv)


def windowed(smoke: "Smoke", what: str, *, lengths: list[int], tokens: int) -> None:
    """The same over rings, whose slots are in order only while they have not gone round."""
    config, rng = smoke.config, np.random.default_rng(tokens)
    window, start = config.sliding_window, np.array(lengths, np.int32) - tokens
    rings = np.full((2, len(lengths), window, config.num_kv_heads, config.head_dim), np.nan, np.float32)
    for sequence, first in enumerate(start):
        for position in range(max(0, first - window), first):
            rings[:, sequence, position % window] = rng.standard_normal((2, *rings.shape[3:]), np.float32)
    new = rng.standard_normal((2, len(lengths), tokens, *rings.shape[3:]), np.float32)
    arrays = (jnp.asarray(x, jnp.bfloat16) for x in (*rings, *new))
    _compare(smoke, what, rng, lengths, tokens, op.RingKV._make([*arrays, jnp.asarray(start)]))


def _compare(smoke: "Smoke", what: str, rng: np.random.Generator, lengths: list[int], tokens: int, kv: Any) -> None:
    """A row is a query of a head: what it attends to, and its log-sum-exp behind it."""
    config = smoke.config
    q = rng.standard_normal((len(lengths), tokens, config.num_heads, config.head_dim), np.float32) * 2
    sinks = jnp.asarray(rng.standard_normal(config.num_heads), jnp.bfloat16)
    positions = jnp.asarray(np.array(lengths)[:, None] - tokens + np.arange(tokens), jnp.int32)

    def rows(attend: op.Attend) -> Any:
        def run(q: Any, kv: Any, positions: Any, sinks: Any) -> jax.Array:
            found = attend(q, kv, positions, sinks)
            out = found.out.astype(jnp.float32).reshape(-1, config.head_dim)
            return jnp.concatenate([out, found.lse.reshape(-1, 1)], axis=1)

        return jax.jit(run)

    def exact(x: Any) -> Any:
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    arguments = (jnp.asarray(q, jnp.bfloat16), kv, positions, sinks)
    expected = np.asarray(rows(op.IMPLEMENTATIONS["reference"])(*jax.tree.map(exact, arguments)))
    smoke.judge(what, rows(smoke.kernels.attention), arguments, _both(expected))


def _both(expected: np.ndarray) -> Compare:
    """Outputs row by row, and log-sum-exps, whose size would hide what is wrong with an output."""

    def compare(found: np.ndarray) -> tuple[bool, str, dict[str, Any]]:
        ok, said, entry = near(expected[:, :-1], ROW_ERROR)(found[:, :-1])
        off = np.abs(found[:, -1] - expected[:, -1])
        worst = float(np.where(np.isfinite(off), off, np.inf).max())
        return ok and worst < LSE_ERROR, f"{said}; log-sum-exp by {worst:.1e}", entry | {"lse_error": worst}

    return compare
