"""All meshes of a slice, planned and ranked; those that no other beats both ways; and what to take in place of one.

Knows no JAX.
"""

import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence

from gptoss_jax.files import of_configs
from gptoss_jax.model.mesh import RULES, MeshError, MeshShape, read
from gptoss_jax.planner import plan as plans
from gptoss_jax.planner.plan import GIB, Plan, PlanError, Request

NAMED = 3  # of the meshes that would do
COLUMNS = (
    "rank", "pareto", "mesh", "batch", "context", "tokens_per_second_per_chip", "tokens_per_second_per_user",
    "prefill_tokens_per_second_per_chip", "bound", "step_ms", "compute_ms", "memory_ms", "interconnect_ms",
    "collectives", "sent_mib", "weights_gib", "kv_cache_gib", "total_gib", "capacity_gib",
)  # fmt: skip


def meshes(devices: int) -> Iterator[MeshShape]:
    """Every mesh of so many devices: all sizes of its axes, each by every set of `_rules`.

    Where each device has slots and they share experts (attention data-parallel), both exchanges that this allows.
    """
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    for data, expert, tensor in itertools.product(sizes, repeat=3):
        if devices % (data * expert * tensor):
            continue
        axes = {"data": data, "expert": expert, "tensor": tensor, "sequence": devices // (data * expert * tensor)}
        for rules in _rules(axes):
            yield MeshShape(axes, {**RULES, **rules})
        if data > 1 and expert == 1:
            for exchange in ("gather", "all_to_all"):
                yield MeshShape(axes, {**RULES, "experts": ("data",)}, exchange)


def _rules(axes: Mapping[str, int]) -> Iterator[dict[str, tuple[str, ...]]]:
    """Heads over tensor, or over expert and tensor; experts over the devices of positions too, or whole on each."""
    for heads in ({}, {"heads": ("expert", "tensor")})[: 1 + (axes["expert"] > 1)]:
        yield heads
        if axes["sequence"] > 1:
            yield {**heads, "experts": ("expert", "sequence")}


def sweep(requests: Sequence[Request]) -> list[Plan]:
    """The plans of those requests that fit and come out even, the most tokens a second of each chip first."""
    found = []
    for request in requests:
        try:
            plan = plans.make(request)
        except (MeshError, PlanError):
            continue
        if plan.fits:
            found.append(plan)
    return sorted(found, key=_merit)


def _merit(plan: Plan) -> tuple[int | float, ...]:
    """Fastest first; where no rate is known, or two are alike, what sends and holds least."""
    speed = plan.tokens_per_second_per_chip, plan.tokens_per_second_per_user
    return -speed[0], -speed[1], plan.decode_work.sent_bytes, plan.memory.total


def requests(request: Request, batches: Sequence[int], contexts: Sequence[int]) -> list[Request]:
    """`request` on every mesh of its slice, with each batch and context."""
    return [
        request._replace(
            mesh=mesh,
            workload=request.workload._replace(
                slots=batch, context_tokens=context, prefill_tokens=min(request.workload.prefill_tokens, context)
            ),
        )
        for mesh, batch, context in itertools.product(meshes(request.slice.devices), batches, contexts)
    ]


def pareto(found: Sequence[Plan]) -> set[int]:
    """Places in `found` of the plans that no other of the same context beats in both speeds; of equals the first."""
    best: dict[int, float] = {}
    front = set()
    order = sorted(
        range(len(found)), key=lambda i: (-found[i].tokens_per_second_per_chip, -found[i].tokens_per_second_per_user, i)
    )
    for i in order:
        context, speed = found[i].request.workload.context_tokens, found[i].tokens_per_second_per_user
        if speed > best.get(context, 0.0):
            best[context] = speed
            front.add(i)
    return front


def to_csv(found: Sequence[Plan]) -> str:
    """A line for each plan, in COLUMNS."""
    front = pareto(found)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for i, plan in enumerate(found):
        writer.writerow(row(plan, i + 1, i in front).values())
    return out.getvalue()


def row(plan: Plan, rank: int, in_front: bool) -> dict[str, object]:
    """The values of COLUMNS; None where a chip has no published rates."""
    decode, memory, workload = plan.decode, plan.memory, plan.request.workload

    def milliseconds(seconds: float | None) -> float | None:
        return None if seconds is None else round(1e3 * seconds, 4)

    times = (decode.seconds, decode.compute, decode.memory, decode.interconnect) if decode else (None,) * 4
    speeds = (
        plan.tokens_per_second_per_chip,
        plan.tokens_per_second_per_user,
        plan.prefill_tokens_per_second_per_chip,
    )
    values = [
        rank,
        int(in_front),
        str(plan.request.mesh),
        workload.slots,
        workload.context_tokens,
        *(round(speed, 2) if decode else None for speed in speeds),
        decode.bound if decode else None,
        *map(milliseconds, times),
        sum(each.arrays for each in plan.decode_work.always),
        round(plan.decode_work.sent_bytes / 2**20, 4),
        *(round(count / GIB, 4) for count in (memory.weights, memory.kv_cache, memory.total, plan.capacity)),
    ]
    return dict(zip(COLUMNS, values, strict=True))


# ---- what does not fit ----


def make_fitting(request: Request) -> Plan:
    """The plan, if it fits.

    Raises:
        PlanError: it does not, or its mesh is not one of this slice; names meshes that would do.
        MeshError: the mesh does not cut the model evenly; alike.
    """
    plans.check_workload(request)
    try:
        plan = plans.make(request)
    except (PlanError, MeshError) as error:
        raise type(error)(f"{error}; {alternatives(request)}") from None
    if not plan.fits:
        has, memory = plan.capacity, plan.memory
        raise PlanError(
            f"mesh {request.mesh} does not fit {request.slice.name}: {plans.in_gib(memory.total)} of "
            f"{plans.in_gib(has)} on each device (weights {plans.in_gib(memory.weights)}, keys and values "
            f"{plans.in_gib(memory.kv_cache)}); {alternatives(request)}"
        )
    return plan


def alternatives(request: Request) -> str:
    """The best meshes of the slice that hold the same model, batch and context; or how many sequences one holds."""
    workload = request.workload
    found = sweep(requests(request, [workload.slots], [workload.context_tokens]))
    if found:
        named = "; ".join(f"{_named(plan)} ({plans.in_gib(plan.memory.total)})" for plan in found[:NAMED])
        return f"of this slice would do: {named}"
    largest = _largest_batch(request)
    if largest:
        return (
            f"no mesh of {request.slice.name} holds {workload.slots} sequences of {workload.context_tokens:,} tokens; "
            f"{_named(largest)} holds {largest.request.workload.slots}"
        )
    return (
        f"no mesh of {request.slice.name} holds even one sequence of {workload.context_tokens:,} tokens, "
        "or none cuts the model evenly"
    )


def _named(plan: Plan) -> str:
    """A mesh as --mesh takes it: the file of configs/meshes that says the same, if there is one."""
    given, mesh = plan.request.slice, plan.request.mesh
    kind = given.name.split(":")[0]
    path = f"configs/meshes/{kind}-{given.devices}.json" if ":" in given.name else f"configs/meshes/{kind}.json"
    if of_configs(path).is_file() and str(read(path)) == str(mesh):
        return path
    return str(mesh)


def _largest_batch(request: Request) -> Plan | None:
    """The plan of the most slots, a power of two, that some mesh holds."""
    slots = 1 << (request.workload.slots.bit_length() - 1)
    while slots >= 1:
        if found := sweep(requests(request, [slots], [request.workload.context_tokens])):
            return found[0]
        slots //= 2
    return None
