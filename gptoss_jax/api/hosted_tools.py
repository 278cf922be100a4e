"""Which of the tools that are run here a request of OpenAI's /v1/responses asks for, among its own `tools`."""

from collections.abc import Mapping
from typing import Any

from gptoss_jax.errors import GptossError, short
from gptoss_jax.tools.choice import Offer, Wanted

_TOOL_OF = {"code_interpreter": "python", "web_search": "browser", "web_search_preview": "browser"}


def wanted(fields: dict[str, Any], offer: Offer | None) -> Wanted | None:
    """The tools that a request asks for and that are offered, which are taken out of its `tools`; None: it has none.

    Other kinds of tools stay there. `tool_choice` "none" takes all away.

    Raises:
        GptossError: a tool that is not offered, or an MCP server with settings of the client's.
    """
    kept, names, servers = [], list[str](), list[str]()
    tools = fields.get("tools")
    if not isinstance(tools, list):
        return None
    for tool in tools:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind in _TOOL_OF:
            names.append(_offered(offer, kind))
        elif isinstance(tool, dict) and kind == "mcp":
            servers.append(_server(offer, tool))
        else:
            kept.append(tool)
    fields["tools"] = kept
    if fields.get("tool_choice") == "none" or not (names or servers):
        return None
    return Wanted(tuple(dict.fromkeys(names)), tuple(dict.fromkeys(servers)))


def _offered(offer: Offer | None, kind: str) -> str:
    """The name under which a tool is offered: python may keep its state."""
    name = _TOOL_OF[kind]
    for each in () if offer is None else offer.names:
        if each.partition(":")[0] == name:
            return each
    raise GptossError(f"tools: {kind} is not switched on here: whoever starts this decides (--tool {name})")


def _server(offer: Offer | None, tool: Mapping[str, Any]) -> str:
    """The name of an MCP server that is offered."""
    servers, label = () if offer is None else offer.servers, tool.get("server_label")
    if not servers:
        raise GptossError("tools: mcp is not switched on here: whoever starts this decides (--mcp SERVER)")
    if label not in servers:
        raise GptossError(f"tools, mcp: server_label is {short(label)}, expected one of {', '.join(servers)}")
    for name in tool:
        if name not in ("type", "server_label", "server_description", "require_approval"):
            raise GptossError(f"tools, mcp: {short(name)} does not act here: the server's own settings do")
    if tool.get("require_approval", "never") != "never":
        raise GptossError("tools, mcp: require_approval is expected to be 'never': whoever runs the server approves")
    return str(label)
