"""Attention over packed rows, for training: several conversations in a row, none of which sees another's tokens.

A row is [head][own part of conversation 1][own part of conversation 2]...[padding]. What conversations begin with alike
(a system message) stands once, as the row's head, and each continues it.

`attend_packed` is what the op means, in jnp; it differentiates. B rows, T tokens each, N query heads, K key/value heads
(query head n reads key/value head n // (N / K)), H head size.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import einops
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


def visible(places: Places, window: int | None) -> Bool[Array, "B T S"]:
    """Whether the query at each index sees the key at each index; see `AttendPacked`."""
    index = jnp.arange(places.position.shape[-1], dtype=jnp.int32)
    query_position, key_position = places.position[..., :, None], places.position[..., None, :]
    own = index >= places.first[..., None]
    shared = index < places.head[..., None]
    seen = (query_position >= 0) & (key_position >= 0) & (index <= index[:, None]) & (own | shared)
    return seen if window is None else seen & (query_position - key_position < window)


def attend_packed(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    places: Places,
    sinks: Float[Array, "N"],
    *,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """See `AttendPacked`. All in float32, and all logits of a row at once."""
    grouped = einops.rearrange(q.astype(jnp.float32), "b t (k g) h -> b t k g h", k=k.shape[2])
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(jnp.float32), precision="highest")
    seen = visible(places, window)[:, None, None]
    logits = jnp.where(seen, logits * q.shape[-1] ** -0.5, -jnp.inf)
    sink = einops.rearrange(sinks.astype(jnp.float32), "(k g) -> k g 1 1", k=k.shape[2])
    top = lax.stop_gradient(jnp.maximum(logits.max(-1, keepdims=True), sink))
    top = jnp.where(top == -jnp.inf, 0, top)  # padding, where the sink is none
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True) + jnp.exp(sink - top)
    probability = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum("bkgts,bskh->btkgh", probability, v.astype(jnp.float32), precision="highest")
    return einops.rearrange(out, "b t k g h -> b t (k g) h")


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
