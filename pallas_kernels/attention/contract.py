"""What attention takes and gives: the two forms of keys and values, the signature, the result, and how results merge.

B sequences, T query tokens, N query heads, K key/value heads (query head n reads key/value head n // (N / K)), H head
size. Knows no back end.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32


class PagedKV(NamedTuple):
    """Keys and values in a pool of P pages of S tokens, M pages per sequence: a query sees every key up to its own.

    The pool holds the query's own key already. A slot that no query sees may hold anything, NaN included, and so may
    the page table where a sequence has no tokens.

    Example: S = 64, page_table[0] = [5, 2, 0, 0], positions[0] = [69]. Sequence 0's tokens 0 to 63 are page 5, its
    tokens 64 to 69 the first six slots of page 2: the query sees these 70 keys.
    """

    k: Float[Array, "P S K H"]
    v: Float[Array, "P S K H"]
    page_table: Int32[Array, "B M"]


class RingKV(NamedTuple):
    """Keys and values of a sliding window of W: a ring of W slots, and T new tokens, which it does not hold yet.

    A query sees the last W keys up to its own. The ring holds position p in slot p % W, for the W positions before
    `start`; the new tokens stand at start, start + 1, ... A slot whose position would be below 0, and a new token that
    is padding, may hold anything, NaN included.

    Example: W = 4, start[0] = 6, T = 2. The ring's slots hold positions 4, 5, 2, 3; the new tokens are 6 and 7. The
    query at position 7 sees positions 4 to 7.
    """

    k: Float[Array, "B W K H"]
    v: Float[Array, "B W K H"]
    k_new: Float[Array, "B T K H"]
    v_new: Float[Array, "B T K H"]
    start: Int32[Array, "B"]  # tokens of the sequence before the new ones


class Attended(NamedTuple):
    """What attention gives: the weighted means of the values, and what `merge` needs to know of their weights."""

    out: Float[Array, "B T N H"]  # float32, or q's dtype where a kernel rounds to it; 0 for padding
    lse: Float[Array, "B T N"]  # float32: ln(sum of exp(logit)), the sink's logit included; -inf for padding


@runtime_checkable
class Attend(Protocol):
    """out = softmax over the keys that a query sees, and its head's sink, of q k / sqrt(H), times their values.

    A query's position counts from the start of its sequence; -1 says padding. The sink is one more logit of the
    softmax, unscaled, with no value; a sink of -inf is none. Memory is O(block), not O(context).

    Keys and values have one dtype. Queries may have another with the reference and with C++.

    Raises:
        TypeError: dtypes that the back end cannot multiply exactly.
    """

    def __call__(  # noqa: D102
        self,
        q: Float[Array, "B T N H"],
        kv: PagedKV | RingKV,
        positions: Int32[Array, "B T"],
        sinks: Float[Array, "N"],
    ) -> Attended: ...


def merge(parts: Attended, axis: int) -> Attended:
    """Attention to all keys, from attentions to disjoint parts of them that are stacked along `axis`.

    One part has the sinks, the others have sinks of -inf. In a part, positions count from its first key, and stop at
    its last; a query that sees none of its keys is padding there. Example: keys 0 to 99 in two parts of 50; the query
    at position 70 stands at 49 in the first and at 20 in the second, the one at 30 at 30 and at -1.

    Source: Dao et al., arXiv:2205.14135, section 3.1, where two blocks of keys meet.
    """
    top = lax.stop_gradient(parts.lse.max(axis, keepdims=True))  # any number will do; beside the largest none overflows
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(parts.lse - top)
    total = weights.sum(axis)
    is_padding = total == 0
    total = jnp.where(is_padding, 1, total)
    out = (parts.out.astype(jnp.float32) * weights[..., None]).sum(axis) / total[..., None]
    return Attended(out, jnp.where(is_padding, -jnp.inf, top.squeeze(axis) + jnp.log(total)))
