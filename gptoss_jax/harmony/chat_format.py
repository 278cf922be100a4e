"""OpenAI-style chat -> harmony messages."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from openai_harmony import Author, Message, Role

from gptoss_jax.errors import GptossError, short
from gptoss_jax.harmony import render
from gptoss_jax.harmony.client_keys import are_parts
from gptoss_jax.harmony.conversation import CONSTRAIN, Conversation
from gptoss_jax.harmony.json_values import json_text, known_fields, model_of, needed, nonempty_list, string
from gptoss_jax.harmony.settings import BUILTIN_TOOLS, namespace
from gptoss_jax.harmony.tool_results import ToolResult, find_calls, result_message

_REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")  # OpenRouter's and vLLM's, DeepSeek's, Ollama's
_CHAT_KEYS = {
    "system": ("content",),
    "developer": ("content",),
    "user": ("content", "name"),
    "assistant": ("content", "refusal", *_REASONING_KEYS, "reasoning_details", "tool_calls", "function_call", "phase"),
    "tool": ("content", "tool_call_id", "name", "tool_name"),  # tool_name is Ollama's
    "function": ("content", "name"),  # OpenAI's, before there were tools
}
# Type of a content part -> where its text stands; two of them are from OpenAI's newer interface.
_TEXT_KEYS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}
_CHANNEL_OF = {"commentary": "commentary", "final_answer": "final"}  # of a phase, which OpenAI's newer interface has
BUILTIN = "builtin"
"""Type of a tool call that no client of chat has: of python and the browser, with the model's own text."""
_INSTRUCTING = ("system", "developer")
_ANSWERING = ("tool", "function")


class _ChatMessage(NamedTuple):
    """A message in OpenAI's form, its keys checked.

    Attributes:
        where: what errors call it.
        role: one of _CHAT_KEYS.
        fields: its keys that say something.
    """

    where: str
    role: str
    fields: Mapping[str, Any]


def from_chat(documents: Sequence[object]) -> Conversation:
    """The conversation that a list of messages in OpenAI's form holds; those in front become settings.

    Raises:
        GptossError: anything else; the error names the message.
    """
    chat = [_chat_message(document, f"message {index}") for index, document in enumerate(documents)]
    front = list(itertools.takewhile(lambda message: message.role in _INSTRUCTING, chat))
    settings = {"instructions": "\n\n".join(filter(None, map(_content, front)))} if front else {}
    messages: list[Message] = []
    call_ids: dict[int, str] = {}
    silent: list[str] = []
    for is_tool, rest in itertools.groupby(chat[len(front) :], key=lambda message: message.role in _ANSWERING):
        if is_tool:
            _take_results([*rest], messages, call_ids)
            continue
        for message in rest:
            spoken = _spoken(message)
            call_ids |= {len(messages) + place: id for place, (_, id) in enumerate(spoken) if id is not None}
            messages += [each for each, _ in spoken]
            silent += [] if spoken else [message.where]
    for index, message in enumerate(messages):
        render.check_message(message, f"message {index} in harmony's terms")
    remarks = (f"left out, since the assistant says nothing there: {', '.join(silent[:20])}",) if silent else ()
    return Conversation(tuple(messages), settings, call_ids, remarks)


def _take_results(results: Sequence[_ChatMessage], messages: list[Message], call_ids: dict[int, str]) -> None:
    """Adds results to the conversation. Some calls may be left without one: the user went on."""
    found = find_calls(
        [ToolResult(result.where, result.fields, _content(result)) for result in results], messages, call_ids
    )
    # Harmony has no ids and reads results as those of the first calls: the calls without one go to the end.
    start = len(messages)
    while start and messages[start - 1].recipient and messages[start - 1].author.role is Role.ASSISTANT:
        start -= 1
    calls = sorted(range(start, len(messages)), key=lambda call: call not in found)
    place_of = dict(zip(calls, itertools.count(start)))
    messages[start:] = [messages[call] for call in calls]
    call_ids |= {place_of[call]: call_ids.pop(call) for call in calls if call in call_ids}
    for place, text in sorted((place_of.get(call, call), text) for call, text in found.items()):
        messages.append(result_message(messages[place], text))


def _chat_message(document: object, where: str) -> _ChatMessage:
    role = document.get("role") if isinstance(document, dict) else None
    if role not in tuple(_CHAT_KEYS):
        raise GptossError(f"{where} has role {short(role)}, expected one of {', '.join(_CHAT_KEYS)}")
    return _ChatMessage(where, role, known_fields(document, ("role", *_CHAT_KEYS[role]), where))


