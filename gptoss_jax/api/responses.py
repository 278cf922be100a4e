"""OpenAI's /v1/responses, answers that come whole. Nothing is stored: a conversation is given back as `input`.

Items of `output` can be given back as they are. A preamble is a message of phase `commentary`. One answer is given,
whatever the defaults say of several. Log probabilities stand with the text of messages if `include` asks for them, or
`top_logprobs` is more than 0.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.api import asking, openai_fields
from gptoss_jax.api.asked import Asked, Options
from gptoss_jax.api.fields import an_object, boolean, known, only, texts, whole
from gptoss_jax.api.response_items import chat_of, output, without_calls
from gptoss_jax.api.tokens import Shown, log_probabilities, usage
from gptoss_jax.api.tool_items import CallItem
from gptoss_jax.api.tool_turn import ToolTurn
from gptoss_jax.engine.request import NOT_FINITE, NOT_HELD
from gptoss_jax.errors import GptossError, short
from gptoss_jax.harmony import messages
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.json_values import known_fields, needed, string
from gptoss_jax.harmony.settings import GRAMMAR_TYPES

_STORED = "nothing is stored here, so the whole conversation goes into input"
_ONLY = {
    **openai_fields.WHOLE,
    "background": (False, "an answer is waited for"),
    "truncation": ("disabled", "nothing is left out of a conversation"),
    "previous_response_id": (None, _STORED),
    "conversation": (None, _STORED),
    "prompt": (None, "no templates are stored here"),
}
_ONLY_TEXT = {"text.verbosity": ("medium", "the model has no such setting")}
_LOGPROBS = "message.output_text.logprobs"
_INCLUDES = (  # the others change nothing: reasoning and what tools gave are given in clear
    *(_LOGPROBS, "reasoning.encrypted_content", "web_search_call.action.sources", "code_interpreter_call.outputs"),
    *("computer_call_output.output.image_url", "file_search_call.results", "message.input_image.image_url"),
)
_FIELD_OF = {
    **openai_fields.FIELD_OF,
    "max_new_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
_STATUS = {
    "stop": "completed",
    "length": "incomplete",
    "error": "failed",
    "constraint": "failed",
    "cancelled": "cancelled",
}
FIELDS = frozenset(
    (
        *("input", "instructions", "model", "metadata", "tools", "tool_choice", "parallel_tool_calls"),
        *("reasoning", "text", "max_output_tokens", "max_tool_calls", "top_logprobs", "include"),
        *(*_ONLY, *openai_fields.SAMPLING, *openai_fields.HARMLESS),
    )
)


def ask(body: Mapping[str, Any], defaults: Options, vocab_path: str | None = None) -> Asked:
    """What a request asks; see `asked.Form`.

    `parallel_tool_calls` changes nothing: the model makes one call an answer. `max_tool_calls` is of tools that are run
    here, of all together.
    """
    fields = known(body, FIELDS)
    only(fields, _ONLY)
    own = {
        **openai_fields.sampling(fields),
        **openai_fields.tools(fields),
        **_reasoning(fields),
        **_text(fields),
        **_logprobs(fields),
        **({"max_new_tokens": fields["max_output_tokens"]} if "max_output_tokens" in fields else {}),
        "n": 1,
    }
    echo = _echo(fields)
    chat = chat_of(needed(fields, "input", "the request"))
    if "instructions" in fields:
        chat.insert(0, {"role": "developer", "content": string(fields["instructions"], "instructions")})
    spoken = messages.from_json(chat, "input")
    asked = asking.conversation(spoken, own, defaults, vocab_path=vocab_path, field_of=_FIELD_OF)
    metadata = an_object(fields["metadata"], "metadata") if "metadata" in fields else None
    most_calls = whole(fields["max_tool_calls"], "max_tool_calls", 1) if "max_tool_calls" in fields else None
    return dataclasses.replace(asked, metadata=metadata, echo=echo, most_calls=most_calls)


def _reasoning(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The effort. Summaries are not made: the reasoning itself is given."""
    names = ("effort", "summary", "generate_summary")
    reasoning = known_fields(fields.get("reasoning", {}), names, "reasoning")
    return {"reasoning_effort": reasoning["effort"]} if "effort" in reasoning else {}


