"""Our own form of requests and responses: what acts, what is refused, what is given back."""

import json
import math

import pytest

from gptoss_jax.api.asked import Options
from gptoss_jax.api.fields import known
from gptoss_jax.api.forms import PLAIN
from gptoss_jax.engine.sampling_params import OPTIONS, SamplingParams
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import messages, render
from gptoss_jax.harmony.settings import Settings
from tests.made_answers import CALL, FINAL, PREAMBLE, THOUGHT, WEATHER, WORDS, answer

DEFAULTS = Options()
HI = [{"role": "user", "content": "Hi"}]
DEVELOPER = {"role": "developer", "content": [{"type": "developer_content", "instructions": "Own"}]}
SYSTEM = {"role": "system", "content": [{"type": "system_content", "reasoning_effort": "High"}]}


def _text(body, defaults=DEFAULTS) -> str:
    return WORDS.decode(PLAIN.ask(body, defaults).token_ids)


def _refused(body, defaults=DEFAULTS) -> str:
    with pytest.raises(GptossError) as caught:
        PLAIN.ask(body, defaults)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_three_sources_give_the_ids_that_generate_gives():
    """Guards prompts: a text and a chat are rendered as elsewhere, ids are taken as they are."""
    rendered = tuple(render.render([messages.user("Hi")], Settings()))
    assert PLAIN.ask({"prompt": "Hi"}, Options()).token_ids == rendered
    assert PLAIN.ask({"messages": HI}, Options()).token_ids == rendered
    assert PLAIN.ask({"messages": {"messages": HI}}, Options()).token_ids == rendered
    assert PLAIN.ask({"token_ids": list(rendered)}, Options()).token_ids == rendered


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "the request has none of them, expected one of prompt, messages, token_ids"),
        ({"prompt": "Hi", "messages": HI}, "the request has prompt and messages, expected one of"),
        ({"prompt": None}, "none of them"),
        ({"prompt": "Hi", "max_tokens": 3}, "unknown field 'max_tokens': did you mean 'max_new_tokens'?"),
        ({"prompt": "Hi", "zzz": 3}, "unknown field 'zzz', expected some of banned_ids, builtin_tools, date,"),
        ({"prompt": "Hi", "temperature": True}, "temperature is True, expected a number"),
        ({"prompt": "Hi", "temperature": "1"}, "temperature is '1', expected a number"),
        ({"prompt": "Hi", "top_p": 1.5}, "top_p is 1.5, expected 0 to 1"),
        ({"prompt": "Hi", "seed": -1}, "seed is -1, expected 0 to 4294967295"),
        ({"prompt": "Hi", "n": 0}, "n is 0, expected 1 to 1024"),
        ({"prompt": "Hi", "max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"prompt": "Hi", "max_new_tokens": 2.0}, "max_new_tokens is 2.0, expected a whole number"),
        ({"prompt": "Hi", "stop": ["a", 3]}, "stop is ['a', 3], expected text or a list of texts"),
        ({"prompt": "Hi", "stop": ""}, "stop holds an empty text"),
        ({"prompt": "Hi", "stop_ids": "1"}, "stop_ids is '1', expected a list of whole numbers"),
        ({"prompt": "Hi", "banned_ids": [True]}, "banned_ids is [True], expected a list of whole numbers"),
        ({"prompt": "Hi", "logprobs": 1}, "logprobs is 1, expected true or false"),
        ({"prompt": "Hi", "logprobs": False, "top_logprobs": 2}, "top_logprobs has an effect with logprobs only"),
        ({"prompt": "Hi", "logit_bias": {"x": 1}}, "logit_bias names 'x', expected token ids such as '1234'"),
        ({"prompt": "Hi", "logit_bias": {"7": 101}}, "logit_bias of id 7 is 101.0, expected -100 to 100"),
        ({"prompt": "Hi", "logit_bias": {"7": False}}, "logit_bias of id 7 is False, expected a number"),
        ({"prompt": "Hi", "logit_bias": [1]}, "logit_bias is [1], expected an object"),
        ({"prompt": "Hi", "reasoning_effort": "extreme"}, "reasoning_effort is 'extreme', expected one of low, medium"),
        ({"prompt": "Hi", "date": "today"}, "date is 'today', expected a date as YYYY-MM-DD, or none"),
        ({"prompt": "Hi", "system": 3}, "system is 3, expected text"),
        ({"prompt": "Hi", "date": "instructions"}, "date is 'instructions', expected a date"),
        ({"prompt": "Hi", "tools": [{"name": "a b"}]}, "tools is 'a b', expected letters"),
        ({"prompt": "Hi", "builtin_tools": ["bash"]}, "builtin_tools is ['bash'], expected of browser, python"),
        ({"prompt": "Hi", "response_format": {"type": "xml"}}, "response_format has type 'xml'"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 3}, "prompt is 3, expected text"),
        ({"prompt": "half \ud800"}, "half a surrogate pair"),
        ({"messages": []}, "messages: got [], expected a list that is not empty"),
        ({"messages": [{"role": "nobody"}]}, "message 0 has role 'nobody'"),
        ({"token_ids": [1], "system": "x"}, "token_ids is the whole prompt, so system has no place in it"),
        ({"token_ids": [1.5]}, "an id in token_ids is 1.5, expected a whole number"),
        ({"token_ids": [False]}, "expected a list of whole numbers"),
        ({"messages": [DEVELOPER, *HI], "system": "x"}, "own developer message, so system cannot be set"),
        ({"messages": [SYSTEM, *HI], "date": "2026-01-01"}, "own system message, so date cannot be set"),
        (
            {"messages": [{"role": "system", "content": "A"}, *HI], "system": "B"},
            "system and the conversation say different things: leave one of them out",
        ),
        (
            {"messages": {"messages": HI, "reasoning_effort": "low"}, "reasoning_effort": "high"},
            "reasoning_effort and the conversation say different things",
        ),
    ],
)
def test_what_cannot_be_done_as_asked_is_refused_by_the_clients_name(body, error):
    """Guards against a row that is answered in another way than it asks: one line that names the field as written."""
    assert error in _refused(body)


