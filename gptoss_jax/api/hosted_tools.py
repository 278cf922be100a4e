"""Which of the tools that are run here a request of OpenAI's /v1/responses asks for, among its own `tools`."""

from collections.abc import Mapping
from typing import Any

from gptoss_jax.errors import GptossError, short
from gptoss_jax.tools.choice import Offer, Wanted

_TOOL_OF = {"code_interpreter": "python", "web_search": "browser", "web_search_preview": "browser"}


def wanted(fields: dict[str, Any], offer: Offer) -> Wanted | None:
    """The tools that a request asks for and that are offered, which are taken out of its `tools`; None: it has none.

    What is not offered stays, and is refused like anything else that the API does not know. `tool_choice` "none" takes
    all of them away.

    Raises:
        GptossError: an MCP server with settings of the client's.
    """
    kept, names, servers = [], list[str](), list[str]()
    tools = fields.get("tools")
    if not isinstance(tools, list):
        return None
    for tool in tools:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if name := _offered(offer, _TOOL_OF.get(str(kind))):
            names.append(name)
        elif kind == "mcp" and tool.get("server_label") in offer.servers:
            _check_server(tool)
            servers.append(tool["server_label"])
        else:
            kept.append(tool)
    fields["tools"] = kept
    if fields.get("tool_choice") == "none" or not (names or servers):
        return None
    return Wanted(tuple(dict.fromkeys(names)), tuple(dict.fromkeys(servers)))


def _offered(offer: Offer, name: str | None) -> str | None:
    """The name under which a tool is offered: python may keep its state."""
    return next((each for each in offer.names if name and each.partition(":")[0] == name), None)


def _check_server(tool: Mapping[str, Any]) -> None:
    for name in tool:
        if name not in ("type", "server_label", "server_description", "require_approval"):
            raise GptossError(f"tools, mcp: {short(name)} does not act here: the server's own settings do")
    if tool.get("require_approval", "never") != "never":
        raise GptossError("tools, mcp: require_approval is expected to be 'never': whoever runs the server approves")
