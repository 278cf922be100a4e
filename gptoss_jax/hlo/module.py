"""A compiled program's text: its computations, their instructions in the order of the schedule, and source lines.

Reads the text that `compiled.as_text()` gives on CPUs, GPUs and TPUs. Knows no JAX.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

ITEMSIZE = {"pred": 1, "s4": 0.5, "u4": 0.5, "f4e2m1fn": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
ITEMSIZE |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class ModuleError(ValueError):
    """A text that is no compiled program."""


class Frame(NamedTuple):
    """One line of a Python program that was being traced."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        """As in model/experts.py:134."""
        return f"{'/'.join(self.file.split('/')[-2:])}:{self.line}"


class Array(NamedTuple):
    """The type of an array."""

    dtype: str  # XLA's: bf16, s32, pred
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Without padding."""
        return math.ceil(ITEMSIZE.get(self.dtype, 0) * math.prod(self.shape))

    def __str__(self) -> str:
        """As XLA writes it: bf16[16,64]."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: unique in the program.
        opcode: XLA's: fusion, dot, custom-call, all-reduce-start.
        type: of what it gives, as text; several arrays in parentheses.
        operands: names of instructions of the same computation.
        rest: what follows: attributes, metadata, the compiler's settings.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    rest: str

    @property
    def arrays(self) -> list[Array]:
        """What it gives, in order."""
        return arrays(self.type)

    @property
    def num_bytes(self) -> int:
        """Of all that it gives."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """JAX's name for what it computes, with all scopes: jit(decode)/while/body/layer_0/attention/..."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def target(self) -> str:
        """Of a custom call: what is called."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def called(self) -> dict[str, list[str]]:
        """Names of the computations that it runs, by what they are to it: body, condition, calls, branches."""
        found: dict[str, list[str]] = {}
        for role, name in _CALLED.findall(self.rest):
            found.setdefault("branches" if role.endswith("_computation") else role, []).append(name)
        if branches := _BRANCHES.search(self.rest):
            found["branches"] = [name.strip().lstrip("%") for name in branches[1].split(",")]
        return found

    @property
    def trips(self) -> int | None:
        """Of a loop: how often it runs; None: that is data."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.rest)
        return int(found[1]) if found else None


class Computation(NamedTuple):
    """Instructions in the order in which they are scheduled, by name."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def parameters(self) -> list[Instruction]:
        """By number."""
        found = [each for each in self.instructions.values() if each.opcode == "parameter"]
        return sorted(found, key=lambda each: int(each.operands[0]))

    @property
    def root(self) -> Instruction:
        """What it gives."""
        found = [each for each in self.instructions.values() if each.rest.startswith("ROOT ")]
        return found[0] if found else list(self.instructions.values())[-1]


class Module(NamedTuple):
    """A compiled program.

    Attributes:
        computations: by name.
        entry: name of the one that is run.
        frames: number of a stack frame -> the line of source, and the number of the frame that called it.
    """

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[Frame, int]]

    def called(self, instruction: Instruction, role: str) -> list[Computation]:
        """What an instruction runs in this role."""
        return [self.computations[name] for name in instruction.called.get(role, ()) if name in self.computations]

    def stack(self, instruction: Instruction) -> list[Frame]:
        """The lines of source that an instruction was traced from, the innermost first; none: XLA does not say."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        number, frames = int(found[1]) if found else 0, []
        while number in self.frames and len(frames) < 100:
            frame, caller = self.frames[number]
            frames.append(frame)
            number = caller
        return frames

    def main_loop(self) -> Instruction | None:
        """The loop of the entry computation that holds most, as decoding has one; None: there is none."""
        loops = [each for each in self.computations[self.entry].instructions.values() if each.opcode == "while"]
        return max(loops, key=lambda loop: len(self.called(loop, "body")[0].instructions), default=None)


