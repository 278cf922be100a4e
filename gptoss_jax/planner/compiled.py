"""A plan's programs as a compiler makes them, on the slice's own compiler or XLA's for CPUs, beside the closed form.

Compiles both programs of an engine of shapes alone. Where the compiler of a slice is not installed, XLA for CPUs cuts
the same program for as many simulated devices: its collectives are those of the partitioner, its kernels are in C++.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from gptoss_jax.errors import GptossError
from gptoss_jax.planner import compiled_collectives, plan
from gptoss_jax.planner.chips import CHIPS, Slice
from gptoss_jax.planner.collectives import Collective
from gptoss_jax.planner.plan import Plan, Request, in_gib
from gptoss_jax.runtime import compile_only

if TYPE_CHECKING:
    from gptoss_jax.runtime.lowered import LoweredStep

STEPS = ("decode", "prefill")
_INT32 = 4
ALIKE = 0.01  # relative: smaller differences are not said


class Compiler(NamedTuple):
    """What compiles for a slice here.

    Attributes:
        slice: that is compiled for: the one asked for, or as many simulated CPU devices.
        said: which, and why, in words.
    """

    slice: Slice
    said: str


class Figure(NamedTuple):
    """One figure of a program, compiled and in closed form."""

    name: str
    unit: str  # bytes, flops or a count
    compiled: float
    closed_form: float | None  # None: it has none

    @property
    def ratio(self) -> float | None:
        """Compiled, of the closed form."""
        return self.compiled / self.closed_form if self.closed_form else None

    @property
    def differs(self) -> bool:
        """Whether by more than ALIKE."""
        return self.closed_form is not None and abs(self.compiled - self.closed_form) > ALIKE * abs(self.closed_form)


def compiler(request: Request) -> Compiler:
    """The vendor's where it is installed; else XLA's for CPUs."""
    given = request.slice
    if given.chip.platform == "cpu":
        return Compiler(given, f"compiled by XLA for {given.devices} simulated CPU devices; nothing was run")
    absent = compile_only.missing(given.chip.platform)
    if absent is None:
        return Compiler(given, f"compiled by the compiler for {given.chip.name}; nothing was run")
    simulated = Slice(f"cpu:{given.devices}", CHIPS["cpu"], given.devices)
    return Compiler(simulated, f"compiled by XLA for {given.devices} simulated CPU devices ({absent}); nothing was run")


def of_layers(request: Request, layers: int | None) -> Request:
    """The request with the model's first `layers` only; None: all.

    Raises:
        GptossError: the model has fewer, or none are left.
    """
    most = request.config.num_layers
    if layers is None:
        return request
    if not 1 <= layers <= most:
        raise GptossError(f"--layers is {layers}, expected 1 to {most}, which the model has")
    return request._replace(config=dataclasses.replace(request.config, num_layers=layers))


def lower(request: Request, where: Compiler, step: str) -> "LoweredStep":
    """One program of the request, lowered for `where`; JAX starts here.

    Raises:
        GptossError: the compiler has no such slice, or a kernel cannot run there.
    """
    compile_only.prepare(where.slice.devices)
    from gptoss_jax.runtime import lowered
    from gptoss_jax.runtime.lowering import StepShape

    workload = request.workload
    width = 1 if step == "decode" else workload.prefill_tokens
    shape = StepShape(workload.slots, workload.context_tokens, width)
    target = compile_only.target(where.slice.name, where.slice.devices)
    return lowered.on_target(request.config, request.mesh, shape, target)


def closed_form(request: Request, where: Compiler) -> Plan:
    """The plan of what is compiled: of simulated devices where those are, so that like is compared with like."""
    return plan.make(request._replace(slice=where.slice))


def figures(found: "LoweredStep", planned: Plan) -> list[Figure]:
    """What both say of one program."""
    width = found.shape.width
    work = planned.decode_work if width == 1 else planned.prefill_work
    memory = found.memory
    chip = planned.request.slice.chip
    temporaries = planned.memory.program_bytes(width) - planned.memory.arguments
    arguments = planned.memory.arguments + _asked_bytes(planned.request, width)
    sent = [each for each in collectives(found) if each.where in ("embedding", "attention", "experts")]
    said = [each for each in work.collectives if each.where != "sampling"]
    read = sum(each.times * each.bytes for each in found.operations)
    return [
        Figure("arguments", "bytes", memory.argument_bytes, arguments),
        Figure("temporaries", "bytes", memory.temporary_bytes, None if chip.platform == "cpu" else temporaries),
        Figure("results beside arguments", "bytes", memory.output_bytes, None),
        Figure("operations", "flops", sum(found.flops.values()), work.flops),
        Figure("read and written", "bytes", read, work.hbm_bytes),
        Figure("sums of the model", "count", sum(each.arrays for each in sent), sum(each.arrays for each in said)),
        Figure("their bytes", "bytes", sum(e.total_bytes for e in sent), sum(e.total_bytes for e in said)),
        Figure("launches", "count", found.launches, work.launches if width == 1 else None),
    ]


def _asked_bytes(request: Request, width: int) -> int:
    """Of what a program is asked, beside what it holds: how many steps; or chunks, their lengths, tokens to draw."""
    slots = request.workload.slots // request.mesh.size("batch")
    return _INT32 * (1 if width == 1 else slots * (width + 2))


def collectives(found: "LoweredStep") -> list[Collective]:
    """Of a compiled program, as the planner counts them."""
    return compiled_collectives.counted(found.collectives, found.module.entry)


def differences(found: "LoweredStep", planned: Plan) -> tuple[list[Collective], list[Collective]]:
    """Collectives that only the compiled program has, and those that only the closed form has."""
    work = planned.decode_work if found.shape.width == 1 else planned.prefill_work
    compiled, said = set(collectives(found)), set(compiled_collectives.planned(work.collectives))
    return sorted(compiled - said), sorted(said - compiled)


# ---- as people read it ----


def text(step: str, found: "LoweredStep", planned: Plan) -> Iterator[str]:
    """The figures of one program, and the collectives in which compiler and closed form differ."""
    name = "decoding step" if step == "decode" else "prefill chunk"
    yield f"{name:28}{'compiled':>16}{'closed form':>16}{'ratio':>8}"
    for each in figures(found, planned):
        ratio = f"{each.ratio:8.3f}" if each.ratio is not None else f"{'-':>8}"
        mark = "  differs" if each.differs else ""
        both = "".join(f"{_size(value, each.unit):>16}" for value in (each.compiled, each.closed_form))
        yield f"  {each.name:26}{both}{ratio}{mark}"
    only_compiled, only_planned = differences(found, planned)
    if not only_compiled and not only_planned:
        yield "  collectives: the same on both sides, sampling too"
    for side, those in (("only compiled", only_compiled), ("only in closed form", only_planned)):
        for each in those:
            size = f"{each.arrays} x {each.bytes:,} B over {each.devices}"
            yield f"  {side}: {each.kind} {each.where}, {size}, {each.when}"


def _size(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "bytes":
        return in_gib(value) if value >= 1 << 20 else f"{value:,.0f} B"
    return f"{value / 1e9:,.3f} GFLOP" if unit == "flops" else f"{value:,.0f}"


def to_json(found: "LoweredStep", planned: Plan) -> dict[str, Any]:
    """The same for scripts."""
    only_compiled, only_planned = differences(found, planned)
    return {
        "figures": [{**each._asdict(), "ratio": each.ratio} for each in figures(found, planned)],
        "flops_by_scope": found.flops,
        "only_compiled": [each._asdict() for each in only_compiled],
        "only_closed_form": [each._asdict() for each in only_planned],
    }
