"""What `--show` prints of a compiled program: collectives, shardings, memory, operations by scope, timeline, text.

What layers have alike stands once, with the layers' numbers.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gptoss_jax.planner import compiled_collectives, drawing, timeline
from gptoss_jax.planner.chips import Chip
from gptoss_jax.planner.plan import in_gib

if TYPE_CHECKING:
    from gptoss_jax.runtime.lowered import LoweredStep

BUFFERS = 20  # of memory's table
_LAYER = re.compile(r"layers/(\d+)(?=/|$)|(?<=cache[./][kv]/)(\d+)$|(?<=layer_)(\d+)")


class Shown(NamedTuple):
    """One section: as people read it, and as scripts do."""

    lines: list[str]
    json: Any


def collectives(found: "LoweredStep", chip: Chip) -> Shown:
    """Each array that is sent: kind, bytes, devices, layer, operation, when it runs, and the line of source."""
    del chip
    rows: dict[tuple[Any, ...], list[int | None]] = {}
    entry = found.module.entry
    for each in found.collectives:
        when = compiled_collectives.as_planned(each, entry).when
        key = (each.kind, each.bytes, each.devices, each.scope.part, each.scope.op, when, each.source)
        rows.setdefault(key, []).append(each.scope.layer)
    lines = [
        f"{'collective':17}{'bytes':>12}{'over':>5}{'times':>6}  {'layers':10}{'part':12}{'operation':16}when, source"
    ]
    json = []
    for (kind, size, devices, part, op, when, source), layers in rows.items():
        lines.append(
            f"{kind:17}{size:12,}{devices:5}{len(layers):6}  {ranges(layers):10}{part:12}{_end(op):16}{when}; {source}"
        )
        fields = {"kind": kind, "bytes": size, "devices": devices, "part": part, "operation": op, "when": when}
        json.append(
            {**fields, "source": source, "layers": [each for each in layers if each is not None], "times": len(layers)}
        )
    if not rows:
        lines = ["no collectives: each device works by itself"]
    return Shown(lines, json)


def ranges(layers: Iterable[int | None]) -> str:
    """Numbers of layers as 0-3,8; "-": none."""
    numbers = sorted({each for each in layers if each is not None})
    if not numbers:
        return "-"
    parts: list[list[int]] = []
    step = 2 if len(numbers) > 1 and numbers[1] - numbers[0] == 2 else 1
    for number in numbers:
        if parts and number == parts[-1][-1] + step:
            parts[-1].append(number)
        else:
            parts.append([number])
    said = ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"{said} by 2" if step == 2 and any(len(part) > 1 for part in parts) else said


def _end(op: str) -> str:
    """The operation's own name, without scopes, for a table."""
    return re.sub(r"[()]", "", op).split("/")[-1].split(":")[0][:15] or "-"


def shardings(found: "LoweredStep", chip: Chip) -> Shown:
    """Each argument's shape, axes and part of a device, as compiled; then each way of cutting, drawn."""
    del chip
    rows: dict[tuple[Any, ...], list[Any]] = {}
    for leaf in found.shardings:
        pattern = _pattern(leaf.path)
        rows.setdefault((pattern, leaf.dtype, leaf.shape, leaf.spec, leaf.shard_shape), []).append(leaf)
    lines = [f"{'argument':46}{'dtype':10}{'shape':22}{'of a device':22}{'bytes':>12}  cut by"]
    json = []
    for (pattern, dtype, shape, _, shard), leaves in rows.items():
        many = f"{pattern} x {len(leaves)}" if len(leaves) > 1 else pattern
        size = leaves[0].shard_bytes
        lines.append(f"{many:46}{dtype:10}{_shape(shape):22}{_shape(shard):22}{size:12,}  {_spec(leaves[0])}")
        json += [{**leaf._asdict(), "spec": [*map(str, leaf.spec)], "sharding": _spec(leaf)} for leaf in leaves]
    drawn: dict[str, Any] = {}
    for leaves in rows.values():
        if leaves[0].path.startswith("params/") and _spec(leaves[0]) != "whole":
            drawn.setdefault(re.sub(r"axis \d+", "", _spec(leaves[0])), leaves[0])
    for leaf in drawn.values():
        lines += ["", f"{_pattern(leaf.path)} {_shape(leaf.shape)}, {_spec(leaf)}:"]
        lines += drawing.drawn(leaf.shape, leaf.sharding).splitlines()
    return Shown(lines, json)


def _pattern(path: str) -> str:
    return _LAYER.sub(lambda found: found[0].rstrip("0123456789") + "*", path)


def _shape(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape)) or "a number"


def _spec(leaf: Any) -> str:
    """Which axes are cut, and by which mesh axes."""
    said = []
    for axis, mesh_axes in enumerate(leaf.spec):
        names = mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)
        cut = [
            f"{name}={leaf.sharding.mesh.shape[name]}" for name in names if name and leaf.sharding.mesh.shape[name] > 1
        ]
        if cut:
            said.append(f"axis {axis} by {'*'.join(cut)}")
    return ", ".join(said) or "whole"


