"""Attention for Hopper GPUs in Mosaic GPU: one flash kernel over keys in pages or in a ring, the sink included.

A block of the grid takes one sequence, one key/value head and up to 128 of its queries: (token, query head of the
group) pairs, so that a key read once serves the whole group. Keys and values come in tiles of 64 by TMA, from where the
cache holds them, into a circle of shared buffers, each refilled as soon as its tile is used; logits and values are
tensor core products; the softmax runs online in float32, in base 2. A block is one warpgroup, and nobody in it is only
a producer: two blocks share an SM, and while one takes exponentials the other multiplies.

Where few queries meet many keys (decoding), the tiles of a sequence are split among blocks, and what the splits found
is merged after the kernel by their log-sum-exp (`_merged`). The sink is the first logit that split 0 sees: it enters
once.

Operands are bfloat16, sums float32. Tensor cores round float32 to 10 bits, so float32 is refused, not rounded.
`docs/kernels.md` has the costs. The names in annotations are those of the op, with R queries of a block and Y keys.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.attention.contract import Attended, PagedKV, RingKV, merge

KEYS = 64  # of a tile: a page of the real cache
STAGES = 4  # tiles under way per block: two blocks keep 128 KiB in flight per SM, and an H200's latency asks for 36
SHARED_BYTES = 111 * 1024  # for tiles, queries and outputs of a block, so that an SM's 228 KiB hold two blocks
ROWS = 64  # queries of one wgmma; a block takes two lots where there are as many, which halves the reads of keys
BLOCKS = 264  # that run at once: 2 on each of Hopper's 132 SMs
MOST_UNROLLED = 40  # splits that are merged one by one: 33 of eight key/value heads, but 264 of one
TILES_PER_SPLIT = 4  # a split of fewer costs more in starting and merging than it saves
LOWEST = -1e30  # below any logit; finite, so that nothing is ever inf - inf
NOWHERE = 2**30  # the position of a slot that holds no key: after every query
LOG2_E = math.log2(math.e)

Ref = Any  # a reference to memory inside a kernel
Scalar = Int32[Array, ""]


def attend(
    q: Float[Array, "B T N H"],
    kv: PagedKV | RingKV,
    positions: Int32[Array, "B T"],
    sinks: Float[Array, "N"],
    *,
    interpret: Any = None,
) -> Attended:
    """See `pallas_kernels.attention.Attend`. Reads the keys that some query sees, where they lie, and no others.

    Outputs are float32 where splits were merged, else of q's dtype.

    `interpret=None` compiles for the device; parameters of Pallas's GPU interpreter run the kernel on a CPU.

    Raises:
        TypeError: q, k and v are not all bfloat16 (the interpreter takes float32 too).
        ValueError: the head size is no multiple of 16, or a page neither 8, 16, 32 nor a multiple of 64 tokens.
    """
    _check(q, kv, interpret)
    keys, sources = _paged(kv) if isinstance(kv, PagedKV) else _sliding_window(kv)
    return _run(keys, sources, q, positions, sinks, interpret)


# ---- where keys are ----


def _paged(kv: PagedKV) -> "tuple[_Pages, tuple[Array, ...]]":
    """How the kernel finds keys in pages, and the arrays that it finds them in."""
    page_tokens = kv.k.shape[1]
    if page_tokens not in (8, 16, 32) and page_tokens % KEYS:
        raise ValueError(f"attention: pages of {page_tokens} tokens, expected 8, 16, 32 or a multiple of {KEYS}")
    return _Pages(page_tokens, kv.page_table.shape[1]), (kv.k, kv.v, kv.page_table)


def _sliding_window(kv: RingKV) -> "tuple[_Window, tuple[Array, ...]]":
    """The same for a ring and new keys."""
    ring_copied, new_copied = _copied(kv.k.shape[1]), _copied(kv.k_new.shape[1])
    ring = [_padded(x, 1, ring_copied) for x in (kv.k, kv.v)]
    new = [_padded(x, 1, new_copied) for x in (kv.k_new, kv.v_new)]
    return _Window(kv.k.shape[1], ring_copied, new_copied), (*ring, *new, kv.start)


class _Pages(NamedTuple):
    """Keys in pages: tile i holds the positions from 64 i of its sequence."""

    page_tokens: int
    pages_per_sequence: int

    kernel_name = "paged_attention"

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
        """Among how many blocks a sequence's keys may be divided."""
        return max(1, self.page_tokens * self.pages_per_sequence // KEYS // TILES_PER_SPLIT)

    def tiles(
        self, refs: tuple[Ref, ...], sequence: Scalar, first: Scalar, last: Scalar
    ) -> tuple[Scalar, Scalar, Scalar]:
        """For queries from position `first` to `last`: the first tile any sees, the first not seen whole, the end."""
        del refs, sequence
        return jnp.int32(0), lax.div(first + 1, KEYS), lax.div(last + KEYS, KEYS)

    def fetch(self, refs: tuple[Ref, ...], sequence: Scalar, head: Scalar, tile: Scalar, k: Ref, v: Ref, ready: Ref):
        """Starts the copies of a tile."""
        k_pages, v_pages, table = refs
        per_page = self.page_tokens // self.copied

        @pl.loop(0, self.copies)
        def _(i: Scalar):
            ordinal = tile * self.copies + i  # of the copy, among the sequence's
            page = jnp.minimum(lax.div(ordinal, per_page), self.pages_per_sequence - 1)  # one too many is never visible
            at = (table[sequence, page], pl.ds(lax.rem(ordinal, per_page) * self.copied, self.copied), head)
            to = pl.ds(i * self.copied, self.copied)
            plgpu.copy_gmem_to_smem(k_pages.at[at], k.at[to], ready)
            plgpu.copy_gmem_to_smem(v_pages.at[at], v.at[to], ready)

    def positions(
        self, refs: tuple[Ref, ...], sequence: Scalar, tile: Scalar, slot: Int32[Array, "..."]
    ) -> Int32[Array, "..."]:
        """Where the keys in a tile's slots stand in their sequence."""
        del refs, sequence
        return tile * KEYS + slot

    def sees(self, query: Int32[Array, "R Y"], key: Int32[Array, "R Y"]) -> Bool[Array, "R Y"]:
        """Whether a query at one position sees a key at another."""
        return key <= query


class _Window(NamedTuple):
    """Keys in a ring, as it was before the new ones, then these: a softmax does not mind that the ring is unordered.

    What an array has too few tokens for a whole copy is padded; in the real model nothing is but one new token.
    """

    window: int
    ring_copied: int  # tokens per copy from the ring
    new_copied: int  # and from the new keys

    kernel_name = "sliding_window_attention"
    copies = 1
    splits = 1

    @property
    def ring_tiles(self) -> int:
        """Tiles that the ring fills; those of the new keys follow."""
        return pl.cdiv(self.window, KEYS)

    def tiles(
        self, refs: tuple[Ref, ...], sequence: Scalar, first: Scalar, last: Scalar
    ) -> tuple[Scalar, Scalar, Scalar]:
        """See `_Pages.tiles`; no tile is taken to be seen whole."""
        start = refs[-1][sequence]
        oldest = first - self.window + 1 - start  # among the new keys
        begin = jnp.where(oldest < 0, 0, self.ring_tiles + lax.div(oldest, KEYS))
        end = jnp.where(last < 0, 0, self.ring_tiles + lax.div(last - start + KEYS, KEYS))
        return begin, begin, end

    def fetch(self, refs: tuple[Ref, ...], sequence: Scalar, head: Scalar, tile: Scalar, k: Ref, v: Ref, ready: Ref):
        """See `_Pages.fetch`."""
        k_ring, v_ring, k_new, v_new, _ = refs

        def copy(source: Ref, tile: Scalar, copied: int, to: Ref):
            at = (sequence, pl.ds(tile * KEYS, copied), head)
            plgpu.copy_gmem_to_smem(source.at[at], to.at[pl.ds(0, copied)], ready)

        @pl.when(tile < self.ring_tiles)
        def _():
            copy(k_ring, tile, self.ring_copied, k)
            copy(v_ring, tile, self.ring_copied, v)

        @pl.when(tile >= self.ring_tiles)
        def _():
            copy(k_new, tile - self.ring_tiles, self.new_copied, k)
            copy(v_new, tile - self.ring_tiles, self.new_copied, v)

    def positions(
        self, refs: tuple[Ref, ...], sequence: Scalar, tile: Scalar, slot: Int32[Array, "..."]
    ) -> Int32[Array, "..."]:
        """See `_Pages.positions`."""
        start = refs[-1][sequence]
        in_ring = tile < self.ring_tiles
        slot = tile * KEYS + slot
        rewritten = lax.rem(start, self.window)  # slots before this one were written once more than the others
        base = jnp.where(in_ring, start - rewritten, start - self.ring_tiles * KEYS)
        rewritten, slots = jnp.where(in_ring, rewritten, NOWHERE), jnp.where(in_ring, self.window, NOWHERE)
        position = slot + jnp.where(slot < rewritten, base, base - self.window)
        return jnp.where((position >= 0) & (slot < slots), position, NOWHERE)

    def sees(self, query: Int32[Array, "R Y"], key: Int32[Array, "R Y"]) -> Bool[Array, "R Y"]:
        """See `_Pages.sees`."""
        return (query - key).astype(jnp.uint32) < jnp.uint32(self.window)  # unsigned, a later key is far before


def _copied(tokens: int) -> int:
    """Tokens to copy at once from an array of so many: a tile's, or all, in whole eights."""
    return min(KEYS, pl.cdiv(tokens, 8) * 8)


# ---- the kernel ----


class _Plan(NamedTuple):
    """What is known when the kernel is compiled."""

    keys: _Pages | _Window
    tokens: int  # of a sequence
    group: int  # query heads per key/value head
    head_size: int
    rows: int  # queries per block
    stored: int  # of these, how many are read and written: one token's 8 heads are 8 rows of 64
    query_tiles: int  # blocks for the queries of a sequence
    splits: int  # blocks for its keys
    stages: int  # tiles under way
    out_dtype: jnp.dtype
    interpret: Any

    @classmethod
    def of(cls, keys: _Pages | _Window, q: Float[Array, "B T N H"], kv_heads: int, interpret: Any) -> "_Plan":
        """Splits the keys as long as that fills SMs which would stay empty."""
        b, tokens, n, head_size = q.shape
        pairs = tokens * (n // kv_heads)
        rows = ROWS if pairs <= ROWS else 2 * ROWS
        query_tiles = pl.cdiv(pairs, rows)
        splits = max(1, min(keys.splits, BLOCKS // (b * kv_heads * query_tiles)))
        stored = min(rows, pl.cdiv(pairs, 8) * 8)
        out_dtype = jnp.dtype(jnp.float32) if splits > 1 else q.dtype
        free_bytes = SHARED_BYTES - rows * head_size * (q.dtype.itemsize + out_dtype.itemsize)
        stages = max(2, min(STAGES, free_bytes // (2 * KEYS * head_size * q.dtype.itemsize)))
        return cls(
            keys, tokens, n // kv_heads, head_size, rows, stored, query_tiles, splits, stages, out_dtype, interpret
        )


def _run(
    keys: _Pages | _Window,
    sources: tuple[Array, ...],
    q: Float[Array, "B T N H"],
    positions: Int32[Array, "B T"],
    sinks: Float[Array, "N"],
    interpret: Any,
) -> Attended:
    """Lays queries out by their key/value head, runs the kernel, and merges the splits."""
    (b, t, _, h), kv_heads = q.shape, sources[0].shape[2]
    plan = _Plan.of(keys, q, kv_heads, interpret)
    by_head = q.reshape(b, t, kv_heads, plan.group, h).transpose(0, 2, 1, 3, 4)
    by_head = _padded(by_head.reshape(b, kv_heads, t * plan.group, h), 2, plan.stored)
    shape = (b, kv_heads, plan.splits, by_head.shape[2])
    out, lse = plgpu.kernel(
        functools.partial(_block, plan),
        out_type=(jax.ShapeDtypeStruct((*shape, h), plan.out_dtype), jax.ShapeDtypeStruct(shape, jnp.float32)),
        scratch_types={
            "q": _shared((plan.rows, h), q.dtype),
            "k": _shared((plan.stages, KEYS, h), q.dtype),
            "v": _shared((plan.stages, KEYS, h), q.dtype),
            "out": _shared((plan.rows, h), plan.out_dtype),
            "lse": plgpu.SMEM((plan.rows,), jnp.float32),
            "q_ready": plgpu.Barrier(),
            "ready": plgpu.Barrier(num_arrivals=2 * keys.copies, num_barriers=plan.stages),
        },
        grid=(b, kv_heads, plan.splits, plan.query_tiles),
        grid_names=("sequence", "head", "split", "query_tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name=keys.kernel_name,
    )(by_head, positions, sinks, *sources)
    found = _merged(Attended(out, lse))
    out, lse = (_by_token(x[:, :, : t * plan.group], t) for x in found)
    return Attended(out, jnp.where(positions[..., None] < 0, -jnp.inf, lse))


def _merged(parts: Attended) -> Attended:
    """`contract.merge` of the splits, [B, K, splits, R, H], written so that XLA makes two kernels of it and not three.

    Each output weighs the splits for itself, without a reduction.
    """
    if parts.out.shape[2] == 1:
        return Attended(parts.out[:, :, 0], parts.lse[:, :, 0])
    if parts.out.shape[2] > MOST_UNROLLED:
        return merge(parts, axis=2)
    splits = [Attended(parts.out[:, :, i], parts.lse[:, :, i, :, None]) for i in range(parts.out.shape[2])]
    lse = [jnp.broadcast_to(split.lse, split.out.shape) for split in splits]
    top = _tree(jnp.maximum, lse)
    weights = [jnp.exp(x - top) for x in lse]
    total = _tree(jnp.add, weights)
    out = _tree(jnp.add, [split.out * weight for split, weight in zip(splits, weights, strict=True)]) / total
    return Attended(out, (top + jnp.log(total))[..., 0])


def _tree(pair: Callable[[Array, Array], Array], of: list[Array]) -> Array:
    """Neighbours first: a chain would wait for each in turn."""
    while len(of) > 1:
        of = [*map(pair, of[::2], of[1::2]), *of[len(of) // 2 * 2 :]]
    return of[0]


def _by_token(x: Float[Array, "B K TG *H"], tokens: int) -> Float[Array, "B T N *H"]:
    """What the kernel gives by key/value head, in the order of queries."""
    b, kv_heads, _, *rest = x.shape
    return jnp.moveaxis(x.reshape(b, kv_heads, tokens, -1, *rest), 2, 1).reshape(b, tokens, -1, *rest)


def _block(
    plan: _Plan,
    q_ref: Ref,
    positions_ref: Ref,
    sinks_ref: Ref,
    *refs: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    out: Ref,
    lse: Ref,
    q_ready: Ref,
    ready: Ref,
):
    """What one block does: see the top of this file."""
    *sources, out_ref, lse_ref = refs
    keys, sources = plan.keys, tuple(sources)
    sequence, head, split = (lax.axis_index(name) for name in ("sequence", "head", "split"))
    query_tile = plan.query_tiles - 1 - lax.axis_index("query_tile")  # the last queries see most keys: they start first
    at = pl.ds(query_tile * plan.rows, plan.stored)
    plgpu.copy_gmem_to_smem(q_ref.at[sequence, head, at], q.at[pl.ds(0, plan.stored)], q_ready)
    queries = _Queries.of(plan, positions_ref.at[sequence], sinks_ref, head, query_tile)
    begin, partial, end = _share(split, plan.splits, *keys.tiles(sources, sequence, queries.first, queries.last))

    def fetch(tile: Scalar):
        slot = lax.rem(tile - begin, plan.stages)
        pl.when(tile < end)(lambda: keys.fetch(sources, sequence, head, tile, k.at[slot], v.at[slot], ready.at[slot]))

    def add_tile(tile: Scalar, softmax: _Softmax, *, whole: bool) -> _Softmax:
        slot = lax.rem(tile - begin, plan.stages)
        plgpu.barrier_wait(ready.at[slot])
        logits = _logits(q, k.at[slot], plan.interpret)
        if not whole:
            position = functools.partial(keys.positions, sources, sequence, tile)
            by_column, by_row = (
                _iota(shape, axis, plan.interpret) for shape, axis in ((logits.shape, 1), (v.shape[1:], 0))
            )
            seen = keys.sees(lax.broadcast_in_dim(queries.positions, logits.shape, [0]), position(by_column))
            logits = jnp.where(seen, logits, -jnp.inf)
            _clean(v.at[slot], position(by_row) <= queries.last)
        softmax = softmax.add(logits, plan.head_size**-0.5 * LOG2_E, v.at[slot], plan.interpret)
        fetch(tile + plan.stages)
        return softmax

    pl.loop(begin, begin + plan.stages)(fetch)
    plgpu.barrier_wait(q_ready)
    softmax = _Softmax.before_keys(queries.sinks, split == 0, plan)
    softmax = lax.fori_loop(begin, partial, functools.partial(add_tile, whole=True), softmax)
    softmax = lax.fori_loop(partial, end, functools.partial(add_tile, whole=False), softmax)
    out[...], lse[...] = softmax.output(out.dtype)
    plgpu.commit_smem()
    for found, to in ((out, out_ref), (lse, lse_ref)):
        plgpu.copy_smem_to_gmem(found.at[pl.ds(0, plan.stored)], to.at[sequence, head, split, at])
    plgpu.wait_smem_to_gmem(0)


def _share(split: Scalar, splits: int, begin: Scalar, partial: Scalar, end: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """The tiles of one split, out of those from `begin` to `end`."""
    share = lax.div(end - begin + splits - 1, splits)
    begin = begin + split * share
    end = jnp.minimum(end, begin + share)
    return begin, jnp.clip(partial, begin, jnp.maximum(begin, end)), end


class _Queries(NamedTuple):
    """What a block knows of its queries."""

    positions: Int32[Array, "R"]
    sinks: Float[Array, "R"]
    first: Scalar  # the least position, -1 if there is padding
    last: Scalar

    @classmethod
    def of(cls, plan: _Plan, positions: Ref, sinks: Ref, head: Scalar, query_tile: Scalar) -> "_Queries":
        """Reads a position per token and a sink per head: each thread picks those of its rows, there is no gather."""
        begin = query_tile * plan.rows
        ordinal = begin + _iota((plan.rows,), 0, plan.interpret)
        met = min(plan.tokens, pl.cdiv(plan.rows - 1, plan.group) + 1)  # tokens, at most
        tokens = [lax.div(begin, plan.group) + i for i in range(met)]
        found = [positions[jnp.minimum(token, plan.tokens - 1)] for token in tokens]
        starts = [token * plan.group for token in tokens]
        in_group = ordinal - _staircase(ordinal, starts, starts)
        of_heads = [sinks[head * plan.group + i].astype(jnp.float32) for i in range(plan.group)]
        return cls(
            _staircase(ordinal, starts, found),
            _staircase(in_group, list(range(plan.group)), of_heads),
            functools.reduce(jnp.minimum, found),
            functools.reduce(jnp.maximum, found),
        )


def _staircase(x: Int32[Array, "R"], starts: list, values: list) -> Array:
    """For each x the value of the last step that starts at or before it."""
    y = jnp.full(x.shape, values[0])
    for start, value in zip(starts[1:], values[1:], strict=True):
        y = jnp.where(x >= start, value, y)
    return y


class _Softmax(NamedTuple):
    """A softmax-weighted sum under way, in base 2 (Milakov and Gimelshein, arXiv:1805.02867)."""

    top: Float[Array, "R"]  # largest logit
    total: Float[Array, "R"]  # sum of 2^(logit - top)
    value: Float[Array, "R H"]  # sum of 2^(logit - top) * value

    @classmethod
    def before_keys(cls, sinks: Float[Array, "R"], sees_sink: Bool[Array, ""], plan: _Plan) -> "_Softmax":
        """The sink is the only logit so far, and it has no value; the other splits have not even that."""
        top = jnp.maximum(sinks * LOG2_E + jnp.where(sees_sink, 0.0, LOWEST), LOWEST)
        total = jnp.broadcast_to(jnp.where(sees_sink, 1.0, 0.0), top.shape)
        value = jnp.zeros((plan.rows, plan.head_size), jnp.float32)
        return cls(top, _laid_out(total, plan.interpret), _laid_out(value, plan.interpret))

    def add(self, logits: Float[Array, "R Y"], scale: float, v: Ref, interpret: Any) -> "_Softmax":
        """Takes in one tile. Logits are scaled where `top` is subtracted: that is one instruction."""
        top = jnp.maximum(self.top, logits.max(axis=1) * scale)
        weights = jnp.exp2(logits * scale - lax.broadcast_in_dim(top, logits.shape, [0]))
        shrink = jnp.exp2(self.top - top)
        value = self.value * lax.broadcast_in_dim(shrink, self.value.shape, [0])
        value = _add_product(value, weights.astype(v.dtype), v, interpret)
        return _Softmax(top, self.total * shrink + weights.sum(axis=1), value)

    def output(self, dtype: jnp.dtype) -> tuple[Float[Array, "R H"], Float[Array, "R"]]:
        """The weighted mean of the values, and the natural logarithm of what the weights add up to."""
        total = jnp.maximum(self.total, 1e-30)  # a split may have met no key
        mean = self.value / lax.broadcast_in_dim(total, self.value.shape, [0])
        return mean.astype(dtype), self.top * math.log(2) + jnp.log(total)


def _logits(q: Ref, k: Ref, interpret: Any) -> Float[Array, "R Y"]:
    """q k^T, in float32."""
    if interpret is not None:  # the interpreter does not know transposed references
        return jnp.dot(q[...], k[...].T, preferred_element_type=jnp.float32)

    def product(sums: Ref) -> Array:
        plgpu.wgmma(sums, q, plgpu.transpose_ref(k, (1, 0)))
        return sums[...]

    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((q.shape[0], k.shape[0]), jnp.float32))


def _add_product(
    sums: Float[Array, "R H"], weights: Float[Array, "R Y"], v: Ref, interpret: Any
) -> Float[Array, "R H"]:
    """Sums + weights v, in float32."""
    if interpret is not None:  # nor operands in registers
        return sums + jnp.dot(weights, v[...], preferred_element_type=jnp.float32)
    accumulate = pl.run_state(lambda sums: plgpu.wgmma(sums, weights, v))
    return cast(Array, accumulate(plgpu.WGMMAAccumulatorRef.init(sums)))


def _clean(v: Ref, held: Bool[Array, "Y H"]):
    """Zeroes values that no query sees: they may be NaN, and 0 x NaN is NaN."""
    v[...] = jnp.where(held, v[...], jnp.zeros(v.shape, v.dtype))
    plgpu.commit_smem()


def _iota(shape: tuple[int, ...], axis: int, interpret: Any) -> Int32[Array, "..."]:
    return _laid_out(lax.broadcasted_iota(jnp.int32, shape, axis), interpret)


def _laid_out(x: Array, interpret: Any) -> Array:
    """x as wgmma lays out its results among the threads, a vector as it lays out a number per row."""
    if interpret is not None:  # nor layouts
        return x
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA if x.ndim == 2 else plgpu.Layout.WGMMA.reduce(1))


def _shared(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Shared memory laid out for wgmma and TMA: tiles of 8 rows, swizzled over as many bytes as a row allows."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    )


# ---- around the kernel ----


def _padded(x: Array, axis: int, multiple: int) -> Array:
    """x with zeros after it along `axis`, if it is no multiple."""
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _check(q: Array, kv: PagedKV | RingKV, interpret: Any):
    """Refuses what the kernel cannot do."""
    dtypes = {x.dtype for x in (q, *kv) if jnp.issubdtype(x.dtype, jnp.floating)}
    allowed = {jnp.dtype(jnp.bfloat16)} | ({jnp.dtype(jnp.float32)} if interpret is not None else set())
    if len(dtypes) > 1 or not dtypes <= allowed:
        found = ", ".join(sorted(map(str, dtypes)))
        raise TypeError(f"attention: q, k and v are {found}, expected bfloat16 for the GPU kernel; use the reference")
    if q.shape[-1] % 16:
        raise ValueError(f"attention: head_dim {q.shape[-1]}, expected a multiple of 16")
