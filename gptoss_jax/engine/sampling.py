"""From logits to a token per slot: penalties, bias, temperature, truncation, seed; the same whatever the neighbours do.

Keys are folded from (request seed, position), so a slot's draw depends on its own request alone. Every option is data:
slots of any mixture share one program. To add an option, add its field to `SamplingParams`, which gives its array, its
flag and its checks, and its line to `adjust_logits` (and to `adjust_ids` of cpu_kernels/native/sampling.h) or to
`filter_logits`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, Int32, Real, UInt32

import cpu_kernels
from cpu_kernels import sampling as cpu_sampling
from gptoss_jax.engine import truncation
from gptoss_jax.engine.sampling_params import MAX_TOP_LOGPROBS, OPTIONS, SamplingParams
from gptoss_jax.model.invariant_sum import RowSum, invariant_log, invariant_sum

KEYS = "threefry2x32"  # whatever JAX's default is: others draw otherwise, or depend on a slot's neighbours
FAULTY = -1  # in place of a token: the slot's logits were not finite
MASK_BITS = 32


class Sampling(NamedTuple):
    """`SamplingParams` of B slots as arrays, constant while a request runs: a change of value compiles nothing."""

    options: Mapping[str, Real[Array, "B"]]  # those that are numbers, by name
    bias: Float[Array, "B V"]
    allowed: UInt32[Array, "B V32"]  # a bit per id, as `pack_mask` lays them out: whether it may be drawn
    prompted: Bool[Array, "B V"]  # ids of the prompt


AXES: Any = Sampling(
    options=dict.fromkeys(OPTIONS, ("batch",)),  # pyright: ignore[reportArgumentType]
    bias=("batch", "vocab"),  # pyright: ignore[reportArgumentType]  (names of axes in place of arrays)
    allowed=("batch", None),  # pyright: ignore[reportArgumentType]  (a whole mask is small)
    prompted=("batch", "vocab"),  # pyright: ignore[reportArgumentType]
)
"""The logical axes of each array."""


class Asked(NamedTuple):
    """What any slot asks for, which decides what is computed: the same at each step of a dispatch."""

    draws: Bool[Array, ""]  # at random
    top: Bool[Array, ""]  # the likeliest ids

    @classmethod
    def of(cls, sampling: Sampling) -> "Asked":
        """By the slots' parameters."""
        return cls(*(jnp.any(sampling.options[name] > 0) for name in ("temperature", "top_logprobs")))


class Draw(NamedTuple):
    """What one step drew for B slots; Z is MAX_TOP_LOGPROBS."""

    token: Int32[Array, "B"]  # FAULTY where the logits were not finite
    logprob: Float[Array, "B"]  # natural logarithm, of the model's own distribution
    top_ids: Int32[Array, "B Z"]  # the likeliest first; meaningless unless a slot asks for any
    top_logprobs: Float[Array, "B Z"]


