"""How packed experts lie in a TPU's memory, and how its cores make bfloat16 of them: one form for each way they can.

All forms give the same bits, and each is undone to the published bytes. A TPU has no 4-bit arithmetic; a core since v6e
computes in bfloat16, one before that in float32 and integers only, and TPU v7x converts E2M1 itself. The costs that
made the choice are in docs/kernels.md.

Scale bytes are read as 1 .. 252, which keeps every weight a finite bfloat16: byte 0 reads as 1 (what it scales
is below 2^-123 either way), 253 and 254 (weights of 2^125 and more) as 252, and loading refuses them. What is then
below 2^-126 is zero.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels.expert_mlp.weights import Rearrangement, WeightLayout
from pallas_kernels.mxfp4 import BLOCK

LANES = 128  # of a vector register, whose other axis are 8 sublanes of 32 bits
SCALES = 1, 252  # the least and the greatest scale byte that keep every weight a finite, normal bfloat16


# ---- MXFP4 as 32-bit words ----

WORDS = 4  # a block of 32 codes is four words of eight codes
PLACES = (
    ((0, 0x81C0),),
    ((3, 0x81C0),),
    ((6, 0x81C0),),
    ((1, 0x8000), (-5, 0x0100), (-4, 0x00C0)),
)
"""Where each half of a word keeps its four codes, as shifts to the left and what to keep of each: a code's sign then
lies where bfloat16 has its sign, and its other three bits as the two lowest of the exponent and the highest of the
mantissa. Sixteen bits hold three codes that one shift brings there, and a fourth that takes three."""

HALF_STEP = 0x0040  # the first mantissa bit: what separates one E2M1 magnitude from the next
ZERO = HALF_STEP  # the rung of the ladder 0.5, 0.75, 1, 1.5, 2, 3, 4, 6 that E2M1 has no use for
"""E2M1's magnitudes are eight neighbouring bfloat16 numbers but for its 0, 0.5, where these have 0.5, 0.75. So its code
1 is kept as 0, and its 0 as 1; adding the scale to the exponent then gives all weights at once, and only what is kept
as 1 has still to be made zero."""


def _both(half: int) -> Int32[Array, ""]:
    """`half` in both halves of a word."""
    return jnp.int32(np.int32(np.uint32(half * 0x10001).view(np.int32)))


def _shift(words: Array, left: int) -> Array:
    by = jnp.asarray(abs(left), words.dtype)
    return lax.shift_left(words, by) if left >= 0 else lax.shift_right_logical(words, by)


def _swap_zero_and_half(codes: Array) -> Array:
    """E2M1 codes, with magnitudes 0 and 1 swapped: to the ladder and back."""
    return jnp.where(codes & 7 <= 1, codes ^ 1, codes)


def _to_words(blocks: UInt8[Array, "E O B 16"]) -> Int32[Array, "E O R"]:
    """R = 4 B words: word r of a block has in its halves, at place p, elements 8 p + 2 r and 8 p + 2 r + 1."""
    words = jnp.zeros((), jnp.uint32)
    for place in range(len(PLACES)):
        pair = blocks[..., WORDS * place : WORDS * (place + 1)].astype(jnp.uint32)
        for at, code in ((0, pair & 15), (16, pair >> 4)):
            rung = _swap_zero_and_half(code)
            bits = (rung & 8) << 12 | (rung & 7) << 6
            words |= (
                functools.reduce(jnp.bitwise_or, [_shift(bits & keep, -left) for left, keep in PLACES[place]]) << at
            )
    return lax.bitcast_convert_type(words.reshape(*blocks.shape[:2], -1), jnp.int32)


def _from_words(words: Int32[Array, "E O R"]) -> UInt8[Array, "E O B 16"]:
    bits = lax.bitcast_convert_type(words.reshape(*words.shape[:2], -1, WORDS), jnp.uint32)
    pairs = []
    for place in range(len(PLACES)):
        rungs = _at_place(bits, place)
        codes = [_swap_zero_and_half((half >> 12 & 8) | (half >> 6 & 7)) for half in (rungs & 0xFFFF, rungs >> 16)]
        pairs.append((codes[0] | codes[1] << 4).astype(jnp.uint8))
    return jnp.concatenate(pairs, axis=-1)


def _at_place(words: Array, place: int) -> Array:
    """The two codes at `place` of every word, where bfloat16 has such bits."""
    kept = [_shift(words, left) & _both(keep).astype(words.dtype) for left, keep in PLACES[place]]
    return functools.reduce(jnp.bitwise_or, kept)


# ---- the forms that weights have in memory ----


class Form(NamedTuple):
    """How weights lie, and how a kernel makes bfloat16 of them: all forms give the same bits.

    The input is contracted in P parts: part p has of each block of 32 the p-th 32 / P elements. Whatever gives
    activations gives them in parts, [P, M, I / P]: gate_up's outputs lie so that the hidden activations come in parts
    too.
    """

    parts: int
    layout: WeightLayout
    most_rows: int  # of a tile: with so many, the matrix unit takes longer than unpacking its weights
    unpack: Callable[..., list[Array]]  # refs of codes [R, N], scales [B, N], a scratch -> P times [I / P, N]


def _in_parts(outputs: Array, parts: int) -> Array:
    """Interleaved gate and linear rows, [E, 2 F, ...], as [E, P, 2, ..., F / P]."""
    to = "e (block part size kind) ... -> e part kind ... (block size)"
    return einops.rearrange(outputs, to, part=parts, size=BLOCK // parts, kind=2)


def _out_of_parts(packed: Array) -> Array:
    """The inverse of `_in_parts`."""
    size = BLOCK // packed.shape[1]
    return einops.rearrange(packed, "e part kind ... (block size) -> e (block part size kind) ...", size=size)


def _layout(
    parts: int, to_codes: Callable[[Array], Array], from_codes: Callable[[Array], Array], codes: str
) -> WeightLayout:
    """Contraction before outputs, which lie along the lanes: 2,880 of them are stored as 2,944 where P is 1, in four
    parts as 3,072; the rest wastes nothing.
    """
    in_parts = functools.partial(_in_parts, parts=parts)
    transposed = functools.partial(jnp.swapaxes, axis1=1, axis2=2)

    def outputs_last(names: tuple[Any, ...]) -> tuple[Any, ...]:
        return names[0], names[2], names[1]

    def parts_first(names: tuple[Any, ...]) -> tuple[Any, ...]:
        return names[0], None, None, *names[2:3], names[1]

    where = f"[expert, part of {parts}, gate or linear, input, output]"
    return WeightLayout(
        Rearrangement(
            lambda a: in_parts(to_codes(a)), lambda a: from_codes(_out_of_parts(a)), parts_first, f"{codes} {where}"
        ),
        Rearrangement(in_parts, _out_of_parts, parts_first, f"bytes {where}", SCALES[1]),
        Rearrangement(in_parts, _out_of_parts, parts_first, f"values {where}"),
        Rearrangement(
            lambda a: transposed(to_codes(a)),
            lambda a: from_codes(transposed(a)),
            outputs_last,
            f"{codes} [expert, input, output]",
        ),
        Rearrangement(transposed, transposed, outputs_last, "bytes [expert, input, output]", SCALES[1]),
        Rearrangement(
            lambda a: a[:, None], lambda a: a[:, 0], lambda n: (n[0], None, n[1]), "values [expert, 1, output]"
        ),
    )


def _scale_words(scales: UInt8[Array, "B N"]) -> Int32[Array, "B N"]:
    """What to add to both halves of a word so that the ladder's first rung becomes 0.5 2^(scale - 127)."""
    exponent = (jnp.clip(scales.astype(jnp.int32), *SCALES) - 1) << 7
    return exponent | exponent << 16


