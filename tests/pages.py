"""What pages show: scripts, and what these print by the page's own words."""

import re
import textwrap
from typing import NamedTuple

from tests.goldens.make import ROOT

_SCRIPT = re.compile(r"```python\n(.*?)```\n+prints(?: `(.+?)`|[^\n]*\n\n((?:    [^\n]*\n|\n)+))", re.DOTALL)


class Shown(NamedTuple):
    """A script of a page, and the lines that it prints."""

    script: str
    prints: list[str]


def text(name: str) -> str:
    """A page of docs."""
    return (ROOT / "docs" / name).read_text()


def scripts(name: str) -> list[Shown]:
    """All scripts of a page; each is followed by "prints" and what it prints."""
    page = text(name)
    found = [Shown(script, lines(inline or textwrap.dedent(block))) for script, inline, block in _SCRIPT.findall(page)]
    assert len(found) == page.count("```python"), f"a script of {name} does not say what it prints"
    return found


def lines(said: str) -> list[str]:
    """Without spaces at their ends, which no page shows."""
    return [line.rstrip() for line in said.strip().splitlines()]
