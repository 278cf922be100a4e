"""Attention for Hopper GPUs in Mosaic GPU: one flash kernel over keys in pages or in a ring, the sink included.

A block of the grid takes one batch row, one key/value head and up to 128 of the row's queries: (token, query head of
the group) pairs, so that a key read once serves the whole group. Its keys and values come in tiles of 64 by TMA, from
where the cache holds them, into a circle of shared buffers, each refilled as soon as its tile is used; logits and
values are tensor core products; the softmax runs online in float32, in base 2. A block is one warpgroup, and nobody in
it is only a producer: two or three blocks share an SM, and while one takes exponentials another multiplies.

Where few queries meet many keys (decoding), the tiles of a row are split among blocks, and what the splits found is
merged behind the kernel by their log-sum-exp. The sink is the first logit that split 0 sees: it enters once.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

KEYS = 64  # per tile: a page of the real cache
STAGES = 4  # tiles under way per block: two blocks an SM keep 128 KiB in flight, where H200's latency asks for 36
ROWS = 64  # queries that one wgmma takes; a block takes two lots of them if there are as many, and reads keys half as often
BLOCKS = 264  # blocks that run at once: 2 on each of Hopper's 132 SMs
TILES_PER_SPLIT = 4  # a split of fewer tiles costs more in starting and merging than it saves
LOWEST = -1e30  # below any logit; finite, so that nothing is ever inf - inf
NOWHERE = 2**30  # the position of a slot that holds no key: behind every query
LOG2_E = math.log2(math.e)

Ref = Any  # a reference to memory inside a kernel
Scalar = Int32[Array, ""]


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P S K H"],
    v_pages: Float[Array, "P S K H"],
    page_table: Int32[Array, "B M"],
    positions: Int32[Array, "B T"],
    sinks: Float[Array, "N"],
    *,
    interpret: Any = None,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.attention.PagedAttention`. Reads each row's keys up to its last position, and no others.

    Args:
        interpret: None compiles for the device; parameters of Pallas's GPU interpreter run the kernel on a CPU.

    Raises:
        TypeError: q, k and v are not all bfloat16 (the interpreter takes float32 too).
        ValueError: the head size is no multiple of 16, or a page neither 8, 16, 32 nor a multiple of 64 tokens.
    """
    page_tokens, pages_per_row = k_pages.shape[1], page_table.shape[1]
    if page_tokens not in (8, 16, 32) and page_tokens % KEYS:
        raise ValueError(f"attention: pages of {page_tokens} tokens, expected 8, 16, 32 or a multiple of {KEYS}")
    return _attend(
        _Pages(page_tokens, pages_per_row), q, (k_pages, v_pages), (page_table,), positions, sinks, interpret
    )


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
    interpret: Any = None,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.attention.BandedAttention`. Reads ring and new keys where they lie; work is O(T W).

    Args:
        interpret: see `paged_attention`.

    Raises:
        TypeError, ValueError: see `paged_attention`.
    """
    window, new_copy = k_ring.shape[1], _copy_of(k_new.shape[1])
    ring_copy = _copy_of(window)
    sources = *(_padded(x, 1, ring_copy) for x in (k_ring, v_ring)), *(_padded(x, 1, new_copy) for x in (k_new, v_new))
    return _attend(_Band(window, ring_copy, new_copy), q, sources, (start,), positions, sinks, interpret)


class _Pages(NamedTuple):
    """Keys in pages: tile i holds the positions from 64 i of its row."""

    page_tokens: int
    pages_per_row: int

    @property
    def copied(self) -> int:
        """Tokens per copy."""
        return min(self.page_tokens, KEYS)

    @property
    def copies(self) -> int:
        """Copies that fill a tile's keys."""
        return KEYS // self.copied

    @property
    def splits(self) -> int:
        """Among how many blocks a row's keys may be divided."""
        return max(1, self.page_tokens * self.pages_per_row // KEYS // TILES_PER_SPLIT)

    def tiles(self, refs: tuple[Ref, ...], row: Scalar, first: Scalar, last: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """The first tile that any query sees, the first that some query does not see whole, the end."""
        del refs, row
        return jnp.int32(0), lax.div(first + 1, KEYS), lax.div(last + KEYS, KEYS)

    def fetch(self, refs: tuple[Ref, ...], row: Scalar, head: Scalar, tile: Scalar, k: Ref, v: Ref, ready: Ref):
        """Starts the copies of a tile."""
        k_pages, v_pages, table = refs
        per_page = self.page_tokens // self.copied
        for i in range(self.copies):
            ordinal = tile * self.copies + i  # of the copy, among the row's
            page = jnp.minimum(
                lax.div(ordinal, per_page), self.pages_per_row - 1
            )  # one repeated is behind every position
            within = pl.ds(lax.rem(ordinal, per_page) * self.copied, self.copied)
            at = (table[row, page], within, head)
            to = pl.ds(i * self.copied, self.copied)
            plgpu.copy_gmem_to_smem(k_pages.at[at], k.at[to], ready)
            plgpu.copy_gmem_to_smem(v_pages.at[at], v.at[to], ready)

    def positions(self, refs: tuple[Ref, ...], row: Scalar, tile: Scalar, slot: Int32[Array, "..."]):
        """Where the keys in a tile's slots stand in their row."""
        del refs, row
        return tile * KEYS + slot

    def sees(self, query: Int32[Array, "..."], key: Int32[Array, "..."]):
        """Whether a query at one position sees a key at another."""
        return key <= query


class _Band(NamedTuple):
    """Keys in a ring of `window` slots, as it was before the new keys, then these, from position `start`.

    A softmax does not ask for order: the ring's tiles are taken as they lie.
    """

    window: int
    ring_copied: int  # tokens per copy from the ring, and from the new keys
    new_copied: int

    copies = 1
    splits = 1

    @property
    def ring_tiles(self) -> int:
        return pl.cdiv(self.window, KEYS)

    def tiles(self, refs: tuple[Ref, ...], row: Scalar, first: Scalar, last: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """See `_Pages.tiles`: no tile is taken to be seen whole."""
        start = refs[-1][row]
        oldest = first - self.window + 1 - start  # among the new keys
        begin = jnp.where(oldest < 0, 0, self.ring_tiles + lax.div(oldest, KEYS))
        end = jnp.where(last < 0, 0, self.ring_tiles + lax.div(last - start + KEYS, KEYS))
        return begin, begin, end

    def fetch(self, refs: tuple[Ref, ...], row: Scalar, head: Scalar, tile: Scalar, k: Ref, v: Ref, ready: Ref):
        """See `_Pages.fetch`."""
        k_ring, v_ring, k_new, v_new, _ = refs

        def copy(source: Ref, tile: Scalar, copied: int, to: Ref):
            at = (row, pl.ds(tile * KEYS, copied), head)
            plgpu.copy_gmem_to_smem(source.at[at], to.at[pl.ds(0, copied)], ready)

        @pl.when(tile < self.ring_tiles)
        def _():
            copy(k_ring, tile, self.ring_copied, k)
            copy(v_ring, tile, self.ring_copied, v)

        @pl.when(tile >= self.ring_tiles)
        def _():
            copy(k_new, tile - self.ring_tiles, self.new_copied, k)
            copy(v_new, tile - self.ring_tiles, self.new_copied, v)

    def positions(self, refs: tuple[Ref, ...], row: Scalar, tile: Scalar, slot: Int32[Array, "..."]):
        """See `_Pages.positions`."""
        start = refs[-1][row]
        in_ring = tile < self.ring_tiles
        slot = tile * KEYS + slot
        wrapped = lax.rem(start, self.window)  # slots before this one were written again since slot 0 was
        base = jnp.where(in_ring, start - wrapped, start - self.ring_tiles * KEYS)
        wrapped = jnp.where(in_ring, wrapped, NOWHERE)
        position = slot + jnp.where(slot < wrapped, base, base - self.window)
        held = (position >= 0) & (slot < jnp.where(in_ring, self.window, NOWHERE))
        return jnp.where(held, position, NOWHERE)

    def sees(self, query: Int32[Array, "..."], key: Int32[Array, "..."]):
        """See `_Pages.sees`."""
        return (key <= query) & (query - key < self.window)


def _attend(
    keys: _Pages | _Band,
    q: Float[Array, "B T N H"],
    sources: tuple[Float[Array, "..."], ...],
    scalars: tuple[Int32[Array, "..."], ...],
    positions: Int32[Array, "B T"],
    sinks: Float[Array, "N"],
    interpret: Any,
) -> Float[Array, "B T N H"]:
    """Lays queries out as rows of their key/value head, runs the kernel, merges the splits."""
    (b, t, n, h), kv_heads = q.shape, sources[0].shape[2]
    _check(q, sources, interpret)
    group = n // kv_heads
    rows = ROWS if t * group <= ROWS else 2 * ROWS
    stored = min(
        rows, pl.cdiv(t * group, 8) * 8
    )  # one token's 8 heads are 8 rows of 64: the rest is neither read nor written
    q = _padded(
        q.reshape(b, t, kv_heads, group, h).transpose(0, 2, 1, 3, 4).reshape(b, kv_heads, t * group, h), 2, stored
    )
    row_tiles = pl.cdiv(t * group, rows)
    splits = max(1, min(keys.splits, BLOCKS // (b * kv_heads * row_tiles)))
    shape = (b, kv_heads, splits, q.shape[2])
    num_sources = len(sources) + len(scalars)
    out_dtype = jnp.float32 if splits > 1 else q.dtype

    def body(q_ref, positions_ref, sinks_ref, *refs):
        refs, (out_ref, lse_ref), scratch = (
            refs[:num_sources],
            refs[num_sources : num_sources + 2],
            refs[num_sources + 2 :],
        )
        q_smem, k_smem, v_smem, out_smem, lse_smem, q_ready, ready = scratch
        row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
        row_tile = row_tiles - 1 - lax.axis_index("row_tile")  # the latest queries see the most keys: they go first
        plgpu.copy_gmem_to_smem(
            q_ref.at[row, head, pl.ds(row_tile * rows, stored)], q_smem.at[pl.ds(0, stored)], q_ready
        )
        ordinal = row_tile * rows + _laid_out(lax.broadcasted_iota(jnp.int32, (rows,), 0), interpret)
        tokens = [lax.div(row_tile * rows, group) + i for i in range(min(t, pl.cdiv(rows - 1, group) + 1))]
        token_positions = [positions_ref[row, jnp.minimum(token, t - 1)] for token in tokens]
        starts = [token * group for token in tokens]
        query_positions = _staircase(ordinal, starts, token_positions)
        row_sinks = [sinks_ref[head * group + i].astype(jnp.float32) for i in range(group)]
        row_sinks = _staircase(ordinal - _staircase(ordinal, starts, starts), list(range(group)), row_sinks)
        first, last = functools.reduce(jnp.minimum, token_positions), functools.reduce(jnp.maximum, token_positions)
        begin, partial, end = keys.tiles(refs, row, first, last)
        per_split = lax.div(end - begin + splits - 1, splits)
        begin = begin + split * per_split
        end = jnp.minimum(end, begin + per_split)
        partial = jnp.clip(partial, begin, jnp.maximum(begin, end))

        def fetch(tile):
            slot = lax.rem(tile - begin, STAGES)

            @pl.when(tile < end)
            def _():
                keys.fetch(refs, row, head, tile, k_smem.at[slot], v_smem.at[slot], ready.at[slot])

        for i in range(STAGES):
            fetch(begin + i)

        without_sink = jnp.where(split == 0, 0.0, LOWEST)
        top = jnp.maximum(row_sinks * LOG2_E + without_sink, LOWEST)
        total = _laid_out(jnp.broadcast_to(jnp.where(split == 0, 1.0, 0.0), (rows,)), interpret)
        value = _laid_out(jnp.zeros((rows, h), jnp.float32), interpret)
        plgpu.barrier_wait(q_ready)

        def step(tile, carry, *, whole):
            top, total, value = carry
            slot = lax.rem(tile - begin, STAGES)
            k, v = k_smem.at[slot], v_smem.at[slot]
            plgpu.barrier_wait(ready.at[slot])
            logits = _logits(q_smem, k, interpret)
            if not whole:
                key_positions = keys.positions(
                    refs, row, tile, _laid_out(lax.broadcasted_iota(jnp.int32, (rows, KEYS), 1), interpret)
                )
                visible = keys.sees(lax.broadcast_in_dim(query_positions, (rows, KEYS), [0]), key_positions)
                logits = jnp.where(visible, logits, -jnp.inf)
                _clean(
                    v,
                    keys.positions(refs, row, tile, _laid_out(lax.broadcasted_iota(jnp.int32, (KEYS, h), 0), interpret))
                    <= last,
                )
            scale = h**-0.5 * LOG2_E
            new_top = jnp.maximum(top, logits.max(axis=1) * scale)
            weights = jnp.exp2(logits * scale - lax.broadcast_in_dim(new_top, (rows, KEYS), [0]))
            shrink = jnp.exp2(top - new_top)
            total = total * shrink + weights.sum(axis=1)
            value = value * lax.broadcast_in_dim(shrink, (rows, h), [0])
            value = _add_product(value, weights.astype(v.dtype), v, interpret)
            fetch(tile + STAGES)
            return new_top, total, value

        carry = lax.fori_loop(begin, partial, lambda tile, carry: step(tile, carry, whole=True), (top, total, value))
        carry = lax.fori_loop(partial, end, lambda tile, carry: step(tile, carry, whole=False), carry)
        top, total, value = carry
        total = jnp.maximum(total, 1e-30)  # a split without keys
        out_smem[...] = (value / lax.broadcast_in_dim(total, (rows, h), [0])).astype(out_dtype)
        lse_smem[...] = top + jnp.log(total) * LOG2_E
        plgpu.commit_smem()
        at = (row, head, split, pl.ds(row_tile * rows, stored))
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, stored)], out_ref.at[at])
        plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, stored)], lse_ref.at[at])
        plgpu.wait_smem_to_gmem(0)

    out, lse = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((*shape, h), out_dtype), jax.ShapeDtypeStruct(shape, jnp.float32)),
        scratch_types=(
            _shared((rows, h), q.dtype),
            _shared((STAGES, KEYS, h), q.dtype),
            _shared((STAGES, KEYS, h), q.dtype),
            _shared((rows, h), out_dtype),
            plgpu.SMEM((rows,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2 * keys.copies, num_barriers=STAGES),
        ),
        grid=(b, kv_heads, splits, row_tiles),
        grid_names=("row", "head", "split", "row_tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(q, positions, sinks, *sources, *scalars)
    out = _merged(out, lse)
    return out[:, :, : t * group].reshape(b, kv_heads, t, group, h).transpose(0, 2, 1, 3, 4).reshape(b, t, n, h)


def _shared(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Shared memory laid out for wgmma and TMA: tiles of 8 rows, swizzled over as many bytes as a row allows."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _merged(out: Float[Array, "B K splits R H"], lse: Float[Array, "B K splits R"]) -> Float[Array, "B K R H"]:
    """The mean of the splits' outputs by their shares of the softmax. Written out, since XLA fuses that into one launch."""
    splits = range(out.shape[2])
    if len(splits) == 1:
        return out[:, :, 0]
    top = functools.reduce(jnp.maximum, (lse[:, :, i] for i in splits))
    weights = [jnp.exp2(lse[:, :, i] - top)[..., None] for i in splits]
    return sum(weights[i] * out[:, :, i] for i in splits) / sum(weights)


def _staircase(x: Int32[Array, "R"], starts: list, values: list) -> Array:
    """For each x the value of the last step that starts at or before it; a number per thread, and no gather."""
    y = jnp.full(x.shape, values[0])
    for start, value in zip(starts[1:], values[1:], strict=True):
        y = jnp.where(x >= start, value, y)
    return y


def _laid_out(x: Array, interpret: Any) -> Array:
    """x as wgmma lays out its results among the threads, a vector as it lays out a number per row."""
    if interpret is not None:  # the interpreter does not know layouts
        return x
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA if x.ndim == 2 else plgpu.Layout.WGMMA.reduce(1))


def _logits(q: Ref, k: Ref, interpret: Any) -> Float[Array, "R Y"]:
    """q k^T, summed in float32."""
    if interpret is not None:  # the interpreter does not know transposed references
        return jnp.dot(q[...], k[...].T, preferred_element_type=jnp.float32)

    def product(sums: Ref):
        plgpu.wgmma(sums, q, plgpu.transpose_ref(k, (1, 0)))
        return sums[...]

    return pl.run_scoped(product, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))


def _add_product(sums: Float[Array, "R H"], weights: Float[Array, "R Y"], v: Ref, interpret: Any):
    """sums + weights v, in float32."""
    if interpret is not None:  # nor operands in registers
        return sums + jnp.dot(weights, v[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda sums: plgpu.wgmma(sums, weights, v))(plgpu.ACC.init(sums))


def _clean(v: Ref, held: Array):
    """Zeroes values that no query of the block sees: they may be NaN, and 0 x NaN is NaN."""
    v[...] = jnp.where(held, v[...], jnp.zeros(v.shape, v.dtype))
    plgpu.commit_smem()


def _copy_of(tokens: int) -> int:
    """Tokens to copy at once from an array of so many: a tile's, or all, in whole eights."""
    return min(KEYS, pl.cdiv(tokens, 8) * 8)


def _padded(x: Array, axis: int, multiple: int, mode: str = "constant") -> Array:
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], mode=mode) if missing else x


def _check(q: Array, sources: tuple[Array, ...], interpret: Any):
    dtypes = {x.dtype for x in (q, *sources)}
    allowed = {jnp.dtype(jnp.bfloat16)} | ({jnp.dtype(jnp.float32)} if interpret is not None else set())
    if len(dtypes) > 1 or not dtypes <= allowed:
        raise TypeError(f"attention: q, k, v are {', '.join(sorted(map(str, dtypes)))}, expected bfloat16 for all")
    if q.shape[-1] % 16:
        raise ValueError(f"attention: head_dim {q.shape[-1]}, expected a multiple of 16")
