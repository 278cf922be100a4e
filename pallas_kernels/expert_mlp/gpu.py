"""The experts' MLPs on Hopper GPUs: two grouped products of packed weights, dequantised in registers (Mosaic GPU).

How the data moves. The assignments are sorted by expert and cut into tiles of M rows, whose activations XLA gathers; of
few tokens every tile has all, and nothing is sorted (tiles.py). A block of threads (one warpgroup for every 64 outputs)
multiplies one tile by its expert's weights, which TMA brings to shared memory as they lie in HBM, 4 blocks of 32
weights of each output at a time and several such steps ahead. They go to registers, become bfloat16 there, and are the
A operand of wgmma (64 outputs x 128 inputs); B is the tile's activations (128 inputs x M rows), swizzled in shared
memory. So weights are read once for M rows, as 4.25 bits, and their bfloat16 form is never stored. The first product
adds its bias and ends in the SwiGLU, the second adds its bias; `tiles.combine` weights and sums. Decoding and prefill
are one kernel: M goes from 8 to 128, and from 64 outputs in a block of threads to 256, which then share the
activations.

Two orders make this cheap, both settled once at load or outside:

- A thread of wgmma's A operand holds 4 of each 16 inputs of a row. Any order of the inputs will do as long as weights
  and activations agree, so a thread (one of the 4 that share a row) takes one whole block of 32 weights: one load of 16
  bytes, one scale. Activations are put in that order by XLA (`_in_fragment_order`), which is a transpose within groups
  of 128 inputs; the first product writes its results in that order.
- The bits of a 32-bit word (8 codes) are permuted at load so that a pair of codes falls onto the sign, exponent and
  mantissa bits of a pair of bfloat16 by a rotation and a mask (`_BIT_OF`, `_pairs`).

float32 activations are multiplied as three bfloat16 terms (8 significant bits each, 24 in all), so that products are
exact and sums are float32, in the tensor core's order of adding. Activations beyond bfloat16's range are not kept.
"""

import functools
import itertools
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, scf, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32, UInt8, UInt32

from pallas_kernels import mxfp4
from pallas_kernels.expert_mlp.reference import ALPHA
from pallas_kernels.expert_mlp.tiles import TiledRows, TokenTiles, tile_rows
from pallas_kernels.expert_mlp.weights import (
    AS_PUBLISHED,
    ExpertWeights,
    Rearrangement,
    WeightLayout,
    unchanged,
    without_adapters,
)
from pallas_kernels.mxfp4 import BLOCK

BLOCKS = 4  # blocks of 32 inputs in a group: one for each thread that shares a row
GROUP = BLOCKS * BLOCK  # inputs that are dequantised together
GROUPS = 2  # of a step, which is what is loaded and waited for at once
WORDS = BLOCK // 8  # 32-bit words of a block
OUTPUTS = 64  # of one warpgroup: wgmma's M
INTERPRETED_WARPGROUPS = 1  # of the interpreter: each is a thread that waits for others, more than a host may run
FEWEST_ROWS = 8  # of a tile: wgmma's least N
MOST_ROWS = 128
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # as wgmma reads operands of bfloat16


# ---- how the weights lie ----

_IN_BFLOAT16 = (6, 7, 8, 15)  # where the bits of an E2M1 code go: mantissa, two of exponent, sign
_ROTATIONS = (0, 13, 10)  # rotations to the left that bring the first three pairs of a word there
_GATHER = (4, 0, 1, 3)  # where the last pair's bits lie: those that are left; one product brings them there
_GATHERING = (1 << 2) + (1 << 7) + (1 << 12)
_LARGEST = 128  # scale byte whose factor, 2^(128 - 127 + 126), is a bfloat16
_MASK = sum(1 << bit << half for bit in _IN_BFLOAT16 for half in (0, 16))


def _bit_of(code: int, bit: int) -> int:
    """Where a bit of one of a word's 8 codes lies at rest; even codes are the low halves of their pairs."""
    pair, half = code // 2, 16 * (code % 2)
    if pair == len(_ROTATIONS):
        return half + _GATHER[bit]
    return (half + _IN_BFLOAT16[bit] - _ROTATIONS[pair]) % 32


_BIT_OF = tuple(_bit_of(code, bit) for code in range(8) for bit in range(4))


