"""A layer that is computed once more for its gradient, on every back end: nothing of it is kept but where it began.

`jax.checkpoint` relies on optimisation barriers, which XLA:CPU takes out before it joins equal computations: there the
second computation becomes the first again, and everything is kept.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rematerialized(
    run: Callable[[Float[Array, "B T D"]], tuple[Float[Array, "B T D"], Any]], x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], Any]:
    """`run(x)`: a float32 residual stream of the shape of x, and what else it gives, to the same bits."""
    pure, captured = jax.closure_convert(run, x)

    @jax.custom_vjp
    def once(x: Float[Array, "B T D"], captured: Any) -> Any:
        return pure(x, *captured)

    def forward(x: Float[Array, "B T D"], captured: Any) -> Any:
        return pure(x, *captured), (x, captured)

    def backward(saved: Any, gradients: Any) -> Any:
        x, captured = saved
        _, pull = jax.vjp(lambda x, captured: pure(x, *captured), _only_after(gradients[0], x), captured)
        return pull(gradients)

    once.defvjp(forward, backward)
    return once(x, captured)


def _only_after(gradient: Float[Array, "B T D"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """x, which no compiler knows before `gradient`: chosen by a bit of it that is always set."""
    x, gradient = lax.optimization_barrier((x, gradient))
    is_always = lax.bitcast_convert_type(gradient, jnp.uint32) | 1
    return jnp.where(is_always > 0, x, jnp.zeros_like(x))
