"""Sampling: the right distribution, the same draw whatever the neighbours, and nothing that has no name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import sampling
from gptoss_jax.sampling import FAULTY, Sampling, SamplingParams


def _sample(logits, temperature, seed, positions, num_token_ids=None):
    rows = len(logits)
    fill = lambda value, dtype: np.broadcast_to(np.asarray(value, dtype), (rows,)).copy()  # noqa: E731
    token, logprob = jax.jit(sampling.sample, static_argnums=3)(
        jnp.asarray(logits, jnp.float32),
        Sampling(jnp.asarray(fill(temperature, np.float32)), jnp.asarray(fill(seed, np.uint32))),
        jnp.asarray(fill(positions, np.int32)),
        num_token_ids or np.shape(logits)[1],
    )
    return np.asarray(token), np.asarray(logprob)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    """Guards the temperature: 20,000 draws against exact probabilities, chi-square at 1 in 10,000."""
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5, -30.0])
    exact = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    draws, _ = _sample(np.tile(logits, (20_000, 1)), temperature, 7, np.arange(20_000))
    counts = np.bincount(draws, minlength=6)
    assert counts[5] == 0  # expected far less than one
    chi_square = ((counts - 20_000 * exact)[:5] ** 2 / (20_000 * exact[:5])).sum()
    assert chi_square < 23.5  # 4 degrees of freedom


def test_seeds_are_independent():
    """Guards the key: draws at the same position under other seeds follow the distribution as well."""
    draws, _ = _sample(np.zeros((20_000, 4)), 1.0, np.arange(20_000), 5)
    chi_square = ((np.bincount(draws, minlength=4) - 5_000) ** 2 / 5_000).sum()
    assert chi_square < 21.1  # 3 degrees of freedom, 1 in 10,000


def test_zero_is_greedy_beside_rows_that_draw():
    """Guards mixtures in one batch: a greedy row stays greedy, ties going to the lower id."""
    logits = np.tile([1.0, 3.0, 3.0, 2.0], (4, 1))
    draws, logprobs = _sample(logits, [0.0, 5.0, 0.0, 1e-30], [0, 1, 2, 3], 0)
    assert draws[[0, 2]].tolist() == [1, 1]
    assert draws[3] in (1, 2)
    np.testing.assert_allclose(logprobs[0], 3 - np.log(np.exp([1, 3, 3, 2]).sum()), rtol=1e-6)


def test_a_row_draws_the_same_alone():
    """Guards determinism: neighbours, their number and their order do not matter."""
    logits = np.random.default_rng(0).standard_normal((8, 50))
    seeds, positions = np.arange(8) * 11, np.arange(8) * 3
    together, _ = _sample(logits, 1.0, seeds, positions)
    order = np.random.default_rng(1).permutation(8)
    shuffled, _ = _sample(logits[order], 1.0, seeds[order], positions[order])
    assert shuffled.tolist() == together[order].tolist()
    alone = [int(_sample(logits[i : i + 1], 1.0, seeds[i], positions[i])[0][0]) for i in range(8)]
    assert alone == together.tolist()


def test_unnamed_ids_are_never_drawn():
    """Guards the embedding's padding rows: ids from 200,019 have no token, yet may have the largest logit."""
    logits = np.zeros((2000, 10))
    logits[:, 7:] = 50
    draws, _ = _sample(logits, 1.0, 3, np.arange(2000), num_token_ids=7)
    assert set(draws) == set(range(7))
    assert (_sample(logits[:1], 0.0, 3, 0, num_token_ids=7)[0] < 7).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_flagged(bad):
    """Guards against token 0 coming out of a broken model as if it were an answer."""
    logits = np.zeros((2, 5))
    logits[1, 3] = bad
    for temperature in (0.0, 1.0):
        token, _ = _sample(logits, temperature, 0, 0)
        assert token[0] != FAULTY
        assert token[1] == FAULTY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected 0 to 10000"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e39}, "temperature is 1e.39, expected 0 to 10000"),
        ({"seed": 2**32}, "seed is 4294967296, expected 0 to 4294967295"),
    ],
)
def test_bad_parameters_are_refused(changes, message):
    """Guards the message."""
    with pytest.raises(ValueError, match=message):
        SamplingParams(**changes)
