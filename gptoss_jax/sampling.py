"""From logits to a token per row: temperature and seed, the same whatever the neighbours do.

Keys are folded from (request seed, position), so a row's draw depends on its own request alone. To add a sampler, add
its per-row field to `SamplingParams` and `Sampling`, and its line to `sample`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

MAX_TEMPERATURE = 1e4  # where every distribution is flat; float32 would overflow far beyond
FAULTY = -1  # in place of a token: the row's logits were not finite


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request draws its tokens.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token, the lowest id among equals.
        seed: 0 to 2^32 - 1; the same seed and prompt give the same tokens.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature is {self.temperature}, expected 0 to {MAX_TEMPERATURE:g}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, expected 0 to {2**32 - 1}")


class Sampling(NamedTuple):
    """The same for B rows, as arrays: a change of value compiles nothing."""

    temperature: Float[Array, "B"]
    seed: UInt32[Array, "B"]


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, positions: Int32[Array, "B"], num_token_ids: int
) -> tuple[Int32[Array, "B"], Float[Array, "B"]]:
    """Each row's token, and its log probability at temperature 1.

    Args:
        logits: float32.
        sampling: each row's parameters.
        positions: where the token will stand in its row.
        num_token_ids: ids from here on are padding of the embedding, and never drawn.
    """
    named = jnp.arange(logits.shape[-1], dtype=jnp.int32) < num_token_ids
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    logits = jnp.where(named, logits, -jnp.inf)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = jax.lax.cond(jnp.any(sampling.temperature > 0), lambda: _draw(logits, sampling, positions), lambda: greedy)
    token = jnp.where(sampling.temperature > 0, drawn, greedy)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    return jnp.where(finite, token, FAULTY), logprob


def _draw(logits: Float[Array, "B V"], sampling: Sampling, positions: Int32[Array, "B"]) -> Int32[Array, "B"]:
    """A token from softmax(logits / temperature), by the Gumbel-max trick."""

    def noise(seed: UInt32[Array, ""], position: Int32[Array, ""]) -> Float[Array, "V"]:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    temperature = jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)[:, None]
    scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    return jnp.argmax(scores + jax.vmap(noise)(sampling.seed, positions), axis=-1).astype(jnp.int32)


def is_stop(token: Int32[Array, "B"], stop_ids: Int32[Array, "B Z"]) -> Bool[Array, "B"]:
    """Whether each row's token is one of its stop ids (padded with ids that no token has)."""
    return jnp.any(token[:, None] == stop_ids, axis=-1)
