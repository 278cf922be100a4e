"""OpenAI's client asking a running server for answers that are held to a form; scenarios as in `serve_clients`."""

import concurrent.futures
import json
from collections.abc import Callable
from typing import Any, Literal

import jsonschema
import openai
import pydantic

SUM, WHERE = "What is 417 + 258?", "What time is it in Tokyo?"
GREEDY: Any = {"model": "gptoss-demo", "temperature": 0}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Lima"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FORECAST = {"name": "get_forecast", "description": "Gives the weather.", "parameters": PARAMETERS, "strict": True}
TIME = {"name": "get_time", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CHAT_TOOLS: Any = [{"type": "function", "function": each} for each in (FORECAST, TIME)]
TOOLS: Any = [{"type": "function", **each} for each in (FORECAST, TIME)]


class Sum(pydantic.BaseModel):
    """What answers are parsed as."""

    model_config = pydantic.ConfigDict(extra="forbid")
    answer: int = pydantic.Field(ge=0, le=9999)
    operation: Literal["sum", "difference"]


def held(client: openai.OpenAI, url: str) -> dict[str, Any]:
    """Every way in which a final answer can be held, through both APIs, whole and streamed."""
    messages: Any = [{"role": "user", "content": SUM}]
    chat, responses = client.chat.completions, client.responses
    regex: Any = {"type": "regex", "regex": "[0-9]{3}"}
    lark: Any = {"type": "lark", "lark": 'start: "it is " NUMBER\nNUMBER: /[0-9]{3}/'}
    an_object: Any = {"type": "json_object"}

    def in_chat(form: Any) -> str | None:
        return chat.create(messages=messages, response_format=form, **GREEDY).choices[0].message.content

    def in_responses(form: Any) -> str:
        return responses.create(input=SUM, text={"format": form}, **GREEDY).output_text

    def streamed_chat() -> Sum | None:
        with chat.stream(messages=messages, response_format=Sum, **GREEDY) as stream:
            return stream.get_final_completion().choices[0].message.parsed

    def streamed_response() -> Sum | None:
        with responses.stream(input=SUM, text_format=Sum, **GREEDY) as stream:
            return stream.get_final_response().output_parsed

    def parsed_chat() -> Sum | None:
        return chat.parse(messages=messages, response_format=Sum, **GREEDY).choices[0].message.parsed

    def parsed_response() -> Sum | None:
        return responses.parse(input=SUM, text_format=Sum, **GREEDY).output_parsed

    parsed = (parsed_chat, streamed_chat, parsed_response, streamed_response)
    forms = {"json_object": an_object, "regex": regex, "lark": lark}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sums = [pool.submit(each) for each in parsed]
        texts = {name: [pool.submit(ask, form) for ask in (in_chat, in_responses)] for name, form in forms.items()}
    found: dict[str, Any] = {name: [each.result() for each in some] for name, some in texts.items()}
    return found | {"parsed": [each.model_dump() if (each := done.result()) else None for done in sums]}


def calls(client: openai.OpenAI, url: str) -> dict[str, Any]:
    """Calls that are forced, of any function, of one, and of those that are allowed; strict arguments."""
    named_chat: Any = {"type": "function", "function": {"name": "get_forecast"}}
    named: Any = {"type": "function", "name": "get_forecast"}
    allowed: Any = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    nested: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named_chat]}}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        started = {
            f"{api.__name__[1:]}, {name}{', streamed' * streams}": pool.submit(api, client, choice, streams=streams)
            for api, choices in (
                (_chat, {"required": "required", "named": named_chat, "allowed": nested}),
                (_responses, {"required": "required", "named": named, "allowed": allowed}),
            )
            for name, choice in choices.items()
            for streams in (False, True)
        }
    return {name: call.result() for name, call in started.items()}


