"""Gradients through every implementation, against JAX's own derivative of the same formulas written densely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention as attention_op
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels import linear as linear_op
from tests.structures import paged_kv
from tests.unit.test_kernels import SHAPES, adapted_call, all_of, assignments_of, dense_experts, random_experts

LIMIT = 7.0


def assert_close(found, expected) -> None:
    """Each gradient within 0.2 % of the largest element expected of it, none of them all zeros."""
    for name, a, b in zip(("first", "second", "third", "fourth"), found, expected, strict=False):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(b).max() > 0, f"the {name} gradient is nothing to compare with"
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("name", all_of(expert_op.IMPLEMENTATIONS))
@pytest.mark.parametrize("routing", ["random", "with skipped assignments"])
def test_experts(name, routing):
    """Guards fine-tuning: x, routing weights and both biases learn; tokens that are padding or skipped do not."""
    tokens, hidden, inner, experts, top_k = SHAPES["fewer tokens than experts"]
    rng = np.random.default_rng(1)
    weights = jax.tree.map(jnp.asarray, random_experts(rng, hidden, inner, experts))
    ids = jnp.asarray(assignments_of(rng, routing, tokens, experts, top_k))
    x, shares = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((tokens, hidden), ids.shape))
    towards = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    implementation = expert_op.IMPLEMENTATIONS[name]
    packed = expert_op.packed(implementation.layout, weights)

    def loss(x, shares, gate_up_bias, down_bias):
        biased = packed._replace(gate_up_bias=gate_up_bias, down_bias=down_bias)
        return jnp.sum(implementation.run(x, ids, shares, biased, limit=LIMIT) * towards)

    def dense(x, shares, gate_up_bias, down_bias, weights):  # an argument: XLA folds constants of four bits wrongly
        biased = weights._replace(gate_up_bias=gate_up_bias, down_bias=down_bias)
        return jnp.sum(dense_experts(x, ids, shares, biased, (None, None), LIMIT) * towards)

    floats = x, shares, packed.gate_up_bias, packed.down_bias
    *found, d_gate_up, d_down = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*floats)
    layout = implementation.layout
    found += [layout.gate_up_bias.unpack(d_gate_up), layout.down_bias.unpack(d_down)]
    bias = weights.gate_up_bias.astype(jnp.float32), weights.down_bias.astype(jnp.float32)
    assert_close(found, jax.jit(jax.grad(dense, argnums=(0, 1, 2, 3)))(x, shares, *bias, weights))


def test_adapters():
    """Guards fine-tuning of adapters: both factors of both learn, and x learns through them."""
    (x, ids, shares), weights, adapters = adapted_call()
    towards = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)

    def loss(x, gate_up, down):
        adapted = weights._replace(gate_up_adapter=gate_up, down_adapter=down)
        return jnp.sum(expert_op.IMPLEMENTATIONS["reference"].run(x, ids, shares, adapted, limit=LIMIT) * towards)

    def dense(x, gate_up, down, weights):
        return jnp.sum(dense_experts(x, ids, shares, weights, (gate_up, down), LIMIT) * towards)

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, *adapters)
    expected = jax.jit(jax.grad(dense, argnums=(0, 1, 2)))(x, *adapters, weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close([a], [b])


@pytest.mark.parametrize("name", all_of(linear_op.IMPLEMENTATIONS))
def test_linear(name):
    """Guards fine-tuning of dense weights through every kernel; whole numbers (int8) have no gradient."""
    rng = np.random.default_rng(2)
    x, w, towards = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 96), (40, 96), (5, 40)))
    w = w.astype(jnp.bfloat16)
    run = linear_op.IMPLEMENTATIONS[name]
    found = jax.jit(jax.grad(lambda x, w: jnp.sum(run(x, w) * towards), argnums=(0, 1)))(x, w)
    assert_close(found, (towards @ w.astype(jnp.float32), towards.T @ x))
    assert found[1].dtype == jnp.bfloat16
    whole = jnp.asarray(rng.integers(-127, 128, (40, 96)), jnp.int8)
    assert_close([jax.grad(lambda x: jnp.sum(run(x, whole) * towards))(x)], [towards @ whole.astype(jnp.float32)])


def _dense_attention(q, k, v, sinks, visible) -> attention_op.Attended:
    """One sequence: q [T, N, H], k and v [S, K, H], visible [T, S]."""
    k, v = (jnp.repeat(a, q.shape[1] // k.shape[1], axis=1) for a in (k, v))
    logits = jnp.einsum("tnh,snh->nts", q, k, precision="highest") * q.shape[-1] ** -0.5
    logits = jnp.where(visible, logits, -jnp.inf)
    logits = jnp.concatenate([logits, jnp.broadcast_to(sinks[:, None, None], (*logits.shape[:2], 1))], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., :-1]
    lse = jax.nn.logsumexp(logits, axis=-1)
    return attention_op.Attended(jnp.einsum("nts,snh->tnh", weights, v, precision="highest"), lse.T)


def _towards(found: attention_op.Attended, targets: attention_op.Attended, positions) -> jax.Array:
    """A loss of the output and of the lse, without padding's lse, which is -inf."""
    lse = jnp.where(positions[..., None] < 0, 0, found.lse)
    return jnp.sum(found.out * targets.out) + jnp.sum(lse * targets.lse)