def _text(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The form of the answer, as chat completions write it."""
    text = known_fields(fields.get("text", {}), ("format", "verbosity"), "text")
    only({f"text.{name}": value for name, value in text.items()}, _ONLY_TEXT)
    if "format" not in text:
        return {}
    schema = dict(an_object(text["format"], "text.format"))
    if schema.get("type") in GRAMMAR_TYPES:
        return {"response_format": schema}
    kind = schema.pop("type", None)
    return {"response_format": {"type": kind, **({"json_schema": schema} if schema else {})}}


def _logprobs(fields: Mapping[str, Any]) -> dict[str, Any]:
    include = texts(fields.get("include", []), "include")
    for name in include:
        if name not in _INCLUDES:
            raise GptossError(f"include names {short(name)}, expected some of {', '.join(_INCLUDES)}")
    asked = {"logprobs": True} if _LOGPROBS in include else {}
    return {**asked, **{name: fields[name] for name in ("top_logprobs",) if name in fields}}


def _echo(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **openai_fields.model_echo(fields),
        **{name: fields[name] for name in ("instructions", "max_tool_calls") if name in fields},
        "tool_choice": fields.get("tool_choice", "auto"),
        "parallel_tool_calls": boolean(fields.get("parallel_tool_calls", True), "parallel_tool_calls"),
    }


def response(asked: Asked, answers: Sequence[Answer], response_id: str, model: str) -> dict[str, Any]:
    """An object `response`; see `asked.Form`. It holds no clock: `created_at` is 0."""
    (answer,) = answers
    cut = answer.finish_reason == "length"
    failed = {"error": NOT_FINITE, "constraint": NOT_HELD}.get(answer.finish_reason)
    return {
        **under_way(asked, response_id, model),
        "status": _STATUS[answer.finish_reason],
        "error": {"code": "server_error", "message": failed} if failed else None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output(answer, response_id, lambda shown: _message_logprobs(asked, answer, shown)),
        "usage": _usage(asked, answers),
        "gptoss": openai_fields.additions(asked, answers),
    }


def items_of_round(turn: ToolTurn, answer: Answer, round: int) -> list[dict[str, Any]]:
    """The output of one answer of several, without its calls to recipients that are answered here."""
    answer_id = turn.answer_id(round)
    items = output(answer, answer_id, lambda shown: _message_logprobs(turn.asked, answer, shown))
    return without_calls(items, answer, answer_id, turn.is_ours)


_CUT_SHORT = {"rounds": "max_tool_calls", "tokens": "max_output_tokens", "context": "max_output_tokens"}


def response_of_turn(turn: ToolTurn, response_id: str, model: str) -> dict[str, Any]:
    """As `response`, of several answers and the calls between them, which were carried out; see `asked.TurnForm`."""
    asked, rounds = turn.asked, turn.rounds
    answers = [round.answer for round in rounds.rounds]
    whole = response(asked, [rounds.answer], response_id, model)
    if reason := _CUT_SHORT.get(str(rounds.ended)):
        whole |= {"status": "incomplete", "incomplete_details": {"reason": reason}}
    used = _usage(asked, answers)
    used |= {"input_tokens": turn.prompt_tokens, "total_tokens": turn.prompt_tokens + used["output_tokens"]}
    return {**whole, "output": _items_of_turn(turn), "usage": used, "gptoss": openai_fields.additions_of_turn(turn)}


def _items_of_turn(turn: ToolTurn) -> list[dict[str, Any]]:
    """Answers, each followed by its calls."""
    items, numbers = list[dict[str, Any]](), itertools.count()
    for at, round in enumerate(turn.rounds.rounds):
        items += items_of_round(turn, round.answer, at)
        for each in round.called:
            items.append(CallItem(each.call, turn.response_id, next(numbers), turn.servers).document(each.output))
    return items


def under_way(asked: Asked, response_id: str, model: str) -> dict[str, Any]:
    """What a response says before there is an answer."""
    return {
        "id": f"resp_{response_id}",
        "object": "response",
        "created_at": 0,
        "model": model,
        **_acted(asked),
        **asked.echo,
        "metadata": asked.metadata or {},
    }


def _acted(asked: Asked) -> dict[str, Any]:
    """What acted, where OpenAI's responses repeat it."""
    acting = asked.acting
    tools = [{"type": "function", "strict": False, **tool} for tool in acting["tools"] or ()]
    form = acting["response_format"]
    text = {"type": form["type"], **form.get("json_schema", form)} if form else {"type": "text"}
    return {
        "instructions": None,
        "max_output_tokens": acting["max_new_tokens"],
        "previous_response_id": None,
        "reasoning": {"effort": acting["reasoning_effort"], "summary": None},
        "store": False,
        "temperature": acting["temperature"],
        "text": {"format": text},
        "tools": tools,
        "top_logprobs": acting["top_logprobs"],
        "top_p": acting["top_p"],
        "truncation": "disabled",
    }


def _message_logprobs(asked: Asked, answer: Answer, shown: Shown) -> list[dict[str, Any]]:
    return log_probabilities(asked, answer, shown) if asked.options.logprobs else []


def _usage(asked: Asked, answers: Sequence[Answer]) -> dict[str, Any]:
    """Whether a cache was hit is the engine's statistics to say: the same answers give the same bytes."""
    used = usage(asked, answers)
    return {
        "input_tokens": used.prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": used.answered,
        "output_tokens_details": {"reasoning_tokens": used.reasoning},
        "total_tokens": used.total,
    }
