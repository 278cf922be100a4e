"""A plan as people read it, and as scripts do."""

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from gptoss_jax.planner.collectives import Collective
from gptoss_jax.planner.memory import Memory
from gptoss_jax.planner.plan import CLOSE, Plan, Timed, in_gib
from gptoss_jax.runtime.device_memory import FRACTION, GPU_FRACTION

PARTS = {  # part of Memory -> its name, and the logical axes that cut it
    "experts": ("experts", ("experts", "expert_hidden")),
    "attention": ("attention", ("heads",)),
    "embeddings": ("embeddings", ("vocab",)),
    "others": ("routers and norms", ()),
    "kv_cache": ("keys and values", ("batch", "heads", "positions")),
    "padded_keys": ("keys and values, padded", ("batch", "heads", "positions")),
    "slots": ("slots", ("batch", "vocab")),
    "snapshots": ("prefix cache's rings", ("batch", "heads")),
    "embedding_copy": ("embedding, copied", ("vocab",)),
    "retiled_weights": ("weights in other tiles", ("heads", "vocab")),
    "activations": ("activations (estimate)", ("batch", "heads", "expert_hidden")),
    "temporaries": ("temporaries (estimate)", ("batch", "vocab")),
}
BASIS = "closed form of the model's numbers; nothing was compiled or run"
WIDTH = 100
ASSUMED = (
    "memory and arithmetic at their published rates, at the same time, and waiting while devices send; all links of a "
    "chip in use; nothing for launches and latency but what --launch-us and --collective-us say; tokens that draw "
    "experts evenly; slots as long as the context; greedy"
)


