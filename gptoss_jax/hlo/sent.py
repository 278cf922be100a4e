"""The arrays that devices send one another in a compiled program: kind, bytes, devices, and where each comes from."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from gptoss_jax.hlo.module import Computation, Frame, Instruction, Module, Scope, scope

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_ROUNDS = {"all-reduce": 2}  # of a ring: a sum goes around twice
_HIDDEN = ("/site-packages/", "gptoss_jax/model/sharding.py", "jax/_src/")  # whose caller says more


class Sent(NamedTuple):
    """One array that is sent at one place of a program.

    Attributes:
        kind: of KINDS.
        bytes: of the array on a device, after it.
        devices: that take part in each group.
        scope: where in the model.
        op_name: JAX's whole name.
        stack: lines of source, the innermost first; empty: the partitioner made it, XLA does not say of what.
        computation: the name of XLA's computation that holds it.
        branches: conditionals around it, whose other branch does not send it.
    """

    kind: str
    bytes: int
    devices: int
    scope: Scope
    op_name: str
    stack: tuple[Frame, ...]
    computation: str
    branches: int = 0

    @property
    def source(self) -> str:
        """The line of source that asked for it, after the line of another file that called for that; "-": not known."""
        said = [frame for frame in self.stack if not any(part in frame.file for part in _HIDDEN)] or list(self.stack)
        callers = [frame for frame in said if frame.file != said[0].file]
        return " > ".join(str(frame) for frame in (*callers[:1], *said[:1])) or "-"

    @property
    def sent_bytes(self) -> float:
        """That each device sends to others, in a ring."""
        return ring_bytes(self.kind, self.bytes, self.devices)


def ring_bytes(kind: str, num_bytes: int, devices: int) -> float:
    """Bytes that each device sends, if `num_bytes` are what it holds after a collective of this kind."""
    if kind == "collective-permute":
        return num_bytes
    if kind == "reduce-scatter":
        return num_bytes * (devices - 1)
    return _ROUNDS.get(kind, 1) * (devices - 1) / devices * num_bytes


def of_module(module: Module) -> list[Sent]:
    """All of a program, in the order of its text: what is in a loop stands once."""
    branches = branch_depths(module)
    return [
        each._replace(branches=branches.get(computation.name, 0))
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if kind_of(instruction)
        for each in of_instruction(module, computation.name, instruction)
    ]


def branch_depths(module: Module) -> dict[str, int]:
    """Name of a computation -> conditionals around it, at most, of those that the entry computation reaches."""
    depths: dict[str, int] = {module.entry: 0}
    waiting = [module.entry]
    while waiting:
        name = waiting.pop()
        for instruction in module.computations[name].instructions.values():
            for role, called in instruction.called.items():
                depth = depths[name] + (role == "branches")
                fresh = [other for other in called if other in module.computations and depths.get(other, -1) < depth]
                depths.update(dict.fromkeys(fresh, depth))
                waiting += fresh
    return depths


def kind_of(instruction: Instruction) -> str | None:
    """Which collective an instruction is, or begins; None: none."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def of_instruction(module: Module, computation: str, instruction: Instruction) -> Iterator[Sent]:
    """The arrays that one collective sends; a compiler may send several at once.

    Raises:
        ValueError: XLA names its devices in a way that is not known here.
    """
    kind = kind_of(instruction)
    assert kind is not None, instruction.opcode
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and kind != "all-reduce":  # operands stand before results
        arrays = arrays[len(instruction.operands) : 2 * len(instruction.operands)]
    named = _named(module.computations[computation], instruction) if kind == "ragged-all-to-all" else instruction
    of_all = scope(named.op_name), named.op_name, tuple(module.stack(named)), computation
    sizes, devices = [array.num_bytes for array in arrays], _devices(instruction.rest)
    if kind == "all-to-all" and len(sizes) == devices > 1:  # a part from each device, as XLA for CPUs writes one array
        sizes = [sum(sizes)]
    for size in sizes:
        yield Sent(kind, size, devices, *of_all)


def _named(computation: Computation, instruction: Instruction) -> Instruction:
    """What says where a ragged all-to-all comes from: itself, else what made the counts that it is given last.

    XLA for GPUs rewrites ragged all-to-alls, and their counts to 64 bits, and forgets their names.
    """
    found = instruction
    while not found.op_name and found.operands and found.operands[-1] in computation.instructions:
        found = computation.instructions[found.operands[-1]]
    return found


def _devices(rest: str) -> int:
    """How many devices take part in each group of a collective."""
    if by_axes := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axes[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", by_axes[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(tiled[1])
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return len(set(re.findall(r"\d+", pairs[1])))
    raise ValueError(f"a collective whose devices are not understood: {rest.strip()[:300]}")
