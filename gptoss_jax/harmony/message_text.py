"""The text that stands in a message between its control tokens, as openai-harmony writes it. Knows no ids.

The source is openai/harmony's src/encoding.rs; tests compare every part of it with the library.
"""

from collections.abc import Iterator, Mapping, Sequence

from openai_harmony import DeveloperContent, Message, Role, SystemContent, TextContent, ToolDescription
from openai_harmony import ToolNamespaceConfig as Namespace

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.typescript import comment_lines, parameters_type


def author(message: Message) -> list[str]:
    """The parts of the header's first word: a tool's name stands where others have their role."""
    role, name = message.author.role, message.author.name
    if role is Role.TOOL:
        return [name or ""]
    return [role.value] if name is None else [role.value, f":{name}"]


def body(message: Message, *, has_functions: bool) -> str:
    r"""The content, as one text: tokens may reach across the seams of its parts (".\n\n" is one).

    Args:
        message: any message.
        has_functions: whether the conversation has function tools, which a system message mentions.

    Raises:
        GptossError: a tool whose schema is none.
    """
    return "".join(_part(part, has_functions) for part in message.content)


def has_functions(message: Message) -> bool:
    """Whether the message brings function tools."""
    namespaces = [part.tools or {} for part in message.content if isinstance(part, DeveloperContent)]
    return any("functions" in tools and tools["functions"].tools for tools in namespaces)


def _part(part: object, has_functions: bool) -> str:
    if isinstance(part, TextContent):
        return part.text
    if isinstance(part, SystemContent):
        return "\n\n".join(_system(part, has_functions))
    if isinstance(part, DeveloperContent):
        return "\n\n".join(_developer(part))
    raise GptossError(f"a message holds a {type(part).__name__}, expected text, system or developer content")


def _system(content: SystemContent, has_functions: bool) -> Iterator[str]:
    facts = {
        "{}": content.model_identity,
        "Knowledge cutoff: {}": content.knowledge_cutoff,
        "Current date: {}": content.conversation_start_date,
    }
    if known := [line.format(value) for line, value in facts.items() if value is not None]:
        yield "\n".join(known)
    if content.reasoning_effort is not None:
        yield f"Reasoning: {content.reasoning_effort.value.lower()}"
    if content.tools:
        yield _tools(content.tools)
    channels = content.channel_config
    if channels and channels.valid_channels:
        line = f"# Valid channels: {', '.join(channels.valid_channels)}."
        if channels.channel_required:
            line += " Channel must be included for every message."
        if has_functions:
            line += "\nCalls to these tools must go to the commentary channel: 'functions'."
        yield line


def _developer(content: DeveloperContent) -> Iterator[str]:
    if content.instructions is not None:
        yield f"# Instructions\n\n{content.instructions}"
    if content.tools:
        yield _tools(content.tools)


def _tools(namespaces: Mapping[str, Namespace]) -> str:
    sections = ["\n".join(_namespace(namespaces[key])) for key in sorted(namespaces)]
    return "\n\n".join(["# Tools", *sections])


def _namespace(namespace: Namespace) -> Iterator[str]:
    yield f"## {namespace.name}\n"
    comment = "// " if namespace.tools else ""
    yield from (comment + line for line in _lines(namespace.description))
    if namespace.tools:
        yield f"namespace {namespace.name} {{\n"
        for tool in namespace.tools:
            yield from _tool(tool)
        yield f"}} // namespace {namespace.name}"


def _tool(tool: ToolDescription) -> Sequence[str]:
    parameters = ""
    if tool.parameters is not None:
        parameters = f"_: {parameters_type(tool.parameters, f'tool {tool.name!r}')}"
    return [*(f"// {line}" for line in _lines(tool.description)), f"type {tool.name} = ({parameters}) => any;\n"]


def _lines(description: str | None) -> list[str]:
    """As of any comment, but an empty description is none, while an empty comment of a schema is a line."""
    return comment_lines(description) if description else []
