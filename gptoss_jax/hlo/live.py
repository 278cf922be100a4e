"""The buffers that are alive when a program takes most memory: its arguments, and temporaries as XLA reports them.

XLA for CPUs and GPUs writes the report where it is asked to dump; the compiler for TPUs writes none.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from gptoss_jax.hlo.module import Array, Computation, Module


class Buffer(NamedTuple):
    """One array that is alive at the peak.

    Attributes:
        bytes: of it.
        what: an argument as its path (params/layers/0/moe/down/blocks), else JAX's name for what computes it.
        is_argument: whether the program was given it.
        type: dtype and shape; empty: XLA does not say.
    """

    bytes: int
    what: str
    is_argument: bool
    type: str


def arguments(module: Module) -> list[Buffer]:
    """What a program is given, the largest first."""
    found = []
    for each in module.computations[module.entry].parameters:
        types = ", ".join(map(str, each.arrays))
        found.append(Buffer(each.num_bytes, as_path(each.op_name) or f"argument {each.operands[0]}", True, types))
    return sorted(found, key=lambda buffer: -buffer.bytes)


def at_peak(folder: Path, module: Module) -> list[Buffer]:
    """The temporaries alive at the moment when they take most memory, the largest first.

    Args:
        folder: the `xla_dump_to` that the program, and nothing larger, was compiled with.
        module: the program.

    Returns:
        None of them where the compiler left no report.
    """
    ranges, values = _ranges(_longest(folder, "*live-range.txt")), _temporaries(_longest(folder, "*assignment.txt"))
    alive = [(name, *place) for name, place in values.items() if name in ranges]
    best: dict[tuple[int, int], str] = {}
    for moment in sorted({ranges[name][0] for name, _, _ in alive}):
        now = {(offset, size): name for name, size, offset in alive if ranges[name][0] <= moment < ranges[name][1]}
        if _covered(now) > _covered(best):
            best = now
    found = [_buffer(module, name, size) for (_, size), name in best.items()]
    return sorted(found, key=lambda buffer: -buffer.bytes)


def _longest(folder: Path, pattern: str) -> str:
    return max((path.read_text() for path in folder.glob(pattern)), key=len, default="")


def _ranges(text: str) -> dict[str, tuple[int, int]]:
    """Name of a value, with its place in braces -> the moments from which and until which it is alive."""
    after = text.partition("BufferLiveRange:\n")[2]
    found = re.findall(r"^ +([\w.-]+\{[\d,]*\}):(\d+)-(\d+)$", after, re.MULTILINE)
    return {name: (int(first), int(last)) for name, first, last in found}


def _temporaries(text: str) -> dict[str, tuple[int, int]]:
    """Name of a value, with its place in braces -> its bytes, and where they begin among the temporaries."""
    found: dict[str, tuple[int, int]] = {}
    of_temporaries = False
    for line in text.splitlines():
        if line.startswith("allocation "):
            of_temporaries = "preallocated-temp" in line
        elif of_temporaries and (value := re.match(r" value: <\d+ (\S+) @\d+> \(size=(\d+),offset=(\d+)\)", line)):
            name = value[1] if value[1].endswith("}") else f"{value[1]}{{}}"
            found[name] = int(value[2]), int(value[3])
    return found


def _covered(places: Iterable[tuple[int, int]]) -> int:
    """Bytes that lie in any of these places: offset and size."""
    total = end = 0
    for offset, size in sorted(places):
        total += max(0, offset + size - max(end, offset))
        end = max(end, offset + size)
    return total


def _buffer(module: Module, value: str, size: int) -> Buffer:
    name, _, at = value.rstrip("}").partition("{")
    for computation in module.computations.values():
        if name in computation.instructions:
            return _described(module, computation, name, at, size)
    return Buffer(size, name, False, "")


def _described(module: Module, computation: Computation, name: str, at: str, size: int) -> Buffer:
    instruction = computation.instructions[name]
    arrays = instruction.arrays
    place = int(at.split(",")[0]) if at else 0
    array = arrays[place] if place < len(arrays) else Array("", ())
    what = instruction.op_name or argument_of(module, computation, name, place) or f"{instruction.opcode} {name}"
    return Buffer(size, what, False, str(array) if array.dtype else "")


def argument_of(module: Module, computation: Computation, name: str, place: int) -> str | None:
    """The path of the program's argument that a value is, whatever loops carry it; None: it is computed."""
    for _ in range(100):
        instruction = computation.instructions.get(name)
        if instruction is None:
            return None
        if instruction.opcode == "get-tuple-element":
            found = re.search(r"index=(\d+)", instruction.rest)
            name, place = instruction.operands[0], int(found[1]) if found else 0
        elif instruction.opcode in ("bitcast", "copy"):
            name = instruction.operands[0]
        elif instruction.opcode == "tuple":
            if place >= len(instruction.operands):
                return None
            name, place = instruction.operands[place], 0
        elif instruction.opcode == "while":
            name = instruction.operands[0]
        elif instruction.opcode == "parameter" and computation.name == module.entry:
            return as_path(instruction.op_name) or f"argument {instruction.operands[0]}"
        elif instruction.opcode == "parameter":
            if (caller := _loop_of(module, computation.name)) is None:
                return None
            computation, name = caller
        else:
            return None
    return None


def as_path(name: str) -> str:
    """An argument as JAX names it, params['layers'][0]['norm'], with slashes."""
    return re.sub(r"\['?([^'\]]*)'?\]", r"/\1", name)


def _loop_of(module: Module, body: str) -> tuple[Computation, str] | None:
    """The loop that runs a computation, and where that stands."""
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode == "while" and any(body in names for names in instruction.called.values()):
                return computation, instruction.name
    return None