def pack_mask(mask: np.ndarray) -> np.ndarray:
    """A mask over the vocabulary, bool [V], as bits, uint32 [ceil(V / 32)]: id 32 i + j is bit j of word i."""
    padded = np.zeros(-(-mask.size // MASK_BITS) * MASK_BITS, np.bool_)
    padded[: mask.size] = mask
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def unpack_mask(bits: UInt32[Array, "B V32"], vocab_size: int) -> Bool[Array, "B V"]:
    """The mask that `pack_mask` packed."""
    by_word = bits[..., None] >> jnp.arange(MASK_BITS, dtype=jnp.uint32) & 1
    return by_word.reshape(bits.shape[0], -1)[:, :vocab_size] == 1


def constants(params: SamplingParams, prompt: Sequence[int], vocab_size: int, num_token_ids: int) -> Sampling:
    """One slot's arrays on the host, without the leading axis.

    Args:
        params: what the request asks for.
        prompt: its token ids.
        vocab_size: V, the width of the logits.
        num_token_ids: ids from here on are padding of the embedding, and never drawn.
    """
    bias, prompted = np.zeros(vocab_size, np.float32), np.zeros(vocab_size, np.bool_)
    for token, value in params.logit_bias.items():
        bias[token] = 0 if value == -math.inf else value
    allowed = np.arange(vocab_size) < num_token_ids
    allowed[list(params.never_drawn)] = False
    prompted[list(prompt)] = True
    options: Any = {name: np.dtype(option.dtype).type(getattr(params, name)) for name, option in OPTIONS.items()}
    arrays: Any = {"bias": bias, "allowed": pack_mask(allowed), "prompted": prompted}
    return Sampling(options, **arrays)


def count_ids(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """How often each id stands among `tokens`, int32 [V]."""
    return np.bincount(np.asarray(tokens, np.int64), minlength=vocab_size).astype(np.int32)


def sample(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    drawn: Int32[Array, "B V"],
    positions: Int32[Array, "B"],
    num_token_ids: int,
    total: RowSum = invariant_sum,
    asked: Asked | None = None,
) -> Draw:
    """Each slot's token, with log probabilities.

    Args:
        logits: float32.
        sampling: each slot's parameters.
        drawn: how often each slot's answer holds each id.
        positions: where the token will stand in its sequence.
        num_token_ids: ids from here on are padding of the embedding: no part of any distribution.
        total: how sums over the vocabulary are taken. With `invariant_sum`, which is for one device, kernels do it on
            CPUs: the tokens are the same, and log probabilities but for rounding.
        asked: `Asked.of` the parameters, where it is known already.
    """
    by_xla = functools.partial(_sample, num_token_ids=num_token_ids, total=total)
    by_kernels = functools.partial(_sample_by_kernels, num_token_ids=num_token_ids)
    arguments = logits, sampling, drawn, positions, asked or Asked.of(sampling)
    if total is not invariant_sum or cpu_kernels.why_not():
        return by_xla(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=by_kernels, default=by_xla)


def _sample(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    drawn: Int32[Array, "B V"],
    positions: Int32[Array, "B"],
    asked: Asked,
    num_token_ids: int,
    total: RowSum,
) -> Draw:
    raw, logits = logits, _named(logits, num_token_ids)
    scores = adjust_logits(logits, sampling, drawn)
    found = survey(raw, logits, scores, total)
    return _drawn(logits, found, lambda: _draw(scores, sampling, positions, total), sampling, asked, num_token_ids)


def _drawn(
    logits: Float[Array, "B V"],
    found: "Survey",
    at_random: Callable[[], Int32[Array, "B"]],
    sampling: Sampling,
    asked: Asked,
    num_token_ids: int,
) -> Draw:
    """What `sample` gives, by a survey and a way to draw at random, which is gone only where a slot asks for it."""
    random = jax.lax.cond(asked.draws, at_random, lambda: found.likeliest)
    token = jnp.where(sampling.options["temperature"] > 0, random, found.likeliest)
    reported = _report(logits, token, asked.top, found.top, found.log_total, num_token_ids)
    return Draw(jnp.where(found.finite, token, FAULTY), *reported)


class Survey(NamedTuple):
    """What is to know of a slot's whole vocabulary, whatever is drawn."""

    finite: Bool[Array, "B"]
    likeliest: Int32[Array, "B"]  # the first id with the largest score
    top: Float[Array, "B"]  # the largest logit
    log_total: Float[Array, "B"]  # log of the sum of exp(logit - top)


def survey(
    raw: Float[Array, "B V"],
    logits: Float[Array, "B V"],
    scores: Float[Array, "B V"],
    total: RowSum = invariant_sum,
) -> Survey:
    """Of `raw` logits whether they are finite, of the named ones the softmax, of the scores the largest.

    Whole vocabularies go through one reduction on a GPU, where five would be ten launches. Where a mesh cuts them,
    each stays XLA's own, which it knows how to cut.
    """
    one_by_one = functools.partial(_survey_one_by_one, total=total)
    if total is not invariant_sum:
        return one_by_one(raw, logits, scores)
    return jax.lax.platform_dependent(raw, logits, scores, cuda=_survey_at_once, default=one_by_one)


def _survey_one_by_one(
    raw: Float[Array, "B V"], logits: Float[Array, "B V"], scores: Float[Array, "B V"], total: RowSum
) -> Survey:
    finite = jnp.all(jnp.isfinite(raw), axis=-1)
    return Survey(finite, _largest(scores), *_softmax_of(logits, total))


def _softmax_of(logits: Float[Array, "*rows V"], total: RowSum) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """The largest logit, and the logarithm of the sum of exponentials after it is subtracted."""
    top = jnp.max(logits, axis=-1)
    log = invariant_log if total is invariant_sum else jnp.log
    return top, log(total(jnp.exp(logits - top[..., None])))


def _survey_at_once(raw: Float[Array, "B V"], logits: Float[Array, "B V"], scores: Float[Array, "B V"]) -> Survey:
    """A sum of exponentials moves to the larger of two maxima as they meet (arXiv:1805.02867)."""
    ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    finite = jnp.isfinite(raw).astype(jnp.float32)

    def meet(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        (finite_a, score_a, id_a, top_a, sum_a), (finite_b, score_b, id_b, top_b, sum_b) = a, b
        a_wins = (score_a > score_b) | ((score_a == score_b) & (id_a < id_b))
        top = jnp.maximum(top_a, top_b)
        parts = [
            jnp.where(own == top, 1.0, jnp.exp(own - top)) * of_own for own, of_own in ((top_a, sum_a), (top_b, sum_b))
        ]
        likeliest = jnp.where(a_wins, score_a, score_b), jnp.where(a_wins, id_a, id_b)
        return jnp.minimum(finite_a, finite_b), *likeliest, top, parts[0] + parts[1]

    nothing = (
        jnp.float32(1),
        jnp.float32(-jnp.inf),
        jnp.int32(scores.shape[-1] - 1),
        jnp.float32(-jnp.inf),
        jnp.float32(0),
    )
    each = finite, scores, ids, logits, jnp.ones_like(logits)
    found = jax.lax.reduce(each, nothing, meet, (scores.ndim - 1,))
    return Survey(found[0] > 0, found[2], found[3], jnp.log(found[4]))


def _sample_by_kernels(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    drawn: Int32[Array, "B V"],
    positions: Int32[Array, "B"],
    asked: Asked,
    num_token_ids: int,
) -> Draw:
    """Looks at each logit once; where top-k leaves few ids in every slot, all else is done with those."""
    options = sampling.options
    penalties = options["repetition_penalty"], options["frequency_penalty"], options["presence_penalty"]
    found = cpu_sampling.survey(
        logits, sampling.bias, sampling.allowed, sampling.prompted, drawn, penalties, num_token_ids
    )
    known = Survey(found.finite, found.likeliest, found.largest_logit, invariant_log(found.total))
    return _drawn(logits, known, lambda: _draw_by_kernels(found, sampling, positions), sampling, asked, num_token_ids)


def _draw_by_kernels(found: cpu_sampling.Survey, sampling: Sampling, positions: Int32[Array, "B"]) -> Int32[Array, "B"]:
    """`_draw`'s token: among few ids without looking at others, unless a slot that draws has too many."""
    draws = sampling.options["temperature"] > 0
    temperature = jnp.where(draws, _positive(sampling.options["temperature"]), 1)
    top_k = jnp.where(draws, sampling.options["top_k"], 1)  # what a greedy slot would draw is not asked for
    left = cpu_sampling.likeliest(found, temperature, top_k)

    def among_few() -> Int32[Array, "B"]:
        vocab_size = found.scores.shape[-1]
        scores = cpu_sampling.nucleus(left, jnp.exp(left.scores), sampling.options["top_p"], vocab_size)
        scores = truncation.min_p(scores, sampling.options["min_p"])
        noises = jax.vmap(_noise_at)(sampling.options["seed"], positions, left.ids)
        return jnp.take_along_axis(left.ids, _largest(scores + noises)[:, None], axis=-1)[:, 0]

    def among_all() -> Int32[Array, "B"]:
        return _draw(found.scores, sampling, positions, invariant_sum)

    return jax.lax.cond(jnp.all(left.counts >= 0), among_few, among_all)


def report_logprobs(
    logits: Float[Array, "*rows V"],
    token: Int32[Array, "*rows"],
    with_top: Bool[Array, ""],
    num_token_ids: int,
    total: RowSum = invariant_sum,
) -> tuple[Float[Array, "*rows"], Int32[Array, "*rows Z"], Float[Array, "*rows Z"]]:
    """Log probabilities by the model's own distribution: of each `token`, and `with_top` of the likeliest ids."""
    logits = _named(logits, num_token_ids)
    return _report(logits, token, with_top, *_softmax_of(logits, total), num_token_ids)


def _report(
    logits: Float[Array, "*rows V"],
    token: Int32[Array, "*rows"],
    with_top: Bool[Array, ""],
    top: Float[Array, "*rows"],
    log_total: Float[Array, "*rows"],
    num_token_ids: int,
) -> tuple[Float[Array, "*rows"], Int32[Array, "*rows Z"], Float[Array, "*rows Z"]]:
    """The same with the softmax known; `logits` may have padding's, since no `token` is any."""
    logprob = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0] - top - log_total

    def likeliest() -> Int32[Array, "*rows Z2"]:
        return _packed(*_top(_named(logits, num_token_ids) - top[..., None] - log_total[..., None]))

    nothing = jnp.zeros((*token.shape, 2 * MAX_TOP_LOGPROBS), jnp.int32)
    packed = jax.lax.cond(with_top, likeliest, lambda: nothing)  # one array: a branch writes each by itself
    return (
        logprob,
        packed[..., :MAX_TOP_LOGPROBS],
        jax.lax.bitcast_convert_type(packed[..., MAX_TOP_LOGPROBS:], jnp.float32),
    )


def _packed(ids: Int32[Array, "*rows Z"], logprobs: Float[Array, "*rows Z"]) -> Int32[Array, "*rows Z2"]:
    return jnp.concatenate([ids, jax.lax.bitcast_convert_type(logprobs, jnp.int32)], axis=-1)


def _named(logits: Float[Array, "*rows V"], num_token_ids: int) -> Float[Array, "*rows V"]:
    """`logits`, with -inf for the embedding's padding."""
    return jnp.where(jnp.arange(logits.shape[-1], dtype=jnp.int32) < num_token_ids, logits, -jnp.inf)


def record(drawn: Int32[Array, "B V"], token: Int32[Array, "B"], active: Bool[Array, "B"]) -> Int32[Array, "B V"]:
    """`drawn` after the active slots drew `token`."""
    token, once = jnp.maximum(token, 0), active.astype(jnp.int32)
    if token.shape[0] > 1:
        return drawn.at[jnp.arange(token.shape[0], dtype=jnp.int32), token].add(once)
    at = jnp.int32(0), token[0]  # a slice: of a scatter XLA checks the bounds, in launches of their own
    return jax.lax.dynamic_update_slice(drawn, jax.lax.dynamic_slice(drawn, at, (1, 1)) + once[:, None], at)


def adjust_logits(logits: Float[Array, "B V"], sampling: Sampling, drawn: Int32[Array, "B V"]) -> Float[Array, "B V"]:
    """`logits` under penalties, bias and bans: what a greedy slot takes the largest of."""
    in_answer = drawn > 0
    penalty = jnp.where(in_answer | sampling.prompted, sampling.options["repetition_penalty"][:, None], 1.0)
    logits = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = logits - drawn.astype(jnp.float32) * sampling.options["frequency_penalty"][:, None]
    logits = logits - jnp.where(in_answer, sampling.options["presence_penalty"][:, None], 0.0)
    largest = jnp.finfo(jnp.float32).max  # a penalty may take a large logit beyond it, and inf - inf is no number
    scores = jnp.clip(logits, -largest, largest) + sampling.bias
    return jnp.where(unpack_mask(sampling.allowed, logits.shape[-1]), scores, -jnp.inf)


def filter_logits(
    scores: Float[Array, "B V"], sampling: Sampling, total: RowSum = invariant_sum
) -> Float[Array, "B V"]:
    """`scores`, tempered, with -inf for every id that top-k, top-p or min-p rule out."""
    options = sampling.options
    coldness = 1 / _positive(options["temperature"])[:, None]  # XLA would turn a quotient into this product
    scores = (scores - jnp.max(scores, axis=-1, keepdims=True)) * coldness
    by_count, by_weight = jnp.any(options["top_k"] > 0), jnp.any(options["top_p"] < 1)
    scores = jax.lax.cond(by_count, lambda: truncation.top_k(scores, options["top_k"]), lambda: scores)
    scores = jax.lax.cond(by_weight, lambda: truncation.top_p(scores, options["top_p"], total), lambda: scores)
    return truncation.min_p(scores, options["min_p"])


def _positive(temperature: Float[Array, "B"]) -> Float[Array, "B"]:
    return jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)


def _draw(
    scores: Float[Array, "B V"], sampling: Sampling, positions: Int32[Array, "B"], total: RowSum
) -> Int32[Array, "B"]:
    """A token from the softmax of the filtered scores, by the Gumbel-max trick."""

    def noise(seed: UInt32[Array, ""], position: Int32[Array, ""]) -> Float[Array, "V"]:
        return jax.random.gumbel(_key(seed, position), scores.shape[-1:], jnp.float32)

    noises = jax.vmap(noise)(sampling.options["seed"], positions)
    return _largest(filter_logits(scores, sampling, total) + noises)


def _key(seed: UInt32[Array, ""], position: Int32[Array, ""]) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed, impl=KEYS), position)


