"""attention for TPUs: a flash softmax (Pallas) whose keys and values stay in HBM and pass through VMEM once a query tile.

Paged: a grid step is a tile of one row's queries. It copies the row's own pages, a block of several at a time and all
heads of a page in one piece, into one half of a buffer while the other half is attended to; at its end it already
starts the next step's first block, so that the copies never stop, whatever the lengths. Banded: a tile sees two blocks
of keys, its own new ones and those before it, which for the first tile are the ring and for the others the tile before.

Heads of fewer lanes than a register has lie side by side in it, and stay so: the queries of neighbouring key/value
heads become rows of one product, each with zeros where another head's lanes are. The matrix unit multiplies as many
zeros as it would for a head alone, and nothing is ever shifted between lanes. Logits count in powers of two.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

LANES = 128
KEYS_PER_BLOCK = 512  # one megabyte of bfloat16 keys and values: a copy long enough to hide what starting it costs
QUERIES_PER_TILE = 64  # 512 rows for each key/value head: enough products for each byte of keys
VMEM_BYTES = 48 * 2**20  # more than any tile takes, less than the smallest memory (64 MiB) among those compiled for


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P S K H"],
    v_pages: Float[Array, "P S K H"],
    page_table: Int32[Array, "B M"],
    positions: Int32[Array, "B T"],
    sinks: Float[Array, "N"],
    *,
    interpret: pltpu.InterpretParams | None = None,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.attention.PagedAttention`. bfloat16 weights of the softmax are rounded before they meet values.

    Args:
        q: queries; all arrays but the positions are of one dtype, float32 (products as exact as the device's) or bfloat16.
        k_pages: keys. Reshaped to [P, S, K H], which is free only where the pool is stored so.
        v_pages: values, likewise.
        page_table: page of each run of S tokens.
        positions: of the queries; -1 is padding.
        sinks: one logit per query head.
        interpret: how to interpret the kernel on a CPU; None compiles it for a TPU.

    Raises:
        ValueError: dtypes that differ, or pages too small for the device's copies.
    """
    _check_dtypes(q=q, k_pages=k_pages, v_pages=v_pages)
    pages, page, kv_heads, _ = k_pages.shape
    if interpret is None and page % _sublanes(k_pages.dtype):
        raise ValueError(f"attention: k_pages has {page} tokens a page, expected a multiple of 16 (float32: of 8)")
    heads = _Heads.of(q, kv_heads)
    tile = _paged_tile(q.shape[1])
    positions = _pad_tokens(positions, tile, -1)
    tiles = positions.reshape(-1, tile)
    rows, steps = q.shape[0], len(tiles)
    tiles_per_row = steps // rows
    lowest, highest = jnp.where(tiles < 0, jnp.iinfo(jnp.int32).max, tiles).min(1), tiles.max(1)
    lowest = jnp.where(highest < 0, -1, lowest)  # padding alone is not to be taken for the end of a long row
    block_pages = min(-(-KEYS_PER_BLOCK // page), page_table.shape[1])

    def table_of(step_of: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, 1, page_table.shape[1]), lambda s, *_: (step_of(s) // tiles_per_row, 0, 0), memory_space=pltpu.SMEM
        )

    by_step = lambda *block: pl.BlockSpec((1, *block), lambda s, *_: (s, *(0 for _ in block)))  # noqa: E731
    tables = page_table[:, None]
    buffer = pltpu.VMEM((2, block_pages * page, heads.kv_lanes), k_pages.dtype)
    out = pl.pallas_call(
        functools.partial(_paged_kernel, heads=heads, block_pages=block_pages),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(steps,),
            in_specs=[
                table_of(lambda s: s),
                table_of(lambda s: jnp.minimum(s + 1, steps - 1)),
                by_step(heads.groups, heads.group * tile, heads.lanes),
                by_step(tile, 1),
                pl.BlockSpec((heads.groups, heads.packed * heads.group, 1), lambda *_: (0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=by_step(heads.groups, heads.group * tile, heads.lanes),
            scratch_shapes=[
                *_Softmax.scratch(heads, tile, q.dtype),
                buffer,
                buffer,
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((steps, heads.groups, heads.group * tile, heads.lanes), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True),
        name="paged_attention",
        interpret=interpret or False,
    )(
        lowest,
        highest,
        tables,
        tables,
        heads.split(q, tile),
        tiles[..., None],
        heads.split_sinks(sinks),
        k_pages.reshape(pages, page, heads.kv_lanes),
        v_pages.reshape(pages, page, heads.kv_lanes),
    )
    return heads.join(out, q.shape)


def _paged_kernel(
    lowest,
    highest,
    table,
    next_table,
    q,
    positions,
    sinks,
    k_pages,
    v_pages,
    out,
    rows,
    top,
    total,
    value,
    k_buffer,
    v_buffer,
    arrived,
    half,
    *,
    heads: "_Heads",
    block_pages: int,
):
    page = k_pages.shape[1]
    block = block_pages * page
    step, last_step = pl.program_id(0), pl.num_programs(0) - 1

    def each_copy(act: Callable, of_step, its_table, i, half):
        """Acts on the copies of block `i`'s pages, those that the row really has."""
        count = jnp.clip((highest[of_step] + page) // page - i * block_pages, 0, block_pages)

        def of_page(n, _):
            at = jnp.clip(its_table[0, 0, i * block_pages + n], 0, k_pages.shape[0] - 1)
            place = pl.ds(pl.multiple_of(n * page, page), page)
            for pages, buffer in ((k_pages, k_buffer), (v_pages, v_buffer)):
                act(pltpu.make_async_copy(pages.at[at], buffer.at[half, place], arrived.at[half]))

        @pl.when(count == block_pages)  # nearly always: without a loop, a copy starts every few cycles
        def _():
            for n in range(block_pages):
                of_page(n, None)

        @pl.when(count < block_pages)
        def _():
            lax.fori_loop(0, count, of_page, None)

    start = functools.partial(each_copy, lambda copy: copy.start())
    wait = functools.partial(each_copy, lambda copy: copy.wait())

    @pl.when(step == 0)
    def _():
        half[0] = 0
        start(step, table, 0, 0)

    softmax = _Softmax(heads, rows, top, total, value)
    softmax.begin(q, sinks)
    blocks = jnp.maximum(1, (highest[step] + block) // block)  # a row without tokens takes part, and copies nothing
    seen_by_all = jnp.minimum(blocks, (lowest[step] + 1) // block)

    def add_block(masked: bool, i, half):
        @pl.when(i + 1 < blocks)
        def _():
            start(step, table, i + 1, 1 - half)

        @pl.when((i + 1 == blocks) & (step < last_step))
        def _():
            start(step + 1, next_table, 0, 1 - half)

        wait(step, table, i, half)
        if masked:
            key = i * block + lax.broadcasted_iota(jnp.int32, (1, block), 1)
            held = i * block + lax.broadcasted_iota(jnp.int32, (block, 1), 0) <= highest[step]
            softmax.add(k_buffer.at[half], v_buffer.at[half], key <= heads.by_query(positions[0]), held)
        else:
            softmax.add(k_buffer.at[half], v_buffer.at[half])
        return 1 - half

    half_now = lax.fori_loop(0, seen_by_all, functools.partial(add_block, False), half[0])
    half[0] = lax.fori_loop(seen_by_all, blocks, functools.partial(add_block, True), half_now)
    softmax.finish(out, positions)


def banded_attention(
    q: Float[Array, "B T N H"],
    k_ring: Float[Array, "B W K H"],
    v_ring: Float[Array, "B W K H"],
    k_new: Float[Array, "B T K H"],
    v_new: Float[Array, "B T K H"],
    start: Int32[Array, "B"],
    positions: Int32[Array, "B T"],
    sinks: Float[Array, "N"],
    *,
    interpret: pltpu.InterpretParams | None = None,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.attention.BandedAttention`, and `paged_attention` above for dtypes, layout and `interpret`.

    Raises:
        ValueError: dtypes that differ.
    """
    _check_dtypes(q=q, k_ring=k_ring, v_ring=v_ring, k_new=k_new, v_new=v_new)
    rows, window, kv_heads, _ = k_ring.shape
    heads = _Heads.of(q, kv_heads)
    tile = _banded_tile(q.shape[1], window)
    highest = positions.max(1)
    tiles = _pad_tokens(positions, tile, -1).reshape(-1, tile)
    tiles_per_row = len(tiles) // rows

    by_tile = lambda *block: pl.BlockSpec(  # noqa: E731
        (1, *block), lambda b, i, *_: (b * tiles_per_row + i, *(0 for _ in block))
    )
    ring = pl.BlockSpec((1, window, heads.kv_lanes), lambda b, i, *_: (b, 0, 0))
    new_tokens = min(tile, q.shape[1])
    own = pl.BlockSpec((1, new_tokens, heads.kv_lanes), lambda b, i, *_: (b, i, 0))
    before = pl.BlockSpec((1, new_tokens, heads.kv_lanes), lambda b, i, *_: (b, jnp.maximum(i - 1, 0), 0))
    k_flat, v_flat, k_ring_flat, v_ring_flat = (
        a.reshape(*a.shape[:2], heads.kv_lanes) for a in (k_new, v_new, k_ring, v_ring)
    )
    out = pl.pallas_call(
        functools.partial(_banded_kernel, heads=heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, tiles_per_row),
            in_specs=[
                by_tile(heads.groups, heads.group * tile, heads.lanes),
                by_tile(tile, 1),
                pl.BlockSpec((heads.groups, heads.packed * heads.group, 1), lambda *_: (0, 0, 0)),
                ring,
                ring,
                before,
                before,
                own,
                own,
            ],
            out_specs=by_tile(heads.groups, heads.group * tile, heads.lanes),
            scratch_shapes=_Softmax.scratch(heads, tile, q.dtype),
        ),
        out_shape=jax.ShapeDtypeStruct((len(tiles), heads.groups, heads.group * tile, heads.lanes), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        name="banded_attention",
        interpret=interpret or False,
    )(
        start,
        highest,
        heads.split(q, tile),
        tiles[..., None],
        heads.split_sinks(sinks),
        k_ring_flat,
        v_ring_flat,
        k_flat,
        v_flat,
        k_flat,
        v_flat,
    )
    return heads.join(out, q.shape)


def _banded_kernel(
    start,
    highest,
    q,
    positions,
    sinks,
    k_ring,
    v_ring,
    k_before,
    v_before,
    k_own,
    v_own,
    out,
    rows,
    top,
    total,
    value,
    *,
    heads: "_Heads",
):
    row, tile = pl.program_id(0), pl.program_id(1)
    first, last = start[row], highest[row]
    window, tokens = k_ring.shape[1], k_own.shape[1]
    softmax = _Softmax(heads, rows, top, total, value)
    softmax.begin(q, sinks)

    def add(k, v, position_of: Callable):
        """Adds keys and values, the n-th of which stands at `position_of(n)`."""
        count = k.shape[0]
        key = position_of(lax.broadcasted_iota(jnp.int32, (1, count), 1))
        distance = heads.by_query(positions[0]) - key
        held = position_of(lax.broadcasted_iota(jnp.int32, (count, 1), 0))
        seen = (distance >= 0) & (distance < window) & (key >= 0)
        softmax.add(k, v, seen, (held >= 0) & (held <= last))

    oldest = lax.rem(first, window)  # its slot, which token `first` will take
    if tokens == 1:  # as if it had been taken: one block of keys
        slots = lax.broadcasted_iota(jnp.int32, k_ring.shape[1:], 0)
        k, v = (jnp.where(slots == oldest, own[0], ring[0]) for own, ring in ((k_own, k_ring), (v_own, v_ring)))
        add(k, v, lambda slot: first - oldest + slot - jnp.where(slot <= oldest, 0, window))
    else:

        @pl.when(tile == 0)
        def _():
            in_slot = lambda slot: first - oldest + slot - jnp.where(slot < oldest, 0, window)  # noqa: E731
            add(k_ring.at[0], v_ring.at[0], in_slot)

        @pl.when(tile > 0)
        def _():
            add(k_before.at[0], v_before.at[0], lambda n: first + (tile - 1) * tokens + n)

        add(k_own.at[0], v_own.at[0], lambda n: first + tile * tokens + n)
    softmax.finish(out, positions)


class _Heads(NamedTuple):
    """How query heads lie in the kernels: in `groups` of `packed` neighbouring key/value heads, a register wide.

    Example: of 64 query and 8 key/value heads of size 64, two key/value heads fill 128 lanes, so there are 4 groups; a
    query tile of T tokens is [4, 8 T, 128] outside the kernel and, apart in rows, [4, 2 * 8 T, 128] within.
    """

    groups: int
    packed: int  # key/value heads side by side
    group: int  # query heads of one key/value head
    size: int

    @classmethod
    def of(cls, q: Float[Array, "B T N H"], kv_heads: int) -> "_Heads":
        heads, size = q.shape[2:]
        packed = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n == 1 or n * size <= LANES))
        return cls(kv_heads // packed, packed, heads // kv_heads, size)

    @property
    def lanes(self) -> int:
        return self.packed * self.size

    @property
    def kv_lanes(self) -> int:
        return self.groups * self.lanes

    def split(self, q: Float[Array, "B T N H"], tile: int) -> Float[Array, "steps groups rows lanes"]:
        """Query tiles with their heads side by side as the keys' are: rows go by query head, then by token."""
        q = _pad_tokens(q, tile, 0)
        b, t = q.shape[:2]
        q = q.reshape(b * t // tile, tile, self.groups, self.packed, self.group, self.size)
        return q.transpose(0, 2, 4, 1, 3, 5).reshape(b * t // tile, self.groups, self.group * tile, self.lanes)

    def join(self, out: Float[Array, "steps groups rows lanes"], shape: tuple[int, ...]) -> Float[Array, "B T N H"]:
        """The inverse of `split`, without the padding."""
        steps, tile = out.shape[0], out.shape[2] // self.group
        out = out.reshape(steps, self.groups, self.group, tile, self.packed, self.size).transpose(0, 3, 1, 4, 2, 5)
        return out.reshape(shape[0], -1, *shape[2:])[:, : shape[1]]

    def split_sinks(self, sinks: Float[Array, "N"]) -> Float[Array, "groups heads 1"]:
        return sinks.astype(jnp.float32).reshape(self.groups, self.packed * self.group, 1) * math.log2(math.e)

    def by_query(self, x: Array) -> Array:
        """[T, 1], one for each token, as one for each row of a group: [packed * group * T, 1]."""
        copies = self.packed * self.group
        return jnp.broadcast_to(x, (copies, 1)) if x.shape[0] == 1 else jnp.concatenate([x] * copies)


class _Softmax(NamedTuple):
    """A softmax under way, in VMEM (as `reference.Softmax`), for all groups of heads of one query tile.

    What there is one of for each row fills a register's lanes, so that it meets logits and values without a broadcast.
    """

    heads: _Heads
    q: Float[Array, "groups rows lanes"]  # each row has one head's lanes, and zeros
    top: Float[Array, "groups rows 128"]  # largest logit
    total: Float[Array, "groups rows 128"]  # sum of 2^(logit - top)
    value: Float[Array, "groups rows lanes"]  # sum of 2^(logit - top) * value; of use in the row's own head's lanes

    @classmethod
    def scratch(cls, heads: _Heads, tile: int, dtype: jnp.dtype) -> list:
        rows = heads.packed * heads.group * tile
        by_lane, by_row = (heads.groups, rows, heads.lanes), (heads.groups, rows, LANES)
        kinds = ((by_lane, dtype), (by_row, jnp.float32), (by_row, jnp.float32), (by_lane, jnp.float32))
        return [pltpu.VMEM(*kind) for kind in kinds]

    def begin(self, q, sinks):
        """Takes the query tile in; the sinks are the only logits, and have no values."""
        heads = self.heads
        tile = self.q.shape[1] // (heads.packed * heads.group)
        for j in range(heads.groups):
            self.q[j] = jnp.concatenate([self._own_lanes(n, q[0, j]) for n in range(heads.packed)])
            sink = sinks[j]
            if tile > 1:
                sink = jnp.concatenate([jnp.broadcast_to(sink[n : n + 1], (tile, 1)) for n in range(len(sink))])
            self.top[j] = jnp.broadcast_to(sink, self.top.shape[1:])
        self.total[...] = jnp.ones_like(self.total)
        self.value[...] = jnp.zeros_like(self.value)

    def _own_lanes(self, n: int, x: Float[Array, "rows lanes"]) -> Float[Array, "rows lanes"]:
        """x with zeros in all lanes but those of the n-th head of a group."""
        head = lax.broadcasted_iota(jnp.int32, x.shape, 1) // self.heads.size
        return jnp.where(head == n, x, jnp.zeros_like(x))

    def add(self, k, v, visible=None, held=None):
        """Takes in a block of keys and values, those `visible` to each row; values not `held` may be NaN."""
        heads = self.heads
        exact = lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
        product = functools.partial(lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
        for j in range(heads.groups):
            lanes = slice(j * heads.lanes, (j + 1) * heads.lanes)
            logits = product(self.q[j], k[:, lanes], (((1,), (1,)), ((), ())))
            logits *= heads.size**-0.5 * math.log2(math.e)
            values = v[:, lanes]
            if visible is not None:
                logits = jnp.where(visible, logits, -jnp.inf)
                values = jnp.where(held, values, jnp.zeros_like(values))
            before = self.top[j]
            top = jnp.maximum(before, logits.max(1, keepdims=True))
            weights, shrink = jnp.exp2(logits - _widen(top, logits.shape[1])), jnp.exp2(before - top)
            self.top[j] = top
            self.total[j] = self.total[j] * shrink + weights.sum(1, keepdims=True)
            value = product(weights.astype(v.dtype), values, (((1,), (0,)), ((), ())))
            self.value[j] = self.value[j] * _widen(shrink, heads.lanes) + value

    def finish(self, out, positions):
        """Writes the weighted means, the heads of a group side by side again, and zeros for padding."""
        heads = self.heads
        rows = out.shape[2]
        real = heads.by_query(positions[0])[:rows] >= 0
        for j in range(heads.groups):
            mean = self.value[j] / _widen(self.total[j], heads.lanes)
            parts = [self._own_lanes(n, mean[n * rows : (n + 1) * rows]) for n in range(heads.packed)]
            out[0, j] = jnp.where(real, sum(parts[1:], start=parts[0]), 0.0)


def _widen(x: Float[Array, "rows 128"], width: int) -> Float[Array, "rows width"]:
    """x, all of whose lanes are alike, over `width` lanes."""
    if width % LANES:
        return jnp.broadcast_to(x[:, :1], (x.shape[0], width))
    return jnp.concatenate([x] * (width // LANES), axis=1)


def _paged_tile(tokens: int) -> int:
    """Query tokens of a grid step: one when decoding, else whole registers of rows (16 in bfloat16)."""
    return 1 if tokens == 1 else min(_round_up(tokens, 16), QUERIES_PER_TILE)


def _banded_tile(tokens: int, window: int) -> int:
    """Query tokens of a grid step: no fewer than the window if there are several, so that two blocks of keys do."""
    return 1 if tokens == 1 else _round_up(min(tokens, window), 16)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _pad_tokens(x: Array, tile: int, value: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), *((0, 0) for _ in x.shape[2:])), constant_values=value)


def _sublanes(dtype: jnp.dtype) -> int:
    """Rows of the smallest tile in which an array of this dtype is copied."""
    return 8 * 4 // dtype.itemsize


def _check_dtypes(**arrays: Array) -> None:
    dtypes = {name: array.dtype for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1 or dtypes["q"] not in (jnp.float32, jnp.bfloat16):
        found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"attention: expected float32 or bfloat16, the same for all, got {found}")
