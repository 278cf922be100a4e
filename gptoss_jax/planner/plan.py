"""A plan: what a model takes and does on a mesh of a slice, how fast its chips' published rates allow it, and why.

    plan = make(Request(config, "gpt-oss-20b", mesh, parse_slice("h200x8"), Workload(64, 8192, 512)))
    plan.memory.total, plan.decode.seconds, plan.tokens_per_second_per_user

All of it is a closed form of the numbers of config.json; nothing is compiled and nothing is run. Knows no JAX.
"""

from typing import NamedTuple

from gptoss_jax.errors import GptossError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.mesh import MeshShape
from gptoss_jax.planner import memory as memory_model
from gptoss_jax.planner import work as work_model
from gptoss_jax.planner.chips import Slice
from gptoss_jax.planner.memory import Memory, Workload
from gptoss_jax.planner.work import Work

GIB = 1 << 30
MOST_SLOTS = 1 << 20
CLOSE = 0.95  # of the capacity: nearer to it than the estimate is exact


class PlanError(GptossError):
    """What is asked for cannot be, on this slice."""


class Costs(NamedTuple):
    """Seconds that no data sheet has: 0 unless somebody has measured them."""

    launch: float = 0.0  # of each kernel, copy or library call
    collective: float = 0.0  # of each array that devices send one another, beside its bytes


class Request(NamedTuple):
    """What is planned."""

    config: ModelConfig
    model: str  # its name
    mesh: MeshShape
    slice: Slice
    workload: Workload
    costs: Costs = Costs()


class Timed(NamedTuple):
    """A step and the least time it takes, in seconds, by each thing that can bound it.

    The device computes while it reads memory, and does neither while it waits for a collective.
    """

    work: Work
    compute: float
    memory: float
    interconnect: float
    overhead: float

    @property
    def seconds(self) -> float:
        """Of the step, at least."""
        return max(self.compute, self.memory) + self.interconnect + self.overhead

    @property
    def bound(self) -> str:
        """What takes most of it."""
        parts = {"memory": self.memory, "compute": self.compute, "interconnect": self.interconnect}
        parts["latency"] = self.overhead
        return max(parts, key=lambda name: parts[name])


class Plan(NamedTuple):
    """What is planned, and what comes of it. Times are None where the chip has no published rates."""

    request: Request
    memory: Memory
    decode_work: Work
    prefill_work: Work
    decode: Timed | None
    prefill: Timed | None

    @property
    def capacity(self) -> int:
        """Bytes of a device that programs may use; 0: not known."""
        return self.request.slice.chip.memory_bytes

    @property
    def fits(self) -> bool:
        """Whether all of it is within a device's memory."""
        return not self.capacity or self.memory.total <= self.capacity

    @property
    def tokens_per_second_per_user(self) -> float:
        """Tokens that one sequence grows by in a second; 0: not known."""
        return 1 / self.decode.seconds if self.decode else 0.0

    @property
    def tokens_per_second_per_chip(self) -> float:
        """Tokens drawn in a second over all slots, of each chip; 0: not known."""
        return self.tokens_per_second_per_user * self.request.workload.slots / self.request.slice.chips

    @property
    def prefill_tokens_per_second_per_chip(self) -> float:
        """Tokens of prompts read in a second, of each chip; 0: not known."""
        return self.prefill.work.tokens / self.prefill.seconds / self.request.slice.chips if self.prefill else 0.0


def make(request: Request) -> Plan:
    """The plan, whether or not it fits.

    Raises:
        PlanError: a size that the model or the slice does not have.
        MeshError: the mesh does not cut the model and the slots evenly.
    """
    check_workload(request)
    _check_mesh(request)
    config, mesh, chip, workload = request.config, request.mesh, request.slice.chip, request.workload
    decode = work_model.decode_step(config, mesh, chip, workload)
    prefill = work_model.prefill_chunk(config, mesh, chip, workload)
    memory = memory_model.memory(config, mesh, chip, workload)
    return Plan(request, memory, decode, prefill, _timed(request, decode), _timed(request, prefill))


def check_workload(request: Request) -> None:
    """Refuses a batch, a context or a chunk that the model cannot have on any mesh.

    Raises:
        PlanError: says which.
    """
    workload, limit = request.workload, request.config.max_context_tokens
    if not 1 <= workload.context_tokens <= limit:
        raise PlanError(f"--context is {workload.context_tokens}, expected 1 to {limit}, which the model has")
    if not 1 <= workload.prefill_tokens <= workload.context_tokens:
        raise PlanError(f"--prefill is {workload.prefill_tokens}, expected 1 to --context, {workload.context_tokens}")
    if not 1 <= workload.slots <= MOST_SLOTS:
        raise PlanError(f"--batch is {workload.slots}, expected 1 to {MOST_SLOTS:,}")


def _check_mesh(request: Request) -> None:
    mesh, given = request.mesh, request.slice
    if mesh.devices != given.devices:
        named = "one device" if mesh.devices == 1 else f"{mesh}, of {mesh.devices} devices"
        raise PlanError(f"the mesh is {named}, and {given.name} has {given.devices}")
    mesh.check(request.config, request.workload.slots)


def _timed(request: Request, work: Work) -> Timed | None:
    chip = request.slice.chip
    if chip.flops is None or chip.hbm_bytes is None or chip.link_bytes is None:
        return None
    arrays = sum(each.arrays for each in work.always)
    overhead = (work.launches or 0) * request.costs.launch + arrays * request.costs.collective
    return Timed(
        work,
        compute=work.flops / (chip.flops / chip.devices),
        memory=work.hbm_bytes / (chip.hbm_bytes / chip.devices),
        interconnect=work.sent_bytes / (chip.link_bytes / chip.devices),
        overhead=overhead,
    )


def in_gib(count: int | float) -> str:
    """Bytes in GiB, small counts in MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 8 else f"{count / 2**20:.2f} MiB"
