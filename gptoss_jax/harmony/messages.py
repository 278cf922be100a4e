"""Conversations from JSON and to JSON: OpenAI-style chat and harmony's own; tools, tool results, response formats."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openai_harmony import Author, DeveloperContent, Message, Role, SystemContent, TextContent, ToolDescription
from openai_harmony import ToolNamespaceConfig as Namespace

from gptoss_jax import whole_files
from gptoss_jax.errors import GptossError, check_text, short
from gptoss_jax.files import check_value
from gptoss_jax.harmony import json_values, parsed, render, tool_schemas
from gptoss_jax.harmony.chat_format import from_chat
from gptoss_jax.harmony.client_keys import results_without_harmless, without_harmless
from gptoss_jax.harmony.conversation import CONSTRAIN, Conversation, CutMessage
from gptoss_jax.harmony.json_values import (
    json_text,
    known_fields,
    model_of,
    needed,
    nonempty_list,
    string,
)
from gptoss_jax.harmony.settings import GrammarFormat, ResponseFormat, Settings
from gptoss_jax.harmony.tool_results import ToolResult, answer_calls

_DOCUMENT_KEYS = ("messages", "tools", "response_format", "reasoning_effort")
_HARMONY_KEYS = ("role", "name", "content", "channel", "recipient", "content_type", "is_cut")
_ONLY_HARMONY_KEYS = {"channel", "recipient", "content_type"}
_PARTS = {"text": TextContent, "system_content": SystemContent, "developer_content": DeveloperContent}


def read_messages(path: str | Path) -> Conversation:
    """The conversation in a JSON file; `from_json` says which forms it may have.

    Raises:
        OSError: the file cannot be read.
        GptossError: it holds no conversation; the error names the file and the message.
    """
    return json_values.read_file(path, from_json)


def read_tools(path: str | Path, remarks: list[str] | None = None) -> tuple[ToolDescription, ...]:
    """The function tools in a JSON file: a list in OpenAI's form, `{"type": "function", "function": {...}}` or bare.

    Args:
        path: the file.
        remarks: gets a line that names what was ignored.

    Raises:
        OSError: the file cannot be read.
        GptossError: it holds something else; the error names the file and the tool.
    """

    def parse(document: object) -> tuple[ToolDescription, ...]:
        document, ignored = without_harmless(document)
        if remarks is not None:
            remarks.extend(ignored)
        return tool_schemas.tools(document)

    return json_values.read_file(path, parse)


def read_response_format(path: str | Path) -> ResponseFormat | GrammarFormat | None:
    """The response format in a JSON file, in the form that OpenAI's `response_format` has; None if it asks for text.

    Raises:
        OSError: the file cannot be read.
        GptossError: it holds something else; the error names the file.
    """
    return json_values.read_file(path, tool_schemas.response_format)


def read_tool_results(path: str | Path, conversation: Conversation, remarks: list[str] | None = None) -> list[Message]:
    """`tool_results` of what a JSON file holds.

    Raises:
        OSError: the file cannot be read.
        GptossError: as `tool_results`; the error names the file.
    """
    return json_values.read_file(path, functools.partial(tool_results, conversation=conversation, remarks=remarks))


def tool_results(documents: object, conversation: Conversation, remarks: list[str] | None = None) -> list[Message]:
    """Messages that answer the conversation's waiting calls, in the calls' order.

    Args:
        documents: a list of `{"name": ..., "content": ...}`, with `tool_call_id` in place of or beside the name; a
            single waiting call needs neither. Content that is not text is written as JSON.
        conversation: the one that waits.
        remarks: gets a line that names what was ignored.

    Raises:
        GptossError: a result that no call waits for, or a call left without one.
    """
    documents, ignored = results_without_harmless(documents)
    if remarks is not None:
        remarks.extend(ignored)
    results = []
    for index, document in enumerate(nonempty_list(documents, "tool results")):
        where = f"result {index}"
        fields = known_fields(document, ("tool_call_id", "name", "tool_name", "content"), where)
        content = document.get("content") if isinstance(document, dict) else None  # an empty list is a result
        if content is None:
            raise GptossError(f"{where} has no 'content'")
        results.append(ToolResult(where, fields, json_text(content)))
    return answer_calls(results, conversation.messages, conversation.call_ids)


def from_json(document: object, where: str = "the file") -> Conversation:
    """The conversation in a JSON value that is already read; errors call it `where`.

    Either form is taken as a list of messages or as an object with the list under "messages", beside it perhaps
    "tools", "response_format" and "reasoning_effort"; or either of these under "conversation", whatever else stands
    in that object. In a message, a key whose value is null or an empty list counts as absent.

    OpenAI-style chat: system and developer messages in front are the instructions; reasoning goes to the analysis
    channel, the text beside tool calls to commentary (a preamble), other text of the assistant to final; a phase, as
    OpenAI's newer interface has it, says which.
    Harmony's own, as `openai_harmony.Conversation.to_json` and `to_json` write it: recognised by a channel,
    recipient or content_type, or by system or developer content.

    Raises:
        GptossError: anything else. Nothing is ignored that would change the meaning; what is, `remarks` names.
    """
    check_value(document, where)
    if isinstance(document, dict) and "conversation" in document:
        if "messages" in document:
            raise GptossError(f"{where} holds both 'conversation' and 'messages', expected one of them")
        document = document["conversation"]
    document, ignored = without_harmless(document)
    is_list = isinstance(document, list)
    fields = {"messages": document} if is_list else known_fields(document, _DOCUMENT_KEYS, where)
    documents = nonempty_list(needed(fields, "messages", where), "messages")
    settings = _settings(fields)
    if any(map(_is_harmony, documents)):
        messages = [_harmony_message(each, f"message {index}") for index, each in enumerate(documents)]
        return Conversation(tuple(messages), settings, remarks=tuple(ignored))
    conversation = from_chat(documents)
    return dataclasses.replace(
        conversation,
        settings=settings | dict(conversation.settings),
        remarks=(*ignored, *conversation.remarks),
    )


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
            **({"is_cut": True} if isinstance(message, CutMessage) else {}),
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


def write_messages(path: str | Path, messages: Sequence[Message]) -> None:
    """Writes messages for `read_messages`, whole or not at all.

    Raises:
        WriteError: the file cannot be written; what was there before is still there.
    """
    text = json.dumps(to_json(messages), indent=2, ensure_ascii=False) + "\n"
    whole_files.write_whole(path, text.encode())


def from_parsed(messages: Sequence[parsed.Message]) -> list[Message]:
    """Parsed messages as part of a conversation that goes on; characters that no header can hold become _."""
    return [_from_parsed(message) for message in messages]


def _from_parsed(message: parsed.Message) -> Message:
    content_type = message.content_type or ""
    mark = CONSTRAIN if message.role == "assistant" and content_type.startswith(CONSTRAIN) else ""
    kind = _header_word(content_type.removeprefix(mark))
    name = _header_word(message.name and message.name.replace(":", "_"))  # `user:me` would be a user
    message_type = CutMessage if message.is_cut else Message
    return message_type(
        author=Author(role=Role(message.role), name=name or ("unnamed" if message.role == "tool" else None)),
        content=[TextContent(text=message.content)],
        channel=_header_word(message.channel),
        recipient=_header_word(message.recipient),
        content_type=kind and mark + kind,
    )


def _header_word(text: str | None) -> str | None:
    return re.sub(r"[\s<|>]+", "_", text or "") or None


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    settings = {}
    if "reasoning_effort" in fields:
        settings["reasoning_effort"] = string(fields["reasoning_effort"], "reasoning_effort")
    if "tools" in fields:
        settings["tools"] = tool_schemas.tools(fields["tools"])
    if "response_format" in fields:
        response_format = tool_schemas.response_format(fields["response_format"])
        if response_format:
            settings["response_format"] = response_format
    Settings(**settings)  # refuses what it cannot be
    return settings


# ---- harmony's own JSON ----


def _is_harmony(document: object) -> bool:
    if not isinstance(document, dict):
        return False
    parts = document["content"] if isinstance(document.get("content"), list) else []
    kinds = [part.get("type") for part in parts if isinstance(part, dict)]
    return bool(_ONLY_HARMONY_KEYS & document.keys()) or "system_content" in kinds or "developer_content" in kinds


def _harmony_message(document: object, where: str) -> Message:
    fields = known_fields(document, _HARMONY_KEYS, where)
    content = document.get("content") if isinstance(document, dict) else None  # a list may be empty here
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise GptossError(f"{where}, content: got {short(parts)}, expected text or a list")
    author = model_of(Author, {key: fields.get(key) for key in ("role", "name")}, where)
    header = {key: fields.get(key) for key in sorted(_ONLY_HARMONY_KEYS)}
    message = model_of(CutMessage if _is_cut(fields, where) else Message, {"author": author, **header}, where)
    message.content = [_harmony_part(part, where) for part in parts]
    render.check_message(message, where)
    return message


def _is_cut(fields: Mapping[str, Any], where: str) -> bool:
    is_cut = fields.get("is_cut", False)
    if not isinstance(is_cut, bool):
        raise GptossError(f"{where}, is_cut: got {short(is_cut)}, expected true or false")
    return is_cut


def _harmony_part(part: object, where: str) -> TextContent | SystemContent | DeveloperContent:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in tuple(_PARTS):
        raise GptossError(f"{where} has a content part of type {short(kind)}, expected one of {', '.join(_PARTS)}")
    model = _PARTS[kind]
    known_fields(part, ("type", *model.model_fields), where)
    content = model_of(model, part, where)
    for namespace in (part.get("tools") or {}).values():
        for tool in known_fields(namespace, tuple(Namespace.model_fields), f"{where}, tools").get("tools", []):
            known_fields(tool, tuple(ToolDescription.model_fields), f"{where}, tools")
    return content
