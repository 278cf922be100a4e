"""OpenAI's chat completions: what a request asks, and where each thing that the model wrote is found."""

import json

import pytest

from gptoss_jax.api import chat
from gptoss_jax.api.asked import Options
from gptoss_jax.api.forms import PLAIN
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import messages, render
from gptoss_jax.harmony.settings import Settings
from tests.made_answers import CALL, CUT_CALL, FINAL, PREAMBLE, STRAY, THOUGHT, WEATHER, WORDS, answer

DEFAULTS = Options()
HI = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": WEATHER}]
SECOND = "<|end|><|start|>assistant<|channel|>final<|message|>"


def _ask(defaults=DEFAULTS, **fields):
    return chat.ask({"model": "gpt-oss-20b", "messages": HI, **fields}, defaults)


def _choice(given, **fields) -> dict:
    (choice,) = chat.response(_ask(**fields), [given], "1", "served")["choices"]
    return choice


def test_a_request_asks_what_the_plain_one_asks():
    """Guards the translation: each of OpenAI's names acts as ours does."""
    same = {"temperature": 0.5, "top_p": 0.9, "presence_penalty": 1.0, "frequency_penalty": -1.0, "n": 2}
    same |= {"logit_bias": {"7": 2}, "stop": ["a", "b"], "logprobs": True, "top_logprobs": 3, "top_k": 5}
    same |= {"min_p": 0.1, "repetition_penalty": 1.1, "banned_ids": [9], "reasoning_effort": "high"}
    asked = _ask(**same, tools=TOOLS, max_completion_tokens=7, max_tokens=7, stop_token_ids=[3], seed=2**32 + 5)
    ours = {**same, "tools": [WEATHER], "max_new_tokens": 7, "stop_ids": [3], "seed": 5}
    plain = PLAIN.ask({"prompt": "Hi", **ours}, Options())
    assert (asked.token_ids, asked.options, asked.acting) == (plain.token_ids, plain.options, plain.acting)
    assert _ask(seed=-1).options.sampling.seed == 2**32 - 1


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"stream": True}, "stream is True, but an answer comes whole here: expected false, or leave it out"),
        ({"verbosity": "low"}, "verbosity is 'low', but the model has no such setting: expected \"medium\""),
        ({"modalities": ["text", "audio"]}, 'but the model writes text only: expected ["text"]'),
        ({"tool_choice": "required"}, "tool_choice asks for a call, but there are no functions: give some"),
        ({"tool_choice": "any"}, "tool_choice is 'any', expected 'auto', 'none', 'required', "),
        ({"tool_choice": {"type": "function"}}, "expected the name of a function"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice names 'f', expected functions"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls is 'no', expected true or false"),
        ({"top_logprobs": 3}, "top_logprobs has an effect with logprobs only: set logprobs to true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21, expected 0 to 20"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens and max_tokens are different"),
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"max_completion_tokens": "9"}, "max_completion_tokens is '9', expected a whole number"),
        ({"stop_token_ids": 3}, "stop_token_ids is 3, expected a list of whole numbers"),
        ({"seed": 0.5}, "seed is 0.5, expected a whole number"),
        ({"model": 3}, "model is 3, expected text"),
        ({"metadata": "x"}, "metadata is 'x', expected an object"),
        ({"messages": None}, "the request has no 'messages'"),
        ({"messages": {"messages": HI}}, "messages: got"),
        ({"reasoning_effort": "none"}, "reasoning_effort is 'none', expected one of low, medium, high"),
        ({"response_format": {"type": "xml"}}, "response_format has type 'xml', expected 'json_schema', 'json_object'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": {"not": {}, "a": 1}}}},
            'response_format, schema has "not", which cannot be enforced: take it out, or set strict to false',
        ),
        ({"tools": [{"type": "web_search"}]}, "tool 0 has type 'web_search', expected 'function'"),
        ({"max_token": 3}, "unknown field 'max_token': did you mean 'max_tokens'?"),
    ],
)
def test_what_nothing_acts_on_is_refused(fields, error):
    """Guards against silence: a field that would change the answer and cannot."""
    with pytest.raises(GptossError) as caught:
        _ask(**fields)
    assert error in str(caught.value)


