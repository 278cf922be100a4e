"""The gradient of linear, in jnp, for any implementation of it: two more products, left to XLA."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Real


def differentiable(run: Any) -> Any:
    """`run`, an implementation of linear, with a gradient; int8 weights have none."""

    def linear(x: Float[Array, "T I"], w: Real[Array, "O I"]) -> Float[Array, "T O"]:
        return _run(run, x, w)

    return linear


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(run, x, w):
    return run(x, w)


def _forward(run, x, w):
    return run(x, w), (x, w)


def _backward(run, saved, gradient):
    del run
    x, w = saved
    dx = _product(gradient, w, ((1,), (0,))).astype(x.dtype)
    is_whole = jnp.issubdtype(w.dtype, jnp.integer)
    return dx, None if is_whole else _product(gradient, x, ((0,), (0,))).astype(w.dtype)


def _product(gradient: Float[Array, "T O"], other: Real[Array, "..."], summed: Any) -> Float[Array, "..."]:
    other = other.astype(jnp.float32)
    return lax.dot_general(gradient, other, (summed, ((), ())), precision=lax.Precision.HIGHEST)


_run.defvjp(_forward, _backward)