def arrays(text: str) -> list[Array]:
    """The types of arrays in a text."""
    return [
        Array(dtype, tuple(int(size.lstrip("<=")) for size in shape.split(",") if size))
        for dtype, shape in _ARRAY.findall(text)
        if dtype in ITEMSIZE
    ]


def parse(text: str) -> Module:
    """The program of a text.

    Raises:
        ModuleError: it holds no entry computation, or a name twice.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = Computation(header[2], {})
            computations[current.name] = current
            entry = current.name if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)):
            if instruction.name in current.instructions:
                raise ModuleError(f"{instruction.name} stands twice in {current.name}")
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ModuleError(f"no compiled program: expected HLO text with an ENTRY, got {text[:60]!r}")
    return Module(computations, entry, _frames(text))


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if not found:
        return None
    start = found.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    opcode, inside = line[end:opening].strip(), line[opening + 1 : closing - 1]
    plain = opcode in ("parameter", "constant")
    operands = (inside,) if plain else tuple(re.findall(r"%([\w.-]+)", inside))
    return Instruction(found[2], opcode, line[start:end], operands, (found[1] or "") + line[closing:])


def _closing(line: str, opening: int) -> int:
    """Just after the parenthesis that closes the one at `opening`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ModuleError(f"a parenthesis is not closed: {line.strip()[:200]}")


def _frames(text: str) -> dict[int, tuple[Frame, int]]:
    """The tables of source lines that stand before the first computation."""
    files, functions = (dict(_numbered(text, name, r'"(.*)"')) for name in ("FileNames", "FunctionNames"))
    pattern = r"\{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
    places = {}
    for number, (file, function, line) in _numbered(text, "FileLocations", pattern):
        places[number] = Frame(str(files.get(int(file), "?")), int(line), str(functions.get(int(function), "?")))
    pattern = r"\{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"
    found = _numbered(text, "StackFrames", pattern)
    # XLA writes the number of a caller with one added.
    return {number: (places[int(at)], int(caller or 0) - 1) for number, (at, caller) in found if int(at) in places}


def _numbered(text: str, heading: str, pattern: str) -> Iterator[tuple[int, str | tuple[str, ...]]]:
    """Lines `NUMBER pattern` below a heading: the number, and what the pattern's groups found."""
    table = re.search(rf"^{heading}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    for line in table[1].splitlines() if table else ():
        number, _, rest = line.partition(" ")
        if found := re.match(pattern, rest):
            yield int(number), found[1] if len(found.groups()) == 1 else found.groups()


# ---- JAX's names ----


class Scope(NamedTuple):
    """Where in the model an operation stands.

    Attributes:
        layer: its number; None: beside the layers.
        part: the named scope: attention, experts, unembedding; embedding, or sampling for what follows the logits.
        op: the rest of JAX's name without scopes that say nothing: psum, dot_general.
    """

    layer: int | None
    part: str
    op: str


_SILENT = re.compile(r"^(shard_map|while|body|cond|closed_call|branch_\d+_fun|jit\(\w*\)|vmap\(\w*\)|pjit|checkpoint)$")


@functools.cache
def scope(op_name: str) -> Scope:
    """The place in the model of JAX's name for an operation."""
    path = re.sub(r"^jit\(\w+\)/(while/(body|cond)/)?", "", op_name)
    parts = [part for part in path.split("/") if part]
    layer, part = None, "sampling"
    if parts and (found := re.fullmatch(r"layer_(\d+)", parts[0])):
        layer, part = int(found[1]), parts[1] if len(parts) > 2 else "residual"
        parts = parts[2:] if len(parts) > 2 else parts[1:]
    elif parts and parts[0] == "unembedding":
        part, parts = parts[0], parts[1:]
    elif path in ("gather", "jit(_take)/gather"):
        part = "embedding"
    said = [each for each in parts if not _SILENT.match(each)] or parts[-1:]
    return Scope(layer, part, "/".join(said[-2:]))
