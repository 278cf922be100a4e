"""Sampling: every option against NumPy, the right distributions, the same draw whatever the neighbours."""

import dataclasses
import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import ArrayLike
from scipy import stats  # jax brings scipy

import cpu_kernels
from cpu_kernels import sampling as cpu_sampling
from gptoss_jax.engine import sampling, truncation
from gptoss_jax.engine.sampling import FAULTY, Asked, Draw
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model.invariant_sum import invariant_log, invariant_sum
from tests.goldens import make as golden

V = 50
LOGITS = np.random.default_rng(0).normal(0, 2, (8, V)).astype(np.float32)
PROMPT, ANSWER = (3, 3, 7, 11), (7, 20, 20, 20, 31)
CHANCE = 1e-4  # of a right sampler failing a chi-square test; seeds are fixed, so a test that passes keeps passing


def _slots(params, num_token_ids=V, vocab_size=V) -> tuple[sampling.Sampling, jax.Array]:
    """Slots of these parameters, after PROMPT and ANSWER where the vocabulary has their ids."""
    has_ids = vocab_size == V
    slots = [sampling.constants(p, PROMPT if has_ids else (), vocab_size, num_token_ids) for p in params]
    counts = sampling.count_ids(ANSWER if has_ids else (), vocab_size)
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *slots), jnp.asarray(np.stack([counts] * len(params)))


_jitted: Any = jax.jit(sampling.sample, static_argnums=4)


def _sample(logits, params, positions: ArrayLike = 0, num_token_ids=None) -> Draw:
    """One draw of each slot; `params` is for all slots, or one for each."""
    logits = np.asarray(logits, np.float32)
    params = params if isinstance(params, list) else [params] * len(logits)
    num_token_ids = num_token_ids or logits.shape[1]
    positions = np.broadcast_to(np.asarray(positions, np.int32), (len(logits),)).copy()
    slots = _slots(params, num_token_ids, logits.shape[1])
    return jax.tree.map(np.asarray, _jitted(logits, *slots, positions, num_token_ids))


def _many(logits, params, draws) -> np.ndarray:
    """How often each id comes out of `draws` draws at positions 0, 1, 2, ..."""
    one = _slots([params], len(logits), len(logits))
    slots = jax.tree.map(lambda x: jnp.broadcast_to(x, (draws, *x.shape[1:])), one)
    tiled = np.broadcast_to(np.asarray(logits, np.float32), (draws, len(logits)))
    token = _jitted(tiled, *slots, np.arange(draws, dtype=np.int32), len(logits)).token
    return np.bincount(np.asarray(token), minlength=len(logits))


# ---- the options in NumPy, float64, with sorting: another road to the same place ----


def _adjusted(logits, params: SamplingParams) -> np.ndarray:
    scores = np.array(logits, np.float64)
    for token in {*PROMPT, *ANSWER}:
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(ANSWER):
        scores[token] -= params.frequency_penalty * ANSWER.count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    scores[list(params.banned_ids)] = -np.inf
    return scores


