"""What docs/serve.md says differs from OpenAI's APIs: each row of its table is tried, and each code in it is there.

A row without a check fails, and so does a check without a row; where the code has a list, the row is held to it.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest

from gptoss_jax.api import openai_fields, overrides
from gptoss_jax.errors import GptossError
from gptoss_jax.grammar import vocabulary
from gptoss_jax.grammar.forms import FormError
from gptoss_jax.grammar.vocabulary import NotInstalledError
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.server import bodies, problems
from gptoss_jax.server.completions import MOST_PROMPTS
from tests import pages
from tests.asgi import Reply, get, post
from tests.goldens.make import ROOT
from tests.made_answers import CALL, CUT_CALL, FINAL, PREAMBLE, THOUGHT, WEATHER, ids_of
from tests.unit.test_server import ASKING, CHAT, HI, ITEMS, TEXT, House
from tests.unit.test_server_forms import ScriptedHeldRunner

PAGE = pages.text("serve.md")
NAME = re.compile(r"`([^`]+)`")
TOOLS = {CHAT: [{"type": "function", "function": WEATHER}], ITEMS: [{"type": "function", **WEATHER}]}
AN_OBJECT = {"type": "json_object"}


def table(head: str) -> dict[str, str]:
    """The rows of a table of the page, after the line `head`: first cell -> the others."""
    lines = PAGE.split(head, 1)[1].strip().splitlines()
    rows = [line.strip("| ").split(" | ", 1) for line in lines[: lines.index("")][2:]]
    return {first.strip(): rest for first, rest in rows}


ROWS = table("## What differs from OpenAI's APIs\n")


def house(script: Any = FINAL) -> House:
    """Two slots and a queue of four; whatever is held, it says the script."""
    made = House(script)
    made.engine.runner.__class__ = ScriptedHeldRunner
    return made


def ask(path: str, script: Any = FINAL, **fields: Any) -> Reply:
    """The response to a short request of an API with these fields."""
    return house(script).post(path, ASKING[path] | fields)


def refused(path: str, says: str, code: str = "invalid_request", **fields: Any) -> None:
    """The request is refused, and the message has what it has to say."""
    reply = ask(path, **fields)
    error = reply.json()["error"]
    assert (reply.status, error["code"]) == (400, code) and says in error["message"], (fields, error)


def ignored(path: str, **fields: Any) -> None:
    """The answer is what it is without these fields, which the header names."""
    reply = ask(path, **fields)
    assert reply.status == 200 and set(fields) <= set(reply.headers["x-gptoss-ignored"].split(", ")), fields


def chunks(path: str, script: Any = FINAL, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, but for its end."""
    events = ask(path, script, stream=True, **fields).events()
    return [event for event in events if event != "[DONE]"]


# ---- rows ----


def unknown(row: str) -> None:
    """Unknown fields."""
    for path in ASKING:
        ignored(path, never_heard_of=1)


REFUSED_VALUES = {"background": True, "truncation": "auto", "verbosity": "high", "suffix": "x", "prompt": {"id": "x"}}
REFUSED_AT: dict[str, str] = {
    **dict.fromkeys(("background", "conversation", "prompt", "truncation"), ITEMS),
    **dict.fromkeys(("suffix", "response_format", "tools"), TEXT),
}


def would_change(row: str) -> None:
    """Fields that nothing acts on: those of the row, and all of the code's list."""
    named = [name.partition(":")[0] for name in NAME.findall(row) if name != "medium"]
    assert set(named) <= {*bodies._REFUSED, *REFUSED_VALUES, "conversation"}
    names = list(dict.fromkeys([*named, *bodies._REFUSED]))

    async def work(app: Any) -> list[Reply]:
        asked = [(REFUSED_AT.get(name, CHAT), {name: REFUSED_VALUES.get(name, {"a": 1})}) for name in names]
        return [await post(app, path, ASKING[path] | field) for path, field in asked]

    for name, reply in zip(names, house().run(work), strict=True):
        assert reply.status == 400 and reply.json()["error"]["message"].startswith(name), name
    refused(ITEMS, "text.verbosity", text={"verbosity": "low"})


def efforts(row: str) -> None:
    """Efforts: those that the model has, those that are mapped, none."""
    mapped = dict(re.findall(r"`(\w+)` (?:acts )?as `(\w+)`", row))
    assert mapped == bodies.EFFORTS
    for effort in ("low", "medium", "high", *mapped):
        acts = mapped.get(effort, effort)
        for path, fields in ((CHAT, {"reasoning_effort": effort}), (ITEMS, {"reasoning": {"effort": effort}})):
            reply = ask(path, **fields)
            assert reply.json()["gptoss"]["settings"]["reasoning_effort"] == acts
            said = reply.headers.get("x-gptoss-mapped", "")
            assert said.endswith(f": {effort} -> {acts}") if effort in mapped else not said
    refused(CHAT, "always reasons", reasoning_effort="none")
    refused(ITEMS, "always reasons", reasoning={"effort": "none"})


