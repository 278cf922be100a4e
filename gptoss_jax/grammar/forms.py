"""What an answer is held to: the form of its final text, which functions it may call and with what arguments."""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from gptoss_jax.errors import GptossError, short
from gptoss_jax.harmony.settings import GrammarFormat, ResponseFormat, Settings, namespace

MAX_CHARACTERS = 2**19  # of one schema or grammar, more than the longest context holds of it

_CONTROL_TOKEN = re.compile(r"<\[|<\|")

Syntax = Literal["json", "regex", "lark"]


class FormError(GptossError):
    """A form that no answer can be held to: a keyword that no grammar has, or what nothing fulfils."""


@dataclass(frozen=True)
class Body:
    """What the text of one message has to be.

    Attributes:
        syntax: how `text` says it.
        text: a JSON schema, a regular expression of the whole text, or a Lark grammar with a rule `start`.
        where: what errors call it.
        lenient: keywords that cannot be enforced are passed over, where else they are refused.
    """

    syntax: Syntax
    text: str
    where: str
    lenient: bool = False

    def __post_init__(self):
        if len(self.text) > MAX_CHARACTERS:
            raise FormError(
                f"{self.where} has {len(self.text)} characters, expected at most {MAX_CHARACTERS}: shorten it"
            )
        if self.syntax == "lark" and _CONTROL_TOKEN.search(self.text):
            raise FormError(f"{self.where} names a control token, expected text only: take it out")


@dataclass(frozen=True)
class AnswerForm:
    """What a whole answer is held to. Reasoning is free, and so are preambles where there is something to call.

    Attributes:
        final: of the final message; "free": any text; None: there has to be a call.
        calls: functions that may be called, with their arguments.
        builtin_tools: those that may be called, as calls name them.
    """

    final: Body | Literal["free"] | None = "free"
    calls: tuple[tuple[str, Body], ...] = ()
    builtin_tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class ToolChoice:
    """Which tools an answer may or has to call.

    Attributes:
        required: whether it has to call one.
        names: of functions, those that it may call; None: all.
    """

    required: bool = False
    names: tuple[str, ...] | None = None


AUTO = ToolChoice()


def tool_choice(value: object, where: str = "tool_choice") -> ToolChoice:
    """A choice in the form of either of OpenAI's interfaces. "none" is no choice: who asks for it leaves tools out.

    Raises:
        GptossError: anything else.
    """
    if value in ("auto", "required"):
        return ToolChoice(required=value == "required")
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind == "function":
        return ToolChoice(required=True, names=(_function_name(value, where),))
    if isinstance(value, dict) and kind == "allowed_tools":
        inner = value.get("allowed_tools", value)
        mode, tools = (inner.get(key) if isinstance(inner, dict) else None for key in ("mode", "tools"))
        if mode in ("auto", "required") and isinstance(tools, list) and tools:
            return ToolChoice(mode == "required", tuple(_function_name(tool, where) for tool in tools))
    raise GptossError(
        f"{where} is {short(value)}, expected 'auto', 'none', 'required', "
        '{"type": "function", "function": {"name": ...}} or {"type": "allowed_tools", ...}'
    )


def _function_name(value: Any, where: str) -> str:
    named = value.get("function", value) if isinstance(value, dict) else None
    name = named.get("name") if isinstance(named, dict) else None
    if not isinstance(name, str) or not name:
        raise GptossError(f"{where} is {short(value)}, expected the name of a function")
    return name.removeprefix("functions.")


def choice_document(choice: ToolChoice) -> Any:
    """A choice for JSON, as `tool_choice` takes it back."""
    if choice.names is None:
        return "required" if choice.required else "auto"
    tools = [{"type": "function", "name": name} for name in choice.names]
    if choice.required and len(tools) == 1:
        return tools[0]
    return {"type": "allowed_tools", "mode": "required" if choice.required else "auto", "tools": tools}


def answer_form(settings: Settings, choice: ToolChoice = AUTO) -> AnswerForm | None:
    """What settings and a choice of tools hold an answer to; None: nothing.

    A response format holds the final message, and each strict function its arguments. The arguments of others are
    held to their schemas as far as these can be, once there is something to hold.

    Raises:
        GptossError: a choice of functions that are not there.
    """
    names = [tool.name for tool in settings.tools]
    for name in choice.names or ():
        if name not in names:
            expected = f"one of {', '.join(names)}" if names else "functions to choose from"
            raise GptossError(f"tool_choice names {short(name)}, expected {expected}")
    if choice.required and not names:
        raise GptossError("tool_choice asks for a call, but there are no functions: give some, or leave it out")
    if settings.response_format is None and choice == AUTO and not any(map(_is_strict, settings.tools)):
        return None
    chosen = [tool for tool in settings.tools if choice.names is None or tool.name in choice.names]
    free_to_answer = "free" if settings.response_format is None else _final(settings.response_format)
    return AnswerForm(
        final=None if choice.required else free_to_answer,
        calls=tuple((tool.name, _arguments(tool)) for tool in chosen),
        builtin_tools=() if choice != AUTO else tuple(map(namespace, settings.builtin_tools)),
    )


def _final(response_format: ResponseFormat | GrammarFormat) -> Body:
    if isinstance(response_format, ResponseFormat):
        return _schema(response_format.schema, "response_format, schema", lenient=not response_format.strict)
    if response_format.type == "json_object":
        return _schema({"type": "object"}, "response_format")
    return Body(response_format.type, response_format.grammar, f"response_format, {response_format.type}")


def _arguments(tool: Any) -> Body:
    schema = tool.parameters or {"type": "object", "additionalProperties": False}
    return _schema(schema, f"tool {tool.name!r}, parameters", lenient=not _is_strict(tool))


def _schema(schema: Any, where: str, *, lenient: bool = False) -> Body:
    try:
        return Body("json", json.dumps(schema, ensure_ascii=False, separators=(",", ":")), where, lenient)
    except RecursionError:
        raise FormError(f"{where} is nested too deeply, expected less") from None


def _is_strict(tool: Any) -> bool:
    from gptoss_jax.harmony.tool_schemas import is_strict  # where there are tools only: it needs openai-harmony

    return is_strict(tool)