def _targets(rng: np.random.Generator, *shape: int) -> attention_op.Attended:
    return attention_op.Attended(*(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (shape, shape[:-1])))


@pytest.mark.parametrize("name", all_of(attention_op.IMPLEMENTATIONS))
def test_paged_attention(name):
    """Guards fine-tuning through pages: queries, every page's keys and values, and the sinks; NaN in free slots."""
    rng = np.random.default_rng(3)
    sequences, tokens, heads, kv_heads, size, page, pages = 2, 3, 6, 2, 16, 8, 5
    q = jnp.asarray(rng.standard_normal((sequences, tokens, heads, size)), jnp.float32)
    pool = [jnp.asarray(rng.standard_normal((7, page, kv_heads, size)), jnp.float32) for _ in range(2)]
    table = jnp.asarray([[6, 1, 3, 0, 0], [2, 5, 0, 0, 0]], jnp.int32)
    positions = jnp.asarray([[18, 19, 20], [9, 10, -1]], jnp.int32)
    sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32)
    targets = _targets(rng, *q.shape)
    spoilt = [p.at[3, 5:].set(jnp.nan).at[4].set(jnp.nan) for p in pool]

    def loss(q, k, v, sinks):
        found = attention_op.IMPLEMENTATIONS[name](q, attention_op.PagedKV(k, v, table), positions, sinks)
        return _towards(found, targets, positions)

    def dense(q, k, v, sinks):
        def one_sequence(q, table, positions):
            keys, values = (p[table].reshape(pages * page, kv_heads, size) for p in (k, v))
            return _dense_attention(q, keys, values, sinks, jnp.arange(pages * page) <= positions[:, None])

        return _towards(jax.vmap(one_sequence)(q, table, positions), targets, positions)

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, *spoilt, sinks)
    assert_close(found, jax.jit(jax.grad(dense, argnums=(0, 1, 2, 3)))(q, *pool, sinks))


@pytest.mark.parametrize("name", all_of(attention_op.IMPLEMENTATIONS))
def test_sliding_window_attention(name):
    """Guards fine-tuning through the ring: what it held and what is new both learn; NaN in slots never written."""
    rng = np.random.default_rng(4)
    tokens, heads, kv_heads, size, window, start = 5, 6, 2, 16, 4, 3
    q = jnp.asarray(rng.standard_normal((1, tokens, heads, size)), jnp.float32)
    ring = [jnp.asarray(rng.standard_normal((1, window, kv_heads, size)), jnp.float32) for _ in range(2)]
    new = [jnp.asarray(rng.standard_normal((1, tokens, kv_heads, size)), jnp.float32) for _ in range(2)]
    positions = (start + jnp.arange(tokens, dtype=jnp.int32)[None]).at[0, -1].set(-1)
    sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32)
    targets = _targets(rng, *q.shape)
    spoilt = [r.at[0, start].set(jnp.nan) for r in ring], [n.at[0, -1].set(jnp.nan) for n in new]

    def loss(q, k, v, k_new, v_new, sinks):
        kv = attention_op.RingKV(k, v, k_new, v_new, jnp.asarray([start], jnp.int32))
        return _towards(attention_op.IMPLEMENTATIONS[name](q, kv, positions, sinks), targets, positions)

    def dense(q, k, v, k_new, v_new, sinks):
        order = (start + jnp.arange(window)) % window
        k, v = (jnp.concatenate([r[0, order], n[0]]) for r, n in ((k, k_new), (v, v_new)))
        keys = start - window + jnp.arange(window + tokens)
        distance = positions[0][:, None] - keys
        visible = (distance >= 0) & (distance < window) & (keys >= 0) & (positions[0] >= 0)[:, None]
        found = _dense_attention(q[0], k, v, sinks, visible)
        return _towards(attention_op.Attended(found.out[None], found.lse[None]), targets, positions)

    found = jax.jit(jax.grad(loss, argnums=tuple(range(6))))(q, *spoilt[0], *spoilt[1], sinks)
    expected = jax.jit(jax.grad(dense, argnums=tuple(range(6))))(q, *ring, *new, sinks)
    for a, b in zip(found, expected, strict=True):
        assert_close([a], [b])