def _content(message: _ChatMessage) -> str:
    """Text, or a list of parts that are text. Users say something; a tool may give nothing, or any JSON."""
    content = message.fields.get("content", "")
    if message.role == "user":
        content = needed(message.fields, "content", message.where)
    if isinstance(content, list) and (message.role not in _ANSWERING or are_parts(content)):
        return "".join(_part_text(part, message.where) for part in content)
    if message.role in _ANSWERING:
        return json_text(content)
    return string(content, f"{message.where}, content")


def _part_text(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _TEXT_KEYS:
        raise GptossError(
            f"{where} has a content part of type {short(kind)}, expected 'text': the model reads no other"
        )
    key = _TEXT_KEYS[kind]
    return string(needed(known_fields(part, ("type", key), where), key, where), f"{where}, {key}")


def _spoken(message: _ChatMessage) -> list[tuple[Message, str | None]]:
    """What a user's or assistant's message is in harmony, each with the id if it is a call; perhaps nothing."""
    if message.role in _INSTRUCTING:
        raise GptossError(
            f"{message.where} has role {message.role!r} after others, expected it in front: move it there, "
            "or write the conversation as harmony JSON"
        )
    if message.role == "assistant":
        return _assistant(message)
    author = model_of(Author, {"role": "user", "name": message.fields.get("name")}, message.where)
    return [(Message.from_author_and_content(author, _content(message)), None)]


def _assistant(message: _ChatMessage) -> list[tuple[Message, str | None]]:
    """Reasoning, text and calls, in this order; nothing where there is none of these."""
    fields, where = message.fields, message.where
    documents = nonempty_list(fields["tool_calls"], f"{where}, tool_calls") if "tool_calls" in fields else []
    calls = [_call(call, f"{where}, tool call {index}") for index, call in enumerate(documents)]
    if "function_call" in fields:
        legacy = _call({"function": fields["function_call"]}, f"{where}, function_call")
        calls += [] if legacy[0] in [call for call, _ in calls] else [legacy]
    messages = [_say(text, "analysis") for text in _reasoning(message)]
    content, refusal = _content(message), string(fields.get("refusal", ""), f"{where}, refusal")
    content += "" if refusal == content else refusal
    phase = fields.get("phase", "commentary" if calls else "final_answer")
    if phase not in tuple(_CHANNEL_OF):
        raise GptossError(f"{where} has phase {short(phase)}, expected one of {', '.join(_CHANNEL_OF)}")
    if content:
        messages.append(_say(content, _CHANNEL_OF[phase]))
    return [(message, None) for message in messages] + calls


def _reasoning(message: _ChatMessage) -> set[str]:
    """The one text under several keys, or none."""
    fields, where = message.fields, message.where
    found = {string(fields[key], f"{where}, {key}") for key in _REASONING_KEYS if fields.get(key)}
    parts = nonempty_list(fields.get("reasoning_details", [{}]), f"{where}, reasoning_details")
    details = [part.get("text") or part.get("summary") or "" for part in parts if isinstance(part, dict)]
    found.add("".join(string(text, f"{where}, reasoning_details") for text in details))
    found.discard("")
    if len(found) > 1:
        raise GptossError(
            f"{where} has several keys for reasoning that differ, expected one of {', '.join(_REASONING_KEYS)}"
        )
    return found


def _say(text: str, channel: str) -> Message:
    return Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel)


def _call(call: object, where: str) -> tuple[Message, str | None]:
    fields = known_fields(call, ("id", "type", "function", "index"), where)
    kind = fields.get("type", "function")
    if kind not in ("function", BUILTIN):
        raise GptossError(f"{where} has type {short(kind)}, expected 'function'")
    function = known_fields(needed(fields, "function", where), ("name", "arguments"), where)
    name = string(needed(function, "name", where), f"{where}, name").removeprefix("functions.")
    if not name:
        raise GptossError(f"{where} has a name that names no function")
    call_id = None if "id" not in fields else string(fields["id"], f"{where}, id")
    if kind == BUILTIN:
        return _builtin_call(name, string(function.get("arguments", ""), f"{where}, arguments"), where), call_id
    arguments = json_text(function.get("arguments") or {})
    if arguments.strip() in ("", "null"):  # like null itself and nothing at all: a function without parameters
        arguments = "{}"
    message = _say(arguments, "commentary").with_recipient(f"functions.{name}").with_content_type(f"{CONSTRAIN}json")
    render.check_message(message, where)
    return message, call_id


def _builtin_call(name: str, text: str, where: str) -> Message:
    """A call of a tool that the system message declares: part of a chain of thought."""
    if name.partition(".")[0] not in map(namespace, BUILTIN_TOOLS):
        raise GptossError(f"{where} names {short(name)}, expected a call to {', '.join(BUILTIN_TOOLS)}")
    message = _say(text, "analysis").with_recipient(name).with_content_type("code")
    render.check_message(message, where)
    return message
