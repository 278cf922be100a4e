"""The server's app without sockets and without a model: what is asked is checked, answered, bounded, and kept."""

import asyncio
import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.api.asked import Options
from gptoss_jax.api.completions import Prompt
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.request import EngineConfig, NumericsError
from gptoss_jax.engine.runner import NOTHING_PENDING
from gptoss_jax.engine.sampling import FAULTY
from gptoss_jax.harmony.tokenizer import VOCAB_SIZE, load_tokenizer
from gptoss_jax.model.config import read_config
from gptoss_jax.server import bodies, replies
from gptoss_jax.server.access import Keys
from gptoss_jax.server.app import Served, create
from gptoss_jax.server.engine_thread import EngineThread
from gptoss_jax.server.exchange import Model
from gptoss_jax.server.metrics import Metrics
from gptoss_jax.server.stored import Stored
from tests.asgi import Connection, Reply, get, post, until
from tests.fake_runner import FakeRunner
from tests.goldens.make import ROOT
from tests.made_answers import CALL, FINAL, THOUGHT, WEATHER, ids_of

CHAT, TEXT, ITEMS = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HI = {"messages": [{"role": "user", "content": "Hi"}]}
ASKING = {CHAT: HI, TEXT: {"prompt": "Hi", "max_tokens": 90}, ITEMS: {"input": "Hi"}}
CONFIG = dataclasses.replace(read_config(ROOT / "configs" / "tiny.json"), vocab_size=VOCAB_SIZE)
SIZES = EngineConfig(slots=2, max_context_tokens=512, prefill_widths=(64,), prefix_snapshots=0)
SAID = "Hello naïve 🙂 world"


class ScriptedRunner(FakeRunner):
    """One that answers whatever it is asked with `script`, or, where that has a None, with numbers that are not finite.

    It decodes a step at a time, and draws nothing while `gate` is not open.
    """

    def __init__(self, sizes: EngineConfig, script: list[int | None]):
        super().__init__(sizes)
        self.script, self.gate = script, threading.Event()
        self.gate.set()
        self._drawn = np.zeros(sizes.slots, int)

    def admit(self, slot, request, drawn, cached=0, pending=NOTHING_PENDING) -> None:
        super().admit(slot, request, drawn, cached, pending)
        self._drawn[slot] = 0

    def decode(self, steps):
        if self.gate.is_set():
            return super().decode(1)
        time.sleep(0.002)
        return super().decode(0)

    def _draw(self, slot, budget, ids=()) -> int:
        token = self.script[self._drawn[slot] % len(self.script)]
        self._drawn[slot] += 1
        self._token[slot] = token or 0
        stops = token is None or token in self._stop_ids[slot]
        self._remaining[slot] = 0 if stops else budget - 1
        return FAULTY if token is None else token


