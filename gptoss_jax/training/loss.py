"""What a training step minimises: the cross entropy of learned tokens, and how evenly routers use their experts."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from gptoss_jax.model.experts import route

LOGITS_BYTES = 1 << 28  # float32 logits held at once; those of more tokens are made part by part, and made anew


class Losses(NamedTuple):
    """Sums over the learned tokens of a batch."""

    total: Float[Array, ""]  # of -log p(target), nats
    right: Int32[Array, ""]  # targets that have the largest logit
    learned: Float[Array, ""]  # tokens


class Router(NamedTuple):
    """How a batch's tokens went to the experts of each layer."""

    load: Float[Array, "L E"]  # share of a layer's assignments that went to each expert
    entropy: Float[Array, "L"]  # of the mean distribution over experts, nats; ln E where all are used alike


@jax.custom_vjp
def negative_log_likelihood(logits: Float[Array, "*BT V"], targets: Int32[Array, "*BT"]) -> Float[Array, "*BT"]:
    """-log softmax(logits)[target], float32; its gradient is one pass over the logits, without a scatter."""
    return _forward(logits, targets)[0]


def _forward(logits, targets):
    lse = jax.nn.logsumexp(logits, axis=-1)
    of_target = jnp.where(_is_target(logits, targets), logits, 0).sum(-1)
    return lse - of_target, (logits, lse, targets)


def _backward(saved, gradient):
    logits, lse, targets = saved
    probability = jnp.exp(logits - lse[..., None])
    return gradient[..., None] * (probability - _is_target(logits, targets).astype(jnp.float32)), None


def _is_target(logits: Float[Array, "*BT V"], targets: Int32[Array, "*BT"]) -> Bool[Array, "*BT V"]:
    return jnp.arange(logits.shape[-1], dtype=jnp.int32) == targets[..., None]


negative_log_likelihood.defvjp(_forward, _backward)


def cross_entropy(
    logits_of: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    x: Float[Array, "B T D"],
    targets: Int32[Array, "B T"],
    weights: Float[Array, "B T"],
    vocab_size: int,
    log_counts: Float[Array, "V"] | None = None,
) -> Losses:
    """The losses of all tokens of `x`, each with its weight, by the logits that `logits_of` makes of some of them.

    `log_counts`: the logarithm of how many equal logits each one stands for; the softmax is over all of them, while the
    largest is so by itself. None: for itself alone.

    Logits of more than LOGITS_BYTES never lie in memory at once: tokens go part by part, and a part's logits are
    computed once more for the gradient.
    """
    parts = _parts(x.shape[0], x.shape[1], vocab_size)

    def of_part(x: Float[Array, "B C D"], targets: Int32[Array, "B C"], weights: Float[Array, "B C"]) -> Losses:
        logits = logits_of(x)
        right = (jnp.argmax(logits, axis=-1) == targets) & (weights > 0)
        logits = logits if log_counts is None else logits + log_counts
        total = (negative_log_likelihood(logits, targets) * weights).sum()
        return Losses(total, right.sum(dtype=jnp.int32), weights.sum())

    if parts == 1:
        return of_part(x, targets, weights)

    def cut(array: Array) -> Array:
        return jnp.moveaxis(array.reshape(array.shape[0], parts, -1, *array.shape[2:]), 1, 0)

    def add(so_far: Losses, part: tuple[Array, Array, Array]) -> tuple[Losses, None]:
        return jax.tree.map(jnp.add, so_far, jax.checkpoint(of_part)(*part)), None

    zero = Losses(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros(()))
    return lax.scan(add, zero, (cut(x), cut(targets), cut(weights)))[0]


def _parts(rows: int, tokens: int, vocab_size: int) -> int:
    """The fewest equal parts of a row's tokens that keep logits within LOGITS_BYTES (a token of each row at least)."""
    wanted = math.ceil(4 * rows * tokens * vocab_size / LOGITS_BYTES)
    return next(parts for parts in range(min(max(wanted, 1), tokens), tokens + 1) if tokens % parts == 0)


def routing(
    logits: Mapping[str, Float[Array, "B T E"]], is_token: Bool[Array, "B T"], top_k: int
) -> tuple[Router, Float[Array, ""]]:
    """How routers used their experts, by each layer's logits, and the load-balancing loss, 1 where they did so evenly.

    The loss is E sum_e f_e p_e, the mean over layers: f_e the share of assignments, p_e the mean probability (Fedus et
    al., arXiv:2101.03961, equations 4 to 6, for top_k experts a token).
    """
    loads, entropies, losses = [], [], []
    tokens = jnp.maximum(is_token.sum(dtype=jnp.float32), 1)
    for of_layer in logits.values():
        num_experts = of_layer.shape[-1]
        ids, _ = route(of_layer, top_k)
        assigned = jax.nn.one_hot(jnp.where(is_token[..., None], ids, -1), num_experts, dtype=jnp.float32)
        load = assigned.sum((0, 1, 2)) / (tokens * top_k)
        mean = (jax.nn.softmax(of_layer) * is_token[..., None].astype(jnp.float32)).sum((0, 1)) / tokens
        loads.append(load)
        entropies.append(-(mean * jnp.log(jnp.maximum(mean, 1e-30))).sum())
        losses.append(num_experts * (lax.stop_gradient(load) * mean).sum())
    return lax.stop_gradient(Router(jnp.stack(loads), jnp.stack(entropies))), jnp.stack(losses).mean()
