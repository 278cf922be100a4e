"""Servers of the Model Context Protocol as tools: each of a server's tools is a function that the model may call.

The official SDK speaks the protocol, in a thread of each server's own, over a process's streams or streamable HTTP.
"""

import asyncio
import importlib.util
import json
import re
import shlex
import tempfile
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TextIO

from gptoss_jax.errors import GptossError, one_line, shortened
from gptoss_jax.harmony import tool_schemas
from gptoss_jax.tools.tool import ToolOutput

if TYPE_CHECKING:
    from mcp import Client
    from openai_harmony import ToolDescription

START_SECONDS = 60.0
CALL_SECONDS = 60.0
_CLOSE_SECONDS = 5.0
_LISTED_TOOLS = 1000  # of one server, more than any prompt holds


def connect_all(servers: Sequence[str], *, call_seconds: float = CALL_SECONDS) -> "list[McpServer]":
    """Connects to servers; a function whose name an earlier one has gets its server's name in front.

    Raises:
        GptossError: a server that does not start or answer, or the extra is missing; none is left running then.
    """
    connected: list[McpServer] = []
    try:
        for server in servers:
            taken = {function.name for each in connected for function in each.functions}
            connected.append(McpServer(server, taken, call_seconds=call_seconds))
    except BaseException:
        for each in connected:
            each.close()
        raise
    return connected


class McpServer:
    """One server; see `gptoss_jax.tools.tool.Tool`.

    Attributes:
        name: what it calls itself, in letters that a function's name may have.
        builtin: none of its tools is.
        functions: its tools.
    """

    builtin: str | None = None

    def __init__(self, server: str, taken: Collection[str] = (), *, call_seconds: float = CALL_SECONDS):
        """Starts a server, or reaches it.

        Args:
            server: a URL, or a command and its arguments as a shell would split them.
            taken: names of functions that others have.
            call_seconds: after which a call has failed.

        Raises:
            GptossError: it does not start or answer, or its tools cannot be functions; or the extra is missing.
        """
        if importlib.util.find_spec("mcp") is None:
            raise GptossError("mcp not installed: pip install 'gptoss-jax[mcp]'")
        self._server, self._call_seconds = server, call_seconds
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._client: Client | None = None
        self._stderr: TextIO = tempfile.TemporaryFile("w+", errors="replace")  # no terminal obeys what it holds
        ready: Future[tuple[str, list[dict[str, Any]]]] = Future()
        self._thread = threading.Thread(target=self._run, args=[ready], name="mcp", daemon=True)
        self._thread.start()
        try:
            name, tools = ready.result(START_SECONDS)
            self.name = _word(name)
            self._tool_of = _functions_of(tools, taken, self.name)
            self.functions: tuple[ToolDescription, ...] = _descriptions(tools, list(self._tool_of))
        except GptossError as error:
            self.close()
            raise GptossError(f"MCP server {shortened(server)}: {error}") from None
        except TimeoutError:
            self.close()
            raise GptossError(f"MCP server {shortened(server)} did not answer within {START_SECONDS:.0f} s") from None

    def takes(self, recipient: str) -> bool:
        """Whether a call is of one of its tools."""
        return recipient.removeprefix("functions.") in self._tool_of and recipient.startswith("functions.")

    def call(self, recipient: str, arguments: str) -> ToolOutput:
        """Call the tool, and wait for what it gives."""
        try:
            given = json.loads(arguments or "{}")
        except ValueError as error:
            return ToolOutput(f"the arguments are no JSON: {error}", failed=True)
        if not isinstance(given, dict):
            return ToolOutput("the arguments are no JSON object", failed=True)
        if self._client is None:
            return ToolOutput(f"MCP server {self.name} has ended", failed=True)
        tool = self._tool_of[recipient.removeprefix("functions.")]
        given_up = 2 * self._call_seconds  # the SDK's own limit, which comes after the one that is spoken of here
        calling = self._client.call_tool(tool, given, read_timeout_seconds=given_up)
        waiting = asyncio.run_coroutine_threadsafe(calling, self._loop)
        try:
            return _output(waiting.result(self._call_seconds))
        except TimeoutError:
            waiting.cancel()
            return ToolOutput(f"MCP server {self.name} gave no answer within {self._call_seconds:g} s", failed=True)
        except Exception as error:  # whatever the SDK raises: a server that died, or broke the protocol
            what = one_line(f"{type(error).__name__} {error}".strip())
            return ToolOutput(f"MCP server {self.name}: the call failed: {what}", failed=True)

    def close(self) -> None:
        """End the process, or the connection."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(_CLOSE_SECONDS)
        self._stderr.close()

    # ---- in its own thread ----

    def _run(self, ready: "Future[tuple[str, list[dict[str, Any]]]]") -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(ready))
        except Exception as error:  # of whatever the SDK raises, people need one line
            if not ready.done():
                ready.set_exception(GptossError(one_line(self._why(error))))
        finally:
            self._client = None
            self._loop.close()

    async def _serve(self, ready: "Future[tuple[str, list[dict[str, Any]]]]") -> None:
        from mcp import Client

        async with Client(self._transport(), read_timeout_seconds=START_SECONDS) as client:
            tools, cursor = [], None
            while len(tools) < _LISTED_TOOLS:
                listed = await client.list_tools(cursor=cursor)
                tools += [
                    {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
                    for tool in listed.tools
                ]
                cursor = listed.next_cursor
                if not cursor:
                    break
            self._client = client
            info = client.server_info
            ready.set_result((info.name if info is not None else "server", tools))
            await self._closing.wait()

    def _transport(self) -> Any:
        if re.match(r"https?://", self._server):
            return self._server
        from mcp.client.stdio import StdioServerParameters, stdio_client

        try:
            command, *arguments = shlex.split(self._server)
        except ValueError as error:
            raise GptossError(f"expected a command or a URL: {error}") from None
        return stdio_client(StdioServerParameters(command=command, args=arguments), errlog=self._stderr)

    def _why(self, error: BaseException) -> str:
        """What went wrong, and the last line that the process wrote to stderr."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self._stderr.seek(0)
        said = self._stderr.read().strip().splitlines()
        why = str(error) or type(error).__name__
        return f"{why} ({said[-1]})" if said else why


def _functions_of(tools: Sequence[dict[str, Any]], taken: Collection[str], server: str) -> dict[str, str]:
    """Name of a function -> the server's tool."""
    found: dict[str, str] = {}
    for tool in tools:
        name = _word(tool["name"])
        if name in taken or name in found:
            name = f"{server}_{name}"
        if name in taken or name in found:
            raise GptossError(f"two tools are called {name!r}, expected different names: leave one server out")
        found[name] = tool["name"]
    return found


def _descriptions(tools: Sequence[dict[str, Any]], names: Sequence[str]) -> "tuple[ToolDescription, ...]":
    documents = [{**tool, "name": name} for tool, name in zip(tools, names, strict=True)]
    return tool_schemas.tools(documents) if documents else ()


def _word(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name) or "server"


def _output(result: Any) -> ToolOutput:
    """The texts of a result, and a line for each of what is none."""
    parts = [_part(part) for part in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return ToolOutput("\n".join(parts), failed=bool(result.is_error))


def _part(part: Any) -> str:
    if part.type == "text":
        return part.text
    if part.type == "resource":
        uri = part.resource.uri
        return getattr(part.resource, "text", None) or f"[a resource that is no text: {uri}]"
    if part.type == "resource_link":
        return f"[a link to {part.uri}]"
    return f"[{part.type}, {part.mime_type}: not shown here]"