class House:
    """An app over a scripted engine."""

    def __init__(
        self,
        script: str | list[int | None] = FINAL,
        most_waiting: int = 4,
        sizes: EngineConfig = SIZES,
        **served: Any,
    ):
        self.runner = ScriptedRunner(sizes, list(ids_of(script)) if isinstance(script, str) else script)
        self.engine = Engine(self.runner, CONFIG, sizes)
        self.thread = EngineThread(self.engine, most_waiting=most_waiting)
        self.scored: list[Any] = []
        stops = (200002, 200012)
        model = Model(("m", "alias"), load_tokenizer(), stops, Options, None, self._score)
        self.metrics, self.stored = Metrics(self.thread, self.engine), Stored(4)
        self.app = create(Served(model, self.thread, self.metrics, self.stored, **served))

    def _score(self, token_ids, top_logprobs) -> Prompt:
        self.scored.append((token_ids, threading.current_thread().name))
        if token_ids[0] == 13:
            raise NumericsError("after token 0: logits are not finite")
        count = len(token_ids) - 1
        return Prompt(token_ids, [-0.25] * count, [[(7, -0.1)][:top_logprobs]] * count)

    def run(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        """What a coroutine gives while the app runs."""

        async def main() -> Any:
            async with self.app.router.lifespan_context(self.app):
                return await asyncio.wait_for(work(self.app), 100)

        return asyncio.run(main())

    def post(self, path: str, body: object, **headers: str) -> Reply:
        return self.run(lambda app: post(app, path, body, headers))


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """What takes seconds once: the vocabulary, and openai-harmony's."""
    House().post(CHAT, HI)


def test_whole_answers_in_each_api():
    """Guards the routes: each gives its own form, with a time, an id that nobody guesses, and the cached tokens."""
    chat, other = (House().post(CHAT, HI).json() for _ in range(2))
    assert chat["choices"][0]["message"]["content"] == SAID and chat["created"] > 1.7e9
    assert chat["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert chat["id"] != other["id"] and len(chat["id"]) > 30
    response = House().post(ITEMS, ASKING[ITEMS]).json()
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"] and response["store"] is True
    assert House().post(TEXT, ASKING[TEXT]).json()["choices"][0]["text"] == FINAL.removesuffix("<|return|>")


@pytest.mark.parametrize("path", ASKING)
def test_streams_end_as_their_api_says(path):
    """Guards streams over the wire: their type, their last event, no buffering by proxies."""
    reply = House().post(path, ASKING[path] | {"stream": True})
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-store"
    last = reply.events()[-1]
    assert (last["type"] if path == ITEMS else last) == ("response.completed" if path == ITEMS else "[DONE]")
    assert (b"event: response.completed\n" in reply.body) == (path == ITEMS)


def test_several_answers_are_numbered():
    """Guards `n`, and several prompts: the choices of each after those of the one before, whole and streamed."""
    body = {"prompt": ["Hi", [7, 8]], "n": 2, "max_tokens": 6}
    house = House()
    choices = house.post(TEXT, body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    events = House().post(TEXT, body | {"stream": True, "stream_options": {"include_usage": True}}).events()
    texts = dict.fromkeys(range(4), "")
    for event in events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [choice["text"] for choice in choices]
    assert events[-2]["usage"]["completion_tokens"] == 24 and events[-2]["choices"] == []


def test_a_prompt_given_back_is_scored_in_the_engines_thread():
    """Guards evaluations: log probabilities of the prompt, also where nothing is drawn; failed numbers are a 500."""
    house = House()
    reply = house.post(TEXT, {"prompt": [[5, 6, 7], [8]], "echo": True, "max_tokens": 0, "logprobs": 1}).json()
    assert [choice["logprobs"]["token_logprobs"] for choice in reply["choices"]] == [[None, -0.25, -0.25], [None]]
    assert house.scored == [((5, 6, 7), "engine")] and reply["usage"]["completion_tokens"] == 0
    drawn = House().post(TEXT, {"prompt": [5, 6], "echo": True, "max_tokens": 2, "logprobs": 0}).json()["choices"][0]
    assert len(drawn["logprobs"]["tokens"]) == 4
    only = {"prompt": [5, 6], "echo": True, "max_tokens": 0, "logprobs": 0, "stream": True}
    events = House().post(TEXT, only | {"stream_options": {"include_usage": True}}).events()
    assert [len(choice["logprobs"]["tokens"]) for choice in events[0]["choices"]] == [2]
    assert events[1]["choices"][0]["finish_reason"] == "length" and events[-1] == "[DONE]"
    assert events[2]["usage"]["total_tokens"] == 2
    plain = House()
    assert plain.post(TEXT, {"prompt": "Hi", "echo": True, "max_tokens": 0}).json()["choices"][0]["text"] == "Hi"
    assert plain.scored == []
    failed = House().post(TEXT, {"prompt": [13, 6], "echo": True, "max_tokens": 1, "logprobs": 0})
    assert (failed.status, failed.json()["error"]["code"]) == (500, "numerics_error")


@pytest.mark.parametrize("path", ASKING)
def test_numbers_that_fail_end_one_answer(path):
    """Guards other answers, and clients: a 500, or an error inside the stream, and the engine goes on."""
    script = [*ids_of(THOUGHT), None]
    reply = House(script).post(path, ASKING[path])
    assert (reply.status, reply.json()["error"]["code"]) == (500, "numerics_error")
    house = House(script)

    async def both(app: Any) -> list[Reply]:
        streamed, limited = ASKING[path] | {"stream": True}, HI | {"max_tokens": 3}
        return list(await asyncio.gather(post(app, path, streamed), post(app, CHAT, limited)))

    streamed, other = house.run(both)
    last = streamed.events()[-1]
    assert last["error"]["code"] == "numerics_error" and streamed.status == 200
    assert b"Hm" in streamed.body
    assert other.json()["choices"][0]["finish_reason"] == "length"
    assert b'gptoss_errors_total{code="numerics_error"} 1.0' in house.metrics.text()


def test_a_full_queue_gets_429_and_when_to_ask_again():
    """Guards the queue's bound over HTTP, streamed and not, and that those under way are answered all the same."""
    house = House(most_waiting=1)

    async def crowd(app: Any) -> list[Reply]:
        house.runner.gate.clear()
        first = [asyncio.create_task(post(app, CHAT, HI)) for _ in range(3)]
        await until(lambda: house.thread.num_open == 3 and house.thread.num_waiting == 1)
        more = [await post(app, CHAT, HI | {"stream": stream}) for stream in (False, True)]
        assert b"gptoss_waiting 1.0" in (await get(app, "/metrics")).body
        house.runner.gate.set()
        return [*more, *await asyncio.gather(*first)]

    refused, streamed, *answered = house.run(crowd)
    for reply in (refused, streamed):
        assert reply.status == 429 and 1 <= int(reply.headers["retry-after"]) <= 60
        assert reply.json()["error"]["type"] == "rate_limit_error"
    assert [reply.status for reply in answered] == [200] * 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ASKING)
def test_who_leaves_is_not_answered(path, stream):
    """Guards slots: whatever a client was waiting for is cancelled when it has gone, in any state."""
    house = House()

    async def leave(app: Any) -> None:
        house.runner.gate.clear()
        body = json.dumps(ASKING[path] | {"stream": stream}).encode()
        connections = [Connection(app, "POST", path, body) for _ in range(4)]
        tasks = [asyncio.create_task(connection.run()) for connection in connections]
        await until(lambda: house.thread.num_running == 2 and house.thread.num_open == 4)
        for connection in connections:
            connection.leave()
        await asyncio.gather(*tasks)
        house.runner.gate.set()
        await until(lambda: house.thread.num_open == 0)
        assert house.engine.num_running == 0
        assert b"gptoss_disconnects_total 4.0" in house.metrics.text()

    house.run(leave)


def test_a_silent_stream_is_kept_alive(monkeypatch):
    """Guards waiting clients against proxies that end what is silent."""
    monkeypatch.setattr(replies, "KEEP_ALIVE_SECONDS", 0.01)
    house = House()

    async def wait(app: Any) -> Reply:
        house.runner.gate.clear()
        connection = Connection(app, "POST", CHAT, json.dumps(HI | {"stream": True}).encode())
        task = asyncio.create_task(connection.run())
        await until(lambda: b": the answer is on its way\n\n" in [each.get("body") for each in connection.sent])
        house.runner.gate.set()
        return await task

    assert house.run(wait).events()[-1] == "[DONE]"


def test_an_agents_loop_goes_on_from_what_is_kept():
    """Guards `previous_response_id`: the same prompt as with all items given back; another's, and old ones, are not."""
    house = House(THOUGHT + CALL, keys=Keys(["one", "two"]))
    tools = [{"type": "function", **WEATHER}]
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))

    async def loop(app: Any) -> None:
        first = (await post(app, ITEMS, {"input": "Hi", "tools": tools}, one)).json()
        (call,) = [item for item in first["output"] if item["type"] == "function_call"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
        given = {"input": [{"role": "user", "content": "Hi"}, *first["output"], result], "tools": tools}
        going_on = {"input": [result], "tools": tools, "previous_response_id": first["id"]}
        whole, kept = [await post(app, ITEMS, each, one) for each in (given, going_on)]
        assert whole.json()["usage"]["input_tokens"] == kept.json()["usage"]["input_tokens"] > 100
        assert kept.json()["previous_response_id"] == first["id"]
        assert (await get(app, f"{ITEMS}/{first['id']}", headers=one)).json() == first
        for reply in (await get(app, f"{ITEMS}/{first['id']}", headers=two), await post(app, ITEMS, going_on, two)):
            assert reply.status in (400, 404)
        assert (await get(app, f"{ITEMS}/{first['id']}", "DELETE", two)).status == 404
        assert (await get(app, f"{ITEMS}/{first['id']}", "DELETE", one)).json()["deleted"] is True
        gone = await post(app, ITEMS, going_on, one)
        assert (gone.status, gone.json()["error"]["code"]) == (400, "previous_response_not_found")
        unkept = (await post(app, ITEMS, {"input": "Hi", "store": False}, one)).json()
        assert unkept["store"] is False and (await get(app, f"{ITEMS}/{unkept['id']}", headers=one)).status == 404

    house.run(lambda app: loop(app))


def test_what_is_kept_is_bounded():
    """Guards memory: the responses unused longest go first, by number and by size."""
    stored = Stored(2)
    for name in ("a", "b"):
        stored.add({"id": name, "output": []}, [], [], "")
    assert stored.find("a", "") is not None
    stored.add({"id": "c", "output": []}, [], [], "")
    assert [stored.find(name, "") is not None for name in "abc"] == [True, False, True]
    small = Stored(100, most_characters=1000)
    for number in range(20):
        small.add({"id": str(number), "output": ["x" * 200]}, [], [], "")
    assert len(small) == 4 and small.find("19", "") is not None
    small.add({"id": "large", "output": ["x" * 2000]}, [], [], "")
    assert len(small) == 0


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe{}", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"messages": 1, "messages": 2}', 400, "invalid_json"),
        (b'{"temperature": Infinity}', 400, "invalid_json"),
        (b"9" * 5000, 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (HI | {"model": "gpt-5"}, 404, "model_not_found"),
        (HI | {"model": ["m"]}, 404, "model_not_found"),
        (HI | {"stream": 1}, 400, "invalid_request"),
        (HI | {"stream_options": {"include_usage": True}}, 400, "invalid_request"),
        (HI | {"reasoning_effort": "none"}, 400, "invalid_request"),
        (HI | {"functions": [{"name": "f"}]}, 400, "invalid_request"),
        (HI | {"guided_json": {}, "use_beam_search": True}, 400, "invalid_request"),
        (HI | {"n": 100}, 400, "invalid_request"),
        (HI | {"max_tokens": 1000}, 400, "context_length_exceeded"),
        (b" " * 130_000 + b"{}", 413, "body_too_large"),
    ],
)
def test_what_cannot_be_is_an_error_object(body, status, code):
    """Guards the server against any body: OpenAI's error object, a status, and nothing asked of the engine."""
    house = House(max_body_bytes=120_000)
    reply = house.post(CHAT, body)
    assert (reply.status, reply.json()["error"]["code"]) == (status, code)
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert house.engine.is_idle and f'status="{status}"'.encode() in house.metrics.text()