def _probabilities(logits, params: SamplingParams) -> np.ndarray:
    """The distribution that a slot draws from."""
    scores = _adjusted(logits, params) / params.temperature
    order = np.argsort(-scores, kind="stable")
    if params.top_k:
        scores[scores < scores[order[min(params.top_k, len(scores)) - 1]]] = -np.inf
    p = np.exp(scores - scores.max())
    p /= p.sum()
    if params.top_p < 1:
        last = int(np.searchsorted(np.cumsum(p[order]), params.top_p))
        p[p < p[order[min(last, len(p) - 1)]]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


OPTIONS = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "top_k": SamplingParams(top_k=5),
    "top_k of one": SamplingParams(top_k=1),
    "top_k of more than there are": SamplingParams(top_k=10**6),
    "top_p": SamplingParams(top_p=0.7),
    "top_p of nothing": SamplingParams(top_p=0.0),
    "min_p": SamplingParams(min_p=0.1),
    "min_p of the likeliest": SamplingParams(min_p=1.0),
    "presence": SamplingParams(presence_penalty=1.5),
    "frequency": SamplingParams(frequency_penalty=0.7),
    "frequency that favours": SamplingParams(frequency_penalty=-1.0),
    "repetition": SamplingParams(repetition_penalty=1.8),
    "repetition that favours": SamplingParams(repetition_penalty=0.5),
    "bias": SamplingParams(logit_bias={0: 4.0, 20: -100.0, 9: float("-inf")}),
    "banned": SamplingParams(banned_ids=(1, 2, 3, 4, 49)),
    "all but one banned": SamplingParams(banned_ids=tuple(i for i in range(V) if i != 17)),
    "together": SamplingParams(
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=0.4,
        logit_bias={5: 3.0},
        banned_ids=(7,),
        temperature=1.4,
        top_k=12,
        top_p=0.9,
        min_p=0.05,
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_leaves_what_numpy_leaves(name):
    """Guards the meaning of an option: the ids that can be drawn, and their probabilities, in eight slots."""
    slots, drawn = _slots([OPTIONS[name]] * len(LOGITS))
    filtered = sampling.filter_logits(sampling.adjust_logits(jnp.asarray(LOGITS), slots, drawn), slots)
    exact = np.stack([_probabilities(row, OPTIONS[name]) for row in LOGITS])
    np.testing.assert_array_equal(np.isfinite(filtered), exact > 0)
    np.testing.assert_allclose(jax.nn.softmax(filtered), exact, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("name", OPTIONS)
def test_draws_follow_the_distribution(name):
    """Guards the draw itself: 20,000 draws of each option against exact probabilities, chi-square at CHANCE."""
    exact = _probabilities(LOGITS[1], OPTIONS[name])
    counts = _many(LOGITS[1], OPTIONS[name], 20_000)
    assert counts[exact == 0].sum() == 0
    usual = exact * 20_000 >= 5  # below that a chi-square is no chi-square: rare ids are pooled
    observed = [*counts[usual], counts[~usual].sum()]
    expected = 20_000 * np.array([*exact[usual], exact[~usual].sum()])
    if np.count_nonzero(expected) > 1:
        present = expected > 0
        statistic = ((np.array(observed)[present] - expected[present]) ** 2 / expected[present]).sum()
        assert statistic < stats.chi2.isf(CHANCE, present.sum() - 1)


def test_a_wrong_distribution_fails_the_chi_square():
    """Guards the test above: draws at a temperature that is off by a twentieth would not pass."""
    counts = _many(LOGITS[1], SamplingParams(temperature=1.05), 20_000)
    exact = 20_000 * _probabilities(LOGITS[1], SamplingParams())
    usual = exact >= 5
    statistic = ((counts - exact)[usual] ** 2 / exact[usual]).sum()
    assert statistic > stats.chi2.isf(CHANCE, usual.sum() - 1)


@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_takes_the_largest_adjusted_logit(name):
    """Guards temperature 0: penalties and bias act, truncation cannot matter."""
    params = dataclasses.replace(OPTIONS[name], temperature=0.0)
    exact = [int(_adjusted(row, params).argmax()) for row in LOGITS]
    assert _sample(LOGITS, params).token.tolist() == exact


@pytest.fixture(scope="module")
def mixture():
    """Logits, options and positions of a batch of all options, drawn at random and greedily, and its draws."""
    params = [*OPTIONS.values(), *(dataclasses.replace(p, temperature=0.0, seed=9) for p in OPTIONS.values())]
    logits, positions = np.resize(LOGITS, (len(params), V)), np.arange(len(params)) * 3
    return logits, params, positions, _sample(logits, params, positions).token


def test_any_mixture_shares_a_batch_and_a_program(mixture):
    """Guards slots against one another's options: each of a mixed batch draws what it draws alone; one program."""
    logits, params, positions, together = mixture
    before = _jitted._cache_size()
    other_way = _sample(logits[::-1], params[::-1], positions[::-1]).token
    assert _jitted._cache_size() == before
    assert other_way.tolist() == together[::-1].tolist()
    alone = [int(_sample(logits[i : i + 1], [p], positions[i]).token[0]) for i, p in enumerate(params)]
    assert together.tolist() == alone


WIDE = 5_000  # ids, more than the kernels keep in a list


def _wide_logits(slots: int) -> np.ndarray:
    """Some of them equal, as bfloat16s are."""
    logits = np.random.default_rng(1).normal(0, 3, (slots, WIDE)).astype(ml_dtypes.bfloat16)
    return np.asarray(logits, np.float32)


def _drawn(draw, logits, params, masks=None) -> Draw:
    """A draw of each slot, held to `masks`, packed, if there are any."""
    slots, counts = _slots(params, logits.shape[1] - 1, logits.shape[1])
    if masks is not None:
        slots = slots._replace(allowed=slots.allowed & masks)
    positions = np.arange(len(params), dtype=np.int32)
    return jax.tree.map(np.asarray, draw(np.resize(logits, (len(params), logits.shape[1])), slots, counts, positions))


def _masks(slots: int, vocab_size: int) -> np.ndarray:
    """As answers are held: here one id is left, there a few, there half of all; always the id that no options ban."""
    masks = np.random.default_rng(2).random((slots, vocab_size)) < np.resize((0, 4 / vocab_size, 0.5), (slots, 1))
    masks[:, 17] = True
    return np.stack([sampling.pack_mask(mask) for mask in masks])


@pytest.fixture(scope="module", params=["narrow", "wide"])
def drawn_by_xla(request):
    """Logits, a draw by kernels, and mixtures of options (any, with few ids, greedy), held or not, with XLA's draws."""
    logits = LOGITS if request.param == "narrow" else _wide_logits(8)
    named = logits.shape[1] - 1
    mixture = [dataclasses.replace(p, top_logprobs=3) for p in OPTIONS.values()]
    few = [dataclasses.replace(p, top_k=min(p.top_k or 40, 1000)) for p in mixture]
    mixtures = mixture, few, [dataclasses.replace(p, temperature=0.0) for p in few]

    @jax.jit
    def by_xla(logits, slots, drawn, positions):
        return sampling._sample(logits, slots, drawn, positions, Asked.of(slots), named, invariant_sum)

    by_kernels = jax.jit(functools.partial(sampling.sample, num_token_ids=named))
    _drawn(by_kernels, logits, mixture)  # compiled once, for all instruction sets
    cases = [(params, masks) for params in mixtures for masks in (None, _masks(len(params), logits.shape[1]))]
    return logits, by_kernels, [(params, masks, _drawn(by_xla, logits, params, masks)) for params, masks in cases]


@pytest.mark.skipif(cpu_kernels.why_not() is not None, reason=str(cpu_kernels.why_not()))
@pytest.mark.parametrize("isa", () if cpu_kernels.why_not() else cpu_kernels.instruction_sets())
def test_kernels_draw_what_xla_draws(drawn_by_xla, isa):
    """Guards the C++: thresholds of top-k and top-p, noise of few ids, ties; every option, in mixtures; held or not."""
    logits, by_kernels, cases = drawn_by_xla
    for params, masks, theirs in cases:
        with cpu_kernels.instruction_set(isa):
            ours = _drawn(by_kernels, logits, params, masks)
        np.testing.assert_array_equal(ours.token, theirs.token)
        np.testing.assert_array_equal(ours.top_ids, theirs.top_ids)
        np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=3e-6)


@pytest.mark.skipif(cpu_kernels.why_not() is not None, reason=str(cpu_kernels.why_not()))
@pytest.mark.parametrize("top_k", [1, 7, 600])
def test_kernels_leave_what_xla_leaves(top_k):
    """Guards the sets that draws come from, bit by bit, which few draws would not show: top-p's sums have an order."""
    logits = jnp.asarray(_wide_logits(8))
    params = [SamplingParams(top_k=top_k, top_p=i / 7, temperature=0.3 + i) for i in range(8)]
    slots, drawn = _slots(params, WIDE, WIDE)

    @jax.jit
    def ours(logits):
        options = slots.options
        penalties = options["repetition_penalty"], options["frequency_penalty"], options["presence_penalty"]
        found = cpu_sampling.survey(logits, slots.bias, slots.allowed, slots.prompted, drawn, penalties, WIDE)
        left = cpu_sampling.likeliest(found, options["temperature"], options["top_k"])
        return left.ids, cpu_sampling.nucleus(left, jnp.exp(left.scores), options["top_p"], WIDE), left.counts

    expected = np.asarray(jax.jit(sampling.filter_logits)(sampling.adjust_logits(logits, slots, drawn), slots))
    for ids, scores, count, theirs in zip(*map(np.asarray, ours(logits)), expected, strict=True):
        found = np.full(WIDE, -np.inf, np.float32)
        found[ids[:count]] = scores[:count]
        np.testing.assert_array_equal(found, theirs)


def test_noise_of_few_ids_is_that_of_all():
    """Guards the counters of JAX's generator, which the noise of an id by itself is made from."""
    seed, position = jnp.uint32(5), jnp.int32(17)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 201_088, 300), jnp.int32)
    whole = jax.jit(lambda: jax.random.gumbel(sampling._key(seed, position), (201_088,), jnp.float32))()
    np.testing.assert_array_equal(jax.jit(sampling._noise_at)(seed, position, ids), whole[ids])


