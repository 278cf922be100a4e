"""Results of tool calls: each goes to the call that waits for it.

Harmony has no ids of calls, so only the order of the results distinguishes two calls of one tool.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from openai_harmony import Author, Message, Role

from gptoss_jax.errors import GptossError, short
from gptoss_jax.harmony import render


class ToolResult(NamedTuple):
    """A result that has not found its call yet.

    Attributes:
        where: what errors call it.
        fields: among them perhaps the call's "name" (or "tool_name") and "tool_call_id".
        text: what the tool gave.
    """

    where: str
    fields: Mapping[str, Any]
    text: str


def answer_calls(
    results: Sequence[ToolResult], messages: Sequence[Message], call_ids: Mapping[int, str]
) -> list[Message]:
    """Tool messages that answer the calls which wait at the end of `messages`, in the calls' order.

    Args:
        results: one for each call.
        messages: the conversation so far.
        call_ids: index of a call in `messages` -> its id, where it has one.

    Raises:
        GptossError: a result that no call waits for, or a call left without one.
    """
    found = find_calls(results, messages, call_ids)
    waiting = [call for call in render.waiting_calls(messages) if call not in found]
    if waiting:
        names = _call_names(waiting, messages, call_ids)
        raise GptossError(f"without a result: {names}; give one for each call")
    return [result_message(messages[call], found[call]) for call in sorted(found)]


def find_calls(
    results: Sequence[ToolResult], messages: Sequence[Message], call_ids: Mapping[int, str]
) -> dict[int, str]:
    """Index of a call which waits at the end of `messages` -> its result; arguments as for `answer_calls`.

    Raises:
        GptossError: a result that no call waits for.
    """
    waiting = render.waiting_calls(messages)
    found: dict[int, str] = {}
    for result in results:
        call = _find_call(result, waiting, messages, call_ids)
        waiting.remove(call)
        found[call] = result.text
    return found


def _find_call(
    result: ToolResult, waiting: Sequence[int], messages: Sequence[Message], call_ids: Mapping[int, str]
) -> int:
    name, call_id = result.fields.get("name", result.fields.get("tool_name")), result.fields.get("tool_call_id")
    fits = [
        call
        for call in waiting
        if (call_id is None or call_ids.get(call) == call_id)
        and (name is None or messages[call].recipient in (name, f"functions.{name}"))
    ]
    if fits and (name is not None or call_id is not None or len(fits) == 1):
        return fits[0]
    which = " and ".join(
        f"{key} {short(value)}" for key, value in (("name", name), ("id", call_id)) if value is not None
    )
    names = _call_names(waiting, messages, call_ids) or "no call"
    raise GptossError(f"{result.where} answers {which or 'a call it does not name'}, but waiting for a result: {names}")


def _call_names(calls: Sequence[int], messages: Sequence[Message], call_ids: Mapping[int, str]) -> str:
    ids = {call: f" ({call_ids[call]})" for call in calls if call in call_ids}
    return ", ".join(f"{messages[call].recipient}{ids.get(call, '')}" for call in calls)


def result_message(call: Message, text: str) -> Message:
    """The message that answers a call: on commentary; that of a built-in tool where it was called."""
    is_function = (call.recipient or "").startswith("functions.")
    author = Author(role=Role.TOOL, name=call.recipient)
    message = Message.from_author_and_content(author, text).with_recipient("assistant")
    return message.with_channel("commentary" if is_function or call.channel is None else call.channel)