def memory(found: "LoweredStep", chip: Chip) -> Shown:
    """The compiler's own count, and the largest buffers that are alive when it takes most."""
    total = found.memory
    buffers = found.buffers
    rows: dict[tuple[Any, ...], list[int]] = {}
    for each in buffers:
        rows.setdefault((_pattern(each.what), each.type, each.is_argument), []).append(each.bytes)
    ordered = sorted(rows.items(), key=lambda row: -sum(row[1]))
    parts = (("arguments", total.argument_bytes), ("results beside them", total.output_bytes))
    lines = [f"{name:24}{in_gib(size):>14}" for name, size in (*parts, ("temporaries", total.temporary_bytes))]
    share = f", {total.total_bytes / chip.memory_bytes:.0%} of {in_gib(chip.memory_bytes)}" if chip.memory_bytes else ""
    lines += [f"{'in all':24}{in_gib(total.total_bytes):>14}{share}", ""]
    lines.append(f"{'alive at the peak':60}{'type':26}{'each':>14}{'count':>6}{'together':>14}")
    for (what, kind, is_argument), sizes in ordered[:BUFFERS]:
        name = what if is_argument else f"(temporary) {re.sub(r'^jit.(decode|prefill)./(while/body/)?', '', what)}"
        lines.append(f"{name[:59]:60}{kind[:25]:26}{in_gib(max(sizes)):>14}{len(sizes):6}{in_gib(sum(sizes)):>14}")
    if len(ordered) > BUFFERS:
        rest = sum(sum(sizes) for _, sizes in ordered[BUFFERS:])
        lines.append(f"{f'{len(ordered) - BUFFERS} more':60}{'':26}{'':14}{'':6}{in_gib(rest):>14}")
    if not any(not buffer.is_argument for buffer in buffers):
        lines.append("this compiler does not say which temporaries are alive")
    json = {**total._asdict(), "total_bytes": total.total_bytes, "buffers": [buffer._asdict() for buffer in buffers]}
    return Shown(lines, json)


def flops(found: "LoweredStep", chip: Chip) -> Shown:
    """Operations of a device by named scope; products of XLA counted, those of kernels by the model's formula."""
    del chip
    total = sum(found.flops.values())
    lines = [f"{'named scope':24}{'operations':>18}{'share':>8}"]
    for part, count in sorted(found.flops.items(), key=lambda item: -item[1]):
        lines.append(f"  {part:22}{count / 1e9:12,.3f} GFLOP{count / total:8.1%}")
    lines.append(f"  {'in all':22}{total / 1e9:12,.3f} GFLOP")
    lines.append("products counted from the compiled program; inside kernels by formula, tokens drawing experts evenly")
    return Shown(lines, found.flops)


def timeline_of(found: "LoweredStep", chip: Chip) -> Shown:
    """Operations and collectives in the order of the schedule, with times that the chip's published rates allow."""
    rows = timeline.rows(found.operations, chip)
    blocks = timeline.blocks(rows)
    seconds = timeline.total_seconds(rows)
    basis = f"roofline of {chip.name}" if seconds is not None else f"no times, bars of bytes: {chip.source}"
    lines = [
        f"PREDICTED, not measured: {basis}",
        f"{'us':>9}  {'part':12}{'operation':34}{'times':>6}{'MiB':>10}{'GFLOP':>9}  bound by",
    ]
    most = max((_weight(row) for block in blocks for row in block.rows), default=0.0)
    for block in blocks:
        many = f"each of layers {ranges(block.layers)}" if len(block.layers) > 1 else f"layer {ranges(block.layers)}"
        where = many if block.layers else "beside the layers"
        lines.append(f"{where}{f': {1e6 * block.seconds:,.1f} us' if seconds is not None else ''}")
        lines += [_line(row, most) for row in block.rows]
    if seconds is not None:
        lines.append(f"one after the other: {1e6 * seconds:,.1f} us, at least, without launches and latency")
    json = {"measured": False, "basis": basis, "seconds": seconds, "rows": [row._asdict() for row in rows]}
    return Shown(lines, json)


def _weight(row: timeline.Row) -> float:
    return row.seconds if row.seconds is not None else row.bytes + row.sent_bytes


def _line(row: timeline.Row, most: float) -> str:
    bar = "#" * round(timeline.BAR * _weight(row) / most) if most else ""
    us = f"{1e6 * row.seconds:9.1f}" if row.seconds is not None else f"{'-':>9}"
    moved = (row.bytes + row.sent_bytes) / 2**20
    return f"{us}  {row.part:12}{row.what[:33]:34}{row.times:6}{moved:10.3f}{row.flops / 1e9:9.3f}  {row.bound:13}{bar}"


def hlo(found: "LoweredStep", chip: Chip) -> Shown:
    """The compiled program itself."""
    del chip
    return Shown(found.text.rstrip("\n").splitlines(), found.text)


SECTIONS: dict[str, Callable[["LoweredStep", Chip], Shown]] = {
    "collectives": collectives,
    "sharding": shardings,
    "memory": memory,
    "flops": flops,
    "timeline": timeline_of,
    "hlo": hlo,
}


def section_names(asked: Sequence[str]) -> Iterator[str]:
    """Those that are asked for, once each, in their order of asking."""
    yield from dict.fromkeys(name.strip() for name in asked)
