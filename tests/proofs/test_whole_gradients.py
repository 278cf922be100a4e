"""Gradients through the whole model: what stands between the ops, and every back end alike."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
import gptoss_jax
from gptoss_jax.model import kv_cache
from gptoss_jax.model.transformer import all_logits
from tests.unit.test_gradients import assert_close

LEARN = ("layers/0/attention/k/weight", "layers/1/attention/q/weight", "layers/1/attention/sinks", "embedding")
LEARN += ("layers/0/moe/router/weight", "layers/0/moe/gate_up/bias", "layers/1/moe/down/bias", "unembedding")


@pytest.fixture(scope="module")
def tokens():
    """A short text of the golden model's vocabulary."""
    return jnp.asarray(np.random.default_rng(5).integers(0, 500, (1, 9)), jnp.int32)


def _loss(model, tokens, leaves, params):
    """Mean negative log likelihood of each token given those before it, the named leaves of `params` replaced."""
    tree = jax.tree.map(lambda x: x, params)
    for path, leaf in leaves.items():
        *parents, last = _keys(path)
        functools.reduce(operator.getitem, parents, tree)[last] = leaf
    cache = kv_cache.empty(model.config, slots=1, pages=1, max_context_tokens=64, dtype=jnp.dtype(jnp.float32))
    counts = jnp.full(1, tokens.shape[1], jnp.int32)
    logits, _ = all_logits(model.model, tree, tokens, counts, cache)
    likely = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(likely, tokens[:, 1:, None], axis=-1))


def _leaves(params, dtype):
    return {path: functools.reduce(operator.getitem, _keys(path), params).astype(dtype) for path in LEARN}


def _keys(path: str) -> list[str | int]:
    return [int(key) if key.isdigit() else key for key in path.split("/")]


def test_the_whole_model_learns_in_the_direction_of_its_gradient(tiny_folder, tokens):
    """Guards what stands between the ops (the cache's writes, routing, norms): the slope is what small steps show."""
    model = gptoss_jax.load(tiny_folder, dtype="float32", kernels="reference")
    leaves = _leaves(model.params, jnp.float32)
    loss = jax.jit(lambda leaves: _loss(model, tokens, leaves, model.params))
    gradient = jax.jit(jax.grad(lambda leaves: _loss(model, tokens, leaves, model.params)))(leaves)
    for path, slope in gradient.items():
        size = float(jnp.linalg.norm(slope))
        assert size > 0, f"{path} learns nothing"
        step = 1e-3 / size**2  # moves the loss by a thousandth: far above rounding, far below a change of expert
        moved = [loss({**leaves, path: leaves[path] + sign * step * slope}) for sign in (1, -1)]
        np.testing.assert_allclose(float(moved[0] - moved[1]) / (2 * step), size**2, rtol=0.05, err_msg=path)


@pytest.mark.skipif(bool(cpu_kernels.why_not()), reason=str(cpu_kernels.why_not()))
def test_the_whole_model_learns_alike_through_kernels(tiny_folder, tokens):
    """Guards fine-tuning on every back end: the C++ kernels' gradients are the reference's."""
    slopes = []
    for kernels in ("reference", "cpu"):
        model = gptoss_jax.load(tiny_folder, dtype="float32", kernels=kernels)
        run = jax.jit(jax.grad(lambda leaves, model=model: _loss(model, tokens, leaves, model.params)))
        slopes.append(run(_leaves(model.params, jnp.bfloat16)))
    for path in LEARN:
        assert_close([slopes[1][path]], [slopes[0][path]])
