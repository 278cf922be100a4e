"""What OpenAI's forms have in common: fields of requests that mean the same in each, and what responses add."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.api.asked import Asked
from gptoss_jax.api.fields import whole
from gptoss_jax.api.tokens import all_log_probabilities
from gptoss_jax.api.tool_turn import ToolTurn
from gptoss_jax.grammar.verdict import verdict
from gptoss_jax.harmony.answer import Answer, call_document
from gptoss_jax.harmony.json_values import string

SAMPLING = (
    *("temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop"),
    *("top_k", "min_p", "repetition_penalty", "banned_ids", "stop_token_ids"),  # not OpenAI's: vLLM's names and ours
)
"""How tokens are drawn and where an answer ends."""

HARMLESS = (
    *("user", "store", "service_tier", "safety_identifier", "stream_options"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
)
"""They change neither the prompt nor the answer, and are ignored."""

WHOLE = {"stream": (False, "an answer comes whole here")}
FIELD_OF = {"stop_ids": "stop_token_ids"}


def sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of SAMPLING by our own names. Seeds of 64 bits, as OpenAI has them, act modulo 2**32.

    Raises:
        GptossError: a seed that is none.
    """
    own = {name: fields[name] for name in SAMPLING if name in fields}
    if "seed" in own:
        own["seed"] = whole(own["seed"], "seed", -(2**63), 2**64 - 1) % 2**32
    if "stop_token_ids" in own:
        own["stop_ids"] = own.pop("stop_token_ids")
    return own


def tools(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The tools, and which of them may or have to be called, by our own names."""
    return {name: fields[name] for name in ("tools", "tool_choice") if name in fields}


def model_echo(fields: Mapping[str, Any]) -> dict[str, str]:
    """The model's name, which responses repeat; whoever has several models chooses by it before.

    Raises:
        GptossError: it is no text.
    """
    return {"model": string(fields["model"], "model")} if "model" in fields else {}


def made_id(kind: str, response_id: str, *place: int) -> str:
    """An id of something in a response: the same wherever the same response is written again."""
    digest = hashlib.sha256("/".join((response_id, *map(str, place))).encode()).hexdigest()
    return f"{kind}_{digest[:24]}"


def additions(asked: Asked, answers: Sequence[Answer]) -> dict[str, Any]:
    """The object `gptoss` of a response: what acted, and what OpenAI's form has no place for."""
    document: dict[str, Any] = {
        "settings": asked.acting,
        "answers": [_addition(asked, answer) for answer in answers],
    }
    return document | ({"remarks": list(asked.remarks)} if asked.remarks else {})


def additions_of_turn(turn: ToolTurn) -> dict[str, Any]:
    """The object `gptoss` of a response whose calls were carried out: these too, and why there are no more rounds.

    There is no clock in it: how long a tool took is another time the next time.
    """
    rounds = turn.rounds.rounds
    remarks = [*turn.asked.remarks, *filter(None, [turn.rounds.remark()])]
    return {
        "settings": turn.asked.acting,
        "answers": [_addition(turn.asked_in(at), round.answer) for at, round in enumerate(rounds)],
        "calls": [each.document() for round in rounds for each in round.called],
        "ended": turn.rounds.ended,
        **({"remarks": remarks} if remarks else {}),
    }


def _addition(asked: Asked, answer: Answer) -> dict[str, Any]:
    return {**_kept(answer, raw=asked.raw), **structured(asked, answer), **all_log_probabilities(asked, answer)}


def structured(asked: Asked, answer: Answer) -> dict[str, Any]:
    """Whether the answer has the form that it was held to; nothing where it was held to none."""
    return {} if asked.form is None else {"structured": verdict(asked.form, answer)}


def _kept(answer: Answer, *, raw: bool) -> dict[str, Any]:
    ended = {"finish_reason": answer.finish_reason, "stop_string": answer.stop_string}
    parsed = answer.parsed
    if raw:
        return {**ended, "token_ids": list(parsed.token_ids)}
    return {
        **ended,
        "parse_status": parsed.parse_status,
        "faults": list(parsed.faults),
        "preambles": list(parsed.preambles),
        "cut_calls": [call_document(call) for call in parsed.cut_calls],
        "unparsed_text": answer.unparsed_text,
        "token_ids": list(parsed.token_ids),
    }