def text(plan: Plan) -> str:
    """The plan, on lines of at most 120 columns."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_work(plan), "", *_collectives(plan), "", *_speed(plan)])


def _head(plan: Plan) -> Iterator[str]:
    request = plan.request
    given, workload = request.slice, request.workload
    many = f"{given.devices} device{'s' * (given.devices > 1)}"
    yield f"{request.model} on {given.name}: {given.chips} {given.chip.name}, {many}; {BASIS}"
    yield (
        f"mesh {request.mesh}; batch {workload.slots}, context {workload.context_tokens:,}, prefill chunks of "
        f"{workload.prefill_tokens:,}"
    )
    if padded(plan):
        yield padded(plan)


def padded(plan: Plan) -> str:
    """What is said of experts that are padded; nothing where they are not."""
    config, mesh = plan.request.config, plan.request.mesh
    width = mesh.expert_width(config) * mesh.size("expert_hidden")
    if width == config.intermediate_size:
        return ""
    return f"experts' width {config.intermediate_size:,} padded with zeros to {width:,}, to come out even"


def cut(plan: Plan, logical: Sequence[str]) -> str:
    """Which of these axes the mesh cuts, and into how many shards."""
    found = [f"{name} / {plan.request.mesh.size(name)}" for name in logical if plan.request.mesh.size(name) > 1]
    return ", ".join(found) or "whole"


def _memory(plan: Plan) -> Iterator[str]:
    yield f"{'each device holds':30}{'':14}  cut by"
    for part in Memory._fields:
        (name, logical), size = PARTS[part], getattr(plan.memory, part)
        if size:
            yield f"  {name:28}{in_gib(size):>14}  {cut(plan, logical)}"
    yield f"  {'in all':28}{in_gib(plan.memory.total):>14}  {verdict(plan)}"


def verdict(plan: Plan) -> str:
    """How much of the capacity that is."""
    if not plan.capacity:
        return "of memory that all simulated devices share"
    share = plan.memory.total / plan.capacity
    said = f"{share:.0%} of {in_gib(plan.capacity)}"
    if share > 1:
        return f"{said}: does not fit"
    said += ": closer than the estimate is exact" if share > CLOSE else ""
    if plan.request.slice.chip.platform == "gpu" and share > GPU_FRACTION:
        said += f"; commands have JAX take {GPU_FRACTION:.0%} of a GPU: {FRACTION}={min(share + 0.02, 0.99):.2f}"
    return said


def _work(plan: Plan) -> Iterator[str]:
    works = plan.decode_work, plan.prefill_work
    yield _columns("each device does", "decoding step", "prefill chunk")
    yield _columns("  tokens, of all devices", *(f"{work.tokens:,}" for work in works))
    yield _columns("  operations", *(_operations(work.flops) for work in works))
    yield _columns("  weights read", *(in_gib(work.weight_bytes) for work in works))
    yield _columns("  keys, values, slots read", *(in_gib(work.kv_bytes) for work in works))
    if any(work.copy_bytes for work in works):
        yield _columns("  copied into another order", *(in_gib(work.copy_bytes) for work in works))
    yield _columns("  collectives", *(f"{sum(each.arrays for each in work.always)}" for work in works))
    yield _columns("  sent to others", *(in_gib(work.sent_bytes) for work in works))
    counts = [plan.decode_work.launches, None]
    yield _columns("  launches", *("-" if count is None else f"{count:,}" for count in counts))


def _columns(name: str, *values: str) -> str:
    return f"{name:30}" + "".join(f"{value:>16}" for value in values)


def _operations(count: float) -> str:
    return f"{count / 1e12:.3f} TFLOP" if count >= 1e11 else f"{count / 1e9:.3f} GFLOP"


def _collectives(plan: Plan) -> Iterator[str]:
    """Those of both steps, which differ in bytes only, beside one another."""
    decode, prefill = plan.decode_work.collectives, plan.prefill_work.collectives
    if not decode:
        yield "no collectives: each device works by itself"
        return
    yield f"{'collectives of a step':30}{'decoding step':>16}{'prefill chunk':>16}"
    others: dict[Any, list[Collective]] = {}
    for each in prefill:
        others.setdefault(_place(each), []).append(each)
    for each in decode:
        other = others.get(_place(each))
        yield _collective(each, _size(each), _size(other.pop(0)) if other else "")
    for each in itertools.chain(*others.values()):
        yield _collective(each, "", _size(each))


def _place(each: Collective) -> tuple[object, ...]:
    """What makes it the same collective, whatever its bytes; alike ones in the order in which they are counted."""
    by_slots = each.bytes if each.where == "sampling" else None
    return each.kind, each.where, each.when, each.devices, by_slots


def _collective(each: Collective, decode: str, prefill: str) -> str:
    name = f"{each.kind} {each.where}"
    return f"  {name:28}{decode:>16}{prefill:>16}  over {each.devices}, {each.when}"


def _size(each: Collective) -> str:
    size = f"{each.bytes:,} B" if each.bytes < 1 << 20 else in_gib(each.bytes)
    return f"{each.arrays} x {size}"


def _speed(plan: Plan) -> Iterator[str]:
    chip = plan.request.slice.chip
    if plan.decode is None or plan.prefill is None:
        yield f"nothing of speed: {chip.source}"
        return
    steps = plan.decode, plan.prefill
    yield _columns(f"roofline of {chip.name}", "decoding step", "prefill chunk")
    for name in ("compute", "memory", "interconnect", "overhead"):
        if name != "overhead" or plan.decode.overhead:
            yield _columns(f"  {name}", *(_milliseconds(getattr(step, name)) for step in steps))
    yield _columns("  at least", *(_milliseconds(step.seconds) for step in steps))
    yield _columns("  bound by", *(step.bound for step in steps))
    yield _columns("tokens/s of each user, at most", f"{plan.tokens_per_second_per_user:,.1f}")
    of_chip = plan.tokens_per_second_per_chip, plan.prefill_tokens_per_second_per_chip
    yield _columns("tokens/s of each chip, at most", *(f"{speed:,.1f}" for speed in of_chip))
    yield ""
    yield from textwrap.wrap(f"figures: {chip.source}", WIDTH)
    yield from textwrap.wrap(f"assumed: {ASSUMED}", WIDTH)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f} ms"


# ---- for scripts ----


def to_json(plan: Plan) -> dict[str, Any]:
    """All of it, in bytes, seconds and tokens a second."""
    request = plan.request
    chip = request.slice.chip
    return {
        "basis": BASIS,
        "assumed": ASSUMED,
        "model": request.model,
        "slice": {"name": request.slice.name, "chips": request.slice.chips, "devices": request.slice.devices},
        "chip": chip._asdict(),
        "mesh": {
            "axes": dict(request.mesh.axes),
            "rules": {k: list(v) for k, v in request.mesh.rules.items()},
            "exchange": request.mesh.exchange_name,
        },
        "workload": request.workload._asdict(),
        "padded": padded(plan) or None,
        "memory": {**plan.memory._asdict(), "total": plan.memory.total, "capacity": plan.capacity},
        "fits": plan.fits,
        "decode": _step_json(plan.decode_work, plan.decode),
        "prefill": _step_json(plan.prefill_work, plan.prefill),
        "tokens_per_second_per_user": plan.tokens_per_second_per_user or None,
        "tokens_per_second_per_chip": plan.tokens_per_second_per_chip or None,
        "prefill_tokens_per_second_per_chip": plan.prefill_tokens_per_second_per_chip or None,
    }


def _step_json(work: Any, timed: Timed | None) -> dict[str, Any]:
    counts = "tokens", "flops", "weight_bytes", "kv_bytes", "copy_bytes", "launches"
    found = {name: getattr(work, name) for name in counts}
    found["sent_bytes"] = work.sent_bytes
    found["collectives"] = [each._asdict() for each in work.collectives]
    if timed is not None:
        found["seconds"] = {"total": timed.seconds, **{name: getattr(timed, name) for name in TIMES}}
        found["bound"] = timed.bound
    return found


TIMES = ("compute", "memory", "interconnect", "overhead")
