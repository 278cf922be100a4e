"""What accelerators do to launch less for a token gives what is computed without it: routing, projections, rings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.random_checkpoint import with_vocab_size
from gptoss_jax.model import experts, layers, sharding, transformer
from gptoss_jax.model.config import ModelConfig, parse_config
from gptoss_jax.runtime import weight_transforms
from pallas_kernels.choice import Hardware
from tests.goldens import make as golden

CONFIG = parse_config(with_vocab_size(golden.two_layers_config(), 512) | {"intermediate_size": 128})


def random_leaves(config: ModelConfig, seed: int = 0) -> dict[str, jax.Array]:
    """Weights by path: small numbers, and bytes under scales near 2^-7."""
    rng, leaves = np.random.default_rng(seed), {}
    for path, leaf in transformer.declare(config, sharding.make()).leaves.items():
        if leaf.dtype == jnp.uint8:
            low, high = (118, 122) if path.endswith("scales") else (0, 256)
            leaves[path] = jnp.asarray(rng.integers(low, high, leaf.shape), jnp.uint8)
        else:
            leaves[path] = jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype)
    return leaves


def test_projections_with_adapters_stay_apart():
    """Guards adapters: they stand beside one projection's weight, and a joined one has no such place."""
    params = transformer.nest(random_leaves(CONFIG))
    query = params["layers"][0]["attention"]["q"]
    query["weight"] = layers.Adapted(query["weight"], jnp.zeros((2, 96)), jnp.zeros((6, 64, 2)))
    joined = weight_transforms.join_projections(params)
    assert isinstance(joined["layers"][0]["attention"]["q"]["weight"], layers.Adapted)
    assert isinstance(joined["layers"][1]["attention"]["q"]["weight"], layers.Joined)


def test_gpus_alone_launch_less():
    """Guards CPUs and TPUs, whose programs are to stay as they are; the kernel that stores is for Hopper alone."""
    found = {}
    for platform, capability in (("cpu", ""), ("tpu", ""), ("gpu", "8.0"), ("gpu", "9.0")):
        names = "auto" if capability == "9.0" else "reference"
        kernels, _ = layers.choose_kernels(names, Hardware(platform, "", capability))
        found[platform + capability] = kernels.few_launches, kernels.place is not None
    assert found == {"cpu": (False, False), "tpu": (False, False), "gpu8.0": (True, False), "gpu9.0": (True, True)}


@pytest.mark.parametrize(("num_experts", "top_k"), [(7, 4), (32, 4)])
def test_counting_chooses_as_sorting_does(num_experts, top_k):
    """Guards routing on accelerators: the same experts in the same order, ties too, the same weights and gradients."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.integers(-3, 3, (64, num_experts)) / 2, jnp.float32)  # many ties
    is_token = jnp.arange(64) % 5 > 0

    def weights_and_ids(way, logits):
        ids, weights = way(logits, is_token, top_k)
        return jnp.sum(weights**2), (ids, weights)

    @jax.jit
    def both(logits):
        ways = (experts._sorted, experts._counted)
        return [jax.grad(functools.partial(weights_and_ids, way), has_aux=True)(logits) for way in ways]

    (pulled, (ids, weights)), (counted_pulled, (counted_ids, counted_weights)) = both(logits)
    np.testing.assert_array_equal(counted_ids, ids)
    np.testing.assert_allclose(counted_weights, weights, rtol=1e-6)
    np.testing.assert_allclose(counted_pulled, pulled, atol=1e-6)
