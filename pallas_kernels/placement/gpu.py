"""place for Hopper GPUs in Mosaic GPU: a block of threads takes one sequence's key/value head, all of it in registers.

A head's queries, key and value are rows of one array in shared memory, fetched and stored by TMA. A thread holds both
numbers of a pair, so that the rotation moves nothing between threads; the value's row is left as it is.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.placement import Stored

ROWS = 64  # of the layout in registers; a head has G + 2, the others hold anything and go nowhere
_LAYOUT = plgpu.Layout.WGMMA


def place(
    projected: Float[Array, "B K G2 H"],
    bias: Float[Array, "K G2 H"],
    turns: Float[Array, "B 2 J"],
    stored: Stored,
    positions: Int32[Array, "B"],
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "B K G H"], Float[Array, "P S KH"], Float[Array, "P S KH"]]:
    """See `pallas_kernels.placement.Place`. `interpret`: None compiles for the device.

    Raises:
        ValueError: a head's rows are more than 62 query heads, a key and a value, or half a head is no multiple of 8.
    """
    b, kv_heads, rows, head_size = projected.shape
    if rows > ROWS or head_size % 16:
        raise ValueError(f"place: {rows - 2} query heads of {head_size} a key/value head, expected up to 62 of 16 n")
    dtype = stored.k.dtype
    scratch = {
        "projected_s": plgpu.SMEM((ROWS, head_size), projected.dtype),
        "bias_s": plgpu.SMEM((ROWS, head_size), bias.dtype),
        "turned_s": plgpu.SMEM((ROWS, head_size), dtype),
        "loaded": plgpu.Barrier(num_arrivals=2),
    }

    def block(*refs: Any) -> None:
        pl.run_scoped(functools.partial(_place, *refs, interpret=interpret), **scratch)

    kernel = pl.kernel(  # rather than `plgpu.kernel`, which cannot take references
        block,
        out_type=jax.ShapeDtypeStruct((b, kv_heads, rows - 2, head_size), dtype),
        mesh=plgpu.Mesh(grid=(b, kv_heads), grid_names=("sequence", "head"), kernel_name="rotate_and_store"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name="rotate_and_store",
        **({} if interpret is None else {"interpret": interpret}),
    )
    k, v = (jax.new_ref(x, memory_space=plgpu.GMEM) for x in (stored.k, stored.v))  # written in place
    q = kernel(positions, stored.page_table, projected, bias, turns, k, v)  # pyright: ignore[reportCallIssue]
    return q, k[...], v[...]


def _place(
    positions,
    page_table,
    projected,
    bias,
    turns,
    k,
    v,
    q,
    *,
    projected_s,
    bias_s,
    turned_s,
    loaded,
    interpret: Any,
):
    """One key/value head of one sequence."""
    sequence, head = lax.axis_index("sequence"), lax.axis_index("head")
    rows, head_size = projected.shape[2:]
    plgpu.copy_gmem_to_smem(projected.at[sequence, head], projected_s.at[pl.ds(0, rows)], loaded)
    plgpu.copy_gmem_to_smem(bias.at[head], bias_s.at[pl.ds(0, rows)], loaded)
    plgpu.barrier_wait(loaded)
    shape = (ROWS, head_size // 2)
    halves = [pl.ds(i * shape[1], shape[1]) for i in (0, 1)]
    first, second = (
        _load(projected_s.at[:, half], _LAYOUT, interpret)
        + _load(bias_s.at[:, half], _LAYOUT, interpret).astype(jnp.float32)
        for half in halves
    )
    cos, sin = (
        lax.broadcast_in_dim(_load(turns.at[sequence, i], _LAYOUT.reduce(0), interpret), shape, [1]) for i in (0, 1)
    )
    is_turned = _rows(shape, interpret) < rows - 1
    turned = first * cos - second * sin, second * cos + first * sin
    for half, new, old in zip(halves, turned, (first, second), strict=True):
        turned_s[:, half] = jnp.where(is_turned, new, old).astype(turned_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(turned_s.at[pl.ds(0, rows - 2)], q.at[sequence, head])
    position, page_tokens = positions[sequence], k.shape[1]

    @pl.when(position >= 0)
    def _():
        page = page_table[sequence, lax.rem(lax.div(position, page_tokens), page_table.shape[1])]
        to = page, pl.ds(lax.rem(position, page_tokens), 1), pl.ds(head * head_size, head_size)
        for row, stored in ((rows - 2, k), (rows - 1, v)):
            plgpu.copy_smem_to_gmem(turned_s.at[pl.ds(row, 1)], stored.at[to])

    plgpu.wait_smem_to_gmem(0)


def _load(ref: Any, layout: Any, interpret: Any) -> Array:
    return plgpu.load(ref, (), layout=layout, optimized=False) if interpret is None else ref[...]


def _rows(shape: tuple[int, int], interpret: Any) -> Array:
    if interpret is not None:
        return lax.broadcasted_iota(jnp.int32, shape, 0)
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_LAYOUT)
