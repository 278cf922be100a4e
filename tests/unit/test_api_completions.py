"""OpenAI's completions: plain text that goes on, and its log probabilities in the older form."""

import json

import pytest

from gptoss_jax.api import completions
from gptoss_jax.api.asked import Options
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.settings import Settings
from tests.made_answers import FINAL, WORDS, answer, ids_of

DEFAULTS = Options()


def _ask(defaults=DEFAULTS, **fields):
    return completions.ask({"model": "gpt-oss-20b", "prompt": "Once upon", **fields}, defaults)


def _choice(given, **fields) -> dict:
    (choice,) = completions.response(_ask(**fields), [given], "cmpl-1", "served")["choices"]
    return choice


def test_a_prompt_is_tokenised_as_it_is():
    """Guards raw text: nothing of harmony is put around it, and control tokens in it are text."""
    asked = _ask(Options(Settings(instructions="Default")), prompt="Once <|end|>")
    assert asked.token_ids == tuple(WORDS.encode("Once <|end|>"))
    assert asked.raw
    assert asked.acting["system"] is None
    assert _ask(prompt=[1, 2]).token_ids == (1, 2)


def test_the_limit_is_openais_unless_something_says_otherwise():
    """Guards `max_tokens`: 16 is the form's default, the command line's comes first, the row's before both."""
    assert _ask().options.max_new_tokens == 16
    assert _ask(Options(max_new_tokens=100)).options.max_new_tokens == 100
    assert _ask(Options(max_new_tokens=100), max_tokens=3).options.max_new_tokens == 3


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"prompt": None}, "the request has no 'prompt'"),
        ({"prompt": ["a", "b"]}, "prompt holds 2 prompts, expected one: send a request for each"),
        ({"prompt": [[1], [2]]}, "prompt holds 2 prompts"),
        ({"prompt": {"a": 1}}, "prompt is {'a': 1}, expected a list of whole numbers"),
        ({"echo": True}, "echo is True, but prompts are not given back"),
        ({"suffix": "end"}, "suffix is 'end', but the model fills no gaps"),
        ({"best_of": 3}, "best_of is 3, but all answers are given"),
        ({"best_of": 3, "n": 2}, "best_of is 3, but all answers are given"),
        ({"logprobs": 6}, "logprobs is 6, expected 0 to 5"),
        ({"logprobs": True}, "logprobs is True, expected a whole number"),
        ({"max_tokens": -1}, "max_tokens is -1, expected at least 1"),
        ({"stream": True}, "stream is True, but an answer comes whole here"),
        ({"messages": []}, "unknown field 'messages'"),
    ],
)
def test_what_cannot_be_done_is_refused(fields, error):
    """Guards against silence: the field is named as the client wrote it."""
    with pytest.raises(GptossError) as caught:
        _ask(**fields)
    assert error in str(caught.value)


def test_as_many_answers_as_the_best_are_taken_from():
    """Guards clients that send `best_of` beside an equal `n`."""
    assert _ask(best_of=2, n=2).options.n == 2
    assert _ask(best_of=1).options.n == 1


@pytest.mark.parametrize(
    ("text", "stop", "reason", "shown"),
    [
        (" a time<|return|>", (), "stop", " a time"),
        (" a time<|return|>", (), "length", " a time<|return|>"),
        (" a time there was", ("there", "time th"), "stop", " a "),
        (FINAL, (), "stop", FINAL.removesuffix("<|return|>")),
        ("<|return|>", (), "stop", ""),
    ],
)
def test_text_ends_before_what_ended_it(text, stop, reason, shown):
    """Guards the text: neither stop strings nor stop tokens are in it, and nothing else is left out."""
    choice = _choice(answer(text, stop=stop, raw=True, reason=reason), logprobs=1)
    assert (choice["text"], choice["finish_reason"]) == (shown, reason)
    assert shown.startswith("".join(choice["logprobs"]["tokens"][:-1]))
    assert len("".join(choice["logprobs"]["tokens"])) >= len(shown)


def test_log_probabilities_are_lists_side_by_side():
    """Guards the older form: offsets into the text, the drawn token among the likeliest, split characters by bytes."""
    given = answer(" a 🫠!<|return|>", raw=True, top=True)
    logprobs = _choice(given, logprobs=2)["logprobs"]
    assert [len(each) for each in logprobs.values()] == [len(given.parsed.token_ids) - 1] * 4
    assert logprobs["token_logprobs"][1] == -1 / 8
    assert logprobs["top_logprobs"][0] == {" a": 0.0, ".": -9999.0}
    assert logprobs["text_offset"][0] == 0
    split = [token for token in logprobs["tokens"] if token.startswith("bytes:")]
    assert len(split) > 1
    assert _choice(given)["logprobs"] is None


def test_a_response_is_openais_with_what_acted_beside():
    """Guards the object: names, sums, no clock; nothing is read as harmony."""
    asked, given = _ask(n=2), answer(FINAL, raw=True)
    response = completions.response(asked, [given, given], "cmpl-1", "served")
    json.dumps(response, allow_nan=False)
    assert (response["object"], response["created"], response["model"]) == ("text_completion", 0, "gpt-oss-20b")
    assert [choice["index"] for choice in response["choices"]] == [0, 1]
    answered = 2 * len(ids_of(FINAL))
    assert response["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": answered,
        "total_tokens": answered + 2,
    }
    assert response["gptoss"]["settings"] == asked.acting
    assert set(response["gptoss"]["answers"][0]) == {"finish_reason", "stop_string", "token_ids"}
