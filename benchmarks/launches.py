"""What a GPU is asked to launch for one token, read from XLA's own list of what a compiled program does.

XLA dumps that list (of thunks, in their order) when it compiles, once as planned and once with what became CUDA graphs:
`of_folder` reads both. A thunk that launches a kernel, a copy or a library call counts as one; of a conditional's
branches the one that launches least counts (greedy decoding draws nothing), of a loop inside one iteration.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptoss_jax.model.config import ModelConfig

Parts = dict[str, list["Thunk"]]
"""Of a loop its condition and body, of a conditional its branches, of anything else that holds thunks: under ""."""


class Thunk(NamedTuple):
    """One line of XLA's list, and what stands below it."""

    number: int
    kind: str  # XLA's: kCustomKernel is a kernel that XLA wrote, kCustomCall one of Mosaic's
    kernel: str  # the name of XLA's kernel
    parts: Parts


class Launch(NamedTuple):
    """What is launched once a token."""

    kind: str
    name: str  # of the kernel, as a profiler shows it
    layer: int | None  # None: beside the layers, or XLA does not say
    operation: str  # the end of JAX's name for what it computes


class Launches(NamedTuple):
    """All that one iteration of a decoding loop launches, and how often the host has a hand in it."""

    launches: list[Launch]
    host_waits: int  # conditions that the host reads before it knows what to launch next
    host_launches: int  # CUDA graphs, and kernels outside of them

    def by_kind(self) -> Counter[str]:
        """How many of each kind."""
        return Counter(launch.kind for launch in self.launches)


LAUNCH_US = 2.0  # assumed: a dependent node of a CUDA graph, and the start and end of a kernel that reads weights
READ_BYTES_PER_US = 4.3e6  # of an H200: what a copy reached, not the 4.8e6 that are promised


