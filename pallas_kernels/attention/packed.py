"""Attention over packed rows, for training: several conversations in a row, none of which sees another's tokens.

A row is [head][own part of conversation 1][own part of conversation 2]...[padding]. What conversations begin with alike
(a system message) stands once, as the row's head, and each continues it.

`attend_packed` is what the op means, in jnp; it differentiates. B rows, T tokens each, N query heads, K key/value heads
(query head n reads key/value head n // (N / K)), H head size.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import einops
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from cpu_kernels import packed_attention as cpu
from pallas_kernels.choice import Choice, Hardware, Implementations, best, by_name


class Places(NamedTuple):
    """Where the tokens of packed rows stand.

    Example: a head of 2 tokens, two conversations that continue it by 3 and 2, one that does not, of 2, and padding.

        index       0  1 | 2  3  4 | 5  6 | 7  8 | 9
        position    0  1 | 2  3  4 | 2  3 | 0  1 |-1
        first       0  0 | 2  2  2 | 5  5 | 7  7 | 0
        head        0  0 | 2  2  2 | 2  2 | 0  0 | 0

    The token at index 6 sees indices 0, 1, 5 and 6.
    """

    position: Int32[Array, "B T"]  # in its conversation, from 0: the index of a head's token; -1 for padding
    first: Int32[Array, "B T"]  # index in the row of the first token of the conversation's own part; 0 for a head's
    head: Int32[Array, "B T"]  # number of tokens at the row's start that the conversation continues; 0 for a head's


@runtime_checkable
class AttendPacked(Protocol):
    """out = softmax over the keys that a query sees, and its head's sink, of q k / sqrt(H), times their values.

    The key at index s is visible to the query at index t if it is not padding, s <= t, it stands in the query's own
    part (s >= first[t]) or in the head that this continues (s < head[t]), and, with a window, position[t] - position[s]
    < window. The sink is one more logit, unscaled, with no value; one of -inf is none. Padding gives 0, and its own
    keys and values have to be finite.

    Differentiable by q, k, v and the sinks.

    Raises:
        TypeError: dtypes that the back end does not take.
    """

    def __call__(  # noqa: D102
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        places: Places,
        sinks: Float[Array, "N"],
        *,
        window: int | None,
    ) -> Float[Array, "B T N H"]: ...


QUERIES_PER_BLOCK = 512  # bounds what the logits of a block take, and lets most queries skip the keys after them


def visible(places: Places, window: int | None, queries: slice = slice(None)) -> Bool[Array, "B Q T"]:
    """Whether the queries at some indices see the key at each index; see `AttendPacked`."""
    index = jnp.arange(places.position.shape[-1], dtype=jnp.int32)
    position, first, head = (array[..., queries, None] for array in places)
    key_position = places.position[..., None, :]
    seen = (position >= 0) & (key_position >= 0) & (index <= index[queries, None]) & ((index >= first) | (index < head))
    return seen if window is None else seen & (position - key_position < window)


def attend_packed(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    places: Places,
    sinks: Float[Array, "N"],
    *,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """See `AttendPacked`. All in float32; logits are computed again for the gradient, and not kept."""
    q, k, v, sinks = (array.astype(jnp.float32) for array in (q, k, v, sinks))  # so that blocks' gradients add up so
    tokens, parts = q.shape[1], []
    for first in range(0, tokens, QUERIES_PER_BLOCK):
        end = min(first + QUERIES_PER_BLOCK, tokens)
        before = Places(*(array[:, :end] for array in places))
        seen = visible(before, window, slice(first, end))
        parts.append(_attend_block(q[:, first:end], k[:, :end], v[:, :end], seen, sinks))
    return jnp.concatenate(parts, axis=1) if parts else jnp.zeros(q.shape, jnp.float32)


@jax.checkpoint
def _attend_block(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    seen: Bool[Array, "B Q S"],
    sinks: Float[Array, "N"],
) -> Float[Array, "B Q N H"]:
    grouped = einops.rearrange(q, "b q (k g) h -> b q k g h", k=k.shape[2])
    logits = jnp.einsum("bqkgh,bskh->bkgqs", grouped, k, precision="highest")
    logits = jnp.where(seen[:, None, None], logits * q.shape[-1] ** -0.5, -jnp.inf)
    sink = einops.rearrange(sinks, "(k g) -> k g 1 1", k=k.shape[2])
    top = lax.stop_gradient(jnp.maximum(logits.max(-1, keepdims=True), sink))
    top = jnp.where(top == -jnp.inf, 0, top)  # padding, where the sink is none
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True) + jnp.exp(sink - top)
    probability = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum("bkgqs,bskh->bqkgh", probability, v, precision="highest")
    return einops.rearrange(out, "b q k g h -> b q (k g) h")


def _reference() -> AttendPacked:
    return attend_packed


def _cpu() -> AttendPacked:
    return cpu.attend_packed


PACKED = Implementations[AttendPacked]({"reference": _reference, "cpu": _cpu})


def choose_packed(name: str, hardware: Hardware, dtype: DTypeLike = jnp.bfloat16) -> Choice:
    """The implementation called `name`, or for "auto" the best on `hardware` for queries, keys and values of `dtype`.

    Raises:
        KernelError: no implementation has that name, or it cannot run here.
    """
    if name != "auto":
        return by_name("packed attention", PACKED, name, hardware)
    otherwise = Choice("reference", PACKED["reference"], "portable jnp")
    if dtype not in (jnp.float32, jnp.bfloat16):
        return otherwise._replace(reason=f"{otherwise.reason}; kernels take float32 and bfloat16")
    return best(PACKED, hardware, otherwise)