def test_seeds_and_positions_are_independent():
    """Guards the key: over seeds at one position, and over positions of one seed, draws are uniform and differ."""
    uniform = np.zeros((2_000, 4), np.float32)
    by_seed = _sample(uniform, [SamplingParams(seed=i) for i in range(2_000)], 5).token
    by_position = _sample(uniform, SamplingParams(seed=5), np.arange(2_000)).token
    for draws in (by_seed, by_position):
        statistic = ((np.bincount(draws, minlength=4) - 500) ** 2 / 500).sum()
        assert statistic < stats.chi2.isf(CHANCE, 3)
    pairs = np.bincount(4 * by_seed + by_position, minlength=16)
    assert ((pairs - 125) ** 2 / 125).sum() < stats.chi2.isf(CHANCE, 15)


TIED = np.array([1.0, 3.0, 3.0, 3.0, 2.0])


def test_ties_at_a_threshold_are_kept():
    """Guards determinism: which of equal ids survives must not depend on how a sort broke the tie."""
    assert _many(TIED, SamplingParams(top_k=2), 2_000)[[0, 4]].sum() == 0
    assert (_many(TIED, SamplingParams(top_p=0.3), 2_000) > 0).tolist() == [False, True, True, True, False]


def test_greedy_takes_the_lowest_of_equal_ids():
    """Guards determinism of greedy answers."""
    assert _sample(TIED[None], SamplingParams(temperature=0.0)).token.tolist() == [1]