def _chat(client: openai.OpenAI, choice: Any, *, streams: bool) -> list[tuple[str, str]]:
    asked: Any = {"messages": [{"role": "user", "content": WHERE}], "tools": CHAT_TOOLS, "tool_choice": choice}
    if not streams:
        choices = client.chat.completions.create(**asked, **GREEDY).choices
        return [(call.function.name, call.function.arguments) for call in choices[0].message.tool_calls or ()]
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **asked, **GREEDY)]
    functions = [call.function for delta in deltas for call in delta.tool_calls or ()]
    return [(each.name or "", each.arguments or "") for each in functions if each]


def _responses(client: openai.OpenAI, choice: Any, *, streams: bool) -> list[tuple[str, str]]:
    asked: Any = {"input": WHERE, "tools": TOOLS, "tool_choice": choice}
    if streams:
        with client.responses.stream(**asked, **GREEDY) as stream:
            response = stream.get_final_response()
    else:
        response = client.responses.create(**asked, **GREEDY)
    return [(item.name, item.arguments) for item in response.output if item.type == "function_call"]


SCHEMAS: list[Any] = [
    Sum.model_json_schema(),
    {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 99}, "minItems": 1, "maxItems": 4},
    {"enum": ["red", "green", None, 3, {"a": [1]}]},
    {
        "$defs": {"leaf": {"type": "object", "properties": {"v": {"type": "boolean"}}, "additionalProperties": False}},
        "anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "string", "pattern": "^[a-c]{2,6}$"}],
    },
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "at": {"type": "string", "format": "date"}},
        "required": ["name", "at"],
        "additionalProperties": False,
    },
]


def many(client: openai.OpenAI, url: str) -> dict[str, Any]:
    """Streams at temperatures where free text is nonsense, several at a time, beside some that nobody holds."""

    def ask(number: int) -> str:
        schema = SCHEMAS[number % len(SCHEMAS)]
        form: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
        held = {} if number % 7 == 6 else {"response_format": form}
        options: Any = {"model": "gptoss-demo", "temperature": 1.0 + number % 3, "seed": number, **held}
        options["logit_bias"] = {"200007": 100}  # the end of a message, which reasoning comes to at once
        messages: Any = [{"role": "user", "content": f"{SUM} {number}"}]
        chunks = list(
            client.chat.completions.create(messages=messages, stream=True, max_tokens=150 if held else 20, **options)
        )
        choices = [choice for chunk in chunks for choice in chunk.choices]
        text = "".join(choice.delta.content or "" for choice in choices)
        if not held:
            return "free"
        if choices[-1].finish_reason != "stop":
            return f"{number}: {choices[-1].finish_reason}: {text[-40:]}"
        jsonschema.validate(json.loads(text), schema)
        return "valid"

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        found = list(pool.map(ask, range(15)))
    return {kind: found.count(kind) for kind in sorted(set(found))}


def mistakes(client: openai.OpenAI, url: str) -> dict[str, Any]:
    """Forms that cannot be."""
    schema: Any = {"type": "array", "uniqueItems": True}
    form: Any = {"name": "it", "schema": schema, "strict": True}
    strict: Any = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}}, "strict": True}
    messages: Any = [{"role": "user", "content": "Hi"}]
    create: Any = client.chat.completions.create
    respond: Any = client.responses.create
    asked: dict[str, Callable[[], Any]] = {
        "chat": lambda: create(
            messages=messages, response_format={"type": "json_schema", "json_schema": form}, **GREEDY
        ),
        "stream": lambda: create(
            messages=messages, response_format={"type": "json_schema", "json_schema": form}, stream=True, **GREEDY
        ),
        "responses": lambda: respond(input="Hi", text={"format": {"type": "json_schema", **form}}, **GREEDY),
        "function": lambda: create(messages=messages, tools=[{"type": "function", "function": strict}], **GREEDY),
        "nobody": lambda: create(messages=messages, tool_choice="required", **GREEDY),
        "regex": lambda: create(messages=messages, response_format={"type": "regex", "regex": "("}, **GREEDY),
    }
    found = {}
    for name, ask in asked.items():
        try:
            ask()
        except openai.BadRequestError as error:
            found[name] = [error.code, error.param, error.body["message"] if isinstance(error.body, dict) else ""]
    return found


SCENARIOS = {each.__name__: each for each in (held, calls, many, mistakes)}