def _with_bits(words: UInt32[Array, "*shape"], moves: list[tuple[int, int]]) -> UInt32[Array, "*shape"]:
    moved = [(words >> jnp.uint32(old) & jnp.uint32(1)) << jnp.uint32(new) for old, new in moves]
    return functools.reduce(jnp.bitwise_or, moved)


def _to_words(blocks: UInt8[Array, "E R B 16"]) -> UInt32[Array, "E R W"]:
    words = lax.bitcast_convert_type(blocks.reshape(*blocks.shape[:-1], WORDS, 4), jnp.uint32)
    return _with_bits(words, list(enumerate(_BIT_OF))).reshape(*blocks.shape[:2], -1)


def _from_words(words: UInt32[Array, "E R W"]) -> UInt8[Array, "E R B 16"]:
    published = _with_bits(words, [(new, old) for old, new in enumerate(_BIT_OF)])
    return lax.bitcast_convert_type(published, jnp.uint8).reshape(*words.shape[:2], -1, BLOCK // 2)


def _split(array: Array) -> Array:
    """Of each 16 rows the 8 gates before the 8 linear ones, so that one thread gets a gate and its linear part."""
    return einops.rearrange(array, "e (rows gate kind) ... -> e (rows kind gate) ...", gate=8, kind=2)


def _interleave(array: Array) -> Array:
    return einops.rearrange(array, "e (rows kind gate) ... -> e (rows gate kind) ...", gate=8, kind=2)


def _words(before: Any, after: Any, described: str) -> Rearrangement:
    return Rearrangement(
        lambda blocks: before(_to_words(blocks)),
        lambda words: _from_words(after(words)),
        lambda axes: axes[:3],
        described,
    )


def _columns(before: Any, after: Any, described: str) -> Rearrangement:
    """TMA's strides are multiples of 16 bytes, which 90 scales are not, and rows of outputs are."""
    return Rearrangement(
        lambda scales: before(scales).swapaxes(1, 2),
        lambda columns: after(columns.swapaxes(1, 2)),
        lambda axes: (axes[0], axes[2], axes[1]),
        described,
    )


_BITS = "words of 8 codes whose bits are permuted"
LAYOUT = WeightLayout(
    _words(_split, _interleave, f"{_BITS}, 8 gates before 8 linear rows"),
    _columns(_split, _interleave, "[E, DB, F2], 8 gates before 8 linear rows"),
    AS_PUBLISHED,
    _words(unchanged, unchanged, _BITS),
    _columns(unchanged, unchanged, "[E, FB, D]"),
    AS_PUBLISHED,
)


# ---- the operation ----


def expert_mlp(
    x: Float[Array, "T D"],
    expert_ids: Int32[Array, "T X"],
    routing_weights: Float[Array, "T X"],
    weights: ExpertWeights,
    *,
    limit: float,
    interpret: Any = None,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.expert_mlp.RunExperts`.

    Args:
        x: bfloat16, or float32 (three products instead of one).
        expert_ids: the experts that each token is assigned to.
        routing_weights: and how much of each it takes.
        weights: the layer's experts, in `LAYOUT`.
        limit: the SwiGLU's.
        interpret: None compiles for the device; else parameters of Mosaic GPU's interpreter.

    Raises:
        TypeError: x has another type.
        NotImplementedError: there are adapters, or the weights are dense.
    """
    arrays = without_adapters(weights)
    num_experts = weights.gate_up_blocks.shape[0]
    terms = _terms(x)
    most = MOST_ROWS if len(terms) == 1 else MOST_ROWS // 4  # three terms take three times the shared memory
    rows = tile_rows(expert_ids.size, num_experts, FEWEST_ROWS, most)
    tiles = (TokenTiles if len(x) <= FEWEST_ROWS else TiledRows).of(expert_ids, num_experts, rows)
    gathered = jnp.stack([_in_fragment_order(tiles.gather(term)) for term in terms])
    run = functools.partial(_product, tiles.in_use(), rows, interpret=interpret)
    hidden = run(gathered, *arrays[:3], limit=limit)
    return tiles.combine(run(hidden, *arrays[3:])[:, : x.shape[1]], routing_weights)


def _terms(x: Float[Array, "T D"]) -> list[Array]:
    """Arrays of bfloat16 whose sum is x."""
    if x.dtype == jnp.bfloat16:
        return [x]
    if x.dtype != jnp.float32:
        raise TypeError(f"x is {x.dtype}, expected bfloat16 or float32")
    terms = []
    for _ in range(3):
        # A conversion and back may be dropped by XLA as excess precision; this rounding may not.
        rounded = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        terms.append(rounded.astype(jnp.bfloat16))
        x = x - rounded
    return terms


def _in_fragment_order(x: Array) -> Array:
    """[R, D] -> [R, D'] with inputs in the order in which wgmma's threads hold the weights; D' whole groups.

    Input (block q, pair c, j) of a group is column 8 c + 2 q + j: thread q of a row holds columns 2 q and 2 q + 1 of
    each 8, and takes them from its block.
    """
    groups = pl.cdiv(x.shape[1], GROUP)
    padded = jnp.pad(x, ((0, 0), (0, groups * GROUP - x.shape[1])))
    by_block = padded.reshape(x.shape[0], groups, BLOCKS, BLOCK // 2, 2)
    return by_block.swapaxes(2, 3).reshape(x.shape[0], groups * GROUP)


class _Tiling(NamedTuple):
    """What one block of threads does, and how far ahead it loads."""

    rows: int  # M
    terms: int  # of each activation
    warpgroups: int  # each with 64 outputs of its own
    stages: int  # steps in shared memory
    parts: int  # in which a group is dequantised: two need fewer registers

    @classmethod
    def of(cls, rows: int, terms: int) -> "_Tiling":
        """Few rows: as many small blocks as there can be, for decoding is 4 x 90 of them and there are 132 SMs.

        Three such blocks share an SM, each with three steps of 8.5 KB on their way (float32's three terms leave room
        for fewer). Many rows: 256 outputs share the activations, which are then most of what is loaded, and 512
        threads have 128 registers each.
        """
        return cls(rows, terms, 4, 2, 2) if rows >= 64 else cls(rows, terms, 1, 4 if terms == 1 else 2, 1)


def _product(
    experts: Int32[Array, "I"],
    rows: int,
    x: Array,
    words: UInt32[Array, "E R W"],
    scales: UInt8[Array, "E B R"],
    bias: Float[Array, "E R"],
    *,
    limit: float | None = None,
    interpret: Any,
) -> Array:
    """Each tile's rows of x [terms, I M, inputs] by its expert's weights, plus bias; tiles of no expert are left out.

    Where x has M rows, they are those of every tile.

    With `limit` the outputs are gates and linear parts, and the SwiGLU of them is given, as terms, in fragment order;
    without, the outputs in their order, float32 [I M, outputs], padded.
    """
    terms, _, inputs = x.shape
    tiling = _Tiling.of(rows, terms)
    if interpret is not None:
        tiling = tiling._replace(warpgroups=min(tiling.warpgroups, INTERPRETED_WARPGROUPS))
    # A warpgroup's four warps take 16 outputs each. In the first product they are 64 outputs from one another, so that
    # the SwiGLU of a warpgroup is 32 neighbours in fragment order; in the second they are neighbours.
    spacing = 4 if limit is not None else 1
    words, scales, bias = (
        a.reshape(*a.shape[:at], a.shape[at] // (16 * spacing), spacing, 16, *a.shape[at + 1 :])
        for a, at in ((words, 1), (scales, 2), (bias, 1))
    )
    units = pl.cdiv(words.shape[1], 4) * spacing
    blocks = pl.cdiv(units, tiling.warpgroups)
    width = OUTPUTS // 2 if limit is not None else OUTPUTS
    columns = blocks * tiling.warpgroups * width
    tile_rows = len(experts) * rows
    shape = (terms, tile_rows, columns) if limit is not None else (tile_rows, columns)
    out = jax.ShapeDtypeStruct(shape, jnp.float32 if limit is None else jnp.bfloat16)
    kernel = plgpu.kernel(
        functools.partial(_kernel, tiling=tiling, groups=inputs // GROUP, limit=limit, interpret=interpret),
        out_type=out,
        scratch_types=_scratch(tiling, bias.dtype, interpret),
        grid=(len(experts), blocks),  # blocks run fastest: tiles of one expert find its weights in L2
        grid_names=("tile", "block"),
        num_threads=tiling.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # `loaded` and `consumed` say all there is to say
        ),
        kernel_name="expert_down" if limit is None else "expert_gate_up",
        **({} if interpret is None else {"interpret": interpret}),
    )
    return kernel(experts, x, words, scales, bias)


def _scratch(tiling: _Tiling, bias_dtype: Any, interpret: Any) -> dict[str, Any]:
    """Shared memory and barriers; what is loaded at once has a place of its own, aligned as TMA wants it."""
    stages, each = tiling.stages, (tiling.stages, tiling.warpgroups)
    inputs = GROUP // tiling.parts
    operands = ((tiling.warpgroups, OUTPUTS, inputs), (tiling.warpgroups, inputs, tiling.rows))
    return {
        "x_s": plgpu.SMEM((stages, tiling.terms, tiling.rows, GROUPS * GROUP), jnp.bfloat16, transforms=_SWIZZLED),
        "words_s": plgpu.SMEM((*each, GROUPS, 4, 16, BLOCKS * WORDS), jnp.uint32),
        "scales_s": plgpu.SMEM((*each, GROUPS * BLOCKS, 4, 16), jnp.uint8),
        "bias_s": plgpu.SMEM((tiling.warpgroups, 4, 16), bias_dtype),
        "loaded": plgpu.Barrier(num_arrivals=(GROUPS + 1) * tiling.warpgroups + 1, num_barriers=stages),
        "consumed": plgpu.Barrier(num_arrivals=tiling.warpgroups, num_barriers=stages),
        "bias_loaded": plgpu.Barrier(num_arrivals=tiling.warpgroups),
        "operands_s": [] if interpret is None else [plgpu.SMEM(shape, jnp.bfloat16) for shape in operands],
    }


def _kernel(
    expert,
    x,
    words,
    scales,
    bias,
    out,
    *,
    x_s,
    words_s,
    scales_s,
    bias_s,
    loaded,
    consumed,
    bias_loaded,
    operands_s,
    tiling: _Tiling,
    groups: int,
    limit: float | None,
    interpret: Any,
):
    """One tile, and for each warpgroup 64 outputs."""
    tile, warpgroup = lax.axis_index("tile"), lax.axis_index("warpgroup")
    unit = lax.axis_index("block") * tiling.warpgroups + warpgroup
    columns, phase = pl.ds(unit // words.shape[2] * 4, 4), lax.rem(unit, words.shape[2])
    rows, steps = pl.ds(tile * tiling.rows, tiling.rows), pl.cdiv(groups, GROUPS)
    x_rows = pl.ds(0, tiling.rows) if x.shape[1] == tiling.rows else rows
    operands_s = [ref.at[warpgroup] for ref in operands_s]
    own = expert[tile]

    @pl.when((own >= 0) & (own < words.shape[0]))
    def _():

        def load(step):
            slot = lax.rem(step, tiling.stages)
            for group in range(GROUPS):
                of_group = words.at[
                    own, columns, phase, :, pl.ds((step * GROUPS + group) * BLOCKS * WORDS, BLOCKS * WORDS)
                ]
                plgpu.copy_gmem_to_smem(of_group, words_s.at[slot, warpgroup, group], loaded.at[slot])
            of_step = scales.at[own, pl.ds(step * GROUPS * BLOCKS, GROUPS * BLOCKS), columns, phase]
            plgpu.copy_gmem_to_smem(of_step, scales_s.at[slot, warpgroup], loaded.at[slot])

            @pl.when(warpgroup == 0)
            def _():
                of_tile = x.at[:, x_rows, pl.ds(step * GROUPS * GROUP, GROUPS * GROUP)]
                plgpu.copy_gmem_to_smem(of_tile, x_s.at[slot], loaded.at[slot])

        def release(step):
            slot = lax.rem(step, tiling.stages)
            plgpu.barrier_arrive(consumed.at[slot])

            @pl.when(step + tiling.stages < steps)
            def _():
                plgpu.barrier_wait(consumed.at[slot])
                load(step + tiling.stages)

        def multiply(acc, step, groups):
            slot = lax.rem(step, tiling.stages)
            plgpu.barrier_wait(loaded.at[slot])
            for part in range(groups * tiling.parts):
                group, part_of_group = divmod(part, tiling.parts)
                blocks = pl.ds(group * BLOCKS, BLOCKS)
                refs = words_s.at[slot, warpgroup, group], scales_s.at[slot, warpgroup, blocks]
                a = _weights(*refs, part_of_group, tiling.parts, interpret)
                inputs = pl.ds(part * a.shape[1], a.shape[1])
                for term in range(tiling.terms):
                    _multiply(acc, a, x_s.at[slot, term, :, inputs], *operands_s)
                # What was started before is done: the registers of its weights can be written, and its slot.
                plgpu.wgmma_wait(tiling.terms)
                if part == 0:
                    pl.when(step > 0)(lambda: release(step - 1))

        def accumulate(acc):
            lax.fori_loop(0, groups // GROUPS, lambda step, _: multiply(acc, step, GROUPS), None)
            if groups % GROUPS:
                plgpu.wgmma_wait(0)  # or ptxas, which looks for hazards across the loop's end, serialises all of it
                multiply(acc, jnp.int32(steps - 1), groups % GROUPS)
            return acc[...]

        plgpu.copy_gmem_to_smem(bias.at[own, columns, phase], bias_s.at[warpgroup], bias_loaded)
        for step in range(min(tiling.stages, steps)):
            load(jnp.int32(step))
        total = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((OUTPUTS, tiling.rows), jnp.float32))
        plgpu.barrier_wait(bias_loaded)
        if limit is None:
            out[rows, pl.ds(unit * OUTPUTS, OUTPUTS)] = _biased(total, bias_s.at[warpgroup], interpret)
        else:
            hidden = _gated(total, bias_s.at[warpgroup], limit, interpret)
            for term in range(tiling.terms):
                rounded = hidden.astype(jnp.bfloat16)
                out[term, rows, pl.ds(unit * OUTPUTS // 2, OUTPUTS // 2)] = rounded
                hidden = hidden - rounded.astype(jnp.float32)


# ---- what is done with registers ----
#
# Each function has two forms of the same meaning: one for the device, which knows which thread holds what, and one on
# plain arrays for the interpreter, which does not model registers.


def _tiled(tiles: tuple[tuple[int, ...], ...], warps: Any, lanes: Any) -> Any:
    return plgpu.Layout.TILED(fragments.Tiling(tiles), warps, lanes, -1)


_EACH_OF_4 = fragments.Replicated(4)
_WORDS_LAYOUTS = {  # by parts: warp, row, (block, word)
    parts: _tiled(((4, 16, 16 // parts), (8, 16 // parts), (4 // parts,)), (-6,), (-3, -2)) for parts in (1, 2)
}
_SCALES_LAYOUT = _tiled(((4, 4, 16), (8,), (1,)), (-4,), (-2, -5))  # block, warp, row
_BIAS_LAYOUT = _tiled(((4, 16), (8,), (1,)), (-4,), (-2, _EACH_OF_4))  # warp, row
_PAIRED_BIAS_LAYOUT = _tiled(((4, 16), (2,), (1,)), (-4,), (-3, _EACH_OF_4))  # warp, row as published: 2 g, 2 g + 1
_HIDDEN_LAYOUT = _tiled(((8, 32), (2, 8), (2,), (1,)), (-3,), (-5, -2, -6))  # activation row, column of fragment order
_BIASED_LAYOUT = _tiled(((8, 64), (2, 16), (8,), (1,)), (-5,), (-2, -6))  # activation row, output


def _load(ref: Any, layout: Any, interpret: Any) -> Array:
    return plgpu.load(ref, (), layout=layout, optimized=False) if interpret is None else ref[...]


def _weights(words_ref: Any, scales_ref: Any, part: int, parts: int, interpret: Any) -> Float[Array, "64 K"]:
    """A part of a group as an A operand: each code times 2^(scale - 127), exactly, in fragment order."""
    words, scales = _load(words_ref, _WORDS_LAYOUTS[1], interpret), _load(scales_ref, _SCALES_LAYOUT, interpret)
    if interpret is not None:
        of_part = words.reshape(4, 16, BLOCKS, parts, WORDS // parts)[:, :, :, part]
        return _scaled_interpreted(_pairs(of_part), scales)
    return _scaled(_pairs(_part(words, part, parts)), scales, parts)


def _pairs(words: UInt32[Array, "*shape"]) -> list[Array]:
    """Each word's 4 pairs of codes, as bits of pairs of bfloat16 that are 2^-126 times the codes' values."""
    rotated = [words] + [(words << jnp.uint32(n)) | (words >> jnp.uint32(32 - n)) for n in _ROTATIONS[1:]]
    left = sum(1 << bit << half for bit in _GATHER for half in (0, 16))
    rotated.append((words & jnp.uint32(left)) * jnp.uint32(_GATHERING))
    return [word & jnp.uint32(_MASK) for word in rotated]


def _scaled_interpreted(pairs: list[Array], scales: UInt8[Array, "4 4 16"]) -> Float[Array, "64 K"]:
    """Counts rather than multiplies by 2^126: XLA's CPU takes numbers below 2^-126 for 0."""
    halves = lax.bitcast_convert_type(jnp.stack(pairs), jnp.uint16)  # pair, warp, row, block, word, half
    magnitude = (halves >> 6 & 7).astype(jnp.int32)
    doubled = jnp.where(magnitude < 2, magnitude, (2 + magnitude % 2) << (magnitude // 2 - 1).clip(0))
    value = jnp.where(halves >> 15 == 1, -doubled, doubled).astype(jnp.float32) / 2
    power, half = (factor.transpose(1, 2, 0)[None, :, :, :, None, None] for factor in mxfp4.decode_scales(scales))
    weights = value * half * power
    # pair, warp, row, block, word, half -> warp, row, word, pair, block, half
    return weights.transpose(1, 2, 4, 0, 3, 5).reshape(OUTPUTS, -1).astype(jnp.bfloat16)


def _part(words: UInt32[Array, "4 16 16"], part: int, parts: int) -> UInt32[Array, "4 16 W"]:
    """The words of one part, of each block."""
    shape, layout = (4, 16, BLOCKS * WORDS // parts), _WORDS_LAYOUTS[parts]
    some = WORDS // parts

    def take(_, words):
        of_part = ir.VectorType.get((some,), _int32())
        slices = [vector.extract_strided_slice(of_part, r, [part * some], [some], [1]) for r in words.registers.flat]
        return _fragments(slices, layout, shape, is_signed=False)

    result = plgpu.ShapeDtypeStruct(shape, jnp.uint32, layout=layout)
    return plgpu.inline_mgpu(arg_types=(_WORDS_LAYOUTS[1],), return_type=result)(take)(words)


def _registers(parts: int) -> list[tuple[int, int, int]]:
    """What wgmma's A registers hold, in order: (word of a block, pair of codes, output g or g + 8).

    For each 8 columns a thread holds 2 neighbours of row g, and then of row g + 8.
    """
    return [*itertools.product(range(WORDS // parts), range(4), (0, 1))]


def _scaled(pairs: list[Array], scales: UInt8[Array, "4 4 16"], parts: int) -> Float[Array, "64 K"]:
    """Exact products by 2^126 and the scale, which are one bfloat16 factor up to scale byte 128.

    A warp that meets a larger one multiplies once more. bfloat16 products on GPUs keep numbers below 2^-126.
    """
    shape = (OUTPUTS, GROUP // parts)

    def scale_up(_, pairs, scales):
        scales = [arith.extui(_int32(), vector.extract(scale, [], [0])) for scale in scales.registers.flat]
        small = [arith.minui(scale, _constant(_LARGEST)) for scale in scales]
        factors = [_power(arith.addi(scale, _constant(126))) for scale in small]  # 2^(scale - 127 + 126)
        values = [
            arith.mulf(_as_pair(vector.extract(pairs[pair].registers.flat[half], [], [word])), factors[half])
            for word, pair, half in _registers(parts)
        ]
        is_larger = arith.cmpi(arith.CmpIPredicate.ugt, arith.maxui(*scales), _constant(_LARGEST))
        branch = scf.IfOp(is_larger, [values[0].type] * len(values), has_else=True)
        larger, as_they_are = (ir.InsertionPoint(region.blocks[0]) for region in branch.regions)
        with larger:
            rest = [_power(arith.addi(arith.subi(a, b), _constant(127))) for a, b in zip(scales, small, strict=True)]
            halves = (half for _, _, half in _registers(parts))
            scf.yield_([arith.mulf(value, rest[half]) for value, half in zip(values, halves, strict=True)])
        with as_they_are:
            scf.yield_(values)
        return _fragments(list(branch.results), plgpu.Layout.WGMMA, shape)

    result = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    arguments = ([_WORDS_LAYOUTS[parts]] * len(pairs), _SCALES_LAYOUT)
    return plgpu.inline_mgpu(arg_types=arguments, return_type=result)(scale_up)(pairs, scales)


def _int32() -> Any:
    return ir.IntegerType.get_signless(32)


def _power(exponent: Any) -> Any:
    """A pair of bfloat16, 2^(exponent - 127) for exponents from 1 to 254."""
    return _as_pair(arith.muli(exponent, _constant(0x0080_0080)))


def _constant(value: int) -> Any:
    return arith.constant(_int32(), value)


def _as_pair(bits: Any) -> Any:
    one = vector.broadcast(ir.VectorType.get((1,), bits.type), bits)
    return vector.bitcast(ir.VectorType.get((2,), ir.BF16Type.get()), one)


def _multiply(acc: Any, a: Float[Array, "64 K"], x_s: Any, *operands_s: Any) -> None:
    """Starts acc += a @ x.T; the interpreter takes both from shared memory, as they are, so they are put there."""
    if not operands_s:
        plgpu.wgmma(acc, a, plgpu.transpose_ref(x_s, (1, 0)))
    else:
        a_s, b_s = operands_s
        a_s[...] = a
        b_s[...] = x_s[...].T
        plgpu.commit_smem()
        plgpu.wgmma(acc, a_s, b_s)
        plgpu.wgmma_wait(0)


def _biased(total: Float[Array, "64 M"], bias_ref: Any, interpret: Any) -> Float[Array, "M 64"]:
    """Sums and bias, activation rows first."""
    bias = _load(bias_ref, _BIAS_LAYOUT, interpret).astype(jnp.float32)
    if interpret is not None:
        return total.T + bias.reshape(OUTPUTS)
    rows = total.shape[1]

    def relabel(_, total, bias):
        sums = _sums(total, bias)
        return _fragments(
            [sums[at] for at in itertools.product(range(rows // 8), (0, 1), (0, 1))], _BIASED_LAYOUT, shape
        )

    shape = (rows, OUTPUTS)
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=_BIASED_LAYOUT)
    return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, _BIAS_LAYOUT), return_type=result)(relabel)(total, bias)


def _gated(total: Float[Array, "64 M"], bias_ref: Any, limit: float, interpret: Any) -> Float[Array, "M 32"]:
    """The SwiGLU of sums and bias (as `reference.swiglu`), activation rows first, in fragment order."""
    bias = _load(bias_ref, _PAIRED_BIAS_LAYOUT, interpret).astype(jnp.float32)
    gate, linear = _halves(total, bias, interpret)
    gate = jnp.minimum(gate, limit)
    linear = jnp.minimum(jnp.maximum(linear, -limit), limit)
    return gate / (1 + jnp.exp(-ALPHA * gate)) * (linear + 1)


def _halves(total: Float[Array, "64 M"], bias: Float[Array, "4 16"], interpret: Any) -> tuple[Array, Array]:
    """Gates and linear parts, which are rows g and g + 8 of each warp's 16: one thread has both."""
    rows = total.shape[1]
    if interpret is not None:
        by_part = total.reshape(4, 2, 8, rows) + bias.reshape(4, 8, 2).swapaxes(1, 2)[..., None]
        # warp, part, half of g, last bit of g, row -> part, row, half of g, warp, last bit of g
        parts = by_part.reshape(4, 2, 4, 2, rows).transpose(1, 4, 2, 0, 3)
        gate, linear = parts.reshape(2, rows, OUTPUTS // 2)
        return gate, linear

    def relabel(_, total, bias):
        sums, places = _sums(total, bias), list(itertools.product(range(rows // 8), (0, 1)))
        return tuple(_fragments([sums[*at, half] for at in places], _HIDDEN_LAYOUT, shape) for half in (0, 1))

    shape = (rows, OUTPUTS // 2)
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=_HIDDEN_LAYOUT)
    inline = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, _PAIRED_BIAS_LAYOUT), return_type=(result, result))
    return inline(relabel)(total, bias)


def _sums(total: Any, bias: Any) -> dict[tuple[int, int, int], Any]:
    """A thread's accumulators plus bias, by (8 activation rows, which of its 2 of those, output g or g + 8)."""
    return {
        (eight, row, half): arith.addf(_one(total.registers.flat[2 * eight + half], row), bias.registers.flat[half])
        for eight, row, half in itertools.product(range(total.registers.size // 2), (0, 1), (0, 1))
    }


def _one(register: Any, at: int) -> Any:
    return vector.extract_strided_slice(ir.VectorType.get((1,), ir.F32Type.get()), register, [at], [1], [1])


def _fragments(registers: list[Any], layout: Any, shape: tuple[int, ...], is_signed: bool | None = None) -> Any:
    tiled = layout.to_mgpu()
    values = np.empty(len(registers), dtype=object)
    values[:] = registers
    in_place = values.reshape(tiled.registers_shape(shape))
    return fragments.FragmentedArray(_registers=in_place, _layout=tiled, _is_signed=is_signed)
