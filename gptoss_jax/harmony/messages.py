"""Conversations from JSON: OpenAI-style chat and harmony's own; tools, tool results, response formats. Knows no jax."""

import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from openai_harmony import Author, DeveloperContent, Message, Role, SystemContent, TextContent, ToolDescription
from openai_harmony import ToolNamespaceConfig as Namespace
from pydantic import BaseModel, ValidationError

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import parser, render
from gptoss_jax.harmony.settings import ResponseFormat, Settings

MAX_FILE_BYTES = 64 * 2**20  # a hundred times what the longest context holds
MAX_DEPTH = 64  # the library takes no more than 128, each message adding some

Model = TypeVar("Model", bound=BaseModel)

_DOCUMENT_KEYS = ("messages", "tools", "response_format", "reasoning_effort")
_HARMONY_KEYS = ("role", "name", "content", "channel", "recipient", "content_type")
_ONLY_HARMONY_KEYS = {"channel", "recipient", "content_type"}
_PARTS = {"text": TextContent, "system_content": SystemContent, "developer_content": DeveloperContent}
_REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")  # OpenRouter's and vLLM's, DeepSeek's, Ollama's
_CHAT_KEYS = {
    "system": ("content",),
    "developer": ("content",),
    "user": ("content", "name"),
    "assistant": ("content", "refusal", *_REASONING_KEYS, "tool_calls", "function_call"),
    "tool": ("content", "tool_call_id", "name", "tool_name"),  # tool_name is Ollama's
    "function": ("content", "name"),  # OpenAI's, before there were tools
}
_INSTRUCTING = ("system", "developer")
_ANSWERING = ("tool", "function")
_CONSTRAIN = "<|constrain|>"


