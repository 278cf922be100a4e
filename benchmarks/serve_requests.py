"""Requests for a server under load, and what their answers have to be: of ids, and conversations held to schemas."""

import json
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jsonschema

from benchmarks.schemas import SCHEMAS
from gptoss_jax.errors import GptossError

STRUCTURED_TOKENS = 2048  # of a conversation with its schema, and its answer


class Asked(NamedTuple):
    """A request.

    Attributes:
        path: where it goes.
        body: what it says.
        schema: what the answer's text, or a call's arguments, have to be; None: anything.
    """

    path: str
    body: dict[str, Any]
    schema: Any = None


class Ended(NamedTuple):
    """What an answer was: its text, the log probability of each token, and why it ended."""

    text: str
    logprobs: tuple[float, ...]
    reason: str | None


def of_ids(count: int, scale: float, num_token_ids: int) -> list[Asked]:
    """Different ones: prompts of 8 to 300 tokens and answers of 4 to 120, times `scale`."""
    draw = random.Random(0)
    found = []
    for seed in range(count):
        prompt_tokens, answer_tokens = int(8 * 37 ** draw.random() * scale), int(4 * 30 ** draw.random() * scale)
        prompt = [draw.randrange(min(num_token_ids, 199_998)) for _ in range(max(1, prompt_tokens))]
        body = {"prompt": prompt, "max_tokens": max(1, answer_tokens), "seed": seed, "logprobs": 0}
        found.append(Asked("/v1/completions", body | {"logit_bias": {"200002": -100, "200012": -100}}))
    return found


def structured(count: int, scale: float) -> list[Asked]:
    """Different ones, each held to a schema: a response format, or parameters of a function that has to be called."""
    found = []
    for number in range(count):
        schema = dict(SCHEMAS[number % len(SCHEMAS)])
        most_tokens = max(1, int((60, 120, 240)[number % 3] * scale))
        body: dict[str, Any] = {"seed": number, "max_completion_tokens": most_tokens}
        body["messages"] = [{"role": "user", "content": f"What is {number} + {7 * number}?"}]
        if number % 2 and schema.get("type") == "object" and schema.get("properties"):
            function = {"name": "f", "parameters": schema, "strict": True}
            body |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
        else:
            form = {"name": "answer", "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        found.append(Asked("/v1/chat/completions", body, schema))
    return found


def is_valid(asked: Asked, ended: Ended) -> bool:
    """Whether an answer is what its schema says; one that was cut at its limit may be anything."""
    if asked.schema is None or ended.reason == "length":
        return True
    try:
        jsonschema.validate(json.loads(ended.text), asked.schema, jsonschema.Draft202012Validator)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def answer(data: bytes, *, streamed: bool) -> Ended:
    """What a response says, whole or streamed, of completions or of a chat.

    Raises:
        GptossError: it is an error, or a stream that has no end.
    """
    if not streamed:
        return _together(json.loads(data)["choices"])
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n") if line.startswith("data: ")]
    if lines[-1:] != ["[DONE]"]:
        raise GptossError(f"the stream ended without its end: {data[-300:].decode(errors='replace')}")
    chunks = [json.loads(line) for line in lines[:-1]]
    if errors := [chunk["error"] for chunk in chunks if "error" in chunk]:
        raise GptossError(f"an error in the stream: {errors[0]}")
    return _together([choice for chunk in chunks for choice in chunk["choices"]])


def _together(choices: Sequence[dict[str, Any]]) -> Ended:
    logprobs = [value for choice in choices for value in (choice.get("logprobs") or {}).get("token_logprobs", ())]
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    text = "".join(piece for choice in choices for piece in _text(choice))
    return Ended(text, tuple(logprobs), reasons[-1] if reasons else None)


def _text(choice: dict[str, Any]) -> Iterable[str]:
    """Of a completion, or the content or the arguments of a chat's message, or of a piece of one."""
    message = choice.get("message") or choice.get("delta") or {}
    yield choice.get("text") or message.get("content") or ""
    for call in message.get("tool_calls") or ():
        yield call["function"].get("arguments") or ""
