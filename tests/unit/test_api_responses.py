"""OpenAI's responses: items in, items out, and what of the request is repeated."""

import json

import pytest

from gptoss_jax.api import chat, responses
from gptoss_jax.api.asked import Options
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import messages, render
from gptoss_jax.harmony.settings import Settings
from tests.made_answers import CALL, CUT_CALL, FINAL, PREAMBLE, STRAY, THOUGHT, WEATHER, WORDS, answer

DEFAULTS = Options()
TOOL = {"type": "function", **WEATHER, "strict": False}
SCHEMA = {"name": "shape", "schema": {"type": "object"}}


def _ask(defaults=DEFAULTS, **fields):
    return responses.ask({"model": "gpt-oss-20b", "input": "Hi", **fields}, defaults)


def _response(given, **fields) -> dict:
    return responses.response(_ask(**fields), [given], "1", "served")


def test_a_request_asks_what_the_chat_asks():
    """Guards the translation: each name of this form acts as that of chat completions does."""
    same = {"temperature": 0.5, "top_p": 0.9, "top_logprobs": 2, "tools": [WEATHER], "seed": 5, "top_k": 3}
    asked = _ask(
        **same,
        reasoning={"effort": "high", "summary": "auto"},
        text={"format": {"type": "json_schema", **SCHEMA}, "verbosity": "medium"},
        max_output_tokens=9,
        instructions="Be brief",
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
    )
    chatted = chat.ask(
        {
            **same,
            "logprobs": True,
            "reasoning_effort": "high",
            "response_format": {"type": "json_schema", "json_schema": SCHEMA},
            "max_tokens": 9,
            "messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}],
        },
        Options(),
    )
    assert (asked.token_ids, asked.options, asked.acting) == (chatted.token_ids, chatted.options, chatted.acting)
    assert _ask(Options(n=4)).options.n == 1


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"stream": True}, "stream is True, but an answer comes whole here"),
        ({"previous_response_id": "resp_0"}, "previous_response_id is 'resp_0', but nothing is stored here"),
        ({"conversation": "c"}, "conversation is 'c', but nothing is stored here"),
        ({"background": True}, "background is True, but an answer is waited for: expected false"),
        ({"truncation": "auto"}, "truncation is 'auto', but nothing is left out of a conversation"),
        ({"tool_choice": "required"}, "tool_choice asks for a call, but there are no functions"),
        ({"reasoning": {"effort": "minimal"}}, "reasoning.effort is 'minimal', expected one of low, medium, high"),
        ({"reasoning": {"budget": 3}}, "reasoning has 'budget', expected only effort"),
        ({"text": {"format": {"type": "xml"}}}, "text.format has type 'xml'"),
        ({"text": {"verbosity": "high"}}, "text.verbosity is 'high', but the model has no such setting"),
        ({"max_output_tokens": 0}, "max_output_tokens is 0, expected at least 1"),
        ({"include": ["all"]}, "include names 'all', expected some of message.output_text.logprobs"),
        ({"n": 2}, "unknown field 'n'"),
        ({"input": None}, "the request has no 'input'"),
        ({"input": []}, "input: got [], expected a list that is not empty"),
        ({"input": ["Hi"]}, "input, item 0 has type None, expected one of message, reasoning, function_call"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input, item 0 has type 'item_reference'"),
        ({"input": [{"role": "user"}]}, "input, item 0 has no 'content'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "content part of type 'input_image'"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x", "summary": []}]}, "is encrypted reasoning"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input, item 0 has no 'call_id'"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "answers id 'c', but"),
        ({"instructions": 3}, "instructions is 3, expected text"),
        ({"input": [{"role": "assistant", "content": "x", "phase": "later"}]}, "message 0 has phase 'later'"),
    ],
)
def test_what_cannot_be_done_is_refused(fields, error):
    """Guards against silence, and that an item is named by its place."""
    with pytest.raises(GptossError) as caught:
        _ask(**fields)
    assert error in str(caught.value)