def _unpack_words(
    ladder_to_weights: Callable[[Array, Array], Array], codes: Any, scales: Any, at: slice, scratch: Any
) -> list[Array]:
    """Four parts of [4 B words * 2, N] bfloat16 weights."""
    added = _scale_words(scales[:, at])
    blocks, outputs = added.shape
    for lane in range(0, outputs, LANES):  # each block's scale beside its four words
        tile = scratch.at[lane // LANES]
        for word in range(WORDS):
            tile[pl.ds(word, blocks, WORDS), :] = _to_lanes(added[:, lane : lane + LANES])
    added = jnp.concatenate([scratch[i, : WORDS * blocks] for i in range(pl.cdiv(outputs, LANES))], axis=1)[:, :outputs]
    words = codes[:, at]
    return [ladder_to_weights(_at_place(words, place), added) for place in range(len(PLACES))]


def _to_lanes(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, LANES - x.shape[1])))


def _by_integers(rungs: Int32[Array, "R N"], scale: Int32[Array, "R N"]) -> Float[Array, "R2 N"]:
    """For cores that have no bfloat16 arithmetic: zeros are found by a carry, and taken out by a mask."""
    seven = 7 * HALF_STEP
    carry = ((rungs ^ _both(ZERO)) + _both(seven)) & _both(seven + HALF_STEP)
    mask = _shift(carry, 7) - _shift(carry, -9)
    return pltpu.bitcast((rungs + scale) & mask, jnp.bfloat16)


def _by_selection(rungs: Int32[Array, "R N"], scale: Int32[Array, "R N"]) -> Float[Array, "R2 N"]:
    """For cores that compare and select bfloat16."""
    weights = pltpu.bitcast(rungs + scale, jnp.bfloat16)
    zero = pltpu.bitcast(scale + _both(ZERO), jnp.bfloat16)
    return jnp.where(jnp.abs(weights) == zero, jnp.zeros((), jnp.bfloat16), weights)


def _to_float4(blocks: UInt8[Array, "E O B 16"]) -> Array:
    return lax.bitcast_convert_type(blocks, jnp.float4_e2m1fn).reshape(*blocks.shape[:2], -1)


def _from_float4(codes: Array) -> UInt8[Array, "E O B 16"]:
    return lax.bitcast_convert_type(codes.reshape(*codes.shape[:2], -1, BLOCK // 2, 2), jnp.uint8)


def _unpack_float4(codes: Any, scales: Any, at: slice, scratch: Any) -> list[Array]:
    """One part: cores that know E2M1 convert it themselves."""
    del scratch
    bits = jnp.clip(scales[:, at].astype(jnp.int32), *SCALES) << 23
    scale = lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)
    weights = codes[:, at].astype(jnp.bfloat16).reshape(-1, BLOCK, scale.shape[1]) * scale[:, None]
    return [weights.reshape(-1, scale.shape[1])]


_WORDS = _layout(len(PLACES), _to_words, _from_words, "words of eight codes")
FORMS = {
    "words, by integers": Form(len(PLACES), _WORDS, 256, functools.partial(_unpack_words, _by_integers)),
    "words, by selection": Form(len(PLACES), _WORDS, 512, functools.partial(_unpack_words, _by_selection)),
    "float4": Form(1, _layout(1, _to_float4, _from_float4, "float4_e2m1fn"), 256, _unpack_float4),
}


def form_for(tpu: str) -> Form:
    """The cheapest form on a TPU that JAX calls `tpu`, as in "TPU v6 lite"; any other gets what every TPU can run."""
    return FORMS[{"TPU7x": "float4", "TPU v6 lite": "words, by selection"}.get(tpu, "words, by integers")]