def predicted_us(launches: Sequence[Launch], config: ModelConfig, context_tokens: int) -> list[float]:
    """What each launch may take on an H200: an assumed time to launch, and to read weights, keys and values."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    experts = config.experts_per_token * inner * hidden * 17 / 32  # packed, with their scales
    projections = [2 * hidden * (heads + 2 * kv_heads), 2 * heads * hidden]  # of queries, keys and values; of outputs
    read = {
        "expert_gate_up": 2 * experts,
        "expert_down": experts,
        "unembedding/dot_general": config.unembedding_bytes,
        "experts/dot_general": 2 * config.num_experts * hidden,
        "paged_attention": 4 * kv_heads * context_tokens,
    }
    found, of_layer = [], {}
    for launch in launches:
        own = read.get(launch.name, read.get(launch.operation, 0))
        if launch.name == "paged_attention" and launch.layer is not None and config.has_sliding_window(launch.layer):
            own = 4 * kv_heads * min(config.sliding_window, context_tokens)
        if launch.operation == "attention/dot_general":
            rest = of_layer.setdefault(launch.layer, list(projections))
            own = rest.pop(0) if rest else 0
        found.append(LAUNCH_US + own / READ_BYTES_PER_US)
    return found


def by_depth(few: Launches, few_layers: int, many: Launches, many_layers: int) -> dict[str, dict[str, float]]:
    """Launches of each kind: what a layer adds, and what there is beside them, from programs of two depths."""
    counts = {}
    for kind in sorted(few.by_kind() | many.by_kind()):
        of_few, of_many = few.by_kind()[kind], many.by_kind()[kind]
        per_layer = (of_many - of_few) / (many_layers - few_layers)
        counts[kind] = {"per_layer": per_layer, "beside_layers": of_few - few_layers * per_layer}
    return counts


def of_folder(folder: Path, compiled: str) -> Launches:
    """What a program launches in an iteration of its longest loop.

    Args:
        folder: the `xla_dump_to` that it, and nothing else with a loop, was compiled with.
        compiled: its text, which knows what each instruction is for.

    Raises:
        ValueError: XLA left no such list there.
    """
    lists = ("thunk_sequence", "thunk_sequence_after_thunk_passes", "thunk_metadata")
    planned, final, metadata = (_only(folder, name) for name in lists)
    loop, instructions = _loop(parse(planned)), _instructions(metadata)
    found = _least(loop.parts["condition"]) + _least(loop.parts["body"])
    launches = [_launch(thunk, instructions.get(thunk.number, ""), compiled) for thunk in found]
    return Launches(launches, *_host_work(parse(final)))


def _only(folder: Path, name: str) -> str:
    texts = [text for path in folder.glob(f"*.{name}.txt") if "kWhile" in (text := path.read_text())]
    if len(texts) != 1:
        raise ValueError(f"{folder} holds {len(texts)} lists {name} with a loop, expected 1")
    return texts[0]


# ---- the list ----

_THUNK = re.compile(r"^( *)(\d+): (k\w+) +\[[^\]]*\] *([\w.-]*)")
_PART = re.compile(r"^( *)(condition|body|\w*branch\w*):$")
_CONTROL = ("kWhile", "kConditional", "kCommandBuffer", "kSequential")


def parse(text: str) -> list[Thunk]:
    """The thunks of a list, each with those that are indented below it."""
    root: Parts = {}
    above: list[tuple[int, Parts, str]] = [(-1, root, "")]  # indentation, parts, and the part that lines belong to
    for line in text.splitlines():
        if part := _PART.match(line):
            if part[2] != "condition":  # which XLA does not indent; it follows its loop at once
                while above[-1][0] > len(part[1]) - 2:
                    above.pop()
            above[-1] = (*above[-1][:2], part[2])
        elif found := _THUNK.match(line):
            thunk = Thunk(int(found[2]), found[3], found[4], {})
            while above[-1][0] >= len(found[1]):
                above.pop()
            _, parts, name = above[-1]
            parts.setdefault(name, []).append(thunk)
            above.append((len(found[1]), thunk.parts, ""))
    return root.get("", [])


def _every(thunks: Sequence[Thunk]) -> Iterator[Thunk]:
    for thunk in thunks:
        yield thunk
        for part in thunk.parts.values():
            yield from _every(part)


def _loop(thunks: Sequence[Thunk]) -> Thunk:
    """The loop that holds most."""
    loops = (thunk for thunk in _every(thunks) if thunk.kind == "kWhile")
    return max(loops, key=lambda loop: len(list(_every([loop]))))


def _least(thunks: Sequence[Thunk]) -> list[Thunk]:
    """What `thunks` launch at least, in order."""
    found = []
    for thunk in thunks:
        if thunk.kind == "kConditional":
            found += min(map(_least, thunk.parts.values()), key=len)
        elif thunk.kind in _CONTROL:
            found += [launched for part in thunk.parts.values() for launched in _least(part)]
        else:
            found.append(thunk)
    return found


def _host_work(thunks: Sequence[Thunk]) -> tuple[int, int]:
    """Waits and launches of the host in an iteration of the longest loop; none if the loop is inside a graph."""
    loop = _loop(thunks)
    if any(graph.kind == "kCommandBuffer" and loop in _every([graph]) for graph in _every(thunks)):
        return 0, 0
    waits, launched = _of_host(loop.parts["body"])
    return waits + 1, launched + len(loop.parts["condition"])


def _of_host(thunks: Sequence[Thunk]) -> tuple[int, int]:
    """Waits and launches for `thunks`: each conditional or loop outside a graph is a wait."""
    waits = launched = 0
    for thunk in thunks:
        if thunk.kind in ("kConditional", "kWhile"):
            of_parts = [_of_host(part) for part in thunk.parts.values()]
            inside = min(of_parts) if thunk.kind == "kConditional" else tuple(map(sum, zip(*of_parts, strict=True)))
            waits, launched = waits + 1 + inside[0], launched + inside[1]
        else:
            launched += 1
    return waits, launched


# ---- what each is ----

_KINDS = {  # by how XLA's kernels are called
    "gemm": "product",
    "cublas": "product",
    "triton": "reduction",
    "input_reduce": "reduction",
    "sort": "sort",
    "input_scatter": "scatter",
}


def _instructions(metadata: str) -> Mapping[int, str]:
    """The number of a thunk -> the HLO instruction that it runs."""
    infos = re.findall(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)', metadata)
    return {int(number): name for name, number in infos}


def _launch(thunk: Thunk, instruction: str, compiled: str) -> Launch:
    operation = _operation(instruction, compiled)
    layer = re.search(r"/layer_(\d+)/", operation)
    at = None if layer is None else int(layer[1])
    ends = re.sub(r"\w+\((\w+)\)", r"\1", operation).split("/")
    if thunk.kind == "kCustomCall":  # Pallas's name for it stands before the primitive's
        return Launch("Mosaic", ends[-2] if len(ends) > 1 else instruction, at, "/".join(ends[-3:-2]))
    kinds = [kind for start, kind in _KINDS.items() if thunk.kernel.startswith(start)]
    kind = "copy" if thunk.kind in ("kCopy", "kMemset") else kinds[0] if kinds else "elementwise"
    return Launch(kind, thunk.kernel or instruction, at, "/".join(ends[-2:]))


def _operation(instruction: str, compiled: str) -> str:
    """JAX's name for what an HLO instruction computes; of a fusion that has none, of the last thing that it holds."""
    if not (line := re.search(rf"^ +(?:ROOT )?%?{re.escape(instruction)} = .*", compiled, re.MULTILINE)):
        return ""
    names: list[Any] = re.findall(r'op_name="([^"]*)"', line[0])
    if not names and (called := re.search(r"calls=%?([\w.-]+)", line[0])):
        body = re.search(rf"^%?{re.escape(called[1])} .*?^\}}", compiled, re.MULTILINE | re.DOTALL)
        names = re.findall(r'op_name="([^"]*)"', body[0] if body else "")
    return names[-1] if names else ""