def test_logprobs_are_the_models_own():
    """Guards reported numbers: temperature, penalties and truncation change the draw, not what is reported."""
    exact = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(-1, keepdims=True))
    draw = _sample(LOGITS, dataclasses.replace(OPTIONS["together"], top_logprobs=4), np.arange(8))
    np.testing.assert_allclose(draw.logprob, exact[np.arange(8), draw.token], atol=1e-5)
    order = np.argsort(-exact, axis=-1)[:, :4]
    np.testing.assert_array_equal(draw.top_ids[:, :4], order)
    np.testing.assert_allclose(draw.top_logprobs[:, :4], np.take_along_axis(exact, order, -1), atol=1e-5)


def test_the_bits_of_logprobs_do_not_follow_from_the_rows_beside():
    """Guards a row's line in any batch: XLA:CPU has other logarithms in other shapes, and in other fusions."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(16, 512)) * 4, jnp.float32)
    tokens = jnp.argsort(logits)[:, 7]
    with_top = jnp.bool_(True)
    report = jax.jit(functools.partial(sampling.report_logprobs, num_token_ids=500))
    together = report(logits, tokens, with_top)
    for rows in (1, 3, 5, 7):
        for found, expected in zip(report(logits[2 : 2 + rows], tokens[2 : 2 + rows], with_top), together, strict=True):
            np.testing.assert_array_equal(found, expected[2 : 2 + rows])


def test_the_bits_of_a_logarithm_do_not_follow_from_how_many_there_are():
    """Guards the same where a kernel of ours took the sum."""
    numbers = np.random.default_rng(0).uniform(1, 1000, 4096).astype(np.float32)
    log = jax.jit(invariant_log)
    together = log(numbers)
    for count in (1, 3, 5, 7, 15, 33):
        for at in range(0, 900, count):
            np.testing.assert_array_equal(log(numbers[at : at + count]), together[at : at + count])


def test_a_vocabulary_is_surveyed_at_once_as_reduction_by_reduction():
    """Guards GPUs: ties, penalties' -inf, logits that are not finite, padding: one pass finds what five do."""
    rng = np.random.default_rng(0)
    raw = jnp.asarray(rng.integers(-4, 4, (6, 97)), jnp.float32)
    raw = raw.at[3, 5].set(jnp.inf).at[4, 6].set(-jnp.inf).at[5, 7].set(jnp.nan)
    logits = jnp.where(jnp.arange(97) < 90, raw, -jnp.inf)
    scores = logits.at[:, ::3].set(-jnp.inf)
    apart = jax.jit(functools.partial(sampling._survey_one_by_one, total=sampling.invariant_sum))(raw, logits, scores)
    at_once = jax.jit(sampling._survey_at_once)(raw, logits, scores)
    assert apart.finite.tolist() == at_once.finite.tolist() == [True, True, True, False, False, False]
    for ours, theirs in zip(at_once, apart, strict=True):
        np.testing.assert_allclose(ours[:3], theirs[:3], rtol=1e-6)


