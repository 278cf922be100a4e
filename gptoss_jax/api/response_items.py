"""The items of OpenAI's /v1/responses: a request's input as a chat, an answer as output."""

from collections.abc import Callable, Mapping
from typing import Any

from gptoss_jax.api.openai_fields import made_id
from gptoss_jax.api.tokens import Shown, leftover
from gptoss_jax.errors import GptossError, short
from gptoss_jax.harmony.answer import Answer, call_document
from gptoss_jax.harmony.chat_format import BUILTIN
from gptoss_jax.harmony.client_keys import are_parts
from gptoss_jax.harmony.json_values import known_fields, needed, nonempty_list, string
from gptoss_jax.harmony.parsed import Message

_PHASES = {"preamble": "commentary", "final": "final_answer"}  # of the kinds of messages that are messages to OpenAI

SEARCH_RESULT = "gptoss"  # field of a web_search_call: the call and its output as the model wrote and read them

Logprobs = Callable[[Shown], list[dict[str, Any]]]
"""Log probabilities of the tokens of a text."""


# ---- input ----


def chat_of(value: object) -> list[dict[str, Any]]:
    """The chat, in the form that `harmony.messages.from_json` takes, which an `input` holds.

    A message of the assistant's whose next item, but for reasoning, is a call is a preamble, unless its phase says
    otherwise.

    Raises:
        GptossError: something else than text or items of messages, reasoning, calls and their results.

    Calls of built-in tools that were carried out here are part of a chain of thought, and are dropped with it once an
    answer has followed; those without what they gave are left out.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    items = nonempty_list(value, "input")
    chat = [message for index, item in enumerate(items) for message in _chat_messages(item, f"input, item {index}")]
    following: Mapping[str, Any] = {}
    for message in reversed(chat):
        if "reasoning" in message:
            continue
        if message["role"] == "assistant" and "content" in message and "tool_calls" in following:
            message.setdefault("phase", "commentary")
        following = message
    return chat


def _chat_messages(item: object, where: str) -> list[dict[str, Any]]:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if isinstance(kind, str) and kind in _CARRIED_OUT:
        return _CARRIED_OUT[kind](item, where)
    if not isinstance(kind, str) or kind not in _READERS:
        raise GptossError(f"{where} has type {short(kind)}, expected one of {', '.join(_READERS)}")
    return [_READERS[kind](item, where)]


def _message(item: object, where: str) -> dict[str, Any]:
    fields = known_fields(item, ("type", "role", "content", "id", "status", "phase"), where)
    kept = {name: fields[name] for name in ("role", "content", "phase") if name in fields}
    return {"role": needed(kept, "role", where), **kept, "content": needed(kept, "content", where)}


def _reasoning(item: object, where: str) -> dict[str, Any]:
    """What was thought, in full or else in summary; of what is encrypted nothing can be read."""
    fields = known_fields(item, ("type", "id", "summary", "content", "encrypted_content", "status"), where)
    parts = fields.get("content") or fields.get("summary")
    if not parts and "encrypted_content" in fields:
        raise GptossError(f"{where} is encrypted reasoning, expected content that can be read")
    return {"role": "assistant", "reasoning": _texts(parts or [], where)}


def _texts(parts: object, where: str) -> str:
    if not isinstance(parts, list) or not are_parts(parts):
        raise GptossError(f"{where} holds {short(parts)}, expected a list of parts that are text")
    return "".join(string(needed(part, "text", where), f"{where}, text") for part in parts)


def _call(item: object, where: str) -> dict[str, Any]:
    fields = known_fields(item, ("type", "id", "call_id", "name", "arguments", "status"), where)
    function = {"name": needed(fields, "name", where), "arguments": fields.get("arguments", "")}
    return {
        "role": "assistant",
        "tool_calls": [{"id": needed(fields, "call_id", where), "type": "function", "function": function}],
    }


def _result(item: object, where: str) -> dict[str, Any]:
    fields = known_fields(item, ("type", "id", "call_id", "output", "status"), where)
    call_id = string(needed(fields, "call_id", where), f"{where}, call_id")
    return {"role": "tool", "tool_call_id": call_id, "content": fields.get("output", "")}


def _mcp_call(item: object, where: str) -> list[dict[str, Any]]:
    """A function that was called here, and what it gave: to the model functions all the same."""
    names = ("type", "id", "name", "arguments", "output", "error", "server_label", "status", "approval_request_id")
    fields = known_fields(item, names, where)
    call_id, gave = needed(fields, "id", where), fields.get("output") or fields.get("error") or ""
    call = {"call_id": call_id, "name": needed(fields, "name", where), "arguments": fields.get("arguments", "")}
    return [_call(call, where), _result({"call_id": call_id, "output": gave}, where)]


def _code_call(item: object, where: str) -> list[dict[str, Any]]:
    fields = known_fields(item, ("type", "id", "code", "container_id", "outputs", "status"), where)
    outputs = fields.get("outputs")
    if not isinstance(outputs, list) or "code" not in fields:
        return []
    logs = [part["logs"] for part in outputs if isinstance(part, dict) and isinstance(part.get("logs"), str)]
    return _builtin_call(needed(fields, "id", where), "python", fields["code"], "".join(logs), where)


def _search_call(item: object, where: str) -> list[dict[str, Any]]:
    """OpenAI's item has no place for what the model read: only one that was made here has it."""
    fields = known_fields(item, ("type", "id", "action", "status", SEARCH_RESULT), where)
    if SEARCH_RESULT not in fields:
        return []
    ours = known_fields(fields[SEARCH_RESULT], ("name", "arguments", "output"), f"{where}, {SEARCH_RESULT}")
    name, arguments, output = (needed(ours, key, where) for key in ("name", "arguments", "output"))
    return _builtin_call(needed(fields, "id", where), name, arguments, output, where)


