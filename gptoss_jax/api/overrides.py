"""A request's own options and settings, by the names of our own form: put over the defaults, and written down again."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from gptoss_jax.api.asked import Options
from gptoss_jax.api.fields import an_object, boolean, number, texts, token_ids, whole
from gptoss_jax.engine.sampling_params import OPTIONS, SamplingParams
from gptoss_jax.errors import GptossError, short
from gptoss_jax.grammar import forms
from gptoss_jax.grammar.forms import AUTO, ToolChoice
from gptoss_jax.harmony import tool_schemas
from gptoss_jax.harmony.client_keys import without_harmless
from gptoss_jax.harmony.json_values import string

MAX_ANSWERS = 1024
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 500  # after each token all are looked for, where others' answers wait for it
_BANNED = "-inf"  # JSON has no infinity

_SAMPLING: Mapping[str, Callable[[object, str], Any]] = {
    **{name: number if option.dtype == "float32" else whole for name, option in OPTIONS.items()},
    "logit_bias": lambda value, name: _biases(value),
    "banned_ids": token_ids,
}
_OTHERS: Mapping[str, Callable[[object, str], Any]] = {
    "max_new_tokens": lambda value, name: whole(value, name, 1),
    "stop": lambda value, name: _stop(value, name),
    "stop_ids": token_ids,
    "n": lambda value, name: whole(value, name, 1, MAX_ANSWERS),
    "logprobs": boolean,
}
OPTION_FIELDS = (*_SAMPLING, *_OTHERS)
SETTING_OF = {
    "system": "instructions",
    "reasoning_effort": "reasoning_effort",
    "date": "current_date",
    "knowledge_cutoff": "knowledge_cutoff",
    "tools": "tools",
    "builtin_tools": "builtin_tools",
    "response_format": "response_format",
}
"""Field of our own form -> that of `Settings`."""


def options(fields: Mapping[str, Any], defaults: Options) -> Options:
    """The defaults with those of OPTION_FIELDS that a request has put over them.

    Raises:
        GptossError: a value that cannot be.
    """
    drawn = {name: read(fields[name], name) for name, read in _SAMPLING.items() if name in fields}
    others = {name: read(fields[name], name) for name, read in _OTHERS.items() if name in fields}
    sampling = dataclasses.replace(defaults.sampling, **drawn) if drawn else defaults.sampling
    if others.get("logprobs") is False and sampling.top_logprobs:
        if drawn.get("top_logprobs"):
            raise GptossError("top_logprobs has an effect with logprobs only: leave one of them out")
        sampling = dataclasses.replace(sampling, top_logprobs=0)
    others["logprobs"] = others.get("logprobs", defaults.logprobs) or sampling.top_logprobs > 0
    return dataclasses.replace(defaults, sampling=sampling, **others)


def options_document(acting: Options) -> dict[str, Any]:
    """OPTION_FIELDS for JSON, as `options` takes them back."""
    sampling = acting.sampling
    biases = {str(token): _BANNED if bias == -math.inf else bias for token, bias in sampling.logit_bias.items()}
    numbers = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(SamplingParams)}
    return {
        **numbers,
        "logit_bias": biases,
        "banned_ids": list(sampling.banned_ids),
        "max_new_tokens": acting.max_new_tokens,
        "stop": list(acting.stop),
        "stop_ids": list(acting.stop_ids),
        "n": acting.n,
        "logprobs": acting.logprobs,
    }


def settings(fields: Mapping[str, Any], remarks: list[str]) -> dict[str, Any]:
    """Those fields of `Settings` that a request sets beside its conversation.

    Args:
        fields: the request's, some of SETTING_OF among them.
        remarks: gets a line that names what was ignored.

    Raises:
        GptossError: a value of another type; `Settings` refuses those that cannot be.
    """
    given = {setting: fields[name] for name, setting in SETTING_OF.items() if name in fields}
    for name in ("instructions", "current_date", "knowledge_cutoff", "reasoning_effort"):
        if name in given:
            string(given[name], name)
    if given.get("current_date") == "none":
        given["current_date"] = None
    if fields.get("tool_choice") == "none":
        given["tools"] = []
    if "tools" in given:
        given["tools"] = _tools(given["tools"], remarks)
    if "builtin_tools" in given:
        given["builtin_tools"] = texts(given["builtin_tools"], "builtin_tools")
    if "response_format" in given:
        given["response_format"] = tool_schemas.response_format(given["response_format"])
    return given


def tool_choice(fields: Mapping[str, Any]) -> ToolChoice:
    """The choice of tools in a request's field of this name; "none" takes the tools away, and is none.

    Raises:
        GptossError: no choice that there is.
    """
    choice = fields.get("tool_choice", "auto")
    return AUTO if choice == "none" else forms.tool_choice(choice)


def choice_document(choice: ToolChoice) -> dict[str, Any]:
    """The field `tool_choice` for JSON, as `tool_choice` takes it back; none where nothing was chosen."""
    return {} if choice == AUTO else {"tool_choice": forms.choice_document(choice)}


def settings_document(acting: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of SETTING_OF for JSON, as `settings` takes them back; null where a setting does not act."""
    document = {name: acting.get(setting) for name, setting in SETTING_OF.items()}
    if "tools" in acting:
        document["tools"] = [tool.model_dump(mode="json") for tool in acting["tools"]]
    if "builtin_tools" in acting:
        document["builtin_tools"] = list(acting["builtin_tools"])
    if document["response_format"]:
        document["response_format"] = tool_schemas.format_document(document["response_format"])
    return document


def _tools(value: object, remarks: list[str]) -> tuple[Any, ...]:
    """A request may have an empty list, which takes the tools of the defaults away."""
    if value == []:
        return ()
    document, ignored = without_harmless(value)
    remarks += ignored
    return tool_schemas.tools(document)


def _stop(value: object, name: str) -> tuple[str, ...]:
    found = texts(value, name)
    if len(found) > MAX_STOPS:
        raise GptossError(f"{name} holds {len(found)} texts, expected at most {MAX_STOPS}")
    if (longest := max(map(len, found), default=0)) > MAX_STOP_CHARACTERS:
        raise GptossError(f"{name} holds a text of {longest} characters, expected at most {MAX_STOP_CHARACTERS}")
    return found


def _biases(value: object) -> dict[int, float]:
    biases = {}
    for key, bias in an_object(value, "logit_bias").items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and str(int(key)) == key):
            raise GptossError(f"logit_bias names {short(key)}, expected token ids such as '1234'")
        biases[int(key)] = -math.inf if bias == _BANNED else number(bias, f"logit_bias of id {key}")
    return biases
