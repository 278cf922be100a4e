"""The built-in browser tool: search, open and find, over pages that are numbered as they are shown."""

import dataclasses
import json
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from gptoss_jax.errors import one_line, short
from gptoss_jax.tools.browser.backend import Backend
from gptoss_jax.tools.browser.page import BrowserError, Page, found
from gptoss_jax.tools.tool import ToolOutput

if TYPE_CHECKING:
    from openai_harmony import ToolDescription

_MAX_RESULTS, _MAX_PAGES = 20, 1000
_SOURCE = "view-source:"
_LINES_ABOVE = 4  # of the place that a link names
_ARGUMENTS = {  # of each call, with their defaults; ... has to be given
    "search": {"query": ..., "topn": 10, "top_n": 10, "source": ""},
    "open": {"id": -1, "cursor": -1, "loc": -1, "num_lines": -1, "view_source": False, "source": ""},
    "find": {"pattern": ..., "cursor": -1},
}


class BrowserTool:
    """OpenAI's browser for models, over any backend. One conversation each, since pages have numbers.

    Args:
        backend: where pages come from; closed with the tool.
        max_characters: of what a call shows, its heading aside; 4,096 are about the 1,024 tokens of OpenAI's.
    """

    builtin: str | None = "browser"
    functions: "tuple[ToolDescription, ...]" = ()

    def __init__(self, backend: Backend, *, max_characters: int = 4096):
        self._backend, self._max_characters = backend, max_characters
        self._one_call = threading.Lock()
        self.pages: list[Page] = []  # by their cursors

    def takes(self, recipient: str) -> bool:
        """Whether a call is for the browser."""
        return recipient == "browser" or recipient.startswith("browser.")

    def call(self, recipient: str, arguments: str) -> ToolOutput:
        """Search, open or find."""
        function = recipient.partition(".")[2]
        try:
            given = _read(function, arguments)
            with self._one_call:
                return ToolOutput(getattr(self, f"_{function}")(**given))
        except BrowserError as error:
            return ToolOutput(one_line(str(error)), failed=True)

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()

    def _search(self, query: str, topn: int, top_n: int, source: str) -> str:
        del source  # one backend, one source
        limit = topn if topn != _ARGUMENTS["search"]["topn"] else top_n
        return self._shown(self._backend.search(query, min(max(1, limit), _MAX_RESULTS)), 0)

    def _open(self, id: int | str, cursor: int, loc: int, num_lines: int, view_source: bool, source: str) -> str:
        del source
        if isinstance(id, str):
            page, line = self._fetched(id, view_source), 0
        else:
            page, line = self._followed(self._page(cursor), id, view_source)
        return self._shown(page, loc if loc >= 0 else line, num_lines)

    def _find(self, pattern: str, cursor: int) -> str:
        page = self._page(cursor)
        if page.is_results:
            raise BrowserError("Cannot run `find` on search results page or find results page")
        return self._shown(found(page, pattern), 0)

    def _followed(self, page: Page, id: int, view_source: bool) -> tuple[Page, int]:
        """The page of a link, or the same page for none, and the line to begin with."""
        if id < 0:
            return (self._fetched(page.url, view_source) if view_source else page), 0
        if id not in page.links:
            raise BrowserError(f"Invalid link id `{id}`.")
        link = page.links[id]
        line = link.line or 0
        known = (
            next((page for page in self.pages if page.url == link.url), None) if link.url and not view_source else None
        )
        return known or self._fetched(link.url, view_source), line - _LINES_ABOVE if line > _LINES_ABOVE else line

    def _fetched(self, url: str, view_source: bool) -> Page:
        """A page, or with a prefix as its URL has it since browsers do, its source."""
        plain_url = url.removeprefix(_SOURCE)
        if not view_source and plain_url == url:
            return self._backend.fetch(url, as_source=False)
        page = self._backend.fetch(plain_url, as_source=True)
        return dataclasses.replace(page, url=f"{_SOURCE}{page.url}")

    def _page(self, cursor: int) -> Page:
        if not self.pages:
            raise BrowserError("No pages to access!")
        if not -1 <= cursor < len(self.pages):
            raise BrowserError(
                f"Cursor `{cursor}` is out of range. Available cursor indices: [0 - {len(self.pages) - 1}]."
            )
        return self.pages[cursor]

    def _shown(self, page: Page, first: int, num_lines: int = -1) -> str:
        """A page from a line on, as far as the bound allows; it gets the next cursor."""
        lines = page.lines
        if first >= len(lines):
            raise BrowserError(
                f"Invalid location parameter: `{first}`. Cannot exceed page maximum of {len(lines) - 1}."
            )
        if len(self.pages) >= _MAX_PAGES:
            raise BrowserError(f"{_MAX_PAGES:,} pages have been opened, which is the most")
        wanted = lines[first : first + num_lines] if num_lines > 0 else lines[first:]
        shown, left = [], self._max_characters
        for number, line in enumerate(wanted, start=first):
            shown.append(f"L{number}: {line}")
            left -= len(shown[-1]) + 1
            if left <= 0:
                break
        self.pages.append(page)
        domain = f" ({_short(unquote(page.url))})" if page.url else ""
        scrollbar = f"**viewing lines [{first} - {first + len(shown) - 1}] of {len(lines) - 1}**"
        return f"[{len(self.pages) - 1}] {_short(page.title)}{domain}\n{scrollbar}\n\n" + "\n".join(shown)


def _short(text: str, limit: int = 256) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _read(function: str, arguments: str) -> dict[str, Any]:
    """A call's arguments over their defaults, with the types of these."""
    if function not in _ARGUMENTS:
        raise BrowserError(f"Unknown function: {short(function)}; there are {', '.join(_ARGUMENTS)}")
    try:
        given = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise BrowserError(f"Invalid function arguments: {short(arguments)}, expected a JSON object")
    expected = _ARGUMENTS[function]
    if unknown := given.keys() - expected:
        raise BrowserError(f"{function} has no argument {short(min(unknown))}; it takes {', '.join(expected)}")
    if missing := [name for name, default in expected.items() if default is ... and given.get(name) is None]:
        raise BrowserError(f"{function} needs {missing[0]}")
    return {
        name: default if given.get(name) is None else _typed(name, given[name], default)
        for name, default in expected.items()
    }


def _typed(name: str, value: Any, default: Any) -> Any:
    if isinstance(value, str) and (name == "id" or default is ... or isinstance(default, str)):
        return int(value) if name == "id" and value.isdecimal() and len(value) < 10 else value
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
    elif isinstance(default, int) and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) < 1e9 and value == int(value):
            return int(value)
    kind = (
        "text"
        if default is ... or isinstance(default, str)
        else "true or false"
        if isinstance(default, bool)
        else "a number"
    )
    raise BrowserError(f"{name} is {short(value)}, expected {kind}")
