"""What responses say of the prefix cache: a prompt that begins as an earlier one did is counted, to a page."""

import dataclasses
import itertools
from typing import Any

import pytest

from gptoss_jax.api import chat, completions, responses
from gptoss_jax.api.asked import Options
from gptoss_jax.model.mesh import PAGE_TOKENS
from tests.asgi import post
from tests.unit.test_server import CHAT, ITEMS, SIZES, TEXT, House

CACHING = dataclasses.replace(SIZES, max_context_tokens=1024, prefix_snapshots=16)
PAGE = 64
LONG = " ".join(f"Rule {number}: be kind." for number in range(40))


def of_chat(question: str) -> dict[str, Any]:
    """A request of each API that ends with a question."""
    return {"messages": [{"role": "system", "content": LONG}, {"role": "user", "content": question}]}


def of_items(question: str) -> dict[str, Any]:
    """As `of_chat`."""
    return {"instructions": LONG, "input": question}


def of_text(question: str) -> dict[str, Any]:
    """As `of_chat`."""
    return {"prompt": LONG + question, "max_tokens": 2}


APIS = {CHAT: (chat, of_chat), ITEMS: (responses, of_items), TEXT: (completions, of_text)}
DETAILS = {CHAT: "prompt_tokens_details", ITEMS: "input_tokens_details", TEXT: "prompt_tokens_details"}


def shared_tokens(path: str, question: str, earlier: str) -> int:
    """Tokens of whole pages in which two prompts begin alike, by their ids alone; one is left to go on from."""
    form, body = APIS[path]
    ids, before = (form.ask(body(each), Options()).token_ids for each in (question, earlier))
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, before, strict=False))
    return min(len(list(alike)), len(ids) - 1) // PAGE * PAGE


def usage_of(reply: Any, path: str) -> dict[str, Any]:
    """The usage in a response, or in the last event of a stream that has it."""
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return reply.json()["usage"]
    last = [event for event in reply.events() if event != "[DONE]"][-1]
    return (last["response"] if path == ITEMS else last)["usage"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", APIS)
def test_a_prompt_that_begins_as_another_did_has_cached_tokens(path, stream):
    """Guards whoever watches what the cache saves: none of the first prompt, whole pages of one that begins alike.

    The pages that hold them are as long as the engine's, so a number that is right by tokens alone is wrong.
    """
    assert PAGE == PAGE_TOKENS == max(CACHING.prefill_widths)
    options = {"stream": True} | ({} if path == ITEMS else {"stream_options": {"include_usage": True}})
    house, questions = House(sizes=CACHING), ("What is rain?", "What is snow?", "What is snow?")

    async def ask(app: Any) -> list[int]:
        bodies = [APIS[path][1](question) | (options if stream else {}) for question in questions]
        replies = [await post(app, path, body) for body in bodies]
        return [usage_of(reply, path)[DETAILS[path]]["cached_tokens"] for reply in replies]

    similar, same = shared_tokens(path, questions[1], questions[0]), shared_tokens(path, questions[2], questions[1])
    assert 2 * PAGE <= similar <= same
    assert house.run(ask) == [0, similar, same]
    assert f"gptoss_cached_prompt_tokens_total {float(similar + same)}".encode() in house.metrics.text()


def test_a_kept_response_is_gone_on_from_in_the_cache():
    """Guards agents' loops: the conversation so far is in the cache, whether it is sent again or named by its id."""
    house = House(sizes=CACHING)

    async def ask(app: Any) -> int:
        first = (await post(app, ITEMS, of_items("What is rain?"))).json()
        going_on = {**of_items("And snow?"), "previous_response_id": first["id"]}
        used = (await post(app, ITEMS, going_on)).json()["usage"]
        assert used["input_tokens"] > first["usage"]["input_tokens"]
        return used["input_tokens_details"]["cached_tokens"] - first["usage"]["input_tokens"]

    assert -PAGE <= house.run(ask) <= 0


def test_each_of_several_prompts_counts_once():
    """Guards sums: `n` answers to a prompt read it once, and of several prompts each counts, as in `prompt_tokens`."""
    house, prompts = House(sizes=CACHING), [LONG + "Rain", LONG + "Snow"]

    async def ask(app: Any) -> list[dict[str, Any]]:
        bodies = [{"prompt": prompt, "max_tokens": 2, "n": 2} for prompt in (prompts[0], prompts)]
        return [(await post(app, TEXT, body)).json()["usage"] for body in bodies]

    one, two = house.run(ask)
    shared = shared_tokens(TEXT, "Rain", "Snow")
    assert (one["prompt_tokens_details"]["cached_tokens"], shared > 0) == (0, True)
    assert two["prompt_tokens_details"]["cached_tokens"] == 2 * shared < two["prompt_tokens"]
