"""The error that people can mend, and how what it says of files is kept to lines that they can read."""

import re
from collections.abc import Iterable
from typing import NamedTuple

LISTED = 8  # faults of one kind that are a line each; of more, one is shown and the others are counted
MAX_LINES = 40
MAX_LINE = 2000  # characters


class GptossError(ValueError):
    """Input that cannot be taken, or files or devices that are not what is needed. One fault per line.

    Commands print each line and exit with code 2. A ValueError that is not one of these is a bug, and keeps its
    traceback.
    """


class Fault(NamedTuple):
    """One thing that is wrong.

    Attributes:
        where: the file, and what in it.
        what: what was found, what was expected, what to do. Faults whose `what` differs in numbers only are alike.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.what}")


def listed(faults: Iterable[Fault]) -> str:
    """A line for each fault, in their order; many that are alike share one line with a count and an example."""
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        kinds.setdefault(re.sub(r"[0-9a-f]{64}|\d[\d,]*", "0", fault.what), []).append(fault)
    lines = []
    for alike in kinds.values():
        few = len(alike) <= LISTED
        lines += map(str, alike) if few else [f"{alike[0]} (and {len(alike) - 1:,} more like it)"]
    left = len(lines) - MAX_LINES
    return "\n".join(lines if left <= 0 else [*lines[:MAX_LINES], f"and {left:,} more faults of other kinds"])


def short(value: object, limit: int = 60) -> str:
    """A value for an error message: its beginning, on one line whatever it holds."""
    return shortened(one_line(repr(value)), limit)


def check_type(name: str, value: object, wanted: type) -> None:
    """Raises GptossError for a value, called `name`, of another type."""
    if not isinstance(value, wanted):
        raise GptossError(f"{name} is {short(value)}, expected {wanted.__name__}")


def check_list(name: str, values: object, of: str) -> None:
    """Raises GptossError for a text, which would be taken letter by letter, or for what cannot be iterated over."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise GptossError(f"{name} is {short(values)}, expected a list of {of}")


def check_text(text: str, what: str) -> None:
    """Raises GptossError for what Python makes of bytes that are no UTF-8, in arguments and on stdin."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GptossError(f"{what} is not valid UTF-8") from None


def shortened(name: str, limit: int = 120) -> str:
    """A name that some file chose, for an error message: its beginning."""
    return name if len(name) <= limit else f"{name[:limit]}..."


def one_line(text: str) -> str:
    """`text` with line breaks and other control characters spelled out, and cut where nobody would read on."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: MAX_LINE + 1])
    return shortened(text, MAX_LINE)
