"""Assignments sorted by expert and cut into tiles of rows of one expert each: what an expert kernel walks over.

A token's assignment to an expert becomes one row of activations; an expert's rows begin at a tile of their own, and
what its last tile has to spare stays empty. So a tile is one dense block of activations beside one expert's weights,
whatever the imbalance.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

MAX_TILE_ROWS = 128


class Tile(NamedTuple):
    """M rows of one expert."""

    expert: Int32[Array, ""]
    assignment: Int32[Array, "M"]  # the flat (token, x) assignment in each row; in an empty row, any
    taken: Bool[Array, "M"]  # whether the row is not empty


class Tiles(NamedTuple):
    """Tiles of at most M rows of one expert each, in order of their experts."""

    rows: int  # M
    assignments: Int32[Array, "A"]  # the flat (token, x) assignments, in order of their expert; skipped ones last
    first_assignment: Int32[Array, "E"]  # where each expert's run begins in `assignments`
    end_assignment: Int32[Array, "E"]
    first_tile: Int32[Array, "E"]
    end_tile: Int32[Array, "E"]

    @classmethod
    def of(cls, expert_ids: Int32[Array, "T X"], num_experts: int, rows: int) -> "Tiles":
        """Cuts; counts by comparing, which compiles to far less than scatters and cumulative sums do."""
        flat, expert = expert_ids.reshape(-1), jnp.arange(num_experts, dtype=jnp.int32)
        flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)  # skipped ones sort last
        first = jnp.sum(flat < expert[:, None], axis=1, dtype=jnp.int32)
        end = jnp.sum(flat <= expert[:, None], axis=1, dtype=jnp.int32)
        tiles = (end - first + rows - 1) // rows
        end_tile = jnp.sum(jnp.where(expert <= expert[:, None], tiles, 0), axis=1, dtype=jnp.int32)
        return cls(rows, jnp.argsort(flat, stable=True).astype(jnp.int32), first, end, end_tile - tiles, end_tile)

    def tile(self, number: Int32[Array, ""]) -> Tile:
        """One of them, by its number."""
        expert = jnp.sum(self.end_tile <= number, dtype=jnp.int32)
        first = self.first_assignment[expert] + (number - self.first_tile[expert]) * self.rows
        place = first + jnp.arange(self.rows, dtype=jnp.int32)
        return Tile(expert, self.assignments.at[place].get(mode="clip"), place < self.end_assignment[expert])


class TiledRows(NamedTuple):
    """All tiles' rows side by side, for kernels that take every tile at once: I tiles of M rows.

    Example: two tokens assigned to experts (0, 2) and (2, 2), tiles of two rows, three experts. Tile 0 is of expert 0
    with assignment 0 and an empty row, tile 1 of expert 2 with assignments 1 and 2, tile 2 of expert 2 with assignment
    3 and an empty row: expert = [0, 2, 2], assignment = [0, -1, 1, 2, 3, -1], row = [[0, 2], [3, 4]], used = 3.
    """

    expert: Int32[Array, "I"]  # of each tile; beyond the last tile in use, that tile's again: nothing new is fetched
    used: Int32[Array, ""]  # tiles in use
    assignment: Int32[Array, "IM"]  # the flat assignment in each row; -1: an empty row
    row: Int32[Array, "T X"]  # where each assignment went; I M for a skipped one

    @classmethod
    def of(cls, expert_ids: Int32[Array, "T X"], num_experts: int, rows: int) -> "TiledRows":
        """Lays out; I is the most tiles that any routing needs."""
        tiles = Tiles.of(expert_ids, num_experts, rows)
        used, num_tiles = tiles.end_tile[-1], max_tiles(expert_ids.size, num_experts, rows)
        at = jnp.minimum(jnp.arange(num_tiles, dtype=jnp.int32), jnp.maximum(used - 1, 0))
        expert = jnp.minimum(jnp.sum(tiles.end_tile <= at[:, None], axis=1, dtype=jnp.int32), num_experts - 1)
        nth = (jnp.arange(num_tiles, dtype=jnp.int32) - tiles.first_tile[expert])[:, None] * rows
        place = (tiles.first_assignment[expert][:, None] + nth + jnp.arange(rows, dtype=jnp.int32)).reshape(-1)
        taken = place < jnp.repeat(tiles.end_assignment[expert], rows)
        assignment = jnp.where(taken, tiles.assignments.at[place].get(mode="clip"), -1)
        row = jnp.full(expert_ids.size, num_tiles * rows, jnp.int32)
        to = jnp.where(taken, assignment, expert_ids.size)  # beyond the array: dropped
        row = row.at[to].set(jnp.arange(num_tiles * rows, dtype=jnp.int32), mode="drop")
        return cls(expert, used, assignment, row.reshape(expert_ids.shape))

    def in_use(self) -> Int32[Array, "I"]:
        """The expert of each tile, -1 beyond those in use."""
        return jnp.where(jnp.arange(len(self.expert), dtype=jnp.int32) < self.used, self.expert, -1)

    def gather(self, x: Float[Array, "T D"]) -> Float[Array, "IM D"]:
        """Each row's token; 0 in an empty row."""
        token = jnp.where(self.assignment < 0, x.shape[0], self.assignment // self.row.shape[1])
        return x.at[token].get(mode="fill", fill_value=0)

    def combine(self, y: Float[Array, "IM D"], routing_weights: Float[Array, "T X"]) -> Float[Array, "T D"]:
        """See `combine`."""
        return combine(y, self.row, routing_weights)


class TokenTiles(NamedTuple):
    """Tiles of few tokens, at most M: each tile holds all of them, and who is not assigned to its expert is not read.

    So nothing is sorted, counted or gathered: a tile for each assignment, empty where an expert has one already.

    Example: tokens assigned to experts (0, 2) and (2, -1), tiles of four rows. Tile 0 is of expert 0, tile 1 of expert
    2 with both tokens, tiles 2 and 3 are of none: expert = [0, 2, -1, -1], row = [[0, 4], [5, 16]].
    """

    rows: int  # M
    expert: Int32[Array, "I"]  # of each tile, I = T X; no expert's number: an empty tile
    row: Int32[Array, "T X"]  # where each assignment is; I M for a skipped one

    @classmethod
    def of(cls, expert_ids: Int32[Array, "T X"], num_experts: int, rows: int) -> "TokenTiles":
        """Lays out; of one token, whose assignments are the tiles, nothing is computed but `row`."""
        tokens, count = expert_ids.shape[0], expert_ids.size
        flat, tile = expert_ids.reshape(-1), jnp.arange(count, dtype=jnp.int32)
        first = tile  # of its expert's assignments
        if tokens > 1:
            first = jnp.min(jnp.where(flat == flat[:, None], tile, count), axis=1)
        row = first * rows + tile // expert_ids.shape[1]
        row = jnp.where((flat >= 0) & (flat < num_experts), row, count * rows)
        expert = flat if tokens == 1 else jnp.where(first == tile, flat, -1)
        return cls(rows, expert, row.reshape(expert_ids.shape))

    def in_use(self) -> Int32[Array, "I"]:
        """The expert of each tile; no expert's number where the tile is empty."""
        return self.expert

    def gather(self, x: Float[Array, "T D"]) -> Float[Array, "M D"]:
        """The rows of any tile."""
        return jnp.pad(x, ((0, self.rows - x.shape[0]), (0, 0)))

    def combine(self, y: Float[Array, "IM D"], routing_weights: Float[Array, "T X"]) -> Float[Array, "T D"]:
        """See `combine`."""
        return combine(y, self.row, routing_weights)


def combine(
    y: Float[Array, "IM D"], row: Int32[Array, "T X"], routing_weights: Float[Array, "T X"]
) -> Float[Array, "T D"]:
    """Each token's assignments, at `row`, weighted and summed in float32; what empty rows hold is not read."""
    assigned = y.at[row].get(mode="fill", fill_value=0).astype(jnp.float32)
    return jnp.sum(assigned * routing_weights.astype(jnp.float32)[..., None], axis=1)


def max_tiles(num_assignments: int, num_experts: int, rows: int) -> int:
    """The most tiles that `num_assignments` can need: each expert in use leaves at most rows - 1 rows empty."""
    return (num_assignments + min(num_assignments, num_experts) * (rows - 1)) // rows


def tile_rows(num_assignments: int, num_experts: int, fewest: int = 1, most: int = MAX_TILE_ROWS) -> int:
    """Rows per tile: a power of two near the mean run of an expert, so that few rows are padding."""
    mean = max(1, num_assignments // num_experts)
    return min(most, max(fewest, 1 << (mean - 1).bit_length()))