@dataclass(frozen=True)
class Conversation:
    """A conversation as a file holds it.

    Attributes:
        messages: in harmony's terms.
        settings: fields of `Settings` that the file sets: `dataclasses.replace(settings, **conversation.settings)`.
        call_ids: index of a tool call in `messages` -> its id, where the file gave one; harmony has none.
    """

    messages: tuple[Message, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    call_ids: Mapping[int, str] = field(default_factory=dict)


def read_messages(path: str | Path) -> Conversation:
    """The conversation in a JSON file; `from_json` says which forms it may have.

    Raises:
        OSError: the file cannot be read.
        GptossError: it holds no conversation; the error names the file and the message.
    """
    with _naming(path):
        return from_json(_load(path))


def read_tools(path: str | Path) -> tuple[ToolDescription, ...]:
    """The function tools in a JSON file: a list in OpenAI's form, `{"type": "function", "function": {...}}` or bare.

    Raises:
        OSError: the file cannot be read.
        GptossError: it holds something else; the error names the file and the tool.
    """
    with _naming(path):
        return _tools(_load(path))


def read_response_format(path: str | Path) -> ResponseFormat | None:
    """The response format in a JSON file, in the form that OpenAI's `response_format` has; None if it asks for text.

    Raises:
        OSError: the file cannot be read.
        GptossError: it holds something else; the error names the file.
    """
    with _naming(path):
        return _response_format(_load(path))


def read_tool_results(path: str | Path, conversation: Conversation) -> list[Message]:
    """`tool_results` of what a JSON file holds.

    Raises:
        OSError: the file cannot be read.
        GptossError: as `tool_results`; the error names the file.
    """
    with _naming(path):
        return tool_results(_load(path), conversation)


def tool_results(rows: object, conversation: Conversation) -> list[Message]:
    """Messages that answer the conversation's waiting calls, in the calls' order.

    Args:
        rows: a list of `{"name": ..., "content": ...}`, with `tool_call_id` in place of or beside the name; a single
            waiting call needs neither. Content that is not text is written as JSON.
        conversation: the one that waits.

    Raises:
        GptossError: a result that no call waits for, or a call left without one.
    """
    answers = []
    for index, row in enumerate(_list(rows, "tool results")):
        where = f"result {index}"
        said = _said(row, ("tool_call_id", "name", "content"), where)
        content = row.get("content") if isinstance(row, dict) else None  # an empty list is a result
        if content is None:
            raise GptossError(f"{where} has no 'content'")
        answers.append(_Answer(where, said, _json_text(content)))
    return _answer(answers, conversation.messages, conversation.call_ids)


def from_json(document: object) -> Conversation:
    """The conversation in a JSON value that is already read.

    Either form is taken as a list of messages or as an object with the list under "messages", beside it perhaps
    "tools", "response_format" and "reasoning_effort"; or either of these under "conversation", whatever else stands
    in that object. In a message, a key whose value is null or an empty list counts as absent.

    OpenAI-style chat: system and developer messages in front are the instructions; reasoning goes to the analysis
    channel, the text beside tool calls to commentary (a preamble), other text of the assistant to final.
    Harmony's own, as `openai_harmony.Conversation.to_json` and `to_json` write it: recognised by a channel,
    recipient or content_type, or by system or developer content.

    Raises:
        GptossError: anything else. Nothing is ignored that would change the meaning.
    """
    _check_value(document, "the file")
    if isinstance(document, dict) and "conversation" in document:
        if "messages" in document:
            raise GptossError("the file holds both 'conversation' and 'messages', expected one of them")
        document = document["conversation"]
    said = {"messages": document} if isinstance(document, list) else _said(document, _DOCUMENT_KEYS, "the file")
    rows = _list(_needed(said, "messages", "the file"), "messages")
    settings = _settings(said)
    if any(map(_is_harmony, rows)):
        messages = [_harmony_message(row, f"message {index}") for index, row in enumerate(rows)]
        return Conversation(tuple(messages), settings)
    conversation = _chat(rows)
    settings |= conversation.settings
    return Conversation(conversation.messages, settings, conversation.call_ids)


def to_json(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Harmony's JSON for messages, which `from_json` takes back unchanged.

    What is absent is written as null: openai-harmony would put its own defaults there when it reads the message.
    """
    return [
        {
            "role": message.author.role.value,
            "name": message.author.name,
            "channel": message.channel,
            "recipient": message.recipient,
            "content_type": message.content_type,
            "content": [{"type": part.to_dict()["type"], **part.model_dump(mode="json")} for part in message.content],
        }
        for message in messages
    ]


def user(text: str) -> Message:
    """What a user says.

    Raises:
        GptossError: nothing, or what is no text.
    """
    check_text(text, "the prompt")
    if not text.strip():
        raise GptossError("the prompt is empty, expected text")
    return Message.from_role_and_content(Role.USER, text)


def check_text(text: str, what: str) -> None:
    """Raises GptossError for what Python makes of bytes that are no UTF-8, in arguments and on stdin."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise GptossError(f"{what} is not valid UTF-8")


def check_can_write(path: str | Path) -> None:
    """Raises GptossError where `write_messages` could not write: asked before an answer, rather than after it."""
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise GptossError(f"cannot write {path}: expected a file name in a folder that exists and can be written to")


def write_messages(path: str | Path, messages: Sequence[Message]) -> None:
    """Writes messages for `read_messages`, whole or not at all.

    Raises:
        OSError: the file cannot be written; what was there before is still there.
    """
    unfinished = Path(f"{path}.partial")
    unfinished.write_text(json.dumps(to_json(messages), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def from_parsed(messages: Sequence[parser.Message]) -> list[Message]:
    """Parsed messages as part of a conversation that goes on; characters that no header can hold become _."""
    return [_from_parsed(message) for message in messages]


def _from_parsed(message: parser.Message) -> Message:
    written = message.content_type or ""
    mark = _CONSTRAIN if message.role == "assistant" and written.startswith(_CONSTRAIN) else ""
    kind = _as_word(written.removeprefix(mark))
    name = _as_word(message.name and message.name.replace(":", "_"))  # `user:me` would be a user
    return Message(
        author=Author(role=Role(message.role), name=name or ("unnamed" if message.role == "tool" else None)),
        content=[TextContent(text=message.content)],
        channel=_as_word(message.channel),
        recipient=_as_word(message.recipient),
        content_type=kind and mark + kind,
    )


def _as_word(text: str | None) -> str | None:
    return re.sub(r"[\s<|>]+", "_", text or "") or None


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Puts the file's name in front of what is wrong with it."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise GptossError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; expected JSON") from None
    except UnicodeDecodeError as error:
        raise GptossError(f"{path}: byte {error.start} is not valid UTF-8; expected JSON in UTF-8") from None
    except RecursionError:
        raise GptossError(f"{path} is nested too deeply, at most {MAX_DEPTH} levels are taken") from None
    except ValueError as error:
        raise GptossError(f"{path}: {error}") from None


def _load(path: str | Path) -> Any:
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise GptossError(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB, which no context holds")
    value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_distinct, parse_constant=_no_constant)
    _check_value(value, "the file")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise GptossError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise GptossError(f"{name} is no JSON")


def _check_value(value: object, where: str, depth: int = 0) -> None:
    """Refuses what passes as JSON and breaks later: half characters, infinities, deep nesting."""
    if depth > MAX_DEPTH:
        raise GptossError(f"the value is nested too deeply, at most {MAX_DEPTH} levels are taken")
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise GptossError(f"{where} holds half a surrogate pair, which is no text")
    elif isinstance(value, int | float):
        if abs(value) > sys.float_info.max:  # Python reads 1e999 as infinity, which the library does not take
            raise GptossError(f"{where} is a number out of range")
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_value(key, f"a key in {where}", depth)
            _check_value(part, f"{where}, {key!r}", depth + 1)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            _check_value(part, f"{where}, [{index}]", depth + 1)


def _said(value: object, known: Sequence[str], where: str) -> dict[str, Any]:
    """An object without the keys that say nothing; the others are all known."""
    if not isinstance(value, dict):
        raise GptossError(f"{where} is {_short(value)}, expected an object with some of {', '.join(known)}")
    says_nothing = (None, []), (None, [], {})  # of a known key an empty object may say something
    said = {key: part for key, part in value.items() if part not in says_nothing[key not in known]}
    unknown = [key for key in said if key not in known]
    if unknown:
        raise GptossError(
            f"{where} has {', '.join(map(repr, unknown))}, expected only {', '.join(known)}: put what it says in "
            "one of these, or take it out if it does not matter"
        )
    return said


def _needed(said: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in said:
        raise GptossError(f"{where} has no {key!r}, or an empty one")
    return said[key]


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise GptossError(f"{where}: got {_short(value)}, expected a list that is not empty")
    return value


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise GptossError(f"{where} is {_short(value)}, expected text")
    return value


def _json_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _model(model: type[Model], fields: Mapping[str, Any], where: str) -> Model:
    """One of the library's own types, its complaint in one line."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        fault = error.errors()[0]
        raise GptossError(f"{where}, {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


# --- what stands beside the messages


def _settings(said: Mapping[str, Any]) -> dict[str, Any]:
    settings = {}
    if "reasoning_effort" in said:
        settings["reasoning_effort"] = _string(said["reasoning_effort"], "reasoning_effort")
    if "tools" in said:
        settings["tools"] = _tools(said["tools"])
    if "response_format" in said:
        response_format = _response_format(said["response_format"])
        if response_format:
            settings["response_format"] = response_format
    Settings(**settings)  # refuses what it cannot be
    return settings


def _tools(value: object) -> tuple[ToolDescription, ...]:
    tools = tuple(_tool(row, f"tool {index}") for index, row in enumerate(_list(value, "tools")))
    Settings(tools=tools)
    return tools


def _tool(row: object, where: str) -> ToolDescription:
    if isinstance(row, dict) and row.get("type", "function") != "function":
        raise GptossError(f"{where} has type {_short(row['type'])}, expected 'function'; built-in tools are a setting")
    if isinstance(row, dict) and "function" in row:
        row = _needed(_said(row, ("type", "function"), where), "function", where)
    said = _said(row, ("type", "name", "description", "parameters", "strict"), where)
    _not_strict(said, where)
    fields = {"description": "", "name": _needed(said, "name", where)} | said
    tool = _model(ToolDescription, fields, where)
    return tool.model_copy(update={"parameters": None}) if _takes_nothing(tool.parameters or {}) else tool


def _takes_nothing(parameters: Mapping[str, Any]) -> bool:
    """Whether a schema is OpenAI's way to say "no parameters"; harmony's is to have no schema."""
    empty = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    return all(key in empty and value == empty[key] for key, value in parameters.items())


def _not_strict(said: Mapping[str, Any], where: str) -> None:
    if said.get("strict"):
        raise GptossError(f"{where} asks for strict, but here a schema stands in the prompt only: leave strict out")


def _response_format(value: object) -> ResponseFormat | None:
    where = "response_format"
    said = _said(value, ("type", "json_schema"), where)
    if said == {"type": "text"}:
        return None
    if said.get("type") != "json_schema":
        raise GptossError(f"{where} has type {_short(said.get('type'))}, expected 'json_schema' or 'text'")
    inner = _said(_needed(said, "json_schema", where), ("name", "description", "schema", "strict"), where)
    _not_strict(inner, where)
    schema = _needed(inner, "schema", where)
    if not isinstance(schema, dict):
        raise GptossError(f"{where}, schema: got {_short(schema)}, expected an object")
    description = inner.get("description")
    name = _string(_needed(inner, "name", where), f"{where}, name")
    return ResponseFormat(name, schema, None if description is None else _string(description, f"{where}, description"))


# --- harmony's own JSON


def _is_harmony(row: object) -> bool:
    if not isinstance(row, dict):
        return False
    parts = row["content"] if isinstance(row.get("content"), list) else []
    kinds = [part.get("type") for part in parts if isinstance(part, dict)]
    return bool(_ONLY_HARMONY_KEYS & row.keys()) or "system_content" in kinds or "developer_content" in kinds


def _harmony_message(row: object, where: str) -> Message:
    said = _said(row, _HARMONY_KEYS, where)
    content = row.get("content") if isinstance(row, dict) else None  # a list may be empty here
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise GptossError(f"{where}, content: got {_short(parts)}, expected text or a list")
    author = _model(Author, {key: said.get(key) for key in ("role", "name")}, where)
    header = {key: said.get(key) for key in sorted(_ONLY_HARMONY_KEYS)}
    message = _model(Message, {"author": author, **header}, where)
    message.content = [_harmony_part(part, where) for part in parts]
    render.check_message(message, where)
    return message


def _harmony_part(part: object, where: str) -> TextContent | SystemContent | DeveloperContent:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in tuple(_PARTS):
        raise GptossError(f"{where} has a content part of type {_short(kind)}, expected one of {', '.join(_PARTS)}")
    model = _PARTS[kind]
    _said(part, ("type", *model.model_fields), where)
    content = _model(model, part, where)
    for namespace in (part.get("tools") or {}).values():
        for tool in _said(namespace, tuple(Namespace.model_fields), f"{where}, tools").get("tools", []):
            _said(tool, tuple(ToolDescription.model_fields), f"{where}, tools")
    return content


# --- OpenAI-style chat


class _Row(NamedTuple):
    """A chat message, its keys checked."""

    where: str
    role: str
    said: Mapping[str, Any]


class _Answer(NamedTuple):
    """A tool result that has not found its call yet."""

    where: str
    said: Mapping[str, Any]
    text: str


def _chat(rows: Sequence[object]) -> Conversation:
    chat = [_chat_row(row, f"message {index}") for index, row in enumerate(rows)]
    front = list(itertools.takewhile(lambda row: row.role in _INSTRUCTING, chat))
    settings = {"instructions": "\n\n".join(_content(row) for row in front)} if front else {}
    messages: list[Message] = []
    call_ids: dict[int, str] = {}
    for is_tool, rest in itertools.groupby(chat[len(front) :], key=lambda row: row.role in _ANSWERING):
        if is_tool:
            answers = [_Answer(row.where, row.said, _content(row)) for row in rest]
            messages += _answer(answers, messages, call_ids)
            continue
        for message, call_id in itertools.chain.from_iterable(map(_spoken, rest)):
            if call_id is not None:
                call_ids[len(messages)] = call_id
            messages.append(message)
    for index, message in enumerate(messages):
        render.check_message(message, f"message {index} in harmony's terms")
    return Conversation(tuple(messages), settings, call_ids)


def _chat_row(row: object, where: str) -> _Row:
    role = row.get("role") if isinstance(row, dict) else None
    if role not in tuple(_CHAT_KEYS):
        raise GptossError(f"{where} has role {_short(role)}, expected one of {', '.join(_CHAT_KEYS)}")
    return _Row(where, role, _said(row, ("role", *_CHAT_KEYS[role]), where))


def _content(row: _Row) -> str:
    """Text, or a list of parts that are text."""
    content = _needed(row.said, "content", row.where)
    if isinstance(content, list):
        return "".join(_part_text(part, row.where) for part in content)
    return _string(content, f"{row.where}, content")


def _part_text(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        raise GptossError(
            f"{where} has a content part of type {_short(kind)}, expected 'text': the model reads no other"
        )
    return _string(_needed(_said(part, ("type", kind), where), kind, where), f"{where}, {kind}")


def _spoken(row: _Row) -> list[tuple[Message, str | None]]:
    """What a user's or assistant's message is in harmony, each with the id if it is a call."""
    if row.role in _INSTRUCTING:
        raise GptossError(
            f"{row.where} has role {row.role!r} behind others, expected it in front: move it there, "
            "or write the conversation as harmony JSON"
        )
    if row.role == "assistant":
        return _assistant(row)
    author = _model(Author, {"role": "user", "name": row.said.get("name")}, row.where)
    return [(Message.from_author_and_content(author, _content(row)), None)]


def _assistant(row: _Row) -> list[tuple[Message, str | None]]:
    said, where = row.said, row.where
    rows = _list(said["tool_calls"], f"{where}, tool_calls") if "tool_calls" in said else []
    if "function_call" in said:
        rows = [*rows, {"function": said["function_call"]}]
    calls = [_call(call, f"{where}, tool call {index}") for index, call in enumerate(rows)]
    reasoning = {_string(said[key], f"{where}, {key}") for key in _REASONING_KEYS if said.get(key)}
    if len(reasoning) > 1:
        raise GptossError(
            f"{where} has several keys for reasoning that differ, expected one of {', '.join(_REASONING_KEYS)}"
        )
    messages = [_say(text, "analysis") for text in reasoning if text]
    content = _content(row) if "content" in said else ""
    content += _string(said.get("refusal", ""), f"{where}, refusal")
    if content or ("content" in said and not calls):
        messages.append(_say(content, "commentary" if calls else "final"))
    if not messages and not calls:
        raise GptossError(f"{where} says nothing, expected content, reasoning or tool_calls")
    return [(message, None) for message in messages] + calls


def _say(text: str, channel: str) -> Message:
    return Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel)


def _call(call: object, where: str) -> tuple[Message, str | None]:
    said = _said(call, ("id", "type", "function", "index"), where)
    if said.get("type", "function") != "function":
        raise GptossError(f"{where} has type {_short(said['type'])}, expected 'function'")
    function = _said(_needed(said, "function", where), ("name", "arguments"), where)
    name = _string(_needed(function, "name", where), f"{where}, name")
    arguments = _json_text(_needed(function, "arguments", where))
    message = _say(arguments, "commentary").with_recipient(f"functions.{name}").with_content_type(f"{_CONSTRAIN}json")
    render.check_message(message, where)
    return message, None if "id" not in said else _string(said["id"], f"{where}, id")


# --- tool results


def _answer(answers: Sequence[_Answer], messages: Sequence[Message], call_ids: Mapping[int, str]) -> list[Message]:
    """Tool messages in the calls' order: harmony has no ids, so only the order tells two results apart."""
    waiting = render.waiting_calls(messages)
    found: dict[int, str] = {}
    for answer in answers:
        call = _find_call(answer, waiting, messages, call_ids)
        waiting.remove(call)
        found[call] = answer.text
    if waiting:
        names = _call_names(waiting, messages, call_ids)
        raise GptossError(f"without a result: {names}; give one for each call")
    return [_tool_message(messages[call], found[call]) for call in sorted(found)]


def _find_call(
    answer: _Answer, waiting: Sequence[int], messages: Sequence[Message], call_ids: Mapping[int, str]
) -> int:
    name, call_id = answer.said.get("name", answer.said.get("tool_name")), answer.said.get("tool_call_id")
    fits = [
        call
        for call in waiting
        if (call_id is None or call_ids.get(call) == call_id)
        and (name is None or messages[call].recipient in (name, f"functions.{name}"))
    ]
    if fits and (name is not None or call_id is not None or len(fits) == 1):
        return fits[0]
    which = " and ".join(
        f"{key} {_short(value)}" for key, value in (("name", name), ("id", call_id)) if value is not None
    )
    names = _call_names(waiting, messages, call_ids) or "no call"
    raise GptossError(f"{answer.where} answers {which or 'a call it does not name'}, but waiting for a result: {names}")


def _call_names(calls: Sequence[int], messages: Sequence[Message], call_ids: Mapping[int, str]) -> str:
    ids = {call: f" ({call_ids[call]})" for call in calls if call in call_ids}
    return ", ".join(f"{messages[call].recipient}{ids.get(call, '')}" for call in calls)


def _tool_message(call: Message, text: str) -> Message:
    """A result goes to commentary; that of a built-in tool to where it was called, mostly the chain of thought."""
    is_function = (call.recipient or "").startswith("functions.")
    author = Author(role=Role.TOOL, name=call.recipient)
    message = Message.from_author_and_content(author, text).with_recipient("assistant")
    return message.with_channel("commentary" if is_function or call.channel is None else call.channel)
