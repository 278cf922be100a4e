"""Sums over the last axis, and logarithms, whose bits on CPUs do not follow from how many rows there are at once."""

import functools
import operator
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

FOLD = 8
_VECTOR = 16  # numbers of the widest vectors of CPUs

RowSum = Callable[[Float[Array, "*rows n"]], Float[Array, "*rows"]]
"""The sum of each row."""


def row_sum(num_devices: int) -> RowSum:
    """How to sum over an axis that a mesh of so many devices may cut, such as the vocabulary.

    Over several devices it is XLA's sum: `invariant_sum` would send slices from device to device. The order of a sum
    then follows from its shape, and a deterministic engine runs one shape whatever the batch (`engine.programs`).
    """
    return invariant_sum if num_devices == 1 else plain_sum


def plain_sum(x: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    """The sum of each row, in the order that XLA likes."""
    return jnp.sum(x, axis=-1)


def invariant_sum(x: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    """The sum of each row.

    XLA:CPU adds up a reduction in vectors, in an order that depends on the shape of the whole array. Written as
    additions of whole slices, there is one order for each n; it takes as long.
    """
    return lax.platform_dependent(x, cpu=_folded, default=functools.partial(jnp.sum, axis=-1))


def invariant_log(x: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """The logarithm of each number, of positive ones, whose bits on CPUs do not follow from how many there are.

    XLA:CPU takes other instructions for what is left beside whole vectors: here there are whole ones, and barriers keep
    XLA from taking the padding away.
    """
    return lax.platform_dependent(x, cpu=_log_of_whole_vectors, default=jnp.log)


def _log_of_whole_vectors(x: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    padded = jnp.pad(x.reshape(-1), (0, -x.size % _VECTOR), constant_values=1)
    logs = lax.optimization_barrier(jnp.log(lax.optimization_barrier(padded)))
    return logs[: x.size].reshape(x.shape)


def _folded(x: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    while x.shape[-1] > 1:
        width = -(-x.shape[-1] // FOLD)
        padding = width * FOLD - x.shape[-1]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
        x = functools.reduce(operator.add, (x[..., i * width : (i + 1) * width] for i in range(FOLD)))
    return x[..., 0]
