"""attention for TPUs: a flash softmax (Pallas); keys and values stay in HBM and pass through VMEM once a query tile.

Paged: a grid step is a tile of one sequence's queries. It copies the sequence's own pages, a block of several at a time
and all heads of a page in one copy, into one half of a buffer while the other half is attended to; at its end it
already starts the next step's first block, so that the copies never stop, whatever the lengths. Sliding window: a tile
sees two blocks of keys, its own new ones and those before it, which for the first tile are the ring and for the others
the tile before.

Heads of fewer lanes than a register has lie side by side in it, and stay so: the queries of neighbouring key/value
heads become rows of one product, each with zeros where another head's lanes are. The matrix unit multiplies as many
zeros as it would for a head alone, and nothing is ever shifted between lanes. Logits count in powers of two.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.attention.contract import Attended, PagedKV, RingKV

LANES = 128
UNROLLED_PAGES = 8  # copies started, or awaited, by one iteration of a loop: a third of the time
VMEM_BYTES = 48 * 2**20  # more than any tile takes, less than the smallest memory (64 MiB) among those compiled for


def attend(
    q: Float[Array, "B T N H"],
    kv: PagedKV | RingKV,
    positions: Int32[Array, "B T"],
    sinks: Float[Array, "N"],
    *,
    interpret: pltpu.InterpretParams | None = None,
) -> Attended:
    """See `pallas_kernels.attention.Attend`.

    Products of float32 have float32's precision (HIGHEST throughout). In bfloat16 logits, maxima and sums are float32,
    and the softmax's weights are rounded to bfloat16 (2^-9 of each) before they meet the values.

    Args:
        q: queries, float32 or bfloat16.
        kv: keys and values, of the same dtype. Reshaped to [., ., K H], which is free where they are stored so.
        positions: of the queries; -1 is padding.
        sinks: one logit per query head.
        interpret: how to interpret the kernel on a CPU; None compiles it for a TPU.

    Raises:
        TypeError: dtypes that differ, or that are neither float32 nor bfloat16.
        ValueError: pages too small for the device's copies.
    """
    _check_dtypes(q=q, **{name: x for name, x in kv._asdict().items() if jnp.issubdtype(x.dtype, jnp.floating)})
    if isinstance(kv, PagedKV):
        return _paged(q, kv, positions, sinks, interpret)
    return _sliding_window(q, kv, positions, sinks, interpret)


def _paged(q, kv: PagedKV, positions, sinks, interpret) -> Attended:
    pages, page, kv_heads, _ = kv.k.shape
    if interpret is None and page % _sublanes(kv.k.dtype):
        raise ValueError(f"attention: k has {page} tokens a page, expected a multiple of 16 (float32: of 8)")
    heads = _Heads.of(q, kv_heads)
    tile, block = _paged_tile(q.shape[1])
    tiles = _pad_tokens(positions, tile, -1).reshape(-1, tile)
    steps = len(tiles)
    tiles_per_sequence = steps // q.shape[0]
    lowest, highest = jnp.where(tiles < 0, jnp.iinfo(jnp.int32).max, tiles).min(1), tiles.max(1)
    lowest = jnp.where(highest < 0, -1, lowest)  # padding alone is not to be taken for the end of a long sequence
    block_pages = min(-(-block // page), kv.page_table.shape[1])

    def table_of(step_of: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, 1, kv.page_table.shape[1]),
            lambda s, *_: (lax.div(step_of(s), tiles_per_sequence), 0, 0),
            memory_space=pltpu.SMEM,
        )

    def by_step(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *block), lambda s, *_: (s, *(0 for _ in block)))

    tables = kv.page_table[:, None]
    buffer = pltpu.VMEM((2, block_pages * page, heads.kv_lanes), kv.k.dtype)
    results = heads.results(tile)
    out, lse = pl.pallas_call(
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
            out_specs=[by_step(*shape) for shape in results],
            scratch_shapes=[
                _State.scratch(heads, tile, q.dtype),
                buffer,
                buffer,
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((steps, *shape), jnp.float32) for shape in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),  # each step starts the next one's first copies
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,  # starting a copy takes a third of the time; the pages' numbers are clipped
        ),
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
        kv.k.reshape(pages, page, heads.kv_lanes),
        kv.v.reshape(pages, page, heads.kv_lanes),
    )
    return heads.join(out, lse, q.shape)


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
    lse,
    state: "_State",
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
        """Acts on the copies of block `i`'s pages, those that the sequence really has."""
        count = jnp.clip(lax.div(highest[of_step] + page, page) - i * block_pages, 0, block_pages)

        def of_page(n, _):
            at = jnp.clip(its_table[0, 0, i * block_pages + n], 0, k_pages.shape[0] - 1)
            place = pl.ds(pl.multiple_of(n * page, page), page)
            for pages, buffer in ((k_pages, k_buffer), (v_pages, v_buffer)):
                act(pltpu.make_async_copy(pages.at[at], buffer.at[half, place], arrived.at[half]))

        def of_pages(n, _):
            for m in range(UNROLLED_PAGES):
                of_page(n * UNROLLED_PAGES + m, None)

        whole = lax.div(count, UNROLLED_PAGES)
        lax.fori_loop(0, whole, of_pages, None)
        lax.fori_loop(whole * UNROLLED_PAGES, count, of_page, None)

    start = functools.partial(each_copy, lambda copy: copy.start())
    wait = functools.partial(each_copy, lambda copy: copy.wait())

    @pl.when(step == 0)
    def _():
        half[0] = 0
        start(step, table, 0, 0)

    softmax = _Softmax(heads, state)
    softmax.begin(q, sinks)
    # A sequence without tokens takes part, and copies nothing.
    blocks = jnp.maximum(1, lax.div(highest[step] + block, block))
    seen_by_all = jnp.minimum(blocks, lax.div(lowest[step] + 1, block))

    def add_block(i, half):
        @pl.when(i + 1 < blocks)
        def _():
            start(step, table, i + 1, 1 - half)

        @pl.when((i + 1 == blocks) & (step < last_step))
        def _():
            start(step + 1, next_table, 0, 1 - half)

        wait(step, table, i, half)

        @pl.when(i < seen_by_all)
        def _():
            softmax.add(lambda lanes: (k_buffer[half, :, lanes], v_buffer[half, :, lanes]))

        @pl.when(i >= seen_by_all)
        def _():
            keys = i * block + lax.broadcasted_iota(jnp.int32, (1, block), 1)
            held = i * block + lax.broadcasted_iota(jnp.int32, (block, 1), 0) <= highest[step]
            softmax.add(
                lambda lanes: (k_buffer[half, :, lanes], _only(held, v_buffer[half, :, lanes])),
                visible=keys <= heads.by_query(positions[0]),
            )

        return 1 - half

    half[0] = lax.fori_loop(0, blocks, add_block, half[0])
    softmax.finish(out, lse, positions)


