"""A step's operations in the order of the schedule, each with the least time that a chip's published rates allow it.

Predicted, not measured: an operation takes the larger of its products and its bytes, a collective its bytes over all
links. Launches, latency and caches take time on top, and a device may do two things at once.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gptoss_jax.hlo.operations import Operation
from gptoss_jax.planner.chips import Chip

BAR = 30
SMALL = 0.02  # of a layer's time: operations below it share a line


class Row(NamedTuple):
    """One line of a timeline: an operation, or small ones of the same place that follow one another.

    Attributes:
        layer: its number; None: beside the layers.
        part: named scope.
        what: kind and name.
        times: operations.
        flops: of all.
        bytes: read and written by all.
        sent_bytes: by all.
        seconds: predicted; None: the chip has no published rates.
        bound: compute, memory or interconnect.
    """

    layer: int | None
    part: str
    what: str
    times: int
    flops: float
    bytes: float
    sent_bytes: float
    seconds: float | None
    bound: str


def rows(operations: Iterable[Operation], chip: Chip) -> list[Row]:
    """A row for each run of operations that are alike in place, kind and name."""
    found: list[Row] = []
    for each in operations:
        row = _row(each, chip)
        last = found[-1] if found else None
        if last is not None and last[:3] == row[:3]:
            found[-1] = _together([last, row])
        else:
            found.append(row)
    return found


def _row(each: Operation, chip: Chip) -> Row:
    flops, moved, sent = (each.times * value for value in (each.flops, each.bytes, each.sent_bytes))
    what = each.name if each.kind in ("collective", each.name) else f"{each.kind} {each.name}".strip()
    seconds, bound = _seconds(flops, moved, sent, chip)
    return Row(each.scope.layer, each.scope.part, what, each.times, flops, moved, sent, seconds, bound)


def _seconds(flops: float, moved: float, sent: float, chip: Chip) -> tuple[float | None, str]:
    if chip.flops is None or chip.hbm_bytes is None or chip.link_bytes is None:
        return None, "interconnect" if sent else "-"
    times = {
        "compute": flops / (chip.flops / chip.devices),
        "memory": moved / (chip.hbm_bytes / chip.devices),
        "interconnect": sent / (chip.link_bytes / chip.devices),
    }
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def _together(those: Sequence[Row]) -> Row:
    first = those[0]
    seconds = [row.seconds for row in those if row.seconds is not None]
    largest = max(those, key=lambda row: row.seconds or 0.0)
    return first._replace(
        times=sum(row.times for row in those),
        flops=sum(row.flops for row in those),
        bytes=sum(row.bytes for row in those),
        sent_bytes=sum(row.sent_bytes for row in those),
        seconds=sum(seconds) if seconds else None,
        bound=largest.bound,
    )


class Block(NamedTuple):
    """Rows of one place that follow one another, and the layers that have the same.

    Attributes:
        layers: those that are alike; empty: beside the layers.
        rows: of each.
    """

    layers: list[int]
    rows: list[Row]

    @property
    def seconds(self) -> float:
        """Of one of the layers; 0: the chip has no rates."""
        return sum(row.seconds or 0.0 for row in self.rows)

    @property
    def weight(self) -> float:
        """What a bar's length is of: seconds, or bytes where there are none."""
        return self.seconds or sum(row.bytes + row.sent_bytes for row in self.rows)


def blocks(found: Sequence[Row]) -> list[Block]:
    """The rows by layer, in order; layers that do the same stand once, where the first of them stands.

    What XLA has moved beside a layer (a copy, the head of a loop) stands before the first layer or after the last.
    """
    of_layer: dict[int, list[Row]] = {}
    for row in found:
        if row.layer is not None:
            of_layer.setdefault(row.layer, []).append(row._replace(layer=0))
    grouped: list[Block] = []
    for layer, those in of_layer.items():
        short = _without_small(those)
        same = next((block for block in grouped if _alike(block.rows, short)), None)
        if same:
            same.layers.append(layer)
        else:
            grouped.append(Block([layer], short))
    first = next((i for i, row in enumerate(found) if row.layer is not None), len(found))
    beside = [row for row in found[:first] if row.layer is None], [row for row in found[first:] if row.layer is None]
    before, after = (_without_small(those) for those in beside)
    return [*([Block([], before)] if before else []), *grouped, *([Block([], after)] if after else [])]


def _alike(one: Sequence[Row], other: Sequence[Row]) -> bool:
    """Whether two layers do the same: the same large operations, of the same size."""
    main = [
        [(row.part, row.what, row.flops, row.sent_bytes) for row in those if row.what != OTHERS]
        for those in (one, other)
    ]
    return main[0] == main[1]


OTHERS = "small ones"


def _without_small(those: Sequence[Row]) -> list[Row]:
    """The rows in order, with those that take little in one row at each place."""
    weights = [(row.seconds if row.seconds is not None else row.bytes + row.sent_bytes) for row in those]
    least = SMALL * sum(weights)
    found: list[Row] = []
    for row, weight in zip(those, weights, strict=True):
        if weight >= least or row.sent_bytes:
            found.append(row)
        elif found and found[-1].what == OTHERS and found[-1].part == row.part:
            found[-1] = _together([found[-1], row])
        else:
            found.append(row._replace(what=OTHERS))
    return found


def total_seconds(found: Iterable[Row]) -> float | None:
    """Of all rows, one after the other; None: the chip has no published rates."""
    seconds = [row.seconds for row in found]
    return None if None in seconds else sum(second or 0.0 for second in seconds)
