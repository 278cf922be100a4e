"""expert_mlp for TPUs: one Mosaic kernel that streams the packed weights of each expert in use through VMEM once.

Movement. Assignments are sorted into tiles of one expert (`tiles.py`). The grid walks over the tiles in use, and within
a tile over steps: first blocks of gate_up's outputs, whose SwiGLU goes to a scratch in VMEM, then blocks of down's
outputs, which leave as float32. Each step contracts over the whole input, so nothing is accumulated between steps, and
neither the hidden activations nor an unpacked weight ever reach HBM. Pallas fetches the next step's weights meanwhile;
a tile of the same expert as the one before reads the weights again.

Numbers. Every weight is an exact bfloat16, products are exact and summed in float32; float32 activations are multiplied
at precision HIGHEST.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.expert_mlp.reference import ALPHA
from pallas_kernels.expert_mlp.tiles import TiledRows, tile_rows
from pallas_kernels.expert_mlp.tpu_forms import LANES, WORDS, Form
from pallas_kernels.expert_mlp.weights import ExpertWeights, without_adapters
from pallas_kernels.mxfp4 import BLOCK

FEWEST_ROWS = 16  # of bfloat16 in one register
MOST_OUTPUTS = 768  # a step's, in 1.1 MB of weights a matrix; 2,880 are four such blocks, a sixteenth of them unused
UNPACKED_OUTPUTS = 256  # at a time: as wide as the widest matrix unit, and few enough to spill little
VMEM_BYTES = 48 << 20  # of the 64 MiB that a core has at least (TPU v7x)


def expert_mlp(
    x: Float[Array, "T D"],
    expert_ids: Int32[Array, "T X"],
    routing_weights: Float[Array, "T X"],
    weights: ExpertWeights,
    *,
    limit: float,
    form: Form,
    interpret: Any = None,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.expert_mlp.RunExperts`.

    Args:
        x: activations, bfloat16 or float32.
        expert_ids: the experts that each token is assigned to.
        routing_weights: and how much of each it takes.
        weights: the layer's experts in `form.layout`.
        limit: the SwiGLU's.
        form: one of `FORMS`.
        interpret: None to compile for a TPU; else `pltpu.InterpretParams`, to run on a CPU.

    Raises:
        NotImplementedError: there are adapters, or the weights are dense.
    """
    without_adapters(weights)
    num_experts = weights.down_blocks.shape[0]
    rows = tile_rows(expert_ids.size, num_experts, FEWEST_ROWS, form.most_rows)
    tiles = TiledRows.of(expert_ids, num_experts, rows)
    x_parts = jnp.moveaxis(x.reshape(len(x), -1, form.parts, BLOCK // form.parts), 2, 0)  # see `Form`
    x_parts = jax.vmap(tiles.gather)(x_parts.reshape(form.parts, len(x), -1))
    y = _run_tiles(tiles, x_parts, weights, limit=limit, form=form, rows=rows, interpret=interpret)
    return tiles.combine(y, routing_weights)


class Steps(NamedTuple):
    """What a tile's steps do: P parts of gate_up's outputs, each in blocks, and then down's outputs in blocks."""

    parts: int
    inner: int  # F / P, gate_up's outputs (gates, or linear ones) in a part
    hidden: int  # D, down's outputs

    @property
    def inner_block(self) -> int:
        """Outputs of gate_up (gates, or linear ones) in one block of a part."""
        return min(self.inner, MOST_OUTPUTS)

    @property
    def hidden_block(self) -> int:
        """Outputs of down in one block."""
        return min(self.hidden, MOST_OUTPUTS)

    @property
    def inner_blocks(self) -> int:
        """Blocks of a part; the last may reach beyond it."""
        return pl.cdiv(self.inner, self.inner_block)

    @property
    def first_down(self) -> int:
        """Index of the first of down's steps, after all of gate_up's."""
        return self.parts * self.inner_blocks

    @property
    def number(self) -> int:
        """How many steps a tile has."""
        return self.first_down + pl.cdiv(self.hidden, self.hidden_block)

    def gate_up_at(self, step: Any) -> tuple[Any, Any]:
        """The part, and the block in it; while down's steps run, the last ones, so that nothing is fetched."""
        return jnp.divmod(jnp.minimum(step, self.first_down - 1), self.inner_blocks)

    def down_at(self, tile: Any, step: Any) -> tuple[Any, Any]:
        """The tile whose expert is meant, and the block.

        While gate_up's steps run it is still the last block of the tile before, so that the first is fetched just in
        time, when gate_up's fetches are done.
        """
        early = (step < self.first_down) & (tile > 0)
        block = jnp.where(early, self.number - 1, jnp.maximum(step, self.first_down)) - self.first_down
        return jnp.where(early, tile - 1, tile), block


def _run_tiles(
    tiles: TiledRows,
    x: Float[Array, "P IM I"],
    weights: ExpertWeights,
    *,
    limit: float,
    form: Form,
    rows: int,
    interpret: Any,
) -> Float[Array, "IM D"]:
    """down(swiglu(gate_up(x))) of every row of a tile in use; other rows are left as they are, whatever that is."""
    _, parts, _, _, inner = weights.gate_up_blocks.shape
    hidden = weights.down_blocks.shape[2]
    steps = Steps(parts, inner, hidden)

    def rows_of(tile, step, expert):
        del step, expert
        return 0, tile, 0

    def gate_up(tile, step, expert):
        part, block = steps.gate_up_at(step)
        return expert[tile], part, 0, 0, block

    def gate_up_bias(tile, step, expert):
        part, block = steps.gate_up_at(step)
        return expert[tile], part, 0, block

    def down(tile, step, expert):
        tile, block = steps.down_at(tile, step)
        return expert[tile], 0, block

    def y_of(tile, step, expert):
        del expert
        return tile, jnp.maximum(step - steps.first_down, 0)

    scratch_rows = WORDS * max(weights.gate_up_scales.shape[-2], weights.down_scales.shape[-2])

    def gate_up_block(array):
        return pl.BlockSpec((None, None, 2, array.shape[-2], steps.inner_block), gate_up)

    def down_block(array):
        return pl.BlockSpec((None, array.shape[-2], steps.hidden_block), down)

    call = pl.pallas_call(
        functools.partial(_step, steps=steps, unpack=form.unpack, limit=limit),
        out_shape=jax.ShapeDtypeStruct((x.shape[1], hidden), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(jnp.maximum(tiles.used, 1), steps.number),  # where no expert is in use, one tile runs unread
            in_specs=[
                pl.BlockSpec((parts, rows, x.shape[2]), rows_of),
                gate_up_block(weights.gate_up_blocks),
                gate_up_block(weights.gate_up_scales),
                pl.BlockSpec((None, None, 2, steps.inner_block), gate_up_bias),
                down_block(weights.down_blocks),
                down_block(weights.down_scales),
                down_block(weights.down_bias),
            ],
            out_specs=pl.BlockSpec((rows, steps.hidden_block), y_of),
            scratch_shapes=[
                pltpu.VMEM((parts, rows, steps.inner_blocks * steps.inner_block), x.dtype),
                pltpu.VMEM((UNPACKED_OUTPUTS // LANES, scratch_rows, LANES), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if interpret else "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret or False,
        name="expert_mlp",
    )
    arrays = without_adapters(weights)
    if interpret is None:  # else XLA would copy what it can of all experts, in use or not, to VMEM beforehand
        arrays = [pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays]
    return call(tiles.expert, x, *arrays)


def _step(experts: Any, x: Any, *refs: Any, steps: Steps, unpack: Any, limit: float) -> None:
    """One grid step, on blocks in VMEM."""
    del experts
    codes, scales, bias, down_codes, down_scales, down_bias, y, h, scratch = refs
    linear_map = functools.partial(_linear_map, unpack=unpack, scratch=scratch)
    step = pl.program_id(1)

    @pl.when(step < steps.first_down)
    def _():
        part, block = steps.gate_up_at(step)
        for at in _slices(steps.inner_block):
            gate, linear = (linear_map(x, codes.at[i], scales.at[i], bias[i : i + 1], at) for i in range(2))
            to = pl.ds(block * steps.inner_block + at.start, at.stop - at.start)
            h[part, :, to] = _swiglu(gate, linear, limit).astype(h.dtype)

    @pl.when(step >= steps.first_down)
    def _():
        for at in _slices(steps.hidden_block):
            y[:, at] = linear_map(h[:, :, : steps.inner], down_codes, down_scales, down_bias, at)


def _slices(outputs: int) -> list[slice]:
    return [slice(at, min(at + UNPACKED_OUTPUTS, outputs)) for at in range(0, outputs, UNPACKED_OUTPUTS)]


def _linear_map(
    x: Any, codes: Any, scales: Any, bias: Any, at: slice, *, unpack: Any, scratch: Any
) -> Float[Array, "M N"]:
    """The outputs `at` of a block of weights; x is [P, M, I / P]."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out = jnp.zeros((x.shape[1], at.stop - at.start), jnp.float32)
    for part, w in enumerate(unpack(codes, scales, at, scratch)):
        out += jnp.dot(x[part], w.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
    return out + bias[:, at].astype(jnp.float32)


def _swiglu(gate: Float[Array, "M N"], linear: Float[Array, "M N"], limit: float) -> Float[Array, "M N"]:
    """See `reference.swiglu`, whose columns are interleaved."""
    gate, linear = jnp.minimum(gate, limit), jnp.clip(linear, -limit, limit)
    return gate * jax.nn.sigmoid(ALPHA * gate) * (linear + 1)