def test_a_request_that_is_no_object_is_refused():
    """Guards files whose lines are lists or texts."""
    with pytest.raises(GptossError, match=r"^the request is \[1\], expected an object$"):
        known([1], ["prompt"])


def test_every_option_replaces_the_default_and_null_leaves_it():
    """Guards the order: what a row says acts, what it does not say is the command line's."""
    own = {name: option.low for name, option in OPTIONS.items()} | {"logit_bias": {"7": 2, "8": "-inf"}}
    own |= {"banned_ids": [9], "max_new_tokens": 5, "stop": "END", "stop_ids": [4], "n": 3, "logprobs": True}
    asked = PLAIN.ask({"prompt": "Hi", **own}, Options())
    numbers: dict = {name: option.low for name, option in OPTIONS.items()}
    drawn = SamplingParams(**numbers, logit_bias={7: 2.0, 8: -math.inf}, banned_ids=(9,))
    assert asked.options == Options(Settings(), drawn, 5, ("END",), (4,), 3, True)
    silent = PLAIN.ask({"prompt": "Hi", **dict.fromkeys(own)}, asked.options)
    assert silent.options == asked.options
    assert PLAIN.ask({"prompt": "Hi", "stop": [], "stop_ids": []}, asked.options).options.stop == ()


def test_log_probabilities_follow_from_the_likeliest():
    """Guards `top_logprobs`, which would be lost without `logprobs`, and a row that wants neither."""
    defaults = PLAIN.ask({"prompt": "Hi", "top_logprobs": 2}, Options()).options
    assert defaults.logprobs
    off = PLAIN.ask({"prompt": "Hi", "logprobs": False}, defaults).options
    assert (off.logprobs, off.sampling.top_logprobs) == (False, 0)


def test_settings_are_those_of_generates_flags():
    """Guards the prompt: every setting of a row stands in it, by the name of the flag."""
    schema = {"type": "json_schema", "json_schema": {"name": "shape", "schema": {"type": "object"}}}
    text = _text(
        {
            **{"prompt": "Hi", "system": "Be brief", "reasoning_effort": "high", "date": "2026-01-31"},
            **{"knowledge_cutoff": "2025-01", "tools": [WEATHER], "builtin_tools": ["python"]},
            "response_format": schema,
        }
    )
    for said in ("Be brief", "Reasoning: high", "date: 2026-01-31", "cutoff: 2025-01", "get_weather", "## python"):
        assert said in text
    assert '## shape\n\n{"type":"object"}' in text


def test_defaults_give_way_to_what_a_row_or_its_conversation_says():
    """Guards a job's command line: it never makes a row fail that is sound by itself."""
    tools = PLAIN.ask({"prompt": "Hi", "tools": [WEATHER]}, Options()).options.settings.tools
    defaults = Options(Settings("low", current_date="2026-01-01", instructions="Default", tools=tools))
    assert "Default" in _text({"prompt": "Hi"}, defaults)
    assert "Row" in (text := _text({"prompt": "Hi", "system": "Row", "date": "none", "tools": []}, defaults))
    assert not {"Default", "2026-01-01", "get_weather"} & set(text.replace(".", " ").split())
    assert "Default" not in _text({"messages": [{"role": "system", "content": "Row"}, *HI]}, defaults)
    own = PLAIN.ask({"messages": [SYSTEM, DEVELOPER, *HI]}, defaults)
    assert own.token_ids == PLAIN.ask({"messages": [SYSTEM, DEVELOPER, *HI]}, Options()).token_ids
    assert (own.acting["date"], own.acting["system"], own.acting["tools"]) == (None, None, None)


def test_a_format_of_plain_text_takes_the_defaults_away():
    """Guards a row that asks for text in a job whose default is a schema."""
    schema = {"type": "json_schema", "json_schema": {"name": "shape", "schema": {"type": "object"}}}
    defaults = PLAIN.ask({"prompt": "Hi", "response_format": schema}, Options()).options
    assert "shape" in _text({"prompt": "Hi"}, defaults)
    assert "shape" not in _text({"prompt": "Hi", "response_format": {"type": "text"}}, defaults)


