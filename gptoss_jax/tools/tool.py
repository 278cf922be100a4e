"""What a model may call while it answers: one interface for the python tool, the browser and MCP servers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from openai_harmony import ToolDescription

MOST_ROUNDS = 20  # how often a model's calls are carried out for one prompt, unless somebody says otherwise


@dataclass(frozen=True)
class ToolOutput:
    """What a call gave.

    Attributes:
        text: what the model is to read, already bounded in length. It is data: control tokens in it are text.
        failed: the call came to nothing, and `text` says why in one line.
    """

    text: str
    failed: bool = False


@runtime_checkable
class Tool(Protocol):
    """Something a model calls. A call's mistakes are outputs (`failed`), so that the model can mend them."""

    @property
    def builtin(self) -> str | None:
        """The name under `harmony.settings.BUILTIN_TOOLS` that the system message declares; None for functions."""
        ...

    @property
    def functions(self) -> "tuple[ToolDescription, ...]":
        """What the developer message declares; () for a built-in tool."""
        ...

    def takes(self, recipient: str) -> bool:
        """Whether a call to `recipient` ("python", "browser.open", "functions.NAME") is this tool's."""
        ...

    def call(self, recipient: str, arguments: str) -> ToolOutput:
        """Answer one call; it blocks, and ends within the tool's own time limit.

        Args:
            recipient: as in the call's header.
            arguments: the call's text as the model wrote it: JSON of functions and the browser, source code of python.
        """
        ...

    def close(self) -> None:
        """Stop what the tool started: processes, connections, files. Called once, also after a failure."""
        ...
