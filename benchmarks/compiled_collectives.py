"""The collectives that stand in a compiled program, as the planner counts them: what its closed form is held to."""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from gptoss_jax.planner.collectives import ALWAYS, DISPATCH, DRAWN, TOP_K, TOP_LOGPROBS, TOP_P, Collective

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
SEARCH = "top-k or top-p"  # whose loops a program does not tell from one another
PASSES = 31  # of such a loop, each bit of a float that is not positive but its sign
_ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({KINDS})(-start)?\(")


def of_program(text: str) -> list[Collective]:
    """Those of a decoding or prefill program's HLO, alike ones counted together.

    Raises:
        ValueError: one that stands where none is expected.
    """
    return _together(_all(text))


def planned(found: Iterable[Collective]) -> list[Collective]:
    """Those of the planner, with the searches of top-k and top-p together."""
    return _together(each._replace(when=SEARCH) if each.when in (TOP_K, TOP_P) else each for each in found)


def _together(found: Iterable[Collective]) -> list[Collective]:
    counts: collections.Counter[Collective] = collections.Counter()
    for each in found:
        counts[each._replace(arrays=1)] += each.arrays
    return sorted(each._replace(arrays=count) for each, count in counts.items())


def _all(text: str) -> Iterator[Collective]:
    in_entry = False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            in_entry = line.startswith("ENTRY")
        if not (found := _COLLECTIVE.search(line)):
            continue
        arrays = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", found[1])
        arrays = arrays[len(arrays) // 2 :] if found[3] and found[2] != "all-reduce" else arrays  # -start: operands too
        name = re.search(r'op_name="([^"]*)"', line)
        where, when, times = _place(name[1] if name else "", in_entry)
        for kind, shape in arrays:
            size = _ITEMSIZE[kind] * math.prod(int(n) for n in shape.split(",") if n)
            yield Collective(found[2], where, when, _devices(line), size, times)


def _devices(line: str) -> int:
    """How many devices take part in each group of a collective."""
    if by_axes := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axes[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", by_axes[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(tiled[1])
    raise ValueError(f"a collective whose devices are not understood: {line.strip()[:300]}")


def _place(name: str, in_entry: bool) -> tuple[str, str, int]:
    """Where in the model a collective stands, when it runs, and how often then."""
    decodes = name.startswith("jit(decode)")
    path = re.sub(r"^jit\(\w+\)/(while/(body|cond)/)?", "", name)
    if part := re.match(r"layer_\d+/(attention|experts)/", path):
        return part[1], ALWAYS, 1
    if path == "gather":
        return "embedding", ALWAYS, 1
    branch, inside, rest = path.partition("cond/branch_1_fun/")
    if inside and not branch:
        if rest.startswith("top_k"):
            return "sampling", TOP_LOGPROBS, 1
        if rest.startswith("cond/branch_1_fun/"):
            return "sampling", SEARCH, PASSES if "while/body" in rest else 1
        return "sampling", DRAWN, 1
    if path.startswith("layer_") or "unembedding" in path:
        raise ValueError(f"a collective where the model has none: {name}")
    return "sampling", DISPATCH if decodes and in_entry else ALWAYS, 1


def difference(compiled: Iterable[Collective], closed_form: Iterable[Collective]) -> dict[str, Any]:
    """What only one of the two has."""
    one, other = set(compiled), set(closed_form)
    return {"only compiled": sorted(one - other), "only planned": sorted(other - one)}
