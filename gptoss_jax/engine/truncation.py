"""Top-k, top-p and min-p of scores whose largest is 0; how many are enough is found without sorting."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from gptoss_jax.model.invariant_sum import RowSum

DIGIT_BITS = 4  # of a threshold, that a GPU finds at once

SumOfKept = Callable[[Bool[Array, "B *more V"]], Float[Array, "B *more"]]


def top_k(scores: Float[Array, "B V"], count: Int32[Array, "B"]) -> Float[Array, "B V"]:
    """The `count` largest scores of each slot (0: all) and what is equal to the last of them, -inf for the others.

    Counts are whole numbers, exact in float32: XLA may add in any order, and takes half as long.
    """
    enough = jnp.where(count > 0, jnp.minimum(count, scores.shape[-1]), scores.shape[-1]).astype(jnp.float32)
    return _keep_likeliest(scores, lambda kept: jnp.sum(kept, axis=-1, dtype=jnp.float32), enough)


def top_p(scores: Float[Array, "B V"], share: Float[Array, "B"], total: RowSum) -> Float[Array, "B V"]:
    """As `top_k`, of the largest that first have `share` of the softmax."""
    weights = jnp.exp(scores)
    enough = share * total(weights)
    filtered = _keep_likeliest(scores, lambda kept: total(jnp.where(kept, _beside(weights, kept), 0.0)), enough)
    return jnp.where((share < 1)[:, None], filtered, scores)


def min_p(scores: Float[Array, "B C"], share: Float[Array, "B"]) -> Float[Array, "B C"]:
    """The scores of at least `share` of the largest's probability, -inf for the others."""
    return jnp.where(scores >= jnp.log(share[:, None]), scores, -jnp.inf)


def _beside(x: Float[Array, "B V"], kept: Bool[Array, "B *more V"]) -> Float[Array, "B *ones V"]:
    return x.reshape(x.shape[0], *(1,) * (kept.ndim - 2), x.shape[1])


def _keep_likeliest(scores: Float[Array, "B V"], sum_of: SumOfKept, enough: Float[Array, "B"]) -> Float[Array, "B V"]:
    """The largest scores (at most 0) whose `sum_of` first reaches `enough`, at least one; -inf for the others.

    Finds the threshold by its bits instead of sorting: the bits of a float that is not positive, read as an integer,
    grow as it falls, and a sum over more of the same weights is never smaller, in floating point too.
    """
    keys = jax.lax.bitcast_convert_type(jnp.abs(scores), jnp.int32)  # 0 for the largest score
    ways = (functools.partial(way, sum_of=sum_of) for way in (_threshold_by_digits, _threshold_by_bits))
    threshold = jax.lax.platform_dependent(keys, enough, **dict(zip(("cuda", "default"), ways, strict=True)))
    return jnp.where(keys <= threshold[:, None], scores, -jnp.inf)


def _threshold_by_bits(keys: Int32[Array, "B V"], enough: Float[Array, "B"], sum_of: SumOfKept) -> Int32[Array, "B"]:
    def set_bit(i: Int32[Array, ""], threshold: Int32[Array, "B"]) -> Int32[Array, "B"]:
        bit = jnp.int32(1) << (30 - i)
        most = threshold + bit - 1  # the largest key that could be kept with this bit clear
        too_few = sum_of(keys <= most[:, None]) < enough
        return jnp.where(too_few, threshold + bit, threshold)

    return jax.lax.fori_loop(0, 31, set_bit, jnp.zeros(keys.shape[:1], jnp.int32))


def _threshold_by_digits(keys: Int32[Array, "B V"], enough: Float[Array, "B"], sum_of: SumOfKept) -> Int32[Array, "B"]:
    """As `_threshold_by_bits`, four bits at a time and without a loop: a graph of launches may not hold one."""
    threshold = jnp.zeros(keys.shape[:1], jnp.int32)
    for low in range(31 - 31 % DIGIT_BITS, -1, -DIGIT_BITS):
        digits = jnp.arange(1, 1 << min(DIGIT_BITS, 31 - low), dtype=jnp.int32)
        most = threshold[:, None] + (digits << low) - 1  # the largest key that could be kept with a smaller digit
        too_few = sum_of(keys[:, None, :] <= most[..., None]) < enough[:, None]
        threshold = threshold + (jnp.sum(too_few, axis=-1, dtype=jnp.int32) << low)
    return threshold
