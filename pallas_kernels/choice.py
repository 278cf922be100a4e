"""Which implementation of an op was taken, and why: each op's own table decides, this is how the answer looks."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """An implementation, and why it was taken."""

    name: str
    implementation: Any
    reason: str


def by_name(op: str, implementations: Mapping[str, Any], name: str) -> Choice:
    """The implementation of `op` called `name`, which then runs or raises: there is no fallback.

    Raises:
        ValueError: none has that name.
    """
    if name not in implementations:
        raise ValueError(f"{op} kernel {name!r}, expected auto or one of {', '.join(implementations)}")
    return Choice(name, implementations[name], "asked for by name")
