"""OpenAI's streams: whatever a model writes, chunks and events add up to the response that comes whole."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.api import chat, completions, responses
from gptoss_jax.api.asked import Options
from gptoss_jax.api.chat_stream import ChatStream
from gptoss_jax.api.completions_stream import CompletionsStream
from gptoss_jax.api.responses_stream import ResponsesStream
from gptoss_jax.engine.request import Event, FinishReason
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.parsed import Delta
from tests.broken_streams import MUTATIONS, SEEDS, WHICH, mutated
from tests.made_answers import CALL, CUT_CALL, FINAL, PREAMBLE, STRAY, THOUGHT, WORDS, ids_of

HI = [{"role": "user", "content": "Hi"}]
CHAT = chat.ask({"messages": HI, "logprobs": True, "n": 2}, Options())
TEXT = completions.ask({"prompt": "Hi", "logprobs": 1}, Options())
ITEMS = responses.ask({"input": "Hi", "top_logprobs": 1}, Options())


def _grown(
    ids: Sequence[int], step: int, stop: tuple[str, ...] = (), raw: bool = False, reason: FinishReason = "length"
) -> tuple[list[list[Delta]], Answer]:
    """What an answer's stream gives when `step` tokens come at a time, the last with the answer, as a server has it."""
    stream, news = AnswerStream(WORDS, stop_strings=stop, raw=raw), []
    for at in range(0, len(ids), step):
        taken, ended = [], False
        for token in ids[at : at + step]:
            taken.append(token)
            if ended := stream.ends_at(token) or token in (200002, 200012):
                break
        count = len(taken)
        is_last = ended or at + step >= len(ids)
        tops = (((7, -1.0),),) * count
        event = Event(0, tuple(taken), (-0.5,) * count, ("stop" if ended else reason) if is_last else None, at, tops)
        news.append(stream.take(event))
        if ended:
            break
    answer, rest = stream.finish()
    if news:
        news[-1] += rest
    return news, answer


