"""The collectives that stand in a compiled program, as the planner counts them: what its closed form is held to."""

import collections
import re
from collections.abc import Iterable
from typing import Any

from gptoss_jax.hlo import module, sent
from gptoss_jax.hlo.sent import Sent
from gptoss_jax.planner.collectives import ALWAYS, DISPATCH, DRAWN, TOP_K, TOP_LOGPROBS, TOP_P, Collective

SEARCH = "top-k or top-p"  # whose loops a program does not tell from one another
ELSEWHERE = "elsewhere"  # where the model as it stands has none: a strategy of one's own, or a mistake
PASSES = 31  # of such a loop, each bit of a float that is not positive but its sign


def of_program(text: str) -> list[Collective]:
    """Those of a decoding or prefill program's HLO, alike ones counted together.

    Raises:
        ValueError: one that stands where none is expected.
    """
    read = module.parse(text)
    found = sent.of_module(read)
    for each in found:
        if _place(each.op_name, in_entry=False)[0] == ELSEWHERE:
            raise ValueError(f"a collective where the model has none: {each.op_name}")
    return counted(found, read.entry)


def counted(found: Iterable[Sent], entry: str) -> list[Collective]:
    """As the planner counts them, alike ones together; `entry` is the name of the program's entry computation."""
    return _together(as_planned(each, entry) for each in found)


def as_planned(each: Sent, entry: str) -> Collective:
    """One array that is sent, as the planner writes it."""
    where, when, times = _place(each.op_name, each.computation == entry)
    if not each.op_name and each.branches:  # the compiler has lost the name, but not the place
        when = SEARCH if each.branches > 1 else DRAWN
    return Collective(each.kind, where, when, each.devices, each.bytes, times)


def planned(found: Iterable[Collective]) -> list[Collective]:
    """Those of the planner, with the searches of top-k and top-p together."""
    by_place = (each._replace(filled=1.0) for each in found)  # a program says what has room, not what is sent
    return _together(each._replace(when=SEARCH) if each.when in (TOP_K, TOP_P) else each for each in by_place)


def _together(found: Iterable[Collective]) -> list[Collective]:
    counts: collections.Counter[Collective] = collections.Counter()
    for each in found:
        counts[each._replace(arrays=1)] += each.arrays
    return sorted(each._replace(arrays=count) for each, count in counts.items())


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
        return ELSEWHERE, ALWAYS, 1
    return "sampling", DISPATCH if decodes and in_entry else ALWAYS, 1


def difference(compiled: Iterable[Collective], closed_form: Iterable[Collective]) -> dict[str, Any]:
    """What only one of the two has."""
    one, other = set(compiled), set(closed_form)
    return {"only compiled": sorted(one - other), "only planned": sorted(other - one)}
