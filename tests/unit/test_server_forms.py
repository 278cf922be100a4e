"""Answers held to a form, over HTTP without sockets and without a model: who waits for a grammar, what is refused."""

import asyncio
import threading
from typing import Any

import pytest

from gptoss_jax.api import asking
from gptoss_jax.engine.held import HeldSlots
from gptoss_jax.engine.programs import MAX_STEPS_PER_DISPATCH
from gptoss_jax.grammar import vocabulary
from gptoss_jax.harmony.tokenizer import VOCAB_SIZE, load_tokenizer
from gptoss_jax.server import app
from tests.asgi import Reply, get, post, until
from tests.made_answers import THOUGHT
from tests.unit.test_server import ASKING, CHAT, HI, ITEMS, SIZES, TEXT, House, ScriptedRunner

AN_OBJECT = {"type": "json_object"}
HELD = {CHAT: HI | {"response_format": AN_OBJECT}, ITEMS: {"input": "Hi", "text": {"format": AN_OBJECT}}}
SAID = '{"a": [1, true], "b": null}'


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """What takes seconds once, as a server does it before it serves."""
    vocabulary.prepare(load_tokenizer())


class ScriptedHeldRunner(ScriptedRunner):
    """One that takes what holds its slots for granted: the script has only what may be drawn."""

    def unheld(self) -> HeldSlots:
        return HeldSlots(SIZES.slots, VOCAB_SIZE, MAX_STEPS_PER_DISPATCH)

    def decode_held(self, steps, held):
        kept = self._remaining.copy()
        self._remaining[~held.takes_part] = 0
        draws = self.decode(1)
        self._remaining[~held.takes_part] = kept[~held.takes_part]
        return draws


def held_house(said: str = SAID) -> House:
    """A house whose model says this in the end."""
    house = House(f"{THOUGHT}<|channel|>final<|message|>{said}<|return|>")
    house.engine.runner.__class__ = ScriptedHeldRunner
    return house


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", HELD)
def test_what_is_held_is_said(path, stream):
    """Guards both APIs: the text is what was drawn under the form, and the response says that it has it."""
    reply = held_house().post(path, HELD[path] | {"stream": stream})
    if not stream:
        document = reply.json()
    elif path == ITEMS:
        document = reply.events()[-1]["response"]
    else:
        events = [event for event in reply.events() if event != "[DONE]"]
        texts = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
        assert "".join(texts) == SAID
        document = events[-1]
    assert document["gptoss"]["answers"][0]["structured"] == {"status": "valid", "fault": None, "remarks": []}
    if path == ITEMS:
        assert document["output"][-1]["content"][0]["text"] == SAID and document["text"]["format"] == AN_OBJECT


@pytest.mark.parametrize("path", HELD)
def test_a_grammar_that_nobody_can_follow_ends_one_answer(path):
    """Guards clients against half of an object: an error, inside the stream too, that counts; others are answered."""
    whole = held_house("no object").post(path, HELD[path])
    assert (whole.status, whole.json()["error"]["code"]) == (500, "constraint_error")
    house = held_house("no object")

    async def both(app: Any) -> list[Reply]:
        asked = post(app, path, HELD[path] | {"stream": True}), post(app, TEXT, ASKING[TEXT])
        return list(await asyncio.gather(*asked))

    streamed, other = house.run(both)
    last = streamed.events()[-1]
    assert last["error"]["code"] == "constraint_error" and "met a limit" in last["error"]["message"]
    assert b"Hm" in streamed.body and other.status == 200 and house.engine.is_idle
    assert b'gptoss_errors_total{code="constraint_error"} 1.0' in house.metrics.text()


def test_nobody_waits_for_anothers_grammar(monkeypatch):
    """Guards the event loop and the engine: while more grammars are compiled than have threads, others are answered."""
    compiling = threading.Event()
    monkeypatch.setattr(asking, "held_form", lambda settings, *rest, **named: settings.response_format and _wait())

    def _wait() -> None:
        assert threading.current_thread().name.startswith("grammars")
        assert compiling.wait(60)

    house, many = House(most_waiting=50), app.GRAMMAR_THREADS + 20

    async def crowd(app: Any) -> None:
        waiting = [asyncio.create_task(post(app, CHAT, HELD[CHAT])) for _ in range(many)]
        await asyncio.sleep(0.05)
        assert (await post(app, CHAT, HI)).status == (await get(app, "/health")).status == 200
        assert not any(task.done() for task in waiting)
        compiling.set()
        assert [reply.status for reply in await asyncio.gather(*waiting)] == [200] * many
        await until(lambda: house.thread.num_open == 0)

    house.run(crowd)


def test_a_crowd_with_grammars_is_sent_away_before_they_are_compiled(monkeypatch):
    """Guards the machine against schemas for which there is no room: 429 at once, and no work for it."""
    compiling, compiled = threading.Event(), list[bool]()
    monkeypatch.setattr(asking, "held_form", lambda *rest, **named: compiled.append(compiling.wait(60)))
    house = House(most_waiting=1)  # beside two slots

    async def crowd(app: Any) -> None:
        first = [asyncio.create_task(post(app, CHAT, HELD[CHAT])) for _ in range(3)]
        await asyncio.sleep(0.05)
        more = await asyncio.gather(*(post(app, CHAT, HELD[CHAT]) for _ in range(20)))
        assert [reply.status for reply in more] == [429] * 20
        assert all(int(reply.headers["retry-after"]) for reply in more)
        compiling.set()
        assert [reply.status for reply in await asyncio.gather(*first)] == [200] * 3
        assert len(compiled) == 3
        house.runner.gate.clear()
        running = [asyncio.create_task(post(app, CHAT, HELD[CHAT])) for _ in range(3)]
        await until(lambda: house.thread.num_open == 3)
        assert (await post(app, CHAT, HELD[CHAT])).status == 429 and len(compiled) == 6
        house.runner.gate.set()
        await asyncio.gather(*running)

    house.run(crowd)


@pytest.mark.parametrize("path", HELD)
def test_a_server_without_the_extra_says_which(path, monkeypatch):
    """Guards servers that cannot hold anything: who asks for it hears what is missing, all others are answered."""
    monkeypatch.setattr(vocabulary, "NEEDED", ("json", "no_such_package"))
    form = {"type": "regex", "regex": f"never compiled before, by {path}"}
    asked = HI | {"response_format": form} if path == CHAT else {"input": "Hi", "text": {"format": form}}
    refused = House().post(path, asked)
    assert (refused.status, refused.json()["error"]["code"]) == (400, "not_installed")
    assert "no_such_package" in refused.json()["error"]["message"]
    assert "pip install 'gptoss-jax[structured]'" in refused.json()["error"]["message"]
    assert House().post(path, ASKING[path]).status == 200


@pytest.mark.parametrize(
    ("path", "field"), [(TEXT, "response_format"), (TEXT, "tools"), (ITEMS, "response_format"), (CHAT, "text")]
)
def test_a_form_in_the_wrong_place_is_refused(path, field):
    """Guards people against an answer that nobody held: a field of the other API is no field to be ignored."""
    refused = House().post(path, ASKING[path] | {field: AN_OBJECT})
    assert refused.status == 400
    assert refused.json()["error"]["message"].startswith(f"{field} is ")
