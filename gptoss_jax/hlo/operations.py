"""What a compiled program does, operation by operation in the order of its schedule: products, bytes, collectives.

An operation is what a device starts once: a fusion, a product, a kernel, a copy, a collective. Counted from shapes:
products (two operations for each multiplication and addition), and bytes read and written. What a kernel does inside
is not in the text, so its bytes are those of its operands and results, and its products are 0; whoever knows the
kernel says more (`gptoss_jax.runtime.kernel_work`). Of a conditional's branches the one that does least counts, as
greedy decoding has it; of a loop whose length is data one iteration.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from gptoss_jax.hlo import sent
from gptoss_jax.hlo.module import Array, Computation, Instruction, Module, Scope, scope
from gptoss_jax.hlo.sent import Sent

_FREE = {  # of no work: they name what is there
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "add-dependency", "domain", "iota",
}  # fmt: skip
_KERNELS = ("cpu_kernels_", "mosaic_gpu", "tpu_custom_call")
_READS_PART = ("dynamic-slice", "gather", "slice")  # of the first operand
_WRITES_PART = {"dynamic-update-slice": 1, "scatter": 2}  # of the first operand, in place; which operand is the part


class Operation(NamedTuple):
    """What a device starts at one place of a step.

    Attributes:
        scope: where in the model.
        kind: fusion, product, kernel, copy, collective or another of XLA's opcodes.
        name: of a kernel its own, else JAX's name for what is computed.
        times: how often it runs in a step.
        flops: multiplications and additions of one run.
        bytes: read and written by one run.
        sent: arrays that one run sends.
        instruction: XLA's line.
        operands: types of the arrays that it takes.
    """

    scope: Scope
    kind: str
    name: str
    times: int
    flops: float
    bytes: float
    sent: tuple[Sent, ...]
    instruction: Instruction
    operands: tuple[Array, ...] = ()

    @property
    def sent_bytes(self) -> float:
        """That one run sends to others, in a ring."""
        return sum((each.sent_bytes for each in self.sent), 0.0)


def of_step(module: Module) -> list[Operation]:
    """One step: an iteration of a decoding program's loop, or all of a program without one."""
    loop = module.main_loop()
    if loop is None or not scope_of_loop(loop):
        return list(_run(module, module.computations[module.entry], 1))
    return [
        operation
        for role in ("condition", "body")
        for computation in module.called(loop, role)
        for operation in _run(module, computation, 1)
    ]


def scope_of_loop(loop: Instruction) -> bool:
    """Whether a loop is that of `programs.decode`, which has as many iterations as tokens are drawn."""
    return loop.op_name == "jit(decode)/while"


def _run(module: Module, computation: Computation, times: int) -> Iterator[Operation]:
    for instruction in computation.instructions.values():
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
            continue
        called = instruction.called
        if instruction.opcode == "while":
            for role in ("condition", "body"):
                for part in module.called(instruction, role):
                    yield from _run(module, part, times * (instruction.trips or 1))
        elif instruction.opcode == "conditional":
            branches = [list(_run(module, part, times)) for part in module.called(instruction, "branches")]
            yield from min(branches, key=_cost, default=[])
        elif instruction.opcode in ("call", "async-start") and ("to_apply" in called or "calls" in called):
            for part in module.called(instruction, "to_apply") or module.called(instruction, "calls"):
                yield from _run(module, part, times)
        else:
            yield _operation(module, computation, instruction, times)


def _cost(branch: list[Operation]) -> tuple[float, int]:
    return sum((each.times * (each.bytes + each.flops + each.sent_bytes) for each in branch), 0.0), len(branch)


def _operation(module: Module, computation: Computation, instruction: Instruction, times: int) -> Operation:
    if kind := sent.kind_of(instruction):
        arrays = tuple(sent.of_instruction(module, computation.name, instruction))
        return Operation(arrays[0].scope, "collective", kind, times, 0.0, 0.0, arrays, instruction)
    where = scope(_jax_name(module, instruction))
    flops = sum((_product_flops(at, each) for at, each in _inside(module, computation, instruction)), 0.0)
    kind, said = _kind(instruction, flops), where.op
    if kind == "kernel":
        said = _kernel_name(instruction)
    moved = _bytes(module, computation, instruction)
    names = [name for name in instruction.operands if name in computation.instructions]
    operands = tuple(array for name in names for array in computation.instructions[name].arrays)
    return Operation(where, kind, said, times, flops, moved, (), instruction, operands)


def _kind(instruction: Instruction, flops: float) -> str:
    if instruction.opcode == "custom-call" and instruction.target.startswith(_KERNELS):
        return "kernel"
    if instruction.opcode in ("dot", "convolution") or flops or "gemm" in instruction.target:
        return "product"
    return "copy" if instruction.opcode.startswith("copy") else instruction.opcode


