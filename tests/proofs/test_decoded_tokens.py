"""A decoded token in the form that GPUs run, with few launches, against the step-by-step form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.model import kv_cache, layers, sharding, transformer
from gptoss_jax.model.layers import Kernels
from gptoss_jax.runtime import weight_transforms
from pallas_kernels.choice import Hardware
from tests.unit.test_few_launches import CONFIG, random_leaves

FLOAT32 = transformer.DTYPE_POLICIES["float32"]


def _filled(laid_out, slots: int) -> kv_cache.KVCache:
    """A cache of random keys and values, each slot with pages of its own."""
    sizes = {"slots": slots, "pages": 4 * slots, "max_context_tokens": 256}
    cache = kv_cache.allocator(CONFIG, laid_out, dtype=FLOAT32.cache, **sizes)()
    rng = np.random.default_rng(1)
    k, v = (tuple(jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype) for x in stored) for stored in (cache.k, cache.v))
    table = jnp.arange(4 * slots, dtype=jnp.int32).reshape(slots, 4)
    return cache._replace(k=k, v=v, page_table=table, lengths=jnp.array([140, 5, 70], jnp.int32))


@pytest.mark.parametrize(
    ("mesh", "dense", "names"),
    [("", "bfloat16", "reference"), ("tensor=2", "int8", "reference"), ("", "int8", "attention=gpu-interpreted")],
)
def test_a_decoded_token_gives_the_same_logits(mesh, dense, names):
    """Guards joined projections, cut by a mesh or in eight bits, rings that are written before they are read, and the
    kernel that rotates and stores.

    One slot's ring has wrapped around, one is filling, one is not active: what it holds may not change.
    """
    laid_out = sharding.make(mesh)
    kernels = layers.choose_kernels(f"{names},linear=reference" if "=" in names else names, Hardware("cpu"))[0]
    plain, few = (
        transformer.declare(CONFIG, laid_out, of, FLOAT32)
        for of in (Kernels(), kernels._replace(few_launches=True, expert_mlp=Kernels().expert_mlp))
    )
    ways = [weight_transforms.to_devices(plain, laid_out), weight_transforms.to_dense_format(plain, dense)]
    params = transformer.nest(dict(weight_transforms.apply(ways, random_leaves(CONFIG).items())))
    joined = weight_transforms.join_projections(params)
    assert isinstance(joined["layers"][1]["attention"]["q"]["weight"], layers.Joined)
    start = _filled(laid_out, 3)
    steps = [jax.jit(functools.partial(transformer.step, model)) for model in (plain, few)]
    caches = [start, start]
    for tokens in ([[7], [300], [11]], [[8], [301], [12]]):
        inputs = jnp.asarray(tokens, jnp.int32), jnp.array([1, 1, 0], jnp.int32)
        found = [step(of, *inputs, cache) for step, of, cache in zip(steps, (params, joined), caches, strict=True)]
        caches = [cache for _, cache in found]
        theirs, ours = (np.asarray(logits)[:2] for logits, _ in found)
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
        assert np.abs(theirs).max() > 0.5
    for before, theirs, ours in zip(*((*cache.k, *cache.v) for cache in (start, *caches)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        own = slice(2, 3) if before.shape[1] > kv_cache.PAGE_TOKENS else slice(8, 12)  # the slot that is not active
        np.testing.assert_array_equal(ours[own], before[own])
