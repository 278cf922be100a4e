"""Two plans side by side: what differs, and which of the logical axes is cut otherwise."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from gptoss_jax.planner import report
from gptoss_jax.planner.plan import Plan, in_gib
from gptoss_jax.planner.report import PARTS

_EVERY = ("batch", "heads", "experts", "expert_hidden", "vocab", "positions")
ALIKE = 0.005  # relative: smaller differences are not said


class Row(NamedTuple):
    """One figure of two plans, and the logical axes that it follows from."""

    name: str
    values: tuple[int | float, int | float]
    unit: str
    logical: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether by more than ALIKE."""
        a, b = self.values
        return abs(a - b) > ALIKE * max(abs(a), abs(b))


def rows(a: Plan, b: Plan) -> list[Row]:
    """All figures of two plans on one slice."""
    return [
        Row(name, (one, other), unit, logical)
        for (name, one, unit, logical), (_, other, _, _) in zip(_figures(a), _figures(b), strict=True)
    ]


def _figures(plan: Plan) -> Iterator[tuple[str, int | float, str, tuple[str, ...]]]:
    """Name, value, unit and the logical axes that it follows from."""
    for part, (name, logical) in PARTS.items():
        yield name, getattr(plan.memory, part), "bytes", logical
    yield "in all", plan.memory.total, "bytes", _EVERY
    for name, step in (("decoding", plan.decode), ("prefill", plan.prefill)):
        if step is not None:
            for part in ("compute", "memory", "interconnect"):
                yield f"{name}: {part}", getattr(step, part), "seconds", _EVERY
            yield f"{name}: at least", step.seconds, "seconds", _EVERY
    yield "decoding: collectives", sum(each.arrays for each in plan.decode_work.always), "", _EVERY
    yield "decoding: sent to others", plan.decode_work.sent_bytes, "bytes", _EVERY
    if plan.decode is not None:
        yield "tokens/s of each user", plan.tokens_per_second_per_user, "", _EVERY
        yield "tokens/s of each chip", plan.tokens_per_second_per_chip, "", _EVERY


def text(a: Plan, b: Plan) -> str:
    """A table of what differs, with the reason, and what is alike below it."""
    return "\n".join(_lines(a, b))


def _lines(a: Plan, b: Plan) -> Iterator[str]:
    yield f"{a.request.model} on {a.request.slice.name}, batch {a.request.workload.slots}"
    yield f"  A: {a.request.mesh}"
    yield f"  B: {b.request.mesh}"
    for plan, name in ((a, "A"), (b, "B")):
        if not plan.fits:
            yield f"  {name} does not fit: {in_gib(plan.memory.total)} of {in_gib(plan.capacity)} on each device"
    found = rows(a, b)
    different = [row for row in found if row.differs]
    yield ""
    yield f"{'of each device':28}{'A':>14}{'B':>14}{'B / A':>8}  since"
    for row in different:
        ratio = f"{row.values[1] / row.values[0]:.2f}" if row.values[0] else "-"
        shown = "".join(f"{_value(value, row.unit):>14}" for value in row.values)
        yield f"{row.name:28}{shown}{ratio:>8}  {reason(a, b, row)}"
    alike = [row.name for row in found if not row.differs and any(row.values)]
    yield f"alike: {', '.join(alike) or 'nothing'}"


def _value(value: int | float, unit: str) -> str:
    if unit == "bytes":
        return in_gib(value)
    return f"{1e3 * value:,.3f} ms" if unit == "seconds" else f"{value:,.1f}".removesuffix(".0")


def reason(a: Plan, b: Plan, row: Row) -> str:
    """Which of the axes that a figure follows from are cut into other numbers of shards; or what else differs."""
    sizes = {name: (a.request.mesh.size(name), b.request.mesh.size(name)) for name in row.logical}
    changed = [f"{name} / {one} -> / {other}" for name, (one, other) in sizes.items() if one != other]
    exchanges = a.request.mesh.exchange_name, b.request.mesh.exchange_name
    if "expert_hidden" in row.logical and exchanges[0] != exchanges[1]:
        changed.append("exchange {} -> {}".format(*exchanges))
    return ", ".join(changed) or "the same axes over other devices"


def to_json(a: Plan, b: Plan) -> dict[str, Any]:
    """Both plans, and a line for each figure."""
    figures = [
        {"name": row.name, "a": row.values[0], "b": row.values[1], "unit": row.unit, "since": reason(a, b, row)}
        for row in rows(a, b)
    ]
    return {"a": report.to_json(a), "b": report.to_json(b), "figures": figures}
