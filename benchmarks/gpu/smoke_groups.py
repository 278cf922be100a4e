"""Which forms of the kernels smoke looks at, in which groups: sizes alone, without JAX, as the driver needs them.

A group is a process of its own: a kernel that hangs or ends it takes no other with it. The sizes are those at which an
op takes another form: rows per tile of 8, 16, 32, 64 and 128, and up to 8 tokens, which share tiles; one split of a
sequence's keys and many, merged in float32; three and four tiles under way; a ring that has gone round, a page that is
not full.
"""

from typing import Any, NamedTuple


class Case(NamedTuple):
    """A check and its sizes: a function of that name in `smoke.CHECKS`."""

    check: str
    sizes: dict[str, Any]


def _exact(*rows: int, scales: tuple[int, int] = (2, 250), **others: Any) -> list[Case]:
    return [Case("exact", {"rows": each, "scales": scales, **others}) for each in rows]


def _experts(*tokens: int, **others: Any) -> list[Case]:
    return [Case("experts", {"tokens": each, **others}) for each in tokens]


def _paged(lengths: list[int], tokens: int, **others: Any) -> Case:
    return Case("paged", {"lengths": lengths, "tokens": tokens, **others})


def _windowed(lengths: list[int], tokens: int) -> Case:
    return Case("windowed", {"lengths": lengths, "tokens": tokens})


def _placed(positions: list[int], **others: Any) -> Case:
    return Case("placed", {"positions": positions, **others})


_MIXED = [700 + 13 * i for i in range(64)]
TRUE = {
    "model": [Case("model", {})],
    "model_graphs": [Case("model", {})],
    "model_launches": [Case("model", {})],
    "exact8": [*_exact(8), *_exact(8, scales=(118, 124)), *_exact(8, scales=(127, 131))],  # 128: where a branch begins
    "exact16_32": _exact(16, 32),
    "exact64_128": _exact(64, 128),
    "gated": [Case("gated", {"rows": rows}) for rows in (8, 32, 128)],
    "experts8": [*_experts(1, 2, 8, 9, 67), *_experts(64, skew=True)],
    "experts_more": [*_experts(100, 200, 512), *_experts(1100, skew=True)],
    "experts120": _experts(1, 64, num_experts=128),
    "experts120_prefill": _experts(4200, num_experts=128),
    "experts_float32": _experts(3, 300, dtype="float32"),
    "paged_decode": [
        _paged([1], 1),
        _paged([64], 1),
        _paged([65, 300, 4000], 1),
        _paged([9000], 1, table=2048),
        _paged([131072], 1),
        _paged([700 + 3000 * i for i in range(8)], 1, table=512),
        _paged(_MIXED, 1),
    ],
    "paged_prefill": [
        _paged([7, 200], 7),
        _paged([9000], 16),
        _paged([3000], 17),
        _paged([2048], 2048),
        _paged([6000, 700], 512),
        _paged([40000], 128, table=2048),
    ],
    "windowed": [
        _windowed([1], 1),
        _windowed([128, 129, 5000], 1),
        _windowed([200], 200),
        _windowed([5000, 300], 130),
        _windowed([4000], 2048),
        _windowed([300 + i for i in range(64)], 1),
    ],
    "placed": [
        _placed([0, 63, -1, 64, 4000]),
        _placed(_MIXED),
        _placed([5, 127, -1, 128, 9000], ring=True),
        _placed(_MIXED, ring=True),
    ],
}
TOY = {  # the same checks where an interpreter takes a second for a call
    "model": [Case("model", {})],
    "model_graphs": [Case("model", {})],
    "model_launches": [Case("model", {})],
    "exact8": _exact(8, columns=24),
    "gated": [Case("gated", {"rows": 8, "columns": 24})],
    "experts8": _experts(3, skew=True),
    "paged_decode": [_paged([65, 300], 1, table=40)],
    "windowed": [_windowed([129], 1)],
    "placed": [_placed([65, -1]), _placed([129], ring=True)],
}
GROUPS = {"true": TRUE, "toy": TOY}
UNTUNED, NO_GRAPHS = "--xla_gpu_autotune_level=0", "--xla_gpu_enable_command_buffer="
XLA_FLAGS = {"model_graphs": UNTUNED, "model_launches": f"{UNTUNED} {NO_GRAPHS}"}
"""What XLA is told for a group. These two must draw the same tokens, as CUDA graphs and launch by launch: neither may
choose products by their speed, which is another choice, and another rounding, from run to run.
"""
