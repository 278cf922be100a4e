"""Tools by name, as commands and servers offer them: what was chosen, checked, and made anew for each conversation.

Quick to import: what a tool needs is imported when it is made.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_jax.errors import GptossError

if TYPE_CHECKING:
    from gptoss_jax.tools.tool import Tool
    from gptoss_jax.tools.toolbox import Toolbox


@dataclass(frozen=True)
class Chosen:
    """What was chosen.

    Attributes:
        names: of TOOLS.
        browser_folder: pages for the browser to search; or else
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


def _python(chosen: Chosen) -> "Tool":
    from gptoss_jax.tools.python import PythonTool

    return PythonTool(stateful=False)


def _stateful_python(chosen: Chosen) -> "Tool":
    from gptoss_jax.tools.python import PythonTool

    return PythonTool(stateful=True)


def _browser(chosen: Chosen) -> "Tool":
    from gptoss_jax.tools.browser import BrowserTool, HttpBackend, LocalFolder

    folder = chosen.browser_folder
    return BrowserTool(LocalFolder(folder) if folder else HttpBackend(chosen.browser_hosts))


TOOLS: Mapping[str, Callable[[Chosen], "Tool"]] = {
    "python": _python,
    "python:stateful": _stateful_python,
    "browser": _browser,
}


class Offer:
    """Tools for any number of conversations: MCP servers are shared, all else each conversation has of its own.

    Attributes:
        names: what can be opened, of TOOLS.
        servers: names of MCP servers.
    """

    def __init__(self, chosen: Chosen, *, max_output_characters: int):
        """Starts the MCP servers, and makes the other tools once, so that what they lack is said now.

        Raises:
            GptossError: a tool that cannot be had, or two of one name.
        """
        self._chosen, self._max_output_characters = chosen, max_output_characters
        self.names = chosen.names
        self._shared: list[Tool] = []
        try:
            if chosen.mcp:
                from gptoss_jax.tools import mcp

                self._shared += mcp.connect_all(chosen.mcp)
            self.open().close()
        except BaseException:
            self.close()
            raise

    def open(self, names: Collection[str] | None = None, servers: Collection[str] | None = None) -> "Toolbox":
        """A conversation's own tools, all of them or those of these names; close it when the conversation ends."""
        from gptoss_jax.tools.toolbox import Toolbox

        own: list[Tool] = []
        try:
            for name in self.names:
                if names is None or name in names:
                    own.append(TOOLS[name](self._chosen))
            shared = [tool for tool in self._shared if servers is None or getattr(tool, "name", "") in servers]
            return Toolbox(own, shared=shared, max_output_characters=self._max_output_characters)
        except BaseException:
            for tool in own:
                tool.close()
            raise

    @property
    def servers(self) -> tuple[str, ...]:
        """Names of the MCP servers."""
        return tuple(getattr(tool, "name", "") for tool in self._shared)

    def close(self) -> None:
        """Ends the MCP servers."""
        for tool in self._shared:
            tool.close()
        self._shared = []
