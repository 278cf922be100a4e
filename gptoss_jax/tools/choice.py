"""Tools by name, as commands and servers offer them: what was chosen, checked, and made anew for each conversation.

Quick to import: what a tool needs is imported when it is made.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gptoss_jax.errors import GptossError

if TYPE_CHECKING:
    from gptoss_jax.tools.browser.backend import Backend
    from gptoss_jax.tools.browser.page import Page
    from gptoss_jax.tools.mcp import McpServer
    from gptoss_jax.tools.tool import Tool
    from gptoss_jax.tools.toolbox import Toolbox

TOOLS = ("python", "python:stateful", "browser")


@dataclass(frozen=True)
class Chosen:
    """What was chosen.

    Attributes:
        names: of TOOLS.
        browser_folder: documents for the browser; or else
        browser_hosts: hosts that it may read.
        mcp: servers, each a command line or a URL.
    """

    names: tuple[str, ...] = ()
    browser_folder: str | None = None
    browser_hosts: tuple[str, ...] = ()
    mcp: tuple[str, ...] = ()

    def __post_init__(self):
        for name in self.names:
            if name not in TOOLS:
                raise GptossError(f"tool is {name[:60]!r}, expected one of {', '.join(TOOLS)}")
        sources = bool(self.browser_folder) + bool(self.browser_hosts)
        if sources != ("browser" in self.names):
            got = "both" if sources == 2 else "none" if sources == 0 else "one without tool browser"
            raise GptossError(f"browser_folder and browser_hosts: got {got}, expected one of them beside tool browser")


class Wanted(NamedTuple):
    """Some of an offer's tools.

    Attributes:
        names: of TOOLS.
        servers: names of MCP servers.
    """

    names: tuple[str, ...]
    servers: tuple[str, ...]


class Offer:
    """Tools for any number of conversations: python's state and the browser's pages are each conversation's own.

    MCP servers are shared, and so is the index of the browser's folder.

    Attributes:
        names: what can be opened, of TOOLS.
    """

    def __init__(self, chosen: Chosen, *, max_output_characters: int):
        """Starts the MCP servers, and makes the other tools once, so that what they lack is said now.

        Raises:
            GptossError: a tool that cannot be had, or two of one name.
        """
        self._max_output_characters = max_output_characters
        self.names = chosen.names
        self._servers: list[McpServer] = []
        self._pages: Backend | None = None
        self._declared: dict[Wanted, Toolbox] = {}
        try:
            self._pages = _pages(chosen) if "browser" in chosen.names else None
            if chosen.mcp:
                from gptoss_jax.tools import mcp

                self._servers = mcp.connect_all(chosen.mcp)
            self.declared(self.all)
        except BaseException:
            self.close()
            raise

    def open(self, names: Collection[str] | None = None, servers: Collection[str] | None = None) -> "Toolbox":
        """A conversation's own tools, all of them or those of these names; close it when the conversation ends."""
        from gptoss_jax.tools.toolbox import Toolbox

        own: list[Tool] = []
        try:
            own += [self._made(name) for name in self.names if names is None or name in names]
            shared = [server for server in self._servers if servers is None or server.name in servers]
            return Toolbox(own, shared=shared, max_output_characters=self._max_output_characters)
        except BaseException:
            for tool in own:
                tool.close()
            raise

    def declared(self, wanted: Wanted) -> "Toolbox":
        """What these tools declare and take: a toolbox that is closed, so that it is not to be called."""
        if wanted not in self._declared:
            self._declared[wanted] = self.open(*wanted)
            self._declared[wanted].close()
        return self._declared[wanted]

    def _made(self, name: str) -> "Tool":
        if name == "browser":
            from gptoss_jax.tools.browser.browser_tool import BrowserTool

            assert self._pages is not None
            return BrowserTool(_SharedPages(self._pages))
        from gptoss_jax.tools.python.python_tool import PythonTool

        return PythonTool(stateful=name == "python:stateful")

    @property
    def servers(self) -> tuple[str, ...]:
        """Names of the MCP servers."""
        return tuple(server.name for server in self._servers)

    @property
    def all(self) -> Wanted:
        """Everything that is offered."""
        return Wanted(self.names, self.servers)

    def close(self) -> None:
        """Ends the MCP servers, and lets go of the browser's pages."""
        for server in self._servers:
            server.close()
        self._servers = []
        if self._pages is not None:
            self._pages.close()
            self._pages = None


def _pages(chosen: Chosen) -> "Backend":
    if chosen.browser_folder:
        from gptoss_jax.tools.browser.local_folder import LocalFolder

        return LocalFolder(Path(chosen.browser_folder))
    from gptoss_jax.tools.browser.http_backend import HttpBackend

    return HttpBackend(chosen.browser_hosts)


class _SharedPages:
    """A backend that stays open when one conversation's browser is closed."""

    def __init__(self, pages: "Backend"):
        self._pages = pages

    def search(self, query: str, limit: int) -> "Page":
        """As the backend."""
        return self._pages.search(query, limit)

    def fetch(self, url: str, *, as_source: bool) -> "Page":
        """As the backend."""
        return self._pages.fetch(url, as_source=as_source)

    def close(self) -> None:
        """Others use it still."""