def test_bodies_that_are_large_or_slow_hear_why(monkeypatch):
    """Guards clients that send on while they are refused, of whom the rest is read; and connections that hold one."""
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)
    house = House(max_body_bytes=1 << 17)

    async def ask(app: Any) -> list[Reply]:
        sizes = {4: True, 9: True, 20: False}  # times the bound, and whether the client says how much comes
        connections = []
        for times, says in sizes.items():
            length = {"content-length": str(times << 17)} if says else {}
            connections.append(Connection(app, "POST", CHAT, b" " * (times << 17), length))
        replies = [await connection.run() for connection in connections]
        assert [len(connection._parts) for connection in connections] == [0, 18, 21]  # of 64 KiB, not read
        slow = Connection(app, "POST", CHAT, b"{")
        slow._parts.append(b"")
        slow._receive = _never_ends(slow._receive)
        return [*replies, await slow.run()]

    *large, slow = house.run(ask)
    assert [(reply.status, reply.headers["connection"]) for reply in large] == [(413, "close")] * 3
    assert (slow.status, slow.json()["error"]["code"]) == (408, "body_too_slow")


def _never_ends(receive: Any) -> Any:
    """A client that has sent one part, and nothing since."""
    parts = itertools.count()

    async def waits() -> Any:
        if next(parts):
            await asyncio.sleep(60)
        return await receive()

    return waits


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
NAMES = ["model", "stream", "stream_options", "n", "echo", "store", "previous_response_id", "reasoning", "prompt"]