@pytest.mark.parametrize("name", all_of(["reference", "cpu"]))
@pytest.mark.parametrize("window", [None, 9])
def test_attention_without_a_cache(name, window):
    """Guards training: sequences as pages of their own, or as new tokens after an empty ring, are plain attention."""
    rng = np.random.default_rng(5)
    sequences, tokens, heads, kv_heads, size, page = 2, 16, 6, 2, 16, 8
    q = jnp.asarray(rng.standard_normal((sequences, tokens, heads, size)), jnp.float32)
    k, v = jnp.asarray(rng.standard_normal((2, sequences, tokens, kv_heads, size)), jnp.float32)
    sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (sequences, tokens))
    targets = _targets(rng, *q.shape)

    def attend(q, k, v, sinks):
        if window is None:
            pages = jnp.arange(sequences * tokens // page, dtype=jnp.int32).reshape(sequences, -1)
            kv = paged_kv(*(x.reshape(-1, page, kv_heads, size) for x in (k, v)), pages)
        else:
            empty = jnp.zeros((sequences, window, kv_heads, size), jnp.float32)
            kv = attention_op.RingKV(empty, empty, k, v, jnp.zeros(sequences, jnp.int32))
        return attention_op.IMPLEMENTATIONS[name](q, kv, positions, sinks)

    def dense(q, k, v, sinks):
        distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
        visible = (distance >= 0) & (distance < (window or tokens))
        return jax.vmap(lambda q, k, v: _dense_attention(q, k, v, sinks, visible))(q, k, v)

    def slopes_and_values(attention):
        def loss(*floats):
            found = attention(*floats)
            return _towards(found, targets, positions), found

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, sinks)

    (slopes, found), (dense_slopes, expected) = map(slopes_and_values, (attend, dense))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert_close(slopes, dense_slopes)


def test_merged_attentions():
    """Guards sequence-parallel training: gradients reach both parts through `merge`, and padding sends none back."""
    rng = np.random.default_rng(6)
    tokens, heads, kv_heads, size, page = 12, 6, 2, 16, 4
    q = jnp.asarray(rng.standard_normal((1, tokens, heads, size)), jnp.float32)
    k, v = jnp.asarray(rng.standard_normal((2, 1, tokens, kv_heads, size)), jnp.float32)
    sinks, targets = jnp.asarray(rng.standard_normal(heads), jnp.float32), _targets(rng, *q.shape)
    positions, first = jnp.arange(tokens, dtype=jnp.int32)[None], 8  # keys of the first part

    def attend(q, k, v, sinks):
        def part(keys: slice, sinks):
            pools = (x[:, keys].reshape(-1, page, kv_heads, size) for x in (k, v))
            pages = jnp.arange(-(-(keys.stop - keys.start) // page), dtype=jnp.int32)[None]
            where = jnp.minimum(jnp.maximum(positions - keys.start, -1), keys.stop - keys.start - 1)
            run = attention_op.IMPLEMENTATIONS["reference"]
            return run(q, paged_kv(*pools, pages), where, sinks)

        parts = part(slice(0, first), sinks), part(slice(first, tokens), jnp.full_like(sinks, -jnp.inf))
        return attention_op.merge(jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts), axis=0)

    def dense(q, k, v, sinks):
        found = _dense_attention(q[0], k[0], v[0], sinks, jnp.tril(jnp.ones((tokens, tokens), bool)))
        return jax.tree.map(lambda x: x[None], found)

    def slopes(attention):
        return jax.jit(jax.grad(lambda *floats: _towards(attention(*floats), targets, positions), argnums=(0, 1, 2, 3)))

    assert_close(slopes(attend)(q, k, v, sinks), slopes(dense)(q, k, v, sinks))
