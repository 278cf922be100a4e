"""Tools and response formats in OpenAI's form -> harmony's. What is enforced of them is `gptoss_jax.grammar`'s."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from openai_harmony import ToolDescription

from gptoss_jax.errors import GptossError, short
from gptoss_jax.harmony.json_values import known_fields, model_of, needed, nonempty_list, string
from gptoss_jax.harmony.settings import GrammarFormat, ResponseFormat, Settings
from gptoss_jax.harmony.typescript import parameters_type


class StrictTool(ToolDescription):
    """A function whose arguments are held to their schema."""

    strict: Literal[True] = True


def is_strict(tool: ToolDescription) -> bool:
    """Whether calls of a function are held to its schema."""
    return isinstance(tool, StrictTool)


def tools(value: object) -> tuple[ToolDescription, ...]:
    """Function tools from a list in OpenAI's form, `{"type": "function", "function": {...}}` or the function alone.

    Raises:
        GptossError: anything else; the error names the tool.
    """
    found = tuple(_tool(document, f"tool {index}") for index, document in enumerate(nonempty_list(value, "tools")))
    Settings(tools=found)  # refuses names that it cannot take
    return found


def _tool(document: object, where: str) -> ToolDescription:
    if isinstance(document, dict) and document.get("type", "function") != "function":
        raise GptossError(
            f"{where} has type {short(document['type'])}, expected 'function'; built-in tools are a setting"
        )
    if isinstance(document, dict) and "function" in document:
        document = needed(known_fields(document, ("type", "function"), where), "function", where)
    fields = known_fields(document, ("type", "name", "description", "parameters", "strict"), where)
    strict = _flag(fields, "strict", where)
    name = needed(fields, "name", where)
    if isinstance(name, str):
        name = name.removeprefix("functions.")
    kind = StrictTool if strict else ToolDescription
    tool = model_of(kind, {"description": "", **fields, "strict": True, "name": name}, where)
    if tool.parameters is None or _takes_nothing(tool.parameters):
        return tool.model_copy(update={"parameters": None})
    parameters_type(tool.parameters, f"tool {tool.name!r}")  # refuses what it cannot write
    return tool


def _takes_nothing(parameters: Mapping[str, Any]) -> bool:
    """Whether a schema is OpenAI's way to say "no parameters"; harmony's is to have no schema."""
    empty = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    return all(key in empty and value == empty[key] for key, value in parameters.items())


def _flag(fields: Mapping[str, Any], name: str, where: str, default: bool = False) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise GptossError(f"{where}, {name}: got {short(value)}, expected true or false")
    return value


def response_format(value: object) -> ResponseFormat | GrammarFormat | None:
    """The format that a value in the form of OpenAI's `response_format` asks for; None if it asks for text.

    Of ours there are two types more: `{"type": "regex", "regex": ...}` and `{"type": "lark", "lark": ...}`.

    Raises:
        GptossError: anything else.
    """
    where = "response_format"
    fields = known_fields(value, ("type", "json_schema", "regex", "lark"), where)
    kind = fields.get("type")
    if extra := [name for name in fields if name not in ("type", kind)]:
        raise GptossError(f"{where} of type {short(kind)} has {short(extra[0])}, expected only what its type names")
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarFormat(kind)
    if kind in ("regex", "lark"):
        return GrammarFormat(kind, string(needed(fields, kind, where), f"{where}, {kind}"))
    if kind != "json_schema":
        raise GptossError(
            f"{where} has type {short(kind)}, expected 'json_schema', 'json_object', 'text', 'regex' or 'lark'"
        )
    inner = known_fields(needed(fields, "json_schema", where), ("name", "description", "schema", "strict"), where)
    schema = needed(inner, "schema", where)
    if not isinstance(schema, dict):
        raise GptossError(f"{where}, schema: got {short(schema)}, expected an object")
    description = inner.get("description")
    return ResponseFormat(
        string(needed(inner, "name", where), f"{where}, name"),
        schema,
        None if description is None else string(description, f"{where}, description"),
        _flag(inner, "strict", where, default=True),
    )


def format_document(found: ResponseFormat | GrammarFormat) -> dict[str, Any]:
    """The inverse of `response_format`."""
    if isinstance(found, GrammarFormat):
        return found.document()
    return {"type": "json_schema", "json_schema": dataclasses.asdict(found)}