def _noise_at(seed: UInt32[Array, ""], position: Int32[Array, ""], ids: Int32[Array, "C"]) -> Float[Array, "C"]:
    """What `jax.random.gumbel` of a whole row has at `ids`, without the others: its bits are of a counter each."""
    counter = ids.astype(jnp.uint32)
    key = jax.random.key_data(_key(seed, position))
    high, low = threefry2x32_p.bind(*jnp.broadcast_to(key[:, None], (2, *ids.shape)), jnp.zeros_like(counter), counter)
    bits = (high ^ low) >> 9 | jnp.float32(1).view(jnp.uint32)  # a number from 1 to 2
    tiny = jnp.finfo(jnp.float32).tiny
    uniform = jnp.maximum(tiny, (bits.view(jnp.float32) - 1) * (1 - tiny) + tiny)
    return -jnp.log(-jnp.log(uniform))


def _largest(scores: Float[Array, "B V"]) -> Int32[Array, "B"]:
    """The first id with the largest score: an argmax as two reductions, which XLA:CPU turns into vectors.

    Among scores that are not numbers, any id.
    """
    last = scores.shape[-1] - 1
    is_largest = scores == jnp.max(scores, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)


def _top(logprobs: Float[Array, "*rows V"]) -> tuple[Int32[Array, "*rows Z"], Float[Array, "*rows Z"]]:
    count = min(MAX_TOP_LOGPROBS, logprobs.shape[-1])
    values, ids = jax.lax.top_k(logprobs, count)
    padding = [(0, 0)] * (logprobs.ndim - 1) + [(0, MAX_TOP_LOGPROBS - count)]
    return jnp.pad(ids, padding), jnp.pad(values, padding, constant_values=-jnp.inf)


def is_stop(token: Int32[Array, "B"], stop_ids: Int32[Array, "B Z"]) -> Bool[Array, "B"]:
    """Whether each slot's token is one of its stop ids (padded with ids that no token has)."""
    return jnp.any(token[:, None] == stop_ids, axis=-1)