def test_thresholds_are_found_by_digits_as_by_bits():
    """Guards GPUs: four bits at a time, without a loop, give the same threshold, of counts and of weights."""
    rng = np.random.default_rng(0)
    scores = -jnp.abs(jnp.asarray(rng.standard_normal((5, 300)) * 10 ** rng.uniform(-9, 9, (5, 300)), jnp.float32))
    scores = scores.at[:, 7].set(0).at[1, :100].set(scores[1, 100]).at[2, 8:].set(-jnp.inf)
    keys = jax.lax.bitcast_convert_type(jnp.abs(scores), jnp.int32)
    weights = jnp.exp(scores)

    @jax.jit
    def both(of, wanted):
        def sum_of(kept):
            return jnp.sum(jnp.where(kept, truncation._beside(of, kept), 0), axis=-1)

        return [way(keys, wanted, sum_of) for way in (truncation._threshold_by_bits, truncation._threshold_by_digits)]

    for enough in (1.0, 40.0, 150.0, 300.0):
        for of in (jnp.ones_like(weights), weights):
            by_bits, by_digits = both(of, jnp.minimum(enough, jnp.sum(of, axis=-1) * 0.9))
            np.testing.assert_array_equal(by_digits, by_bits)


def test_unnamed_ids_are_never_drawn():
    """Guards the embedding's padding rows: ids from 200,019 have no token, yet may have the largest logit."""
    logits = np.zeros((200, 12))
    logits[:, 7:] = 50.0
    for params in (SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(temperature=1e4, top_k=11)):
        draw = _sample(logits, dataclasses.replace(params, top_logprobs=9), np.arange(200), num_token_ids=7)
        assert (draw.token < 7).all()
        np.testing.assert_allclose(draw.logprob, -np.log(7), rtol=1e-5)
        assert sorted(draw.top_ids[0, :7].tolist()) == list(range(7))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_flagged(bad):
    """Guards against token 0 coming out of a broken model as if it were an answer."""
    logits = np.zeros((2, 5))
    logits[1, 3] = bad
    for params in (SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=2, top_p=0.5)):
        token = _sample(logits, params).token
        assert token[0] != FAULTY
        assert token[1] == FAULTY


def test_extreme_finite_logits_and_temperatures_draw():
    """Guards overflow: logits near float32's end, hot and cold, give the likeliest or a fair draw, never a fault."""
    logits = np.array([[3e38, -3e38, 1.0, 0.0], [-3e38, -3e38, -3e38, -2e38]])
    for temperature in (1e-30, 1.0, 1e4):
        draw = _sample(logits, SamplingParams(temperature=temperature, top_p=0.9))
        assert draw.token.tolist() == [0, 3]
    assert (_many(np.array([0.0, 1.0]), SamplingParams(temperature=1e4), 1_000) > 400).all()


def test_a_penalty_that_overflows_still_draws_the_likeliest():
    """Guards infinity minus infinity: huge logits that a penalty makes larger still are clipped, not lost."""
    logits = np.full((1, V), -1.0)
    logits[0, [3, 7]] = 3e38, 2e38
    for temperature in (0.0, 1.0):
        params = SamplingParams(repetition_penalty=0.01, temperature=temperature, banned_ids=(7,))
        assert _sample(logits, params).token.tolist() == [3]


