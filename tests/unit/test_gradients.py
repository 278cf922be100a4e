"""Gradients through every implementation, against JAX's own derivative of the same formulas written densely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention as attention_op
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels import linear as linear_op
from pallas_kernels import mxfp4
from tests.unit.test_kernels import SHAPES, all_of, choices_of, random_experts

LIMIT = 7.0


def assert_close(found, expected) -> None:
    """Each gradient within 0.2 % of the largest element expected of it, none of them all zeros."""
    for name, a, b in zip(("first", "second", "third", "fourth"), found, expected, strict=False):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(b).max() > 0, f"the {name} gradient is nothing to compare with"
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * np.abs(b).max(), err_msg=name)


def _dense_experts(x, shares, gate_up_bias, down_bias, ids, weights):
    """Every expert on every token, then those that were chosen."""
    gate_up = mxfp4.dequantize(weights.gate_up_blocks, weights.gate_up_scales, jnp.float32)
    down = mxfp4.dequantize(weights.down_blocks, weights.down_scales, jnp.float32)
    h = jnp.einsum("td,efd->tef", x, gate_up, precision="highest") + gate_up_bias.astype(jnp.float32)
    gate, linear = jnp.minimum(h[..., 0::2], LIMIT), jnp.clip(h[..., 1::2], -LIMIT, LIMIT)
    y = jnp.einsum("tef,edf->ted", gate * jax.nn.sigmoid(1.702 * gate) * (linear + 1), down, precision="highest")
    y = y + down_bias.astype(jnp.float32)
    chosen = jax.nn.one_hot(ids, y.shape[1], dtype=jnp.float32) * shares[..., None]
    return jnp.einsum("txe,ted->td", chosen, y, precision="highest")


@pytest.mark.parametrize("name", all_of(expert_op.IMPLEMENTATIONS))
@pytest.mark.parametrize("routing", ["random", "with skipped choices"])
def test_experts(name, routing):
    """Guards fine-tuning: x, the router's weights and both biases learn; rows that are padding or skipped do not."""
    tokens, hidden, inner, experts, choices = SHAPES["fewer tokens than experts"]
    rng = np.random.default_rng(1)
    weights = jax.tree.map(jnp.asarray, random_experts(rng, hidden, inner, experts))
    ids = jnp.asarray(choices_of(rng, routing, tokens, experts, choices))
    x, shares = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((tokens, hidden), ids.shape))
    towards = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    implementation = expert_op.IMPLEMENTATIONS[name]
    packed = expert_op.packed(implementation.layout, weights)

    def loss(x, shares, gate_up_bias, down_bias):
        biased = packed._replace(gate_up_bias=gate_up_bias, down_bias=down_bias)
        return jnp.sum(implementation.run(x, ids, shares, biased, limit=LIMIT) * towards)

    def dense(x, shares, gate_up_bias, down_bias):
        return jnp.sum(_dense_experts(x, shares, gate_up_bias, down_bias, ids, weights) * towards)

    floats = x, shares, packed.gate_up_bias, packed.down_bias
    *found, d_gate_up, d_down = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*floats)
    layout = implementation.layout
    found += [layout.gate_up_bias.unpack(d_gate_up), layout.down_bias.unpack(d_down)]
    bias = weights.gate_up_bias.astype(jnp.float32), weights.down_bias.astype(jnp.float32)
    assert_close(found, jax.grad(dense, argnums=(0, 1, 2, 3))(x, shares, *bias))


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


def _dense_attention(q, k, v, sinks, visible):
    """One row: q [T, N, H], k and v [S, K, H], visible [T, S]."""
    k, v = (jnp.repeat(a, q.shape[1] // k.shape[1], axis=1) for a in (k, v))
    logits = jnp.einsum("tnh,snh->nts", q, k, precision="highest") * q.shape[-1] ** -0.5
    logits = jnp.where(visible, logits, -jnp.inf)
    logits = jnp.concatenate([logits, jnp.broadcast_to(sinks[:, None, None], (*logits.shape[:2], 1))], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., :-1]
    return jnp.einsum("nts,snh->tnh", weights, v, precision="highest")


@pytest.mark.parametrize("name", all_of(attention_op.IMPLEMENTATIONS))
def test_paged_attention(name):
    """Guards fine-tuning through pages: queries, every page's keys and values, and the sinks; NaN in free slots."""
    rng = np.random.default_rng(3)
    rows, tokens, heads, kv_heads, size, page, pages = 2, 3, 6, 2, 16, 8, 5
    q = jnp.asarray(rng.standard_normal((rows, tokens, heads, size)), jnp.float32)
    pool = [jnp.asarray(rng.standard_normal((7, page, kv_heads, size)), jnp.float32) for _ in range(2)]
    table = jnp.asarray([[6, 1, 3, 0, 0], [2, 5, 0, 0, 0]], jnp.int32)
    positions = jnp.asarray([[18, 19, 20], [9, 10, -1]], jnp.int32)
    sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32)
    towards = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    spoilt = [p.at[3, 5:].set(jnp.nan).at[4].set(jnp.nan) for p in pool]

    def loss(q, k, v, sinks):
        return jnp.sum(attention_op.IMPLEMENTATIONS[name].paged(q, k, v, table, positions, sinks) * towards)

    def dense(q, k, v, sinks):
        total = 0.0
        for row in range(rows):
            keys, values = (p[table[row]].reshape(pages * page, kv_heads, size) for p in (k, v))
            visible = jnp.arange(pages * page) <= positions[row][:, None]
            total += jnp.sum(_dense_attention(q[row], keys, values, sinks, visible) * towards[row])
        return total

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, *spoilt, sinks)
    assert_close(found, jax.grad(dense, argnums=(0, 1, 2, 3))(q, *pool, sinks))


@pytest.mark.parametrize("name", all_of(attention_op.IMPLEMENTATIONS))
def test_banded_attention(name):
    """Guards fine-tuning through the ring: what it held and what is new both learn."""
    rng = np.random.default_rng(4)
    tokens, heads, kv_heads, size, window, behind = 5, 6, 2, 16, 4, 7
    q = jnp.asarray(rng.standard_normal((1, tokens, heads, size)), jnp.float32)
    ring = [jnp.asarray(rng.standard_normal((1, window, kv_heads, size)), jnp.float32) for _ in range(2)]
    new = [jnp.asarray(rng.standard_normal((1, tokens, kv_heads, size)), jnp.float32) for _ in range(2)]
    start, positions = jnp.asarray([behind], jnp.int32), behind + jnp.arange(tokens, dtype=jnp.int32)[None]
    sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32)
    towards = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)

    def loss(q, k_ring, v_ring, k_new, v_new, sinks):
        run = attention_op.IMPLEMENTATIONS[name].banded
        return jnp.sum(run(q, k_ring, v_ring, k_new, v_new, start, positions, sinks) * towards)

    def dense(q, k_ring, v_ring, k_new, v_new, sinks):
        order = (behind + jnp.arange(window)) % window
        k, v = (jnp.concatenate([r[0, order], n[0]]) for r, n in ((k_ring, k_new), (v_ring, v_new)))
        distance = positions[0][:, None] - (behind - window + jnp.arange(window + tokens))
        return jnp.sum(_dense_attention(q[0], k, v, sinks, (distance >= 0) & (distance < window)) * towards[0])

    arguments = q, *ring, *new, sinks
    found = jax.jit(jax.grad(loss, argnums=tuple(range(6))))(*arguments)
    for a, b in zip(found, jax.grad(dense, argnums=tuple(range(6)))(*arguments), strict=True):
        assert_close([a], [b])
