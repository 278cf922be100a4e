"""Which implementation of an op was taken, and why: each op's own table decides, this is how the answer looks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import cpu_kernels

CPU = "cpu"  # in every table: the C++ kernels


class Choice(NamedTuple):
    """An implementation, and why it was taken."""

    name: str
    implementation: Any
    reason: str


def by_name(op: str, implementations: Mapping[str, Any], name: str, platform: str) -> Choice:
    """The implementation of `op` called `name`, which then runs or raises: there is no fallback.

    Raises:
        ValueError: none has that name, or the C++ kernels are asked for and were not built, or not for `platform`.
    """
    if name not in implementations:
        raise ValueError(f"{op} kernel {name!r}, expected auto or one of {', '.join(implementations)}")
    if name == CPU and platform != "cpu":
        others = ", ".join(other for other in implementations if other != CPU)
        raise ValueError(
            f"{op} kernel {name!r} runs on CPUs alone, not on {platform}: expected auto or one of {others}"
        )
    if name == CPU and (missing := cpu_kernels.why_not()):
        raise ValueError(f"{op} kernel {name!r} cannot run: {missing}")
    return Choice(name, implementations[name], "asked for by name")


def best(platform: str, implementations: Mapping[str, Any], otherwise: Choice) -> Choice:
    """On CPUs the C++ kernels, if they were built (else the reason says why not); on other platforms `otherwise`."""
    if platform != "cpu":
        return otherwise
    if missing := cpu_kernels.why_not():
        return otherwise._replace(reason=f"{otherwise.reason}; slow: {missing}")
    return Choice(CPU, implementations[CPU], f"C++ for {cpu_kernels.instruction_sets()[0]}")
