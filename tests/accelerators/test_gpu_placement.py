"""The kernel that rotates a decoded token and stores its key and value: against jnp, and what it must leave alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import interpreter, placement
from pallas_kernels.interpreter import InterpretGPUParams
from pallas_kernels.placement import Stored, gpu


def _call(dtype, sequences: int = 3, kv_heads: int = 2, group: int = 3, head_size: int = 64, pages: int = 2):
    """Arguments, of a pool of `pages` pages of 8 tokens a sequence; the second sequence's token is padding."""
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    table = jnp.asarray(rng.permutation(sequences * pages).reshape(sequences, pages), jnp.int32)
    stored = [normal(sequences * pages, 8, kv_heads * head_size, dtype=dtype) for _ in range(2)]
    projected, bias = normal(sequences, kv_heads, group + 2, head_size), normal(kv_heads, group + 2, head_size)
    turns = normal(sequences, 2, head_size // 2)
    positions = jnp.array([13, -1, 6][:sequences], jnp.int32)
    return projected, bias.astype(jnp.bfloat16), turns, Stored(stored[0], stored[1], table), positions


def _expected(projected, bias, turns, stored, positions):
    """The same, step by step, in jnp."""
    x = projected + bias.astype(jnp.float32)
    (first, second), (cosine, sine) = jnp.split(x, 2, -1), (turns[:, i, None, None] for i in (0, 1))
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)
    k, v = (np.array(each) for each in stored[:2])
    for i, position in enumerate(np.asarray(positions)):
        if position >= 0:
            at = stored.page_table[i, position // 8 % stored.page_table.shape[1]], position % 8
            k[at], v[at] = (np.asarray(each[i].astype(k.dtype)).reshape(-1) for each in (turned[:, :, -2], x[:, :, -1]))
    return turned[:, :, :-2].astype(k.dtype), k, v


@pytest.mark.parametrize(("dtype", "pages"), [(jnp.bfloat16, 2), (jnp.float32, 1)])
def test_queries_and_cache(dtype, pages):
    """Guards pairs, heads, the value that does not turn, pages, a ring gone round, padding, which writes nothing."""
    arguments = _call(dtype, pages=pages)
    found = placement.IMPLEMENTATIONS["gpu-interpreted"](*arguments)
    for ours, theirs in zip(found, _expected(*arguments), strict=True):
        np.testing.assert_allclose(
            np.float32(ours), np.float32(theirs), rtol=1e-2 if dtype == jnp.bfloat16 else 1e-6, atol=1e-6
        )


def test_nothing_races():
    """Guards shared memory: nothing is read before it came, nor stored before it was written."""
    run = functools.partial(gpu.place, interpret=InterpretGPUParams(detect_races=True))
    jax.block_until_ready(jax.jit(run)(*_call(jnp.bfloat16, sequences=1, kv_heads=1)))
    assert not interpreter.races_found()


def test_heads_that_do_not_fit_are_refused():
    """Guards against rows beyond the layout's, which would be dropped in silence."""
    with pytest.raises(ValueError, match="place: 63 query heads of 64 a key/value head, expected up to 62 of 16 n"):
        gpu.place(*_call(jnp.bfloat16, group=63))
