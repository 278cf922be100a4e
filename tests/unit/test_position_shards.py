"""Keys and values cut by position: who stores which token, what each shard's queries see, and one softmax of all."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.model import kv_cache, position_shards, sharding
from gptoss_jax.model.position_shards import PositionShard
from pallas_kernels import attention as attention_op
from tests.structures import attended, paged_kv
from tests.unit.test_kernels import _assert_close, _attend, all_of

PAGE = kv_cache.PAGE_TOKENS


@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_every_token_has_one_shard_and_every_key_is_seen_once(number):
    """Guards the cut against a count key by key: ends of pages, sequences shorter than a page, padding."""
    positions = np.array([[-1, 0, 1, PAGE - 1, PAGE, 2 * PAGE - 1, 2 * PAGE, 5 * PAGE + 7, 8 * PAGE, 17 * PAGE + 63]])
    keys = np.arange(20 * PAGE)
    owner = keys // PAGE % number
    held, seen = np.zeros(positions.shape, int), np.zeros(positions.shape, int)
    for index in range(number):
        shard = PositionShard(index, number)
        last = np.asarray(shard.last_seen(jnp.asarray(positions)))
        mine = keys[owner == index]  # in the order in which they lie in the shard's pages
        assert last.tolist() == (np.sum(mine <= positions[..., None], axis=-1) - 1).tolist()
        is_held = np.asarray(shard.holds(jnp.asarray(positions)))
        assert (mine[last[is_held]] == positions[is_held]).all()
        held, seen = held + is_held, seen + last + 1
    assert (held == (positions >= 0)).all() and (seen == positions + 1).all()


def test_the_first_shard_sees_a_key_of_every_query():
    """Guards sinks, which are on the first shard: where a query sees none of a shard's keys it is padding there."""
    positions = jnp.arange(4 * PAGE)[None]
    assert (PositionShard(0, 4).last_seen(positions) >= 0).all()
    assert (PositionShard(1, 4).last_seen(positions) < 0).any()
    sinks = jnp.array([1.0, -jnp.inf, 2.0])
    assert PositionShard(0, 4).sinks(sinks).tolist() == sinks.tolist()
    assert np.isneginf(PositionShard(3, 4).sinks(sinks)).all()


@pytest.mark.parametrize("tokens", [1, 3 * PAGE + 5])
def test_tokens_are_written_where_they_are_looked_for(tokens):
    """Guards prefill and decoding: chunks that begin and end anywhere, each in the pages of its own sequence."""
    number, starts, counts = 2, np.array([0, 100, 255]), np.array([tokens, max(1, tokens - 3), 0])
    ordinal = np.arange(tokens)
    positions = np.where(ordinal < counts[:, None], starts[:, None] + ordinal, -1).astype(np.int32)
    new = (1 + np.arange(3 * tokens, dtype=np.float32)).reshape(3, tokens, 1, 1)
    table = np.random.default_rng(0).permutation(12).reshape(3, 4).astype(np.int32)
    whole = np.zeros((12, number * PAGE))
    for i, token in itertools.product(range(3), range(tokens)):
        if (position := positions[i, token]) >= 0:
            page, place = divmod(position, number * PAGE)
            whole[table[i, page], place] = new[i, token, 0, 0]
    for index in range(number):
        (mine,), written = PositionShard(index, number).own((jnp.asarray(new),), jnp.asarray(positions))
        pool = kv_cache.write_pages(jnp.zeros((12, PAGE, 1)), mine, jnp.asarray(table), written)
        assert (np.asarray(pool)[..., 0] == whole[:, index * PAGE : (index + 1) * PAGE]).all()


