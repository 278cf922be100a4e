"""What a load test asks a server, and how it judges the answers: a judge that lets all pass would prove nothing."""

import json

import pytest

from benchmarks import serve_requests
from benchmarks.serve_requests import Ended
from gptoss_jax.errors import GptossError


def test_answers_are_judged_by_their_schemas():
    """Guards the load test against an answer that breaks its schema, or was cut without saying so."""
    asked = serve_requests.structured(2, 1.0)[0]  # {"type": "boolean"}
    assert asked.schema == {"type": "boolean"}
    for text, reason, valid in (
        ("true", "stop", True),
        ("tru", "stop", False),
        ("7", "stop", False),
        ("tru", "length", True),
    ):
        assert serve_requests.is_valid(asked, Ended(text, (), reason)) is valid


def test_streams_say_what_whole_answers_say():
    """Guards the comparison: text and arguments in pieces are put together, and an error or a lost end is none."""
    call = {"tool_calls": [{"function": {"name": "f", "arguments": '{"a":1}'}}], "content": None}
    whole = json.dumps({"choices": [{"message": call, "finish_reason": "tool_calls"}]}).encode()
    pieces = [{"delta": {"tool_calls": [{"function": {"arguments": part}}]}} for part in ('{"a"', ":1}")]
    events = [{"choices": [piece]} for piece in [*pieces, {"delta": {}, "finish_reason": "tool_calls"}]]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    expected = Ended('{"a":1}', (), "tool_calls")
    assert serve_requests.answer(whole, streamed=False) == expected
    assert serve_requests.answer(f"{stream}data: [DONE]\n\n".encode(), streamed=True) == expected
    for broken, message in ((stream, "without its end"), ('data: {"error": 1}\n\ndata: [DONE]\n\n', "an error in")):
        with pytest.raises(GptossError, match=message):
            serve_requests.answer(broken.encode(), streamed=True)