def test_items_of_all_kinds_are_a_conversation():
    """Guards `input`: parts, reasoning, calls and results stand where the model expects them."""
    items = [
        {"role": "developer", "content": "Second."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm, so."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I will look."}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Now."}]},
        {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": '{"city": "Paris"}'},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "sunny"}]},
    ]
    text = WORDS.decode(_ask(input=items, instructions="First.").token_ids)
    assert "# Instructions\n\nFirst.\n\nSecond.<|end|>" in text
    assert "<|start|>user<|message|>Weather?<|end|><|start|>assistant" + THOUGHT + PREAMBLE in text
    assert "<|channel|>analysis<|message|>Now.<|end|><|start|>assistant" + CALL.partition("<|channel|>")[0] in text
    assert "to=assistant<|channel|>commentary<|message|>sunny<|end|><|start|>assistant" in text


def test_the_output_given_back_is_what_the_model_wrote():
    """Guards the next turn: no item of ours is refused as input (litellm#13420), or moves to another channel."""
    given = answer(THOUGHT + PREAMBLE + THOUGHT + CALL)
    output = _response(given)["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "reasoning", "function_call"]
    result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "sunny"}
    asked = _ask(input=[{"role": "user", "content": "Hi"}, *output, result])
    history = [messages.user("Hi"), *messages.from_parsed(given.history())]
    before = render.render(history, Settings(), for_completion=False)
    assert list(asked.token_ids[: len(before)]) == before
    assert "sunny" in WORDS.decode(asked.token_ids[len(before) :])
    final = _response(answer("<|channel|>final<|message|>Hello<|return|>"))["output"]
    asked = _ask(input=[{"role": "user", "content": "Hi"}, *final, {"role": "user", "content": "On"}])
    assert "<|channel|>final<|message|>Hello<|end|>" in WORDS.decode(asked.token_ids)


def test_an_answer_is_items_in_its_order():
    """Guards the output: each with its phase, an id that stays, and one status."""
    response = _response(answer(FINAL), instructions="Be brief")
    reasoning, message = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm, so."}]
    assert (message["phase"], message["status"], message["role"]) == ("final_answer", "completed", "assistant")
    assert message["content"] == [
        {"type": "output_text", "text": "Hello naïve 🙂 world", "annotations": [], "logprobs": []}
    ]
    assert response["output"] == _response(answer(FINAL))["output"]
    assert reasoning["id"] != message["id"]


@pytest.mark.parametrize(
    ("text", "types", "shown"),
    [
        (STRAY, ["message"], "I cannot help."),
        ("<|channel|>analysis<|message|>Let me", ["reasoning"], ""),
        (CUT_CALL, ["message"], '{"city": "Par'),
        ("<|channel|>final<|message|>Half", ["message"], "Half"),
        ("<|channel|>comm", ["message"], "comm"),
        ("", [], ""),
    ],
)
def test_text_is_never_lost_where_there_is_no_answer(text, types, shown):
    """Guards what was cut: it is said to be, no cut call is a call, and what was written is an item."""
    response = _response(answer(text, reason="length"))
    assert [item["type"] for item in response["output"]] == types
    assert "".join(item["content"][0]["text"] for item in response["output"] if item["type"] == "message") == shown
    assert all(item["status"] == "incomplete" for item in response["output"])
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_an_answer_that_failed_says_why():
    """Guards logits that are not finite: the response is not a complete one."""
    response = _response(answer("<|channel|>final<|message|>Half", reason="error"))
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")


def test_log_probabilities_stand_with_the_text_of_each_message():
    """Guards `include`: the tokens of a message are its own, up to the one in which a stop string begins."""
    text = THOUGHT + PREAMBLE + "<|channel|>final<|message|>One STOP it now<|return|>"
    given = answer(text, stop=("STOP it now",), top=True)
    for fields in ({"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}):
        parts = [item["content"][0] for item in _response(given, stop="STOP it now", **fields)["output"][1:]]
        assert ["".join(token["token"] for token in part["logprobs"]) for part in parts] == ["I will look.", "One STOP"]
    (item,) = _response(answer(STRAY), top_logprobs=2)["output"]
    assert "".join(token["token"] for token in item["content"][0]["logprobs"]) == "I cannot help."


def test_a_response_repeats_what_acted():
    """Guards the object: what the client wrote, what acted, sums, no clock, and JSON that holds no infinity."""
    fields = {"instructions": "Be brief", "tools": [TOOL], "max_output_tokens": 50, "reasoning": {"effort": "low"}}
    fields |= {"text": {"format": {"type": "json_schema", **SCHEMA}}, "metadata": {"a": "b"}, "top_p": 0.5}
    asked, given = _ask(**fields, parallel_tool_calls=False, top_logprobs=1), answer(FINAL, top=True)
    response = responses.response(asked, [given], "1", "served")
    json.dumps(response, allow_nan=False)
    expected = {
        **{"id": "resp_1", "object": "response", "created_at": 0, "model": "gpt-oss-20b", "status": "completed"},
        **{"instructions": "Be brief", "tools": [TOOL], "max_output_tokens": 50, "metadata": {"a": "b"}},
        **{"top_p": 0.5, "temperature": 1.0, "parallel_tool_calls": False, "tool_choice": "auto", "top_logprobs": 1},
        **{"previous_response_id": None, "truncation": "disabled", "error": None, "incomplete_details": None},
        "reasoning": {"effort": "low", "summary": None},
        "text": {"format": {"type": "json_schema", **SCHEMA, "description": None, "strict": True}},
    }
    assert {name: response[name] for name in expected} == expected
    prompt, answered = len(asked.token_ids), len(given.parsed.token_ids)
    assert response["usage"] == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answered,
        "output_tokens_details": {"reasoning_tokens": 4},
        "total_tokens": prompt + answered,
    }
    assert response["gptoss"]["settings"] == asked.acting
