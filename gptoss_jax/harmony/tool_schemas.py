"""Tools and response formats in OpenAI's form -> harmony's. They stand in the prompt; nothing enforces a schema."""

from collections.abc import Mapping
from typing import Any

from openai_harmony import ToolDescription

from gptoss_jax.errors import GptossError, short
from gptoss_jax.harmony.json_values import known_fields, model_of, needed, nonempty_list, string
from gptoss_jax.harmony.settings import ResponseFormat, Settings
from gptoss_jax.harmony.typescript import parameters_type


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
    _not_strict(fields, where)
    name = needed(fields, "name", where)
    if isinstance(name, str):
        name = name.removeprefix("functions.")
    tool = model_of(ToolDescription, {"description": "", **fields, "name": name}, where)
    if tool.parameters is None or _takes_nothing(tool.parameters):
        return tool.model_copy(update={"parameters": None})
    parameters_type(tool.parameters, f"tool {tool.name!r}")  # refuses what it cannot write
    return tool


def _takes_nothing(parameters: Mapping[str, Any]) -> bool:
    """Whether a schema is OpenAI's way to say "no parameters"; harmony's is to have no schema."""
    empty = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    return all(key in empty and value == empty[key] for key, value in parameters.items())


def _not_strict(fields: Mapping[str, Any], where: str) -> None:
    if fields.get("strict"):
        raise GptossError(f"{where} asks for strict, but here a schema stands in the prompt only: leave strict out")


def response_format(value: object) -> ResponseFormat | None:
    """The format that a value in the form of OpenAI's `response_format` asks for; None if it asks for text.

    Raises:
        GptossError: anything else.
    """
    where = "response_format"
    fields = known_fields(value, ("type", "json_schema"), where)
    if fields == {"type": "text"}:
        return None
    if fields.get("type") != "json_schema":
        raise GptossError(f"{where} has type {short(fields.get('type'))}, expected 'json_schema' or 'text'")
    inner = known_fields(needed(fields, "json_schema", where), ("name", "description", "schema", "strict"), where)
    _not_strict(inner, where)
    schema = needed(inner, "schema", where)
    if not isinstance(schema, dict):
        raise GptossError(f"{where}, schema: got {short(schema)}, expected an object")
    description = inner.get("description")
    name = string(needed(inner, "name", where), f"{where}, name")
    return ResponseFormat(name, schema, None if description is None else string(description, f"{where}, description"))