def test_draws_do_not_follow_the_process_s_random_bits():
    """Guards seeds against JAX's default generator, which people change: rbg's bits depend on a slot's neighbours."""
    slots, _ = _slots([SamplingParams(seed=i) for i in range(4)])
    scores, positions = jnp.zeros((4, V)), jnp.zeros(4, jnp.int32)

    def draw() -> list[int]:
        traced_anew = jax.jit(functools.partial(sampling._draw, total=invariant_sum))
        return traced_anew(scores, slots, positions).tolist()

    usual = draw()
    with jax.default_prng_impl("rbg"):
        assert draw() == usual


def test_draws_are_counted_for_active_slots_only():
    """Guards penalties over time: a slot whose answer has ended, or meets a fault, draws nothing more."""
    slots, drawn = _slots([SamplingParams()] * 2)
    drawn = sampling.record(drawn, jnp.array([4, FAULTY], jnp.int32), jnp.array([True, False]))
    assert drawn[0].tolist() == [[*ANSWER, 4].count(i) for i in range(V)]
    assert drawn[1].tolist() == [ANSWER.count(i) for i in range(V)]
    assert np.flatnonzero(slots.prompted[0]).tolist() == sorted(set(PROMPT))


@pytest.mark.parametrize("size", [1, 31, 32, 33, 201_088])
def test_a_packed_mask_comes_back(size):
    """Guards the bits of bans and grammars: an id that is one off, or padding that leaks into the next word."""
    mask = np.random.default_rng(size).random(size) < 0.5
    packed = sampling.pack_mask(mask)
    assert packed.shape == (-(-size // 32),)
    np.testing.assert_array_equal(sampling.unpack_mask(jnp.asarray(packed)[None], size)[0], mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected 0 to 10000"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e39}, "temperature is 1e.39, expected 0 to 10000"),
        ({"seed": 2**32}, "seed is 4294967296, expected 0 to 4294967295"),
        ({"top_k": -1}, "top_k is -1, expected 0 to 2147483647"),
        ({"top_p": 1.5}, "top_p is 1.5, expected 0 to 1"),
        ({"min_p": -0.1}, "min_p is -0.1, expected 0 to 1"),
        ({"presence_penalty": 3.0}, "presence_penalty is 3.0, expected -2 to 2"),
        ({"frequency_penalty": -3.0}, "frequency_penalty is -3.0, expected -2 to 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected 0.01 to 100"),
        ({"top_logprobs": 21}, "top_logprobs is 21, expected 0 to 20"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias of id 3 is nan, expected -100 to 100, or -inf to ban the id"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias of id 3 is inf"),
    ],
)
def test_bad_parameters_are_refused(changes, message):
    """Guards the message."""
    with pytest.raises(ValueError, match=message):
        SamplingParams(**changes)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(logit_bias={7: 1.0}), "logit_bias names id 7, expected ids from 0 to 6"),
        (SamplingParams(banned_ids=(-1,)), "banned_ids names id -1, expected ids from 0 to 6"),
        (
            SamplingParams(banned_ids=(0, 1, 2, 3), logit_bias={i: float("-inf") for i in (3, 4, 5, 6)}),
            "all 7 ids are banned, expected at least one that may be drawn",
        ),
    ],
)
def test_ids_that_do_not_exist_and_total_bans_are_refused(params, message):
    """Guards against a bias that lands nowhere, and a slot with nothing to draw."""
    with pytest.raises(ValueError, match=message):
        params.check(7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("top_k=1.5", "top_k is 1.5, expected a whole number"),
        ("seed=1.5", "seed is 1.5, expected a whole number"),
        ("banned_ids=(1.5,)", "an id in banned_ids is 1.5, expected a whole number"),
        ("logit_bias={1.5: 2.0}", "an id in logit_bias is 1.5, expected a whole number"),
    ],
)
def test_fractions_are_refused_where_whole_numbers_belong(changes, message):
    """Guards JSON's 1.5 for a whole number: in a process of its own, since this one's type checks come first."""
    code = f"from gptoss_jax.engine.sampling_params import SamplingParams; SamplingParams({changes})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=golden.ROOT, check=False)
    assert done.stderr.splitlines()[-1] == f"gptoss_jax.errors.GptossError: {message}"