def _sliding_window(q, kv: RingKV, positions, sinks, interpret) -> Attended:
    sequences, window, kv_heads, _ = kv.k.shape
    heads = _Heads.of(q, kv_heads)
    tile = _window_tile(q.shape[1], window)
    highest = positions.max(1)
    tiles = _pad_tokens(positions, tile, -1).reshape(-1, tile)
    tiles_per_sequence = len(tiles) // sequences

    def by_tile(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *block), lambda b, i, *_: (b * tiles_per_sequence + i, *(0 for _ in block)))

    ring = pl.BlockSpec((1, window, heads.kv_lanes), lambda b, i, *_: (b, 0, 0))
    new_tokens = min(tile, q.shape[1])
    own = pl.BlockSpec((1, new_tokens, heads.kv_lanes), lambda b, i, *_: (b, i, 0))
    before = pl.BlockSpec((1, new_tokens, heads.kv_lanes), lambda b, i, *_: (b, jnp.maximum(i - 1, 0), 0))
    k_ring, v_ring, k_new, v_new = (a.reshape(*a.shape[:2], heads.kv_lanes) for a in kv[:4])
    results = heads.results(tile)
    out, lse = pl.pallas_call(
        functools.partial(_window_kernel, heads=heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(sequences, tiles_per_sequence),
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
            out_specs=[by_tile(*shape) for shape in results],
            scratch_shapes=[_State.scratch(heads, tile, q.dtype)],
        ),
        out_shape=[jax.ShapeDtypeStruct((len(tiles), *shape), jnp.float32) for shape in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        name="sliding_window_attention",
        interpret=interpret or False,
    )(
        kv.start,
        highest,
        heads.split(q, tile),
        tiles[..., None],
        heads.split_sinks(sinks),
        k_ring,
        v_ring,
        k_new,
        v_new,
        k_new,
        v_new,
    )
    return heads.join(out, lse, q.shape)


def _window_kernel(
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
    lse,
    state: "_State",
    *,
    heads: "_Heads",
):
    sequence, tile = pl.program_id(0), pl.program_id(1)
    first, last = start[sequence], highest[sequence]
    window, tokens = k_ring.shape[1], k_own.shape[1]
    softmax = _Softmax(heads, state)
    softmax.begin(q, sinks)

    def add(count: int, load: Callable, position_of: Callable):
        """Adds `count` keys and values, the n-th of which stands at `position_of(n)`."""
        keys = position_of(lax.broadcasted_iota(jnp.int32, (1, count), 1))
        distance = heads.by_query(positions[0]) - keys
        place = position_of(lax.broadcasted_iota(jnp.int32, (count, 1), 0))
        held = (place >= 0) & (place <= last)

        def held_only(lanes):
            k, v = load(lanes)
            return k, _only(held, v)

        softmax.add(held_only, visible=(distance >= 0) & (distance < window) & (keys >= 0))

    def of_ring(lanes):
        return k_ring[0, :, lanes], v_ring[0, :, lanes]

    def of_tile_before(lanes):
        return k_before[0, :, lanes], v_before[0, :, lanes]

    def of_tile(lanes):
        return k_own[0, :, lanes], v_own[0, :, lanes]

    oldest = lax.rem(first, window)  # its slot, which token `first` will take
    if tokens == 1:  # as if it had been taken: one block of keys

        def of_ring_then(lanes):
            taken = lax.broadcasted_iota(jnp.int32, (window, 1), 0) == oldest
            return tuple(jnp.where(taken, new, old) for new, old in zip(of_tile(lanes), of_ring(lanes), strict=True))

        add(window, of_ring_then, lambda slot: first - oldest + slot - jnp.where(slot <= oldest, 0, window))
    else:

        @pl.when(tile == 0)
        def _():
            add(window, of_ring, lambda slot: first - oldest + slot - jnp.where(slot < oldest, 0, window))

        @pl.when(tile > 0)
        def _():
            add(tokens, of_tile_before, lambda n: first + (tile - 1) * tokens + n)

        add(tokens, of_tile, lambda n: first + tile * tokens + n)
    softmax.finish(out, lse, positions)


class _Heads(NamedTuple):
    """How query heads lie in the kernels: in `groups` of `packed` neighbouring key/value heads, a register wide.

    Example: of 64 query and 8 key/value heads of size 64, two key/value heads fill 128 lanes, so there are 4 groups; a
    query tile of T tokens is [4, 8 T, 128] outside the kernel, and [4, 2 * 8 T, 128] within, each row of one head.
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

    def results(self, tile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of what the kernel gives of a query tile: weighted means; for each row within, a lane of lse."""
        rows = self.group * tile
        return (self.groups, rows, self.lanes), (self.groups, pl.cdiv(self.packed * rows, LANES), LANES)

    def join(
        self,
        out: Float[Array, "steps groups rows lanes"],
        lse: Float[Array, "steps groups registers 128"],
        shape: tuple[int, ...],
    ) -> Attended:
        """The inverse of `split`, without the padding."""
        steps, tile = out.shape[0], out.shape[2] // self.group
        out = out.reshape(steps, self.groups, self.group, tile, self.packed, self.size).transpose(0, 3, 1, 4, 2, 5)
        rows = lse.reshape(steps, self.groups, -1)[..., : self.packed * self.group * tile]
        lse = rows.reshape(steps, self.groups, self.packed, self.group, tile).transpose(0, 4, 1, 2, 3)
        return Attended(
            out.reshape(shape[0], -1, *shape[2:])[:, : shape[1]], lse.reshape(shape[0], -1, shape[2])[:, : shape[1]]
        )

    def split_sinks(self, sinks: Float[Array, "N"]) -> Float[Array, "groups heads 1"]:
        """The sinks as logits in powers of two; one of -inf, which takes nothing, stays a number."""
        finite = jnp.maximum(sinks.astype(jnp.float32), jnp.finfo(jnp.float32).min / 2)
        return finite.reshape(self.groups, self.packed * self.group, 1) * math.log2(math.e)

    def by_query(self, x: Array) -> Array:
        """[T, 1], one for each token, as one for each row of a group: [packed * group * T, 1]."""
        copies = self.packed * self.group
        return jnp.broadcast_to(x, (copies, 1)) if x.shape[0] == 1 else jnp.concatenate([x] * copies)


class _State(NamedTuple):
    """What a softmax under way holds in VMEM (as `reference.Softmax`), for all groups of heads of one query tile.

    What there is one of for each row fills a register's lanes, so that it meets logits and values without a broadcast.
    """

    q: Any  # [groups, rows, lanes]: each row has one head's lanes, and zeros
    top: Any  # [groups, rows, 128], float32: largest logit
    total: Any  # [groups, rows, 128], float32: sum of 2^(logit - top)
    value: Any  # [groups, rows, lanes], float32: sum of 2^(logit - top) * value; of use in the row's own head's lanes

    @classmethod
    def scratch(cls, heads: _Heads, tile: int, dtype: jnp.dtype) -> "_State":
        rows = heads.packed * heads.group * tile
        by_lane, by_row = (heads.groups, rows, heads.lanes), (heads.groups, rows, LANES)
        kinds = ((by_lane, dtype), (by_row, jnp.float32), (by_row, jnp.float32), (by_lane, jnp.float32))
        return cls(*(pltpu.VMEM(*kind) for kind in kinds))


class _Softmax(NamedTuple):
    """The steps of a softmax, each for all groups of heads of one query tile."""

    heads: _Heads
    state: _State

    def begin(self, q, sinks):
        """Takes the query tile in; the sinks are the only logits, and have no values."""
        heads, state = self
        tile = state.q.shape[1] // (heads.packed * heads.group)

        def begin_group(j, _):
            state.q[j] = jnp.concatenate([self._own_lanes(n, q[0, j]) for n in range(heads.packed)])
            sink = sinks[j]
            if tile > 1:
                sink = jnp.concatenate([jnp.broadcast_to(sink[n : n + 1], (tile, 1)) for n in range(len(sink))])
            state.top[j] = jnp.broadcast_to(sink, state.top.shape[1:])
            state.total[j] = jnp.ones_like(state.total[j])
            state.value[j] = jnp.zeros_like(state.value[j])

        self._each_group(begin_group)

    def _own_lanes(self, n: int, x: Float[Array, "rows lanes"]) -> Float[Array, "rows lanes"]:
        """x with zeros in all lanes but those of the n-th head of a group."""
        lane, size = lax.broadcasted_iota(jnp.int32, x.shape, 1), self.heads.size
        return _only((lane >= n * size) & (lane < (n + 1) * size), x)

    def add(self, load: Callable, *, visible: Bool[Array, "rows keys"] | None = None):
        """Takes in a block of keys and values, those `visible` to each row.

        Args:
            load: from lanes to the keys and values in them, [keys, lanes]. No value may be NaN.
            visible: None if every row sees every key.
        """
        heads, state = self

        def add_group(j, _):
            k, v = load(pl.ds(pl.multiple_of(j * heads.lanes, heads.lanes), heads.lanes))
            logits = _product(state.q[j], k, contracted=1) * (heads.size**-0.5 * math.log2(math.e))
            if visible is not None:
                logits = jnp.where(visible, logits, -jnp.inf)
            before = state.top[j]
            top = jnp.maximum(before, logits.max(1, keepdims=True))
            weights, shrink = jnp.exp2(logits - _widen(top, logits.shape[1])), jnp.exp2(before - top)
            state.top[j] = top
            state.total[j] = state.total[j] * shrink + weights.sum(1, keepdims=True)
            value = _product(weights.astype(v.dtype), v, contracted=0)
            state.value[j] = state.value[j] * _widen(shrink, heads.lanes) + value

        self._each_group(add_group)

    def finish(self, out, lse, positions):
        """Writes the weighted means, heads of a group side by side again, and the lse; 0 and -inf for padding."""
        heads, state = self
        rows = out.shape[2]
        real = heads.by_query(positions[0]) >= 0

        def finish_group(j, _):
            mean = state.value[j] / _widen(state.total[j], heads.lanes)
            parts = [self._own_lanes(n, mean[n * rows : (n + 1) * rows]) for n in range(heads.packed)]
            out[0, j] = _only(real[:rows], sum(parts[1:], start=parts[0]))
            top = _to_lanes(jnp.where(real, state.top[j], -jnp.inf))
            lse[0, j] = top * math.log(2) + jnp.log(_to_lanes(state.total[j]))

        self._each_group(finish_group)

    def _each_group(self, act: Callable):
        """A few rows are too little work to fill the pipeline; many rows fill it, and would take minutes to compile."""
        groups, rows = self.state.q.shape[:2]
        lax.fori_loop(0, groups, act, None, unroll=groups if rows <= LANES else 1)


def _product(x: Float[Array, "rows inner"], y: Array, *, contracted: int) -> Float[Array, "rows columns"]:
    """x times y, [columns, inner] or [inner, columns], summed in float32, over y's axis `contracted`."""
    exact = lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
    axes = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(x, y, axes, precision=exact, preferred_element_type=jnp.float32)


def _only(where: Bool[Array, "..."], x: Array) -> Array:
    """x where it is wanted, else zero, even in place of NaN."""
    return jnp.where(where, x, jnp.zeros_like(x))


def _to_lanes(x: Float[Array, "rows 128"]) -> Float[Array, "registers 128"]:
    """x, all of whose lanes are alike, as one lane for each row: of 128 rows, the diagonal. Zeros in lanes beyond."""

    def diagonal(x):
        row, lane = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
        return _only(row == lane, x).sum(0, keepdims=True)

    return jnp.concatenate([diagonal(x[first : first + LANES]) for first in range(0, x.shape[0], LANES)])


def _widen(x: Float[Array, "rows 128"], width: int) -> Float[Array, "rows width"]:
    """x, all of whose lanes are alike, over `width` lanes."""
    if width % LANES:
        return jnp.broadcast_to(x[:, :1], (x.shape[0], width))
    return jnp.concatenate([x] * (width // LANES), axis=1)


def _paged_tile(tokens: int) -> tuple[int, int]:
    """Query tokens of a grid step and keys of a block.

    Decoding waits for copies, so that a block is 2 MiB (of the real models, in bfloat16): what memory delivers in the
    microsecond that a copy takes to begin. A prompt waits for the vector unit: 64 tokens are enough products for each
    byte of keys, and more of either only overflow the registers. Tiles are whole registers of rows (16 in bfloat16).
    """
    return (1, 1024) if tokens == 1 else (min(_round_up(tokens, 16), 64), 512)


def _window_tile(tokens: int, window: int) -> int:
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
        raise TypeError(f"attention: expected float32 or bfloat16, the same for all, got {found}")
