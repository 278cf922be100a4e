"""A decoded token rotated and stored, against NumPy in float32; whatever else is stored must stay, bit for bit."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.comparing import Compare, near
from gptoss_jax.model import kv_cache
from pallas_kernels.placement import Stored

if TYPE_CHECKING:
    from benchmarks.gpu.smoke import Smoke

ROW_ERROR = 1e-2  # of a head's numbers, rounded to bfloat16


def placed(smoke: "Smoke", what: str, *, positions: list[int], ring: bool = False) -> None:
    """A token of each sequence at one of `positions` (-1: padding), to pages in no order, or to rings."""
    config, rng = smoke.config, np.random.default_rng(len(positions))
    if smoke.kernels.place is None:
        smoke.results.leave_out(what, "the chosen kernels store step by step")
        return
    sequences, kv_heads, head_size = len(positions), config.num_kv_heads, config.head_dim
    page = config.sliding_window if ring else kv_cache.PAGE_TOKENS
    width = 1 if ring else kv_cache.num_pages(max(positions) + 1)
    table = rng.permutation(sequences * width).reshape(sequences, width).astype(np.int32)
    stored = _bfloat16(rng, 2, sequences * width, page, kv_heads * head_size)
    projected = rng.standard_normal((sequences, kv_heads, config.num_heads // kv_heads + 2, head_size), np.float32)
    bias = _bfloat16(rng, *projected.shape[1:])
    angles = rng.random((sequences, head_size // 2), np.float32) * 6
    turns = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    expected = _expected(projected + bias.astype(np.float32), turns, stored.astype(np.float32), table, positions)
    kernel = smoke.kernels.place

    def run(projected: Any, bias: Any, turns: Any, k: Any, v: Any, table: Any, at: Any) -> jax.Array:
        found = kernel(projected, bias, turns, Stored(k, v, table), at)
        return jnp.concatenate([x.astype(jnp.float32).reshape(-1, head_size) for x in found])

    arguments = projected, bias, turns, *stored, table, np.array(positions, np.int32)
    before = stored.astype(np.float32).reshape(-1, head_size)
    smoke.judge(what, jax.jit(run), tuple(map(jnp.asarray, arguments)), _placed(expected, before))


def _bfloat16(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)


def _expected(x: np.ndarray, turns: np.ndarray, stored: np.ndarray, table: np.ndarray, positions: list[int]) -> Any:
    """Rows of a head: of the queries, then of all keys and values."""
    (first, second), (cosine, sine) = np.split(x, 2, axis=-1), turns.swapaxes(0, 1)[:, :, None, None]
    turned = np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    k, v = stored.copy()
    for sequence, position in enumerate(positions):
        if position >= 0:
            at = table[sequence, position // k.shape[1] % table.shape[1]], position % k.shape[1]
            k[at], v[at] = turned[sequence, :, -2].reshape(-1), x[sequence, :, -1].reshape(-1)
    return np.concatenate([rows.reshape(-1, x.shape[-1]) for rows in (turned[:, :, :-2], k, v)])


def _placed(expected: np.ndarray, before: np.ndarray) -> Compare:
    """Every row is near, and what was stored `before` and is expected still is the same."""
    stays = np.all(expected[-len(before) :] == before, axis=1)

    def compare(found: np.ndarray) -> tuple[bool, str, dict[str, Any]]:
        ok, said, entry = near(expected, ROW_ERROR)(found)
        changed = np.count_nonzero((found[-len(before) :] != before)[stays])
        said += f"; {changed} numbers of other tokens changed" * bool(changed)
        return ok and not changed, said, entry | {"changed": changed}

    return compare
