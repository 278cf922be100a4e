"""OpenAI's /v1/chat/completions, answers that come whole.

`message.content` is the final answer. Where the model came to none, it is what it wrote before calls (its preambles)
and outside of any message; where there is neither, nor reasoning nor a call, whatever it wrote: content, reasoning and
calls are never all absent if there is text. Reasoning stands in `reasoning` and, the same, in `reasoning_content`.
`logprobs.content` holds the tokens of the content; those of all ids are in `gptoss`.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.api import asking, openai_fields
from gptoss_jax.api.asked import Asked, Options
from gptoss_jax.api.fields import an_object, boolean, known, only
from gptoss_jax.api.tokens import Shown, leftover, log_probabilities, usage
from gptoss_jax.api.tool_turn import ToolTurn
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import messages
from gptoss_jax.harmony.answer import Answer, call_document
from gptoss_jax.harmony.json_values import needed, nonempty_list

_LIMITS = ("max_completion_tokens", "max_tokens")  # the second is the older name
_SAME = ("reasoning_effort", "response_format", "n", "logprobs", "top_logprobs")
_ONLY = {
    **openai_fields.WHOLE,
    "modalities": (["text"], "the model writes text only"),
    "verbosity": ("medium", "the model has no such setting"),
}
FIELDS = frozenset(
    (
        *("messages", "model", "metadata", "tools", "tool_choice", "parallel_tool_calls", "prediction"),
        *(*_LIMITS, *_SAME, *_ONLY, *openai_fields.SAMPLING, *openai_fields.HARMLESS),
    )
)


def ask(body: Mapping[str, Any], defaults: Options, vocab_path: str | None = None) -> Asked:
    """What a request asks; see `asked.Form`.

    `seed` acts modulo 2**32. `parallel_tool_calls` changes nothing: the model makes one call an answer.
    """
    fields = known(body, FIELDS)
    only(fields, _ONLY)
    boolean(fields.get("parallel_tool_calls", True), "parallel_tool_calls")
    if fields.get("top_logprobs") and not fields.get("logprobs", defaults.logprobs):
        raise GptossError("top_logprobs has an effect with logprobs only: set logprobs to true")
    limit = _limit(fields)
    spoken = messages.from_json(nonempty_list(needed(fields, "messages", "the request"), "messages"), "messages")
    own = {
        **openai_fields.sampling(fields),
        **openai_fields.tools(fields),
        **{name: fields[name] for name in _SAME if name in fields},
        **({"max_new_tokens": fields[limit]} if limit else {}),
    }
    field_of = {**openai_fields.FIELD_OF, **({"max_new_tokens": limit} if limit else {})}
    asked = asking.conversation(spoken, own, defaults, vocab_path=vocab_path, field_of=field_of)
    metadata = an_object(fields["metadata"], "metadata") if "metadata" in fields else None
    return dataclasses.replace(asked, metadata=metadata, echo=openai_fields.model_echo(fields))


def _limit(fields: Mapping[str, Any]) -> str | None:
    """The field that limits the answer's length."""
    given = [name for name in _LIMITS if name in fields]
    if len(given) == 2 and fields[given[0]] != fields[given[1]]:
        raise GptossError(f"{' and '.join(given)} are different: leave one of them out")
    return given[0] if given else None


def response(asked: Asked, answers: Sequence[Answer], response_id: str, model: str) -> dict[str, Any]:
    """An object `chat.completion`; see `asked.Form`. It holds no clock: `created` is 0."""
    return {
        "id": f"chatcmpl-{response_id}",
        "object": "chat.completion",
        "created": 0,
        "model": asked.echo.get("model", model),
        "choices": [choice(asked, answer, response_id, index) for index, answer in enumerate(answers)],
        "usage": usage_document(asked, answers),
        "system_fingerprint": None,
        **({} if asked.metadata is None else {"metadata": asked.metadata}),
        "gptoss": openai_fields.additions(asked, answers),
    }


def response_of_turn(turn: ToolTurn, response_id: str, model: str) -> dict[str, Any]:
    """As `response`, its one choice the last answer; see `asked.TurnForm`. Calls in it are the client's to answer."""
    asked, rounds = turn.asked, turn.rounds
    answers = [round.answer for round in rounds.rounds]
    whole = response(asked, [rounds.answer], response_id, model)
    last = whole["choices"][0]
    if calls := last["message"].pop("tool_calls", None):
        of_client = [not turn.is_ours(str(call.recipient)) for call in rounds.answer.parsed.calls]
        if calls := list(itertools.compress(calls, of_client)):
            last["message"]["tool_calls"] = calls
        elif last["finish_reason"] == "tool_calls":  # no room for another round
            last["finish_reason"] = "length"
    used = usage_document(asked, answers)
    used |= {"prompt_tokens": turn.prompt_tokens, "total_tokens": turn.prompt_tokens + used["completion_tokens"]}
    return {**whole, "usage": used, "gptoss": openai_fields.additions_of_turn(turn)}


def choice(asked: Asked, answer: Answer, response_id: str, index: int) -> dict[str, Any]:
    """One choice of a response, whole."""
    content = _content(answer)
    reasoning = answer.parsed.reasoning or None
    calls = [
        {"id": openai_fields.made_id("call", response_id, index, number), "type": "function", "function": call}
        for number, call in enumerate(map(call_document, answer.parsed.calls))
    ]
    return {
        "index": index,
        "message": {
            "role": "assistant",
            "content": content.text if content.text or answer.final is not None else None,
            "refusal": None,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
            **({"tool_calls": calls} if calls else {}),
        },
        "logprobs": _log_probabilities(asked, answer, content) if asked.options.logprobs else None,
        "finish_reason": "tool_calls" if calls and answer.finish_reason == "stop" else answer.finish_reason,
    }


def _content(answer: Answer) -> Shown:
    """What is shown as the answer; of no text where there is none."""
    parsed = answer.parsed
    if answer.final:
        return Shown(answer.final, ("final",))
    if said := "\n\n".join(filter(None, (*parsed.preambles, answer.stray_text))):
        return Shown(said, ("preamble", "unparsed"))
    return Shown("", ()) if parsed.reasoning or parsed.calls else leftover(answer)


def _log_probabilities(asked: Asked, answer: Answer, content: Shown) -> dict[str, Any]:
    return {"content": log_probabilities(asked, answer, content), "refusal": None}


def usage_document(asked: Asked, answers: Sequence[Answer]) -> dict[str, Any]:
    """The `usage` of a response."""
    used = usage(asked, answers)
    return {**used.document(), "completion_tokens_details": {"reasoning_tokens": used.reasoning}}