def reasoning(row: str) -> None:
    """The chain of thought under both names, whole and streamed; an item."""
    message = ask(CHAT).json()["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "Hm, so."
    deltas = [choice["delta"] for event in chunks(CHAT) for choice in event["choices"]]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == "Hm, so."
    item = ask(ITEMS, include=["reasoning.encrypted_content"]).json()["output"][0]
    assert (item["type"], item["content"][0]["type"], item["summary"]) == ("reasoning", "reasoning_text", [])
    assert not item.get("encrypted_content")


def seed(row: str) -> None:
    """The seed that acted; that each request has its own is `cli.serving`'s."""
    assert ask(CHAT, seed=2**40 + 5).json()["gptoss"]["settings"]["seed"] == 5


def tool_choice(row: str) -> None:
    """All forms; which are enforced, `structured` says."""
    one = {"type": "function", "name": "get_weather"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [one]}
    for path, tools in TOOLS.items():
        for choice in ("auto", "none", "required", one, allowed):
            reply = ask(path, THOUGHT + CALL, tools=tools, tool_choice=choice)
            assert reply.status == 200
            assert ("structured" in reply.json()["gptoss"]["answers"][0]) == (choice not in ("auto", "none"))
        for choice in ({"type": "custom", "name": "x"}, {"type": "code_interpreter"}):
            refused(path, "tool_choice is", tools=tools, tool_choice=choice)


def parallel(row: str) -> None:
    """It changes nothing."""
    for path, tools in TOOLS.items():
        one, other = (ask(path, tools=tools, parallel_tool_calls=value).json()["usage"] for value in (True, False))
        assert one == other


def max_tool_calls(row: str) -> None:
    """Accepted without tools too; what it bounds is in `test_server_tools`."""
    assert ask(ITEMS, max_tool_calls=1).json()["max_tool_calls"] == 1
    ignored(CHAT, max_tool_calls=1)


def hosted(row: str) -> None:
    """Refused where nobody switched them on."""
    for kind in NAME.findall(ROW_OF[hosted]):
        refused(ITEMS, "not switched on", tools=[{"type": kind, "server_label": "a"}])
    for kind in ("file_search", "image_generation", "computer_use_preview", "shell"):
        refused(ITEMS, kind, tools=[{"type": kind}])


def response_format(row: str) -> None:
    """Enforced in both; refused in the third."""
    said = f"{THOUGHT}<|channel|>final<|message|>{{}}<|return|>"
    schema = {"name": "a", "schema": {"type": "object"}}
    lark, regex = {"type": "lark", "lark": "start: /.*/"}, {"type": "regex", "regex": ".*"}
    for form in (AN_OBJECT, lark, regex, {"type": "json_schema", "json_schema": schema}):
        answers = [ask(CHAT, said, response_format=form).json()["gptoss"]["answers"][0]]
        inner = {"type": "json_schema", **schema} if "json_schema" in form else form
        answers.append(ask(ITEMS, said, text={"format": inner}).json()["gptoss"]["answers"][0])
        assert [answer["structured"]["status"] for answer in answers] == ["valid"] * 2
    unique = {"name": "a", "schema": {"type": "array", "uniqueItems": True}}
    refused(CHAT, "uniqueItems", "invalid_form", response_format={"type": "json_schema", "json_schema": unique})
    refused(TEXT, "response_format", response_format=AN_OBJECT)


def strict(row: str) -> None:
    """Held with `strict`, free without."""
    for is_strict in (True, False):
        tools = [{"type": "function", "function": WEATHER | {"strict": is_strict}}]
        if is_strict:
            tools[0]["function"]["parameters"] = WEATHER["parameters"] | {"additionalProperties": False}
        answer = ask(CHAT, THOUGHT + CALL, tools=tools).json()["gptoss"]["answers"][0]
        assert ("structured" in answer) == is_strict


def refusal(row: str) -> None:
    """Always null."""
    assert ask(CHAT).json()["choices"][0]["message"]["refusal"] is None


def streamed_calls(row: str) -> None:
    """Whole, in one delta; one that is cut, in none."""
    deltas = [event["choices"][0]["delta"] for event in chunks(CHAT, THOUGHT + CALL, tools=TOOLS[CHAT])]
    [calls] = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    length = len(ids_of(THOUGHT + CUT_CALL))
    cut = chunks(CHAT, THOUGHT + CUT_CALL, tools=TOOLS[CHAT], max_tokens=length)
    assert not any("tool_calls" in event["choices"][0]["delta"] for event in cut)


def streamed_logprobs(row: str) -> None:
    """In the last chunk of a choice; in responses with the text's end."""
    for path, value in ((CHAT, True), (TEXT, 0)):
        found = [event["choices"][0] for event in chunks(path, logprobs=value)]
        assert [choice["logprobs"] is not None for choice in found] == [*[False] * (len(found) - 1), True]
    events = chunks(ITEMS, include=["message.output_text.logprobs"])
    with_some = {event["type"] for event in events if event.get("logprobs")}
    assert with_some == {"response.output_text.done"}


def preambles(row: str) -> None:
    """The content where no answer follows."""
    whole = ask(CHAT, THOUGHT + PREAMBLE + CALL, tools=TOOLS[CHAT]).json()["choices"][0]["message"]
    assert (whole["content"], len(whole["tool_calls"])) == ("I will look.", 1)


def max_tokens(row: str) -> None:
    """Left out: as far as the context goes."""
    settings = ask(CHAT).json()["gptoss"]["settings"]
    assert settings["max_new_tokens"] is None
    assert ask(TEXT, echo=True, max_tokens=0).status == 200
    refused(TEXT, "max_tokens", max_tokens=0)


def stop(row: str) -> None:
    """So many, so long, and of the answer alone."""
    assert all(f" {most} " in row for most in (overrides.MAX_STOPS, overrides.MAX_STOP_CHARACTERS))
    sound = ["x" * overrides.MAX_STOP_CHARACTERS] * (overrides.MAX_STOPS - 1)
    message = ask(CHAT, stop=["so", *sound]).json()["choices"][0]["message"]  # which stands in the reasoning
    assert message["reasoning"] == "Hm, so." and message["content"].startswith("Hello")
    assert ask(CHAT, stop="world").json()["choices"][0]["message"]["content"].endswith("🙂 ")
    refused(CHAT, "stop holds 17 texts, expected at most 16", stop=["a"] * 17)
    refused(ITEMS, "stop holds a text of 501 characters, expected at most 500", stop="a" * 501)


def many(row: str) -> None:
    """Up to slots and queue."""
    assert len(ask(CHAT, n=6).json()["choices"]) == 6
    refused(CHAT, "7 answers at once, expected at most 6", n=7)
    assert ask(TEXT, n=2, best_of=2).status == 200
    refused(TEXT, "best_of", best_of=2)


def text_logprobs(row: str) -> None:
    """Up to 5."""
    assert ask(TEXT, logprobs=5, max_tokens=0, echo=True).status == 200
    refused(TEXT, "logprobs is 6, expected 0 to 5", logprobs=6)
    echoed = ask(TEXT, prompt=[5, 6], max_tokens=1, logprobs=0, echo=True).json()["choices"][0]
    assert len(echoed["logprobs"]["tokens"]) == 3


def prompts(row: str) -> None:
    """Texts or ids, up to 128."""
    assert str(MOST_PROMPTS) in row
    assert len(ask(TEXT, prompt=["Hi", [7, 8]], max_tokens=1).json()["choices"]) == 2
    refused(TEXT, f"expected at most {MOST_PROMPTS}", prompt=["Hi"] * (MOST_PROMPTS + 1))
    scored = ask(TEXT, prompt=["Hi"] * MOST_PROMPTS, max_tokens=0, echo=True)
    assert scored.status == 200 or "at once" in scored.json()["error"]["message"]


def logit_bias(row: str) -> None:
    """-100 to 100, or "-inf"."""
    for bias in (-100, 100, "-inf"):
        assert ask(CHAT, logit_bias={"7": bias}).json()["gptoss"]["settings"]["logit_bias"] == {"7": bias}
    refused(CHAT, "logit_bias", logit_bias={"7": 101})


def others_sampling(row: str) -> None:
    """All that the row names, which are all that the code has beyond OpenAI's."""
    values = {"top_k": 3, "min_p": 0.25, "repetition_penalty": 1.5, "stop_token_ids": [9], "banned_ids": [8]}
    openais = {"temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop"}
    assert set(NAME.findall(row)) == set(values) == set(openai_fields.SAMPLING) - openais
    ours = {name: own for own, name in openai_fields.FIELD_OF.items()}
    for path in ASKING:
        settings = ask(path, **values).json()["gptoss"]["settings"]
        assert {name: settings[ours.get(name, name)] for name in values} == values


def media(row: str) -> None:
    """Refused wherever they stand."""
    url = {"url": "data:,x"}
    for part in ({"type": "image_url", "image_url": url}, {"type": "file", "file": {}}, {"type": "input_audio"}):
        refused(CHAT, "", messages=[{"role": "user", "content": [part]}])
    for part in ({"type": "input_image", "image_url": "data:,x"}, {"type": "input_file", "file_id": "a"}):
        refused(ITEMS, "", input=[{"role": "user", "content": [part]}])


def store(row: str) -> None:
    """Kept, found and forgotten; chat's are not."""

    async def work(app: Any) -> list[int]:
        kept = (await post(app, ITEMS, ASKING[ITEMS])).json()["id"]
        assert "store" in (await post(app, CHAT, HI | {"store": True})).headers["x-gptoss-ignored"]
        return [(await get(app, f"{ITEMS}/{kept}", method)).status for method in ("GET", "DELETE", "GET")]

    assert house().run(work) == [200, 200, 404]


def previous(row: str) -> None:
    """Refused with its code."""
    [code] = NAME.findall(row)
    refused(ITEMS, "is not kept here", code, previous_response_id="resp_0")


def model(row: str) -> None:
    """Names, none, another."""
    assert [ask(CHAT, **given).status for given in ({"model": "alias"}, {}, {"model": "gpt-5"})] == [200, 200, 404]


def harmless(row: str) -> None:
    """All of the code's list are ignored and named, in each API; the row names some."""
    says_nothing = set(bodies._SAY_NOTHING)
    assert set(NAME.findall(ROW_OF[harmless])) <= says_nothing
    for path in ASKING:
        ignored(path, **dict.fromkeys(says_nothing - ({"store"} if path == ITEMS else set()), "x"))


def obfuscation(row: str) -> None:
    """Nothing is added."""
    options = {"include_obfuscation": True}
    assert not any("obfuscation" in event for event in chunks(CHAT, stream_options=options))


def gptoss(row: str) -> None:
    """In a response and the last chunk of a choice."""
    assert {"settings", "answers"} <= set(ask(CHAT).json()["gptoss"])
    assert ["gptoss" in event for event in chunks(CHAT)][-1] is True
    assert "gptoss" in chunks(ITEMS)[-1]["response"]


def usage(row: str) -> None:
    """Reasoning tokens, and cached ones, of which `test_server_usage` has the numbers."""
    used = ask(CHAT).json()["usage"]
    assert used["completion_tokens_details"]["reasoning_tokens"] > 0
    assert used["prompt_tokens_details"] == {"cached_tokens": 0}
    assert ask(ITEMS).json()["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


CHECKS: dict[str, Callable[[str], None]] = {
    "unknown fields": unknown,
    "fields that would change the answer, and that nothing here acts on": would_change,
    "`reasoning_effort`, `reasoning.effort`": efforts,
    "`reasoning`, `reasoning_content`": reasoning,
    "`seed`": seed,
    "`tool_choice`": tool_choice,
    "`parallel_tool_calls`": parallel,
    "`max_tool_calls`": max_tool_calls,
    "`code_interpreter`, `web_search`, `mcp` in responses": hosted,
    "`response_format`, `text.format`": response_format,
    'functions with `"strict": true`': strict,
    "`refusal`": refusal,
    "calls in a stream": streamed_calls,
    "`logprobs` in a chat or completions stream": streamed_logprobs,
    "text beside calls (preambles) in a chat": preambles,
    "`max_tokens`": max_tokens,
    "`stop`": stop,
    "`n`, `best_of`": many,
    "`logprobs` of completions": text_logprobs,
    "`prompt`": prompts,
    "`logit_bias`": logit_bias,
    "others' sampling": others_sampling,
    "images, audio, files": media,
    "`store`": store,
    "`previous_response_id`": previous,
    "`model`": model,
    "`service_tier`, `user`, `prompt_cache_key`, `safety_identifier` and their like": harmless,
    "`stream_options.include_obfuscation`": obfuscation,
    "`gptoss`": gptoss,
    "`usage`": usage,
}
ROW_OF = {check: first for first, check in CHECKS.items()}


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """What takes seconds once."""
    vocabulary.prepare(load_tokenizer())
    ask(CHAT)


def test_each_row_has_a_check():
    """Guards the page against a row that nobody tries, and against promises that it no longer makes."""
    assert set(ROWS) == set(CHECKS)


@pytest.mark.parametrize("first", CHECKS)
def test_a_row_says_what_the_server_does(first):
    """Guards people who read the table before they move a client here."""
    CHECKS[first](ROWS[first])


def test_each_error_code_is_in_the_table():
    """Guards clients that look at codes: those of the source are those of the page."""
    told = re.findall(r"^\| ([\d, ]+) \| (`[^|]+`) \|", PAGE, re.MULTILINE)
    codes = {code for _, names in told for code in NAME.findall(names)}
    sources = [path.read_text() for path in sorted((ROOT / "gptoss_jax" / "server").glob("*.py"))]
    found = {code for source in sources for code in re.findall(r'\bcode="(\w+)"', source)}
    errors = (FormError("a"), NotInstalledError("a"), GptossError("a"), GptossError("exceed the context"))
    assert codes == found | set(map(problems._code, errors))
