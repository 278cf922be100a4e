"""Calls that were carried out here, as items and events of OpenAI's /v1/responses."""

import json
from collections.abc import Mapping
from typing import Any

from gptoss_jax.api.openai_fields import made_id
from gptoss_jax.api.response_items import SEARCH_RESULT
from gptoss_jax.tools.rounds import Call
from gptoss_jax.tools.tool import ToolOutput

Events = list[tuple[str, dict[str, Any]]]
"""Types of events, and their fields."""


class CallItem:
    """One call that is carried out.

    Attributes:
        id: of the item.
    """

    def __init__(self, call: Call, response_id: str, place: int, servers: Mapping[str, str]):
        """A call.

        Args:
            call: as the model wrote it.
            response_id: the response's own part of its id.
            place: its number among the response's calls.
            servers: function -> the MCP server that it is of.
        """
        self._call, self._name = call, call.recipient.removeprefix("functions.")
        self._server = servers.get(self._name, "")
        self._kind = {"python": "code_interpreter", "browser": "web_search"}.get(call.recipient.split(".")[0], "mcp")
        prefix = {"code_interpreter": "ci", "web_search": "ws", "mcp": "mcp"}[self._kind]
        self._response_id = response_id
        self.id = made_id(prefix, response_id, place)

    def document(self, output: ToolOutput | None) -> dict[str, Any]:
        """The item; None: the tool is at work."""
        status = "in_progress" if output is None else "failed" if output.failed else "completed"
        head = {"type": f"{self._kind}_call", "id": self.id, "status": status}
        match self._kind:
            case "code_interpreter":
                logs = None if output is None else [{"type": "logs", "logs": output.text}]
                container = made_id("cntr", self._response_id)
                return {**head, "code": self._call.arguments, "container_id": container, "outputs": logs}
            case "web_search":
                item = {**head, "action": _action(self._call)}
                if output is None:
                    return item
                return {**item, SEARCH_RESULT: {**self._call.document(), "output": output.text}}
            case _:
                failed = output is not None and output.failed
                text = None if output is None else output.text
                return {
                    **head,
                    "name": self._name,
                    "arguments": self._call.arguments,
                    "server_label": self._server,
                    "output": None if failed else text,
                    "error": text if failed else None,
                }

    def begun(self) -> Events:
        """Events between the item's beginning and the tool's work."""
        text = self._call.arguments
        match self._kind:
            case "code_interpreter":
                return [
                    ("response.code_interpreter_call.in_progress", {}),
                    ("response.code_interpreter_call_code.delta", {"delta": text}),
                    ("response.code_interpreter_call_code.done", {"code": text}),
                    ("response.code_interpreter_call.interpreting", {}),
                ]
            case "web_search":
                return [("response.web_search_call.in_progress", {}), ("response.web_search_call.searching", {})]
            case _:
                return [
                    ("response.mcp_call.in_progress", {}),
                    ("response.mcp_call_arguments.delta", {"delta": text}),
                    ("response.mcp_call_arguments.done", {"arguments": text}),
                ]

    def ended(self, output: ToolOutput) -> Events:
        """Events between the tool's work and the item's end; OpenAI has a failure of MCP's only."""
        failed = output.failed and self._kind == "mcp"
        return [(f"response.{self._kind}_call.{'failed' if failed else 'completed'}", {})]


def _action(call: Call) -> dict[str, Any]:
    """What the browser was asked, as far as the model's arguments say it."""
    try:
        given = json.loads(call.arguments or "{}")
    except ValueError:
        given = {}
    fields = given if isinstance(given, dict) else {}
    match call.recipient:
        case "browser.open":
            return {"type": "open_page", "url": str(fields.get("id", ""))}
        case "browser.find":
            return {"type": "find_in_page", "pattern": str(fields.get("pattern", "")), "url": ""}
        case _:
            return {"type": "search", "query": str(fields.get("query", "")), "queries": [str(fields.get("query", ""))]}
