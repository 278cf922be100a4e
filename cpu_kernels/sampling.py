"""Drawing a token on CPUs: one look at all logits, then top-k and top-p among the few ids that are left."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

import cpu_kernels

MOST_LEFT = 1024
"""C, how many ids `likeliest` leaves at most: more than any top-k that people ask for."""

_SPAN_IDS = 64  # as sampling_call.h has it


class Survey(NamedTuple):
    """What one look at the logits of B slots gives."""

    scores: Float[Array, "B V"]  # logits under penalties, bias and bans
    largest_of_spans: Float[Array, "B S"]  # of every 64 scores
    likeliest: Int32[Array, "B"]  # the first id with the largest score
    largest_logit: Float[Array, "B"]
    total: Float[Array, "B"]  # the sum of exp(logit - largest_logit)
    finite: Bool[Array, "B"]  # whether all logits are


class Likeliest(NamedTuple):
    """The ids that top-k leaves, in their order: at most C of them, and padding."""

    ids: Int32[Array, "B C"]
    scores: Float[Array, "B C"]  # less the slot's largest, over the temperature; -inf beyond the count
    counts: Int32[Array, "B"]  # -1 where there are more than C: then the ids are meaningless


def survey(
    logits: Float[Array, "B V"],
    bias: Float[Array, "B V"],
    allowed: UInt32[Array, "B V32"],
    prompted: Bool[Array, "B V"],
    drawn: Int32[Array, "B V"],
    penalties: tuple[Float[Array, "B"], Float[Array, "B"], Float[Array, "B"]],
    num_ids: int,
) -> Survey:
    """Scores, and what is known of them after one look.

    Args:
        logits: of all ids.
        bias: added to each.
        allowed: a bit per id, id 32 i + j being bit j of word i; ids that are not allowed score -inf.
        prompted: whether the prompt has an id.
        drawn: how often the answer has it.
        penalties: for repetition, frequency and presence.
        num_ids: ids from here on are no part of the distribution.

    Raises:
        cpu_kernels.Unavailable: the library was not built.
    """
    cpu_kernels.library()
    slots, vocab_size = logits.shape
    spans = -(-vocab_size // _SPAN_IDS)
    results = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((slots, vocab_size), jnp.float32),
            ((slots, spans), jnp.float32),
            ((slots,), jnp.int32),
            ((slots,), jnp.float32),
            ((slots,), jnp.float32),
            ((slots,), jnp.bool_),
        )
    ]
    call = jax.ffi.ffi_call("cpu_kernels_survey", results)
    return Survey(*call(logits, bias, allowed, prompted, drawn, *penalties, num_ids=np.int32(num_ids)))


def likeliest(
    found: Survey, temperature: Float[Array, "B"], top_k: Int32[Array, "B"], most: int = MOST_LEFT
) -> Likeliest:
    """The ids that `top_k` leaves (0: all), those as likely as the last one among them."""
    slots, vocab_size = found.scores.shape
    width = min(most, vocab_size)
    results = [
        jax.ShapeDtypeStruct((slots, width), jnp.int32),
        jax.ShapeDtypeStruct((slots, width), jnp.float32),
        jax.ShapeDtypeStruct((slots,), jnp.int32),
    ]
    call = jax.ffi.ffi_call("cpu_kernels_likeliest", results)
    return Likeliest(*call(found.scores, found.largest_of_spans, temperature, top_k))


def nucleus(
    left: Likeliest, weights: Float[Array, "B C"], top_p: Float[Array, "B"], vocab_size: int
) -> Float[Array, "B C"]:
    """Scores of the ids of `left` whose `weights` first reach `top_p` of all, -inf for the others.

    Sums are taken in the order in which `invariant_sum` adds up a row as wide as the vocabulary, other ids having
    weights of 0.
    """
    result = jax.ShapeDtypeStruct(left.scores.shape, jnp.float32)
    call = jax.ffi.ffi_call("cpu_kernels_nucleus", result)
    return call(left.ids, left.counts, left.scores, weights, top_p, vocab=np.int32(vocab_size))