def _kernel_name(instruction: Instruction) -> str:
    """A C++ kernel's target, or what stands before Pallas's primitive in JAX's name."""
    if instruction.target.startswith("cpu_kernels_"):
        return instruction.target.removeprefix("cpu_kernels_")
    names = re.sub(r"\w+\((\w+)\)", r"\1", instruction.op_name).split("/")
    return names[-2] if len(names) > 1 else instruction.target


def _jax_name(module: Module, instruction: Instruction) -> str:
    """JAX's name; of a fusion that has none, of the last thing that it holds."""
    if instruction.op_name or instruction.opcode != "fusion":
        return instruction.op_name
    names = [each.op_name for part in module.called(instruction, "calls") for each in part.instructions.values()]
    return next((name for name in reversed(names) if name), "")


def _inside(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """The instruction, or all that a fusion holds; each with the computation that it stands in."""
    yield computation, instruction
    if instruction.opcode == "fusion":
        for part in module.called(instruction, "calls"):
            for each in part.instructions.values():
                yield from _inside(module, part, each)


# ---- products ----


def _product_flops(computation: Computation, instruction: Instruction) -> float:
    """Of a product: twice its results, times what is summed over; 0 for anything else."""
    if instruction.opcode == "dot":
        left = computation.instructions[instruction.operands[0]].arrays[0].shape
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        summed = math.prod(left[int(axis)] for axis in found[1].split(",") if axis) if found else 1
        return 2.0 * math.prod(instruction.arrays[0].shape) * summed
    operands = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
    results = math.prod(instruction.arrays[0].shape) if instruction.arrays else 0
    if instruction.target == "cpu_kernels_linear":
        return 2.0 * results * operands[0].arrays[0].shape[-1]
    if instruction.opcode == "convolution" or "gemm" in instruction.target or "matmul" in instruction.target:
        # TPUs write products so, GPUs call libraries: M K, K N and M N are known, which is which is not.
        sizes = [math.prod(each.arrays[0].shape) for each in operands[:2]]
        return 2.0 * math.sqrt(math.prod(sizes) * results)
    return 0.0


# ---- bytes ----


def _bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Of operands and results; of one that is cut, or written in part, the part."""
    written = float(instruction.num_bytes) - _aliased_bytes(instruction)
    parts = module.called(instruction, "calls") if instruction.opcode == "fusion" else []
    if not parts:
        operands = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
        return _plain_bytes(instruction, operands, written) - _aliased_bytes(instruction)
    inside = parts[0]
    users = _users(inside)
    read = sum(_read_of(users, parameter) for parameter in inside.parameters)
    updates = [each for each in inside.instructions.values() if each.opcode in _WRITES_PART]
    in_place = sum(each.num_bytes for each in updates if each.num_bytes in [a.num_bytes for a in instruction.arrays])
    return read + max(0.0, written - in_place) + sum(_update_bytes(inside, each) for each in updates)


def _plain_bytes(instruction: Instruction, operands: list[Instruction], written: float) -> float:
    if instruction.opcode in _WRITES_PART:
        return 2.0 * operands[_WRITES_PART[instruction.opcode]].num_bytes
    if instruction.opcode in _READS_PART:
        return 2.0 * written
    return written + sum(each.num_bytes for each in operands)


def _users(computation: Computation) -> dict[str, list[Instruction]]:
    """Name of an instruction -> those that take what it gives, through what a fusion does element by element."""
    direct: dict[str, list[Instruction]] = {}
    for each in computation.instructions.values():
        for operand in each.operands:
            direct.setdefault(operand, []).append(each)

    def through(name: str) -> list[Instruction]:
        return [found for user in direct.get(name, ()) for found in (through(user.name) if _renames(user) else [user])]

    return {name: through(name) for name in direct}


def _renames(instruction: Instruction) -> bool:
    return instruction.opcode in ("bitcast", "bitcast-convert", "convert") and not instruction.rest.startswith("ROOT ")


def _read_of(users: dict[str, list[Instruction]], parameter: Instruction) -> float:
    """Bytes of a fusion's operand that are read: all of them, unless every use of it takes a part."""
    found = users.get(parameter.name, [])
    if found and all(user.opcode in _READS_PART for user in found):
        return min(float(parameter.num_bytes), sum(float(user.num_bytes) for user in found))
    if found and all(user.opcode in _WRITES_PART and parameter.num_bytes == user.num_bytes for user in found):
        return 0.0
    return float(parameter.num_bytes)


def _update_bytes(computation: Computation, update: Instruction) -> float:
    return float(computation.instructions[update.operands[_WRITES_PART[update.opcode]]].num_bytes)


def _aliased_bytes(instruction: Instruction) -> float:
    """Of results that a kernel writes into its operands' place: how much of them is not in the text."""
    found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.rest)
    places = [int(place) for place in re.findall(r"\{(\d+)\}: \(", found[1])] if found else []
    return float(sum(instruction.arrays[place].num_bytes for place in places))