def _call(number: int, tokens: int):
    """Ragged sequences on shuffled pages cut into `number` runs of keys, and what attention to all of them gives.

    What no query sees is NaN. Queries, pools [P, number, 64, K, H], table, positions, sinks, expected.
    """
    rng = np.random.default_rng(tokens)
    lengths, heads, kv_heads, size = np.array([0, 3, 70, 300]), 6, 2, 16
    pages = 1 + 350 // (number * PAGE)
    pools = rng.standard_normal((2, 4 * pages, number * PAGE, kv_heads, size)).astype(np.float32)
    table = rng.permutation(4 * pages).reshape(4, pages).astype(np.int32)
    q = rng.standard_normal((4, tokens, heads, size)).astype(np.float32) * 2
    sinks = rng.standard_normal(heads).astype(np.float32) * 2
    sinks[4] = -np.inf
    counts = np.array([tokens, max(1, tokens - 2), tokens, max(1, tokens // 2)])
    ordinal = np.arange(tokens)
    positions = np.where(ordinal < counts[:, None], lengths[:, None] + ordinal, -1).astype(np.int32)
    expected = []
    for i in range(4):
        keys, values = (pool[table[i]].reshape(-1, kv_heads, size) for pool in pools)
        expected.append(_attend(q[i], keys, values, sinks, np.arange(len(keys)) <= positions[i][:, None]))
        for page, start in enumerate(range(0, pages * number * PAGE, number * PAGE)):
            pools[:, table[i, page], max(0, int(positions[i].max()) + 1 - start) :] = np.nan
    pools = pools.reshape(2, 4 * pages, number, PAGE, kv_heads, size)
    return q, pools, table, positions, sinks, attended(*map(np.stack, zip(*expected, strict=True)))


@pytest.mark.parametrize("name", all_of(attention_op.IMPLEMENTATIONS))
@pytest.mark.parametrize("tokens", [1, 70])
def test_every_kernel_attends_to_a_shard(name, tokens):
    """Guards kernels against queries of a chunk that see equally many keys, or none, in the middle of it."""
    number = 3
    q, pools, table, positions, sinks, expected = _call(number, tokens)
    run, parts = jax.jit(attention_op.IMPLEMENTATIONS[name]), []
    for index in range(number):
        shard = PositionShard(index, number)
        kv = paged_kv(*(jnp.asarray(pool[:, index]) for pool in pools), jnp.asarray(table))
        last, own_sinks = shard.last_seen(jnp.asarray(positions)), shard.sinks(jnp.asarray(sinks))
        parts.append(run(jnp.asarray(q), kv, last, own_sinks))
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=1), *parts)
    _assert_close(attention_op.merge(stacked, axis=1), expected)


@pytest.mark.parametrize("mesh", ["sequence=8", "tensor=2,sequence=4"])
@pytest.mark.parametrize("tokens", [1, 70])
def test_devices_merge_their_parts_into_one_softmax(mesh, tokens):
    """Guards the sums over devices: a sink counted by each, padding that becomes NaN, heads of another device."""
    laid_out = sharding.make(mesh)
    number = laid_out.size("positions")
    q, pools, table, positions, sinks, expected = _call(number, tokens)
    k, v = (pool.reshape(pool.shape[0], -1, *pool.shape[3:]) for pool in pools)
    run = attention_op.IMPLEMENTATIONS["reference"]

    def attend(q, k, v, table, positions, sinks):
        shard = PositionShard(laid_out.index("positions"), number)
        part = run(q, paged_kv(k, v, table), shard.last_seen(positions), shard.sinks(sinks))
        return position_shards.merged(part, laid_out)

    by_head, pool = (None, None, "heads", None), ("pages", "positions", "heads", None)
    in_axes = (by_head, pool, pool, (None, None), (None, None), ("heads",))
    found = jax.jit(laid_out.map(attend, in_axes=in_axes, out_axes=by_head))(q, k, v, table, positions, sinks)
    is_token = positions >= 0
    np.testing.assert_allclose(np.asarray(found)[is_token], expected.out[is_token], rtol=1e-4, atol=1e-5)
    assert (np.asarray(found)[~is_token] == 0).all()