def test_what_acted_given_back_asks_the_same():
    """Guards the echo: a row's settings are all that acted, in the form that rows take."""
    schema = {"name": "shape", "schema": {"type": "object"}, "description": "A shape"}
    body = {
        **{"system": "Be brief", "tools": [WEATHER], "builtin_tools": ["browser"], "date": "2026-01-31", "seed": 7},
        **{"logit_bias": {"7": -3.5, "8": "-inf"}, "banned_ids": [1], "stop": ["x"], "top_logprobs": 3, "n": 2},
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    asked = PLAIN.ask({"prompt": "Hi", **body}, Options())
    acting = json.loads(json.dumps(asked.acting, allow_nan=False))
    again = PLAIN.ask({"prompt": "Hi", **acting}, Options())
    assert (again.token_ids, again.options, again.acting) == (asked.token_ids, asked.options, asked.acting)


def test_ids_have_no_settings():
    """Guards a prompt of ids: defaults of the prompt do not act on it, and are not said to."""
    asked = PLAIN.ask({"token_ids": [1, 2]}, Options(Settings("high", instructions="Default")))
    assert asked.acting["reasoning_effort"] is asked.acting["system"] is None
    assert asked.acting["temperature"] == 1.0


def test_each_of_several_answers_has_its_own_seed():
    """Guards `n`: the same seeds as of `generate --n`, and the model's own stop ids beside the row's."""
    asked = PLAIN.ask({"prompt": "Hi", "n": 3, "seed": 2**32 - 1, "stop_ids": [5, 200002]}, Options())
    requests, streams = asked.requests(WORDS, [200002, 200012])
    assert [request.sampling.seed for request in requests] == [2**32 - 1, 0, 1]
    assert requests[0].stop_ids == (200002, 200012, 5)
    assert [request.ends_at for request in requests] == [stream.ends_at for stream in streams]


def test_a_response_holds_all_that_came():
    """Guards the plain output: one flat object with everything but what its ids say again."""
    asked = PLAIN.ask({"prompt": "Hi", "metadata": {"row": 3}}, Options())
    response = PLAIN.response(asked, [answer(THOUGHT + PREAMBLE + CALL)], "id", "model")
    assert response["tool_calls"] == [{"name": "get_weather", "arguments": '{"city": "Paris"}'}]
    assert (response["reasoning"], response["preambles"], response["final"]) == ("Hm, so.", ["I will look."], None)
    prompt, answered = len(asked.token_ids), len(response["token_ids"])
    assert response["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": answered,
        "reasoning_tokens": 4,
        "total_tokens": prompt + answered,
    }
    assert (response["settings"], response["metadata"]) == (asked.acting, {"row": 3})
    assert set(response) == {
        *("final", "preambles", "reasoning", "tool_calls", "cut_calls", "unparsed_text", "parse_status", "faults"),
        *("finish_reason", "stop_string", "token_ids", "usage", "settings", "metadata"),
    }


def test_log_probabilities_are_given_if_asked_for():
    """Guards the size of outputs, and that every id has its own."""
    given = answer(FINAL, top=True)
    asked = PLAIN.ask({"prompt": "Hi", "logprobs": True}, Options())
    response = PLAIN.response(asked, [given], "id", "model")
    assert response["logprobs"] == list(given.logprobs)
    assert "top_logprobs" not in response
    asked = PLAIN.ask({"prompt": "Hi", "top_logprobs": 2}, Options())
    assert len(PLAIN.response(asked, [given], "id", "model")["top_logprobs"]) == len(given.logprobs)


def test_several_answers_are_a_list_with_one_sum():
    """Guards `n`: usage, settings and metadata stand once."""
    asked = PLAIN.ask({"prompt": "Hi", "n": 2, "metadata": "x"}, Options())
    one = answer(FINAL)
    response = PLAIN.response(asked, [one, one], "id", "model")
    assert set(response) == {"answers", "usage", "settings", "metadata"}
    assert [each["final"] for each in response["answers"]] == ["Hello naïve 🙂 world"] * 2
    assert response["usage"]["completion_tokens"] == 2 * len(one.parsed.token_ids)
    assert response["usage"]["prompt_tokens"] == len(asked.token_ids)


def test_remarks_say_what_has_no_place_in_the_prompt():
    """Guards against silence: ignored keys of messages, and instructions that ask for another effort."""
    chat = [{"role": "system", "content": "Reasoning: high"}, {"role": "user", "content": "Hi", "id": "m1"}]
    asked = PLAIN.ask({"messages": chat}, Options())
    remarks = PLAIN.response(asked, [answer(FINAL)], "id", "model")["remarks"]
    assert remarks[0] == "ignored, since the prompt has no place for it: 'id'"
    assert "the effort that acts is medium" in remarks[1]
