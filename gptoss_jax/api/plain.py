"""Our own form: a prompt, a conversation or ids; options and settings by the names that `generate`'s flags have."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.api import asking, overrides
from gptoss_jax.api.asked import Asked, Options
from gptoss_jax.api.fields import known, token_ids
from gptoss_jax.api.openai_fields import structured
from gptoss_jax.api.tokens import all_log_probabilities, usage
from gptoss_jax.api.tool_turn import ToolTurn
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import messages
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.conversation import Conversation
from gptoss_jax.harmony.json_values import string

SOURCES = ("prompt", "messages", "token_ids")
FIELDS = frozenset((*SOURCES, *overrides.SETTING_OF, *overrides.OPTION_FIELDS, "tool_choice", "metadata"))
_LEFT_OUT = ("messages", "text", "logprobs", "top_logprobs")  # the ids say the first two; the others if asked for


def ask(body: Mapping[str, Any], defaults: Options, vocab_path: str | None = None) -> Asked:
    """What a request asks; see `asked.Form`."""
    fields = known(body, FIELDS)
    sources = [name for name in SOURCES if name in fields]
    if len(sources) != 1:
        found = " and ".join(sources) or "none of them"
        raise GptossError(f"the request has {found}, expected one of {', '.join(SOURCES)}")
    if sources == ["token_ids"]:
        asked = _of_ids(fields, defaults, vocab_path)
    else:
        asked = asking.conversation(_conversation(fields), fields, defaults, vocab_path=vocab_path)
    return dataclasses.replace(asked, metadata=fields.get("metadata"))


def _conversation(fields: Mapping[str, Any]) -> Conversation:
    if "messages" in fields:
        return messages.from_json(fields["messages"], "the conversation")
    return Conversation((messages.user(string(fields["prompt"], "prompt")),))


def _of_ids(fields: Mapping[str, Any], defaults: Options, vocab_path: str | None) -> Asked:
    for name in (*overrides.SETTING_OF, "tool_choice"):
        if name in fields:
            raise GptossError(f"token_ids is the whole prompt, so {name} has no place in it")
    ids = token_ids(fields["token_ids"], "token_ids")
    return asking.plain_ids(ids, fields, defaults, raw=False, vocab_path=vocab_path)


def response(asked: Asked, answers: Sequence[Answer], response_id: str, model: str) -> dict[str, Any]:
    """The answer, or the list of several, with usage, settings, metadata and remarks beside.

    It has no id and no model's name: whoever writes rows puts theirs beside it.
    """
    del response_id, model
    documents = [_document(asked, answer) for answer in answers]
    return {
        **(documents[0] if len(documents) == 1 else {"answers": documents}),
        "usage": _usage(asked, answers),
        "settings": asked.acting,
        **({} if asked.metadata is None else {"metadata": asked.metadata}),
        **({"remarks": list(asked.remarks)} if asked.remarks else {}),
    }


def response_of_turn(turn: ToolTurn, response_id: str, model: str) -> dict[str, Any]:
    """As `response`, of the last answer; all of them are in `rounds`, with their calls. See `asked.TurnForm`."""
    asked, rounds = turn.asked, turn.rounds
    whole = response(turn.asked_in(len(rounds.rounds) - 1), [rounds.answer], response_id, model)
    used = _usage(asked, [round.answer for round in rounds.rounds])
    used |= {"prompt_tokens": turn.prompt_tokens, "total_tokens": turn.prompt_tokens + used["completion_tokens"]}
    remarks = [*asked.remarks, *filter(None, [rounds.remark()])]
    return {
        **whole,
        "tool_calls": [call.document() for call in rounds.waiting()],
        "usage": used,
        **({"remarks": remarks} if remarks else {}),
        "ended": rounds.ended,
        "rounds": [
            {
                "answer": _document(turn.asked_in(at), round.answer),
                "calls": [each.document() for each in round.called],
            }
            for at, round in enumerate(rounds.rounds)
        ],
    }


def _document(asked: Asked, answer: Answer) -> dict[str, Any]:
    kept = {name: value for name, value in answer.document().items() if name not in _LEFT_OUT}
    return {**kept, **structured(asked, answer), **all_log_probabilities(asked, answer)}


def _usage(asked: Asked, answers: Sequence[Answer]) -> dict[str, int]:
    used = usage(asked, answers)
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.answered,
        "reasoning_tokens": used.reasoning,
        "total_tokens": used.total,
    }