ODD = st.dictionaries(st.sampled_from(NAMES) | st.text(), VALUES, max_size=2)


@settings(max_examples=5)
@given(st.lists(st.tuples(st.sampled_from(list(ASKING)), ODD), min_size=8, max_size=16))
def test_any_field_is_answered_or_refused(requests):
    """Guards against a 500 by whatever somebody sends, and header values that no header can hold."""

    async def ask(app: Any) -> list[Reply]:
        sent = [(path, {**ASKING[path], "max_tokens": 3, **odd}) for path, odd in requests]
        return [await post(app, path, json.dumps(body).encode()) for path, body in sent]

    for reply in House().run(ask):
        assert reply.status in (200, 400, 404)
        assert "\n" not in reply.headers.get("x-gptoss-ignored", "")


def test_unknown_fields_are_ignored_and_named():
    """Guards clients that send what other servers know; null says nothing."""
    odd = {"my_field": 1, "nothing": None, "é\n": 2, "user": "me"}
    reply = House().post(CHAT, HI | odd | {"reasoning_effort": "minimal"})
    assert reply.headers["x-gptoss-ignored"] == "my_field, ?\\n, user"
    assert reply.headers["x-gptoss-mapped"] == "reasoning_effort: minimal -> low"
    assert reply.json()["gptoss"]["settings"]["reasoning_effort"] == "low"
    mapped = House().post(ITEMS, {"input": "Hi", "reasoning": {"effort": "xhigh"}})
    assert mapped.headers["x-gptoss-mapped"] == "reasoning.effort: xhigh -> high"