def _chat_added_up(chunks: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
    """The choice that a client makes of the chunks, as OpenAI's own does."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "reasoning_content": "", "tool_calls": []}
    found: dict[str, Any] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            assert "finish_reason" not in found, "a chunk after the last"
            for name, value in choice["delta"].items():
                message[name] = value if name == "role" else message[name] + value
            if choice["finish_reason"]:
                found = {"finish_reason": choice["finish_reason"], "logprobs": choice["logprobs"]}
    return {"message": message, **found}


def _check_chat(ids: Sequence[int], step: int, stop: tuple[str, ...] = ()) -> None:
    news, answer = _grown(ids, step, stop)
    stream = ChatStream(CHAT, "1", "m")
    chunks = stream.begin()
    for deltas in news:
        chunks += stream.take(1, deltas)
    chunks += stream.finish(1, answer)
    whole, made = chat.choice(CHAT, answer, "1", 1), _chat_added_up(chunks, 1)
    expected = whole["message"]
    assert made["message"]["role"] == expected["role"]
    for name in ("content", "reasoning", "reasoning_content"):
        assert made["message"][name] == (expected[name] or ""), name
    calls = [{name: call[name] for name in ("id", "type", "function")} for call in made["message"]["tool_calls"]]
    assert calls == expected.get("tool_calls", [])
    assert (made["finish_reason"], made["logprobs"]) == (whole["finish_reason"], whole["logprobs"])


def _check_items(ids: Sequence[int], step: int, stop: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    news, answer = _grown(ids, step, stop)
    stream = ResponsesStream(ITEMS, "1", "m", added={"created_at": 5})
    events = stream.begin()
    for deltas in news:
        events += stream.take(deltas)
    ended, whole = stream.finish(answer)
    events += ended + stream.last(whole)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    expected = responses.response(ITEMS, [answer], "1", "m") | {"created_at": 5}
    assert _by_id(whole) == _by_id(expected)
    assert events[-1]["response"] == whole
    _check_parts(events, whole)
    return events


def _by_id(response: dict[str, Any]) -> dict[str, Any]:
    return {**response, "output": {item["id"]: item for item in response["output"]}}


def _check_parts(events: Sequence[dict[str, Any]], whole: dict[str, Any]) -> None:
    """Each item: added once, its deltas are its text, and the item when it is done is the one in the whole."""
    texts: dict[int, str] = {}
    done: list[dict[str, Any]] = []
    for event in events:
        kind, at = event["type"], event.get("output_index")
        if kind == "response.output_item.added":
            assert at == len(texts) and event["item"]["status"] == "in_progress"
            texts[len(texts)] = ""
        elif kind.endswith(".delta"):
            texts[event["output_index"]] += event["delta"]
        elif kind.endswith("_text.done"):
            assert event["text"] == texts[event["output_index"]]
        elif kind == "response.output_item.done":
            assert at == len(done)
            done.append(event["item"])
    assert [item["id"] for item in done] == [item["id"] for item in whole["output"]]
    for at, item in enumerate(whole["output"]):
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert texts[at] == text
        assert {**done[at], "status": 0, "content": 0} == {**item, "status": 0, "content": 0}


def _check_text(ids: Sequence[int], step: int, stop: tuple[str, ...] = ()) -> None:
    news, answer = _grown(ids, step, stop, raw=True)
    stream = CompletionsStream(TEXT, "1", "m")
    chunks = [chunk for deltas in news[:-1] for chunk in stream.take(0, deltas)] + stream.finish(0, answer)
    whole = completions.choice(TEXT, answer, 0, WORDS)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    last = chunks[-1]["choices"][0]
    assert (last["logprobs"], last["finish_reason"]) == (whole["logprobs"], whole["finish_reason"])


CHECKS = {"chat": _check_chat, "responses": _check_items, "completions": _check_text}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize(
    "text",
    [
        *(FINAL, THOUGHT + PREAMBLE + CALL, CUT_CALL, STRAY, THOUGHT + PREAMBLE),
        THOUGHT + PREAMBLE + "<|channel|>final<|message|>Done<|return|>",
        THOUGHT + FINAL.replace("<|return|>", "<|end|><|start|>assistant") + FINAL,
    ],
)
@pytest.mark.parametrize("step", [1, 4, 100])
def test_a_stream_adds_up_to_the_whole(name, text, step):
    """Guards clients that stream: they see what others see, no text missing, none twice, no call that was cut."""
    CHECKS[name](ids_of(text), step)
    CHECKS[name](ids_of(text), step, (" wor", "k."))


@pytest.mark.parametrize("name", CHECKS)
@settings(max_examples=60)
@given(edits=MUTATIONS, which=st.tuples(WHICH, WHICH), step=st.integers(1, 9))
def test_whatever_a_model_writes_the_stream_adds_up(name, edits, which, step):
    """Guards streams against every broken format that the parser repairs or keeps."""
    first, other = (ids_of(SEEDS[index]) for index in which)
    ids = mutated(first, edits, ids_of("to=x assistant"), other)
    if ids:
        CHECKS[name](ids, step, ("sw",))


def test_the_order_of_events_is_openais():
    """Guards clients that follow items by their events: reasoning first, then the call, each with a beginning."""
    kinds = [event["type"].removeprefix("response.") for event in _check_items(ids_of(THOUGHT + CALL), 100)]
    item = ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"]
    item += ["content_part.done", "output_item.done"]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds == ["created", "in_progress", *item, *call, "completed"]


def test_usage_comes_last_and_without_choices():
    """Guards `stream_options.include_usage`: its chunk, and a null in all others."""
    news, answer = _grown(ids_of(FINAL), 3)
    for stream in (ChatStream(CHAT, "1", "m", with_usage=True), CompletionsStream(TEXT, "1", "m", with_usage=True)):
        chunks = [*stream.begin(), *stream.take(0, news[0]), *stream.finish(0, answer)]
        assert all(chunk["usage"] is None for chunk in chunks)
        (last,) = stream.end([answer], 64)
        assert last["choices"] == [] and last["usage"]["prompt_tokens_details"] == {"cached_tokens": 64}
        assert last["usage"]["completion_tokens"] == len(answer.parsed.token_ids)


def test_an_answer_whose_numbers_fail_ends_as_failed():
    """Guards a client against an answer that looks whole: the last event says that it failed."""
    news, answer = _grown(ids_of(THOUGHT), 100, reason="error")
    stream = ResponsesStream(ITEMS, "1", "m")
    stream.take(news[0])
    _, whole = stream.finish(answer)
    (last,) = stream.last(whole)
    error = {"message": "m", "type": "server_error", "param": None, "code": "c"}
    failed, raised = stream.fail(error)
    assert (raised["type"], raised["error"], raised["code"]) == ("error", error, "c")
    for event in (last, failed):
        assert (event["type"], event["response"]["error"]["code"]) == ("response.failed", "server_error")
        assert event["response"]["status"] == "failed"


def test_a_prompt_that_is_given_back_stands_in_front():
    """Guards `echo`: text, one log probability a token, none for the first, offsets that count from the prompt's."""
    ids = ids_of("Hi there 🙂")
    prompt = completions.Prompt(ids, [-0.5] * (len(ids) - 1), [[(7, -0.1)]] * (len(ids) - 1))
    news, answer = _grown(ids_of(" world"), 1, raw=True)
    choice = completions.echoed(completions.choice(TEXT, answer, 0, WORDS), prompt, WORDS)
    logprobs = choice["logprobs"]
    assert choice["text"] == "Hi there 🙂 world"
    assert logprobs["token_logprobs"] == [None, *[-0.5] * len(ids)]
    assert logprobs["top_logprobs"][0] is None and len(logprobs["top_logprobs"][1]) == 2
    placed = list(zip(logprobs["text_offset"], logprobs["tokens"], strict=True))
    assert all(choice["text"][at:].startswith(text) for at, text in placed if not text.startswith("bytes:"))
    assert logprobs["text_offset"][-1] == len("Hi there 🙂")
    stream = CompletionsStream(TEXT, "1", "m", prompt=prompt)
    chunks = [*stream.begin(), *[c for deltas in news[:-1] for c in stream.take(0, deltas)], *stream.finish(0, answer)]
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == choice["text"]
    streamed = [part["logprobs"] for part in parts if part["logprobs"]]
    assert {name: [x for part in streamed for x in part[name]] for name in logprobs} == logprobs
    json.dumps(choice, allow_nan=False)
