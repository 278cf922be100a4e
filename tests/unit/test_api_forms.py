"""All forms: whatever a client writes and whatever a model wrote, there is an answer or one line that says why not."""

import json
import re
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.api import tokens
from gptoss_jax.api.asked import Form, Options
from gptoss_jax.api.forms import OPENAI, PLAIN
from gptoss_jax.engine.request import Event
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.answer import Answer, AnswerStream
from tests.broken_streams import MUTATIONS, SEEDS, WHICH, mutated
from tests.made_answers import FINAL, WEATHER, WORDS, answer, ids_of

FORMS = {"plain": PLAIN, **OPENAI}
DEFAULTS = Options()
CHAT = [{"role": "user", "content": "Hi"}]
SOUND = {  # values that most fields take, so that what is drawn gets past the first check
    **{"prompt": "Hi", "messages": CHAT, "input": CHAT, "tools": [WEATHER], "temperature": 0.5, "top_logprobs": 2},
    **{"logprobs": True, "response_format": {"type": "text"}, "text": {"format": {"type": "text"}}, "n": 2},
    **{"logit_bias": {"7": 1}, "stop": ["a"], "metadata": {"a": "b"}, "reasoning": {"effort": "low"}, "seed": 5},
}
WORDS_OF_JSON = st.sampled_from(["type", "role", "content", "user", "assistant", "text", "function", "name", "none"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4) | WORDS_OF_JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS_OF_JSON | st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=80)
@given(data=st.data())
def test_any_json_is_asked_or_refused(name, data):
    """Guards a job against one odd row: nothing but our own error, in one line, and an echo that is JSON."""
    form = FORMS[name]
    sound = {field: SOUND[field] for field in sorted(form.FIELDS & SOUND.keys())}
    body = data.draw(st.fixed_dictionaries({}, optional={field: st.just(value) for field, value in sound.items()}))
    body |= data.draw(st.dictionaries(st.sampled_from(sorted(form.FIELDS)), VALUES, max_size=2))
    try:
        asked = form.ask(body, DEFAULTS)
    except GptossError as error:
        assert "\n" not in str(error)
        return
    json.dumps([dict(asked.acting), dict(asked.echo), asked.metadata], allow_nan=False)
    assert PLAIN.ask({"prompt": "Hi", **asked.acting}, DEFAULTS).options.sampling == asked.options.sampling


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_one(name):
    """Guards the protocol that batch jobs and the server rely on."""
    assert isinstance(FORMS[name], Form)


def _broken(edits, which: tuple[int, int], raw: bool) -> Answer:
    first, other = (ids_of(SEEDS[index]) for index in which)
    stream = AnswerStream(WORDS, stop_strings=("sw",), raw=raw)
    for step, token in enumerate(mutated(first, edits, ids_of("to=x assistant"), other)):
        ended = stream.ends_at(token)
        stream.take(Event(0, (token,), (-1.0,), "stop" if ended else None, step, (((token, -1.0),),)))
        if ended:
            break
    else:
        stream.take(Event(0, (), (), "length"))
    return stream.finish()[0]


ASKED = {
    name: form.ask({**body, "logprobs": True}, DEFAULTS)
    for name, form, body in (
        ("plain", PLAIN, {"prompt": "Hi"}),
        ("/v1/chat/completions", OPENAI["/v1/chat/completions"], {"messages": CHAT}),
    )
}
ASKED["/v1/responses"] = OPENAI["/v1/responses"].ask({"input": "Hi", "top_logprobs": 1}, DEFAULTS)
ASKED["/v1/completions"] = OPENAI["/v1/completions"].ask({"prompt": "Hi", "logprobs": 1}, DEFAULTS)


@settings(max_examples=20)
@given(MUTATIONS, st.tuples(WHICH, WHICH))
def test_whatever_the_model_wrote_has_a_response_that_shows_it(edits, which):
    """Guards against lost answers: broken streams give JSON in every form, and text is found where clients look."""
    parsed, raw = _broken(edits, which, False), _broken(edits, which, True)
    responses = {
        name: form.response(ASKED[name], [raw if ASKED[name].raw else parsed], "id", "model")
        for name, form in FORMS.items()
    }
    json.dumps(responses, allow_nan=False)
    written = responses["plain"]
    texts = [written[key] for key in ("final", "reasoning", "unparsed_text", "preambles", "tool_calls")]
    message = responses["/v1/chat/completions"]["choices"][0]["message"]
    assert any(texts) == bool(message["content"] or message["reasoning"] or "tool_calls" in message)
    items = responses["/v1/responses"]["output"]
    assert any(texts) == any("call_id" in item or item["content"][0]["text"] for item in items)


@settings(max_examples=150)
@given(MUTATIONS, st.tuples(WHICH, WHICH))
def test_each_token_stands_where_its_text_does(edits, which):
    """Guards log probabilities and counts of reasoning: a message's tokens hold its content and hardly more."""
    given_answer = _broken(edits, which, False)
    places = tokens.places(given_answer, WORDS)
    ids = given_answer.parsed.token_ids
    for index, message in enumerate(given_answer.messages):
        own = [
            token
            for token, place in zip(ids, places, strict=True)
            if place.message == index and place.kind == message.kind and place.is_kept
        ]
        text = WORDS.decode(own)
        assert _plain(message.content) in _plain(text)
        assert len(WORDS.decode(own[1:-1])) <= len(message.content)


def _plain(text: str) -> str:
    """Without what may stand on a seam: white space, and characters of several tokens with others among them."""
    return re.sub(r"\s|[^\x00-\xff]", "", text)


def test_reasoning_is_counted_without_its_headers():
    """Guards usage: tokens of the thought, none of the control tokens around it."""
    asked = PLAIN.ask({"prompt": "Hi"}, DEFAULTS)
    used = tokens.usage(asked, [answer(FINAL), answer(FINAL)])
    thought = len(list(chain(*[WORDS.encode("Hm, so.")] * 2)))
    assert used == (len(asked.token_ids), 2 * len(ids_of(FINAL)), thought)
    assert used.total == used.prompt + used.answered