def _builtin_call(call_id: object, name: object, text: object, output: object, where: str) -> list[dict[str, Any]]:
    function = {"name": string(name, f"{where}, name"), "arguments": string(text, f"{where}, text")}
    call = {"id": string(call_id, f"{where}, id"), "type": BUILTIN, "function": function}
    result = {"role": "tool", "tool_call_id": call["id"], "content": string(output, f"{where}, output")}
    return [{"role": "assistant", "tool_calls": [call]}, result]


_CARRIED_OUT: Mapping[str, Callable[[object, str], list[dict[str, Any]]]] = {
    "code_interpreter_call": _code_call,
    "web_search_call": _search_call,
    "mcp_call": _mcp_call,
}
_READERS: Mapping[str, Callable[[object, str], dict[str, Any]]] = {
    "message": _message,
    "reasoning": _reasoning,
    "function_call": _call,
    "function_call_output": _result,
}


# ---- output ----


def without_calls(
    items: list[dict[str, Any]], answer: Answer, response_id: str, recipients: Callable[[str], bool]
) -> list[dict[str, Any]]:
    """The items of `output`, but for calls to these recipients, which are no client's to answer."""
    own = {
        made_id("fc", response_id, index)
        for index, message in enumerate(answer.messages)
        if message.kind == "call" and recipients(str(message.recipient))
    }
    return [item for item in items if item["id"] not in own]


def output(answer: Answer, response_id: str, logprobs: Logprobs) -> list[dict[str, Any]]:
    """The items of an answer, in its order.

    Text outside of any message is a message at the end where there is no final answer; and where nothing else came,
    whatever the model wrote. Calls that were cut are none.
    """
    items = [
        item for index, message in enumerate(answer.messages) if (item := _item(message, response_id, index, logprobs))
    ]
    parsed = answer.parsed
    rest = Shown("" if answer.final else answer.stray_text, ("unparsed",))
    if not (answer.final or rest.text or parsed.preambles or parsed.reasoning or parsed.calls):
        rest = leftover(answer)
    if rest.text:
        status = "completed" if answer.finish_reason == "stop" else "incomplete"
        own_id = made_id("msg", response_id, len(answer.messages))
        items.append(_message_item(rest, "final", status, own_id, logprobs))
    return items


def _item(message: Message, response_id: str, index: int, logprobs: Logprobs) -> dict[str, Any] | None:
    status = "incomplete" if message.is_cut else "completed"
    match message.kind:
        case "reasoning":
            own_id = made_id("rs", response_id, index)
            content = [{"type": "reasoning_text", "text": message.content}]
            return {"type": "reasoning", "id": own_id, "summary": [], "content": content, "status": status}
        case "preamble" | "final":
            own_id = made_id("msg", response_id, index)
            shown = Shown(message.content, (message.kind,), index)
            return _message_item(shown, message.kind, status, own_id, logprobs)
        case "call":
            ids = {"id": made_id("fc", response_id, index), "call_id": made_id("call", response_id, index)}
            return {"type": "function_call", **ids, **call_document(message), "status": status}
        case _:
            return None


def _message_item(shown: Shown, kind: str, status: str, own_id: str, logprobs: Logprobs) -> dict[str, Any]:
    part = {"type": "output_text", "text": shown.text, "annotations": [], "logprobs": logprobs(shown)}
    return {
        "type": "message",
        "id": own_id,
        "role": "assistant",
        "status": status,
        "phase": _PHASES[kind],
        "content": [part],
    }