def test_harmless_fields_change_nothing():
    """Guards clients that send what only OpenAI's servers read."""
    fields = {"user": "u", "store": True, "service_tier": "auto", "stream": False, "stream_options": None}
    fields |= {"prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "medium", "parallel_tool_calls": False}
    assert _ask(**fields) == _ask()


def test_no_tools_where_the_choice_says_so():
    """Guards `tool_choice: none`, for the request's tools and for those of the defaults."""
    assert _ask(tools=TOOLS, tool_choice="none").token_ids == _ask().token_ids
    defaults = Options(Settings(tools=_ask(tools=TOOLS).options.settings.tools))
    assert _ask(defaults).token_ids == _ask(tools=TOOLS).token_ids
    assert _ask(defaults, tool_choice="none").token_ids == _ask(defaults, tools=[]).token_ids == _ask().token_ids


def test_the_answer_is_content_and_the_reasoning_stands_under_both_names():
    """Guards clients: content is the final answer alone."""
    choice = _choice(answer(THOUGHT + PREAMBLE + "<|channel|>final<|message|>Done<|return|>"))
    assert choice["message"] == {
        "role": "assistant",
        "content": "Done",
        "refusal": None,
        "reasoning": "Hm, so.",
        "reasoning_content": "Hm, so.",
    }
    assert (choice["finish_reason"], choice["logprobs"], choice["index"]) == ("stop", None, 0)


def test_calls_have_ids_that_stay_and_the_preamble_is_the_content():
    """Guards tool calls: written again they are the same, and no two answers share an id."""
    given = answer(THOUGHT + PREAMBLE + CALL)
    first, second = chat.response(_ask(tools=TOOLS, n=2), [given, given], "1", "m")["choices"]
    (call,) = first["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert (first["message"]["content"], first["finish_reason"]) == ("I will look.", "tool_calls")
    assert first == _choice(given)
    assert call["id"] != second["message"]["tool_calls"][0]["id"]


def test_an_answer_with_its_call_can_be_given_back():
    """Guards the next turn: the message as it came, and the call's result, are a conversation."""
    given = answer(THOUGHT + PREAMBLE + CALL)
    message = _choice(given)["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
    asked = chat.ask({"messages": [*HI, message, result]}, Options())
    history = [messages.user("Hi"), *messages.from_parsed(given.history())]
    before = render.render(history, Settings(), for_completion=False)
    assert list(asked.token_ids[: len(before)]) == before
    assert "sunny" in WORDS.decode(asked.token_ids[len(before) :])


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        (STRAY, "I cannot help.", None),
        (THOUGHT + "<|channel|>commentary<|message|>I will", "I will", "Hm, so."),
        ("<|channel|>analysis<|message|>Let me", None, "Let me"),
        (PREAMBLE + "<|channel|>final<|message|>", "I will look.", None),
        (CUT_CALL, '{"city": "Par', None),
        ("<|channel|>comm", "comm", None),
        ("<|start|>user<|message|>Me<|end|>", "Me", None),
        ("", None, None),
    ],
)
def test_text_is_never_lost_where_there_is_no_answer(text, content, reasoning):
    """Guards vllm#41902: content and reasoning both null although the model wrote something."""
    choice = _choice(answer(text, reason="length"))
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == (content, reasoning)
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]


def test_log_probabilities_are_those_of_the_content():
    """Guards `logprobs.content`: its tokens joined are the content, bytes whole, the likeliest beside them."""
    given = answer(FINAL, top=True)
    content = _choice(given, logprobs=True, top_logprobs=2)["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "Hello naïve 🙂 world"
    first = given.parsed.token_ids.index(WORDS.encode("Hello")[0])
    assert content[0] == {
        "token": "Hello",
        "logprob": -first / 8,
        "bytes": list(b"Hello"),
        "top_logprobs": [
            {"token": "Hello", "logprob": -first / 8, "bytes": list(b"Hello")},
            {"token": ".", "logprob": -9999.0, "bytes": list(b".")},
        ],
    }


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        (FINAL, ("world",)),
        (FINAL.replace("<|return|>", SECOND + "Twice STOP more"), ("STOP",)),
        (STRAY, ()),
        (CUT_CALL, ()),
        ("<|channel|>comm", ()),
        ("<|channel|>final Hello there<|return|>", ()),
    ],
)
def test_log_probabilities_cover_what_is_shown_wherever_it_comes_from(text, stop):
    """Guards the tokens after a stop string, of two answers, and of text that stands in for one."""
    choice = _choice(answer(text, stop=stop), logprobs=True)
    shown = [token["token"] for token in choice["logprobs"]["content"]]
    content = choice["message"]["content"].replace("\n\n", "")
    assert "".join(shown).strip().startswith(content.strip())
    assert len("".join(shown[:-1])) < len(content)


def test_a_response_is_openais_with_what_acted_beside():
    """Guards the object: names, sums, no clock, and JSON that holds no infinity."""
    asked = _ask(metadata={"a": "b"}, logprobs=True, top_logprobs=1, messages=[{**HI[0], "id": "x"}])
    given = answer(FINAL, top=True)
    response = chat.response(asked, [given, given], "1", "served")
    json.dumps(response, allow_nan=False)
    assert {name: response[name] for name in ("id", "object", "created", "model", "metadata")} == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "gpt-oss-20b",
        "metadata": {"a": "b"},
    }
    prompt, answered = len(asked.token_ids), 2 * len(given.parsed.token_ids)
    assert response["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": answered,
        "total_tokens": prompt + answered,
        "completion_tokens_details": {"reasoning_tokens": 8},
    }
    added = response["gptoss"]
    assert added["settings"] == asked.acting
    assert added["remarks"] == ["ignored, since the prompt has no place for it: 'id'"]
    assert [each["token_ids"] for each in added["answers"]] == [list(given.parsed.token_ids)] * 2
    assert added["answers"][0]["logprobs"] == list(given.logprobs)
    assert set(added["answers"][0]) == {
        *("finish_reason", "stop_string", "parse_status", "faults", "preambles", "cut_calls", "unparsed_text"),
        *("token_ids", "logprobs", "top_logprobs"),
    }
    assert chat.response(chat.ask({"messages": HI}, Options()), [given], "x", "served")["model"] == "served"
