"""A request's body: read up to a size, as JSON, and sorted into fields that act, are ignored, or are refused."""

import asyncio
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from starlette.requests import Request

from gptoss_jax.api.fields import an_object, boolean
from gptoss_jax.api.openai_fields import HARMLESS
from gptoss_jax.errors import GptossError, short
from gptoss_jax.files import parse_json
from gptoss_jax.server.problems import Problem

IGNORED_HEADER, MAPPED_HEADER = "x-gptoss-ignored", "x-gptoss-mapped"
BODY_SECONDS = 60.0  # that a body may take to come
MOST_DROPPED = 8  # times the largest body: as much of one that is too large is read, so that its client hears why
MOST_NAMED = 20  # fields in a header
EFFORTS = {"minimal": "low", "xhigh": "high"}
"""Efforts that clients send and the model does not have -> those that act in their place. `none` is refused."""

_NO_EFFORT = "is 'none', but the model always reasons: expected low, medium or high ('low' reasons least)"
# Fields, OpenAI's and others', that would change the answer, and that nothing here acts on.
_REFUSED = (
    *("functions", "function_call", "audio", "web_search_options", "moderation"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "grammar", "json_schema"),
    *("use_beam_search", "prompt_logprobs", "continue_final_message", "ignore_eos", "min_tokens", "bad_words"),
    *("chat_template", "documents", "images", "prompt_embeds"),
    *("response_format", "text", "tools"),  # where a form has no such field
)
_SAY_NOTHING = frozenset(HARMLESS) - {"stream_options"}  # on which the server acts
_CLOSING = {"Connection": "close"}  # the rest of a body is not read
_FORMS = ("response_format", "text", "tools")


async def read(request: Request, max_bytes: int) -> dict[str, Any]:
    """The object that a request's body holds.

    Raises:
        Problem: it is too large, no JSON, or no object.
        starlette.requests.ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no page in a browser can send to another site unasked
        raise Problem(415, f"the content type is {short(kind)}, expected application/json", code="content_type")
    data = await _bytes(request, max_bytes)
    try:
        body = parse_json(data, "the body", whole="the body")
    except GptossError as error:
        raise Problem(400, str(error).removeprefix("the body: "), code="invalid_json") from None
    if not isinstance(body, dict):
        raise Problem(400, f"the body is {short(body)}, expected a JSON object", code="invalid_json")
    return body


async def _bytes(request: Request, max_bytes: int) -> bytes:
    """The body, whole.

    One that is too large is read on for a while and dropped: a client that still sends would see a connection that
    breaks, and nothing else.
    """
    data, dropped = bytearray(), 0
    given = request.headers.get("content-length", "")
    is_large = given.isdecimal() and int(given) > max_bytes
    if is_large and int(given) > MOST_DROPPED * max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                if not is_large:
                    data += chunk
                    is_large = len(data) > max_bytes
                if is_large:
                    dropped += len(chunk)
                    data.clear()
                if dropped > MOST_DROPPED * max_bytes:
                    break
    except TimeoutError:
        if not is_large:
            said = f"the body did not come within {BODY_SECONDS:g} s"
            raise Problem(408, said, code="body_too_slow", headers=_CLOSING) from None
    if is_large:
        raise _too_large(max_bytes)
    return bytes(data)


def _too_large(max_bytes: int) -> Problem:
    return Problem(413, f"the body has more than {max_bytes:,} bytes", code="body_too_large", headers=_CLOSING)


@dataclasses.dataclass(frozen=True)
class Fields:
    """A request's fields, sorted.

    Attributes:
        acting: those that a form may be asked with.
        stream: whether the answer comes as events.
        with_usage: whether the last event says what was used.
        headers: of the response: what was ignored, and what acted in place of what was asked.
    """

    acting: Mapping[str, Any]
    stream: bool
    with_usage: bool
    headers: Mapping[str, str]


def may_be_held(body: Mapping[str, Any]) -> bool:
    """Whether a request may ask for a grammar, which can take seconds to compile."""
    return any(body.get(name) for name in _FORMS)


def sort(body: Mapping[str, Any], known: Collection[str], own: Collection[str] = ()) -> Fields:
    """Sorts a request's fields: null counts as absent, and what says nothing here is ignored and named.

    Args:
        body: the request.
        known: what the form knows.
        own: what the server itself acts on, beside `stream` and `stream_options`.

    Raises:
        GptossError: a field that would change the answer and cannot.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name in _REFUSED:
        if given.get(name) not in (None, False, [], {}, "", "none", 0) and name not in known:
            raise GptossError(f"{name} is {short(given[name])}, which nothing here acts on: leave it out")
    stream = boolean(given.pop("stream", False), "stream")
    options = an_object(given.pop("stream_options", {}), "stream_options")
    if options and not stream:
        raise GptossError("stream_options has an effect with stream only: leave it out, or set stream to true")
    with_usage = boolean(options.get("include_usage") or False, "stream_options.include_usage")
    acts = {*own, *(set(known) - _SAY_NOTHING)}
    ignored = [name for name in given if name not in acts]
    acting = {name: value for name, value in given.items() if name not in ignored}
    mapped = _map_efforts(acting)
    headers = {IGNORED_HEADER: _listed(ignored)} if ignored else {}
    return Fields(acting, stream, with_usage, headers | ({MAPPED_HEADER: mapped} if mapped else {}))


def _map_efforts(fields: dict[str, Any]) -> str:
    """Puts efforts in place that the model has; says which, "" if none."""
    reasoning = fields.get("reasoning")
    places = [(fields, "reasoning_effort", "reasoning_effort")]
    if isinstance(reasoning, dict):
        fields["reasoning"] = reasoning = dict(reasoning)
        places.append((reasoning, "effort", "reasoning.effort"))
    mapped = ""
    for holder, key, name in places:
        effort = holder.get(key)
        if effort == "none":
            raise GptossError(f"{name} {_NO_EFFORT}")
        if isinstance(effort, str) and effort in EFFORTS:
            holder[key] = EFFORTS[effort]
            mapped = f"{name}: {effort} -> {EFFORTS[effort]}"
    return mapped


def _listed(names: Collection[str]) -> str:
    """Names for a header, of letters that one can hold."""
    shown = [short(name, 40)[1:].split("'")[0].encode("ascii", "replace").decode() for name in list(names)[:MOST_NAMED]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")