def test_who_may_ask():
    """Guards keys, compared whole; and a machine against pages that its user looks at."""
    house = House(keys=Keys(["sk-1", "sk-ü"]), origins=("http://mine",))

    async def ask(app: Any) -> None:
        for key, status in (("Bearer sk-1", 200), ("bearer sk-1 ", 200), ("Bearer sk-", 401), ("sk-1", 401), ("", 401)):
            reply = await post(app, CHAT, HI, {"authorization": key})
            assert reply.status == status, key
        assert reply.json()["error"]["code"] == "invalid_api_key" and reply.headers["www-authenticate"] == "Bearer"
        assert [(await get(app, path)).status for path in ("/health", "/metrics", "/v1/models")] == [200, 401, 401]
        known = {"authorization": "Bearer sk-1"}
        assert (await post(app, CHAT, HI, known | {"origin": "http://evil"})).status == 403
        mine = await post(app, CHAT, HI, known | {"origin": "http://mine"})
        assert mine.headers["access-control-allow-origin"] == "http://mine"
        form = await post(app, CHAT, HI, known | {"content-type": "text/plain"})
        assert (form.status, form.json()["error"]["code"]) == (415, "content_type")

    house.run(ask)


def test_other_paths():
    """Guards what is not an answer: names of models, health while closing, and nothing of the file system."""
    house = House()

    async def look(app: Any) -> None:
        assert [model["id"] for model in (await get(app, "/v1/models")).json()["data"]] == ["m", "alias"]
        assert (await get(app, "/v1/models/alias")).json()["id"] == "alias"
        paths = ("/v1/models/x", "/", "/docs", "/openapi.json", "/../etc/passwd", "/v1/responses/../../etc/passwd")
        for path in paths:
            reply = await get(app, path)
            assert reply.status == 404 and "message" in reply.json()["error"], path
        assert (await get(app, CHAT)).status == 405
        assert (await get(app, "/health")).status == 200
        house.thread.close(0.0)
        assert (await get(app, "/health")).status == 503
        closed = await post(app, CHAT, HI)
        assert (closed.status, closed.json()["error"]["code"]) == (503, "unavailable")

    house.run(look)


def test_metrics_say_what_was_done():
    """Guards dashboards: after one answer its tokens, time to the first, speed, slots, pages and the hit rate."""
    house = House()
    used = house.post(CHAT, HI).json()["usage"]
    found = dict(line.rsplit(" ", 1) for line in house.metrics.text().decode().splitlines() if line[0] != "#")
    numbers = {name: float(value) for name, value in found.items()}
    assert numbers["gptoss_slots"] == SIZES.slots and numbers["gptoss_running"] == numbers["gptoss_waiting"] == 0
    assert numbers["gptoss_answer_tokens_total"] == used["completion_tokens"]
    assert numbers["gptoss_prompt_tokens_total"] == used["prompt_tokens"]
    assert numbers["gptoss_time_to_first_token_seconds_count"] == 1 == numbers["gptoss_tokens_per_second_count"]
    assert numbers["gptoss_free_pages"] == numbers["gptoss_pages"] > 0 == numbers["gptoss_prefix_hit_rate"]
    assert numbers[f'gptoss_requests_total{{path="{CHAT}",status="200"}}'] == 1


def test_closing_ends_streams_with_an_error_inside():
    """Guards clients of a server that ends: those that wait hear so in their stream, those that run end."""
    house = House()

    async def close(app: Any) -> list[Reply]:
        house.runner.gate.clear()
        tasks = [asyncio.create_task(post(app, CHAT, HI | {"stream": True})) for _ in range(2)]
        await until(lambda: house.thread.num_running == 2)
        tasks += [asyncio.create_task(post(app, path, ASKING[path] | {"stream": True})) for path in ASKING]
        await until(lambda: house.thread.num_open == 5)
        house.thread.close(20.0)
        house.runner.gate.set()
        return await asyncio.gather(*tasks)

    *ran, chat, text, items = house.run(close)
    assert [reply.events()[-1] for reply in ran] == ["[DONE]"] * 2
    for reply in (chat, text, items):
        assert reply.events()[-1]["error"]["code"] == "unavailable"
