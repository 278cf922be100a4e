"""No path from a request reaches the file system, and no address from one the network, whatever field it stands in."""

import copy
import json
import socket
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gptoss_jax.errors import GptossError
from gptoss_jax.grammar import vocabulary
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.tools.choice import Chosen, Offer
from tests.asgi import get, post
from tests.made_answers import WEATHER
from tests.round_models import FINAL, running
from tests.unit import test_server_tools as tools
from tests.unit.test_python_tool import namespaces_are_here
from tests.unit.test_server import CHAT, HI, ITEMS, TEXT, House
from tests.unit.test_server_forms import held_house
from tests.watched import Watched, watching

CALL = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
SAID = {"role": "assistant", "content": "Hi", "reasoning": "Hm"}
IGNORED = {"user": "u", "prompt_cache_key": "k", "safety_identifier": "s", "service_tier": "auto", "unknown": "x"}
COMMON = {**IGNORED, "model": "m", "metadata": {"a": "b"}, "stop": ["zz"]}
SOUND: dict[str, dict[str, Any]] = {  # each text in them is replaced in turn
    CHAT: {
        **COMMON,
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "name": "me", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "rain"},
            SAID,
            {"role": "user", "content": "Hi"},
        ],
        "tools": [{"type": "function", "function": WEATHER}],
        "reasoning_effort": "low",
        "prediction": {"type": "content", "content": "Hi"},
    },
    ITEMS: {
        **COMMON,
        "instructions": "Be kind.",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
            {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "rain"},
            {"type": "code_interpreter_call", "id": "i", "container_id": "x", "code": "1", "outputs": [{"logs": "1"}]},
            {"type": "web_search_call", "id": "w", "action": {"type": "open_page", "url": "a"}},
            {"role": "user", "content": "Hi"},
        ],
        "tools": [{"type": "function", **WEATHER}],
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
    },
    TEXT: {**COMMON, "prompt": "Hi", "max_tokens": 2},
}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where texts stand in a document."""
    if isinstance(value, str):
        yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*at, key))


def replaced(document: Any, at: tuple[Any, ...], value: str) -> Any:
    """A document with another text at a place."""
    found = whole = copy.deepcopy(document)
    for key in at[:-1]:
        found = found[key]
    found[at[-1]] = value
    return whole


def spelled(watched: Watched) -> list[str]:
    """Ways to name the file and the address."""
    path = str(watched.path)
    return [path, f"../../../../../../../../..{path}", f"file://{path}", f"{path}\0.txt", watched.url]


def elsewhere(value: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Bodies with fields that name files with OpenAI or with others; nearly all are refused."""
    parts = [
        {"type": "image_url", "image_url": {"url": value}},
        {"type": "file", "file": {"file_id": value, "filename": value, "file_data": value}},
        {"type": "input_audio", "input_audio": {"data": value, "format": "wav"}},
        {"type": "input_image", "image_url": value, "file_id": value},
        {"type": "input_file", "file_id": value, "filename": value, "file_url": value},
    ]
    for part in parts:
        yield CHAT, {"messages": [{"role": "user", "content": [part]}]}
        yield ITEMS, {"input": [{"role": "user", "content": [part]}]}
    tools = [
        {"type": "code_interpreter", "container": value},
        {"type": "code_interpreter", "container": {"type": "auto", "file_ids": [value]}},
        {"type": "file_search", "vector_store_ids": [value]},
        {"type": "mcp", "server_label": value, "server_url": value},
        {"type": "web_search", "filters": {"allowed_domains": [value]}},
        {"type": "custom", "name": "c", "format": {"type": "grammar", "syntax": "lark", "definition": value}},
    ]
    for tool in tools:
        yield ITEMS, {"input": "Hi", "tools": [tool]}
    for name in ("previous_response_id", "conversation", "background"):
        yield ITEMS, {"input": "Hi", name: value}
    yield ITEMS, {"input": "Hi", "prompt": {"id": value, "variables": {"a": value}}}
    yield ITEMS, {"input": [{"type": "item_reference", "id": value}]}
    for name in ("chat_template", "guided_grammar", "documents", "images", "lora_path", "vocab_path", "date"):
        yield CHAT, HI | {name: value}


def schemas(value: str) -> list[dict[str, Any]]:
    """Schemas that lead out of themselves; the first ones where no grammar walks, and jsonschema does."""
    return [
        {"not": {"$ref": "#/kept"}, "kept": {"$ref": value}},
        {"uniqueItems": True, "$dynamicRef": value},
        {"not": {"$ref": "https://json-schema.org/draft/next/schema"}},
        {"$ref": value},
        {"$id": value, "not": {"$ref": "#/nowhere"}},
        {"$schema": value},
        {"properties": {"a": {"$ref": f"{value}#/a"}}},
    ]


def held(value: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Forms of answers: schemas, and grammars that import."""
    for schema in schemas(value):
        for strict in (True, False):
            form = {"name": "f", "schema": {"type": "object", **schema}, "strict": strict}
            yield CHAT, HI | {"response_format": {"type": "json_schema", "json_schema": form}}
        function = {"name": "f", "strict": True, "parameters": {"type": "object", **schema}}
        yield ITEMS, {"input": "Hi", "tools": [{"type": "function", **function}]}
    for grammar in (f'start: "{value}"\n%import {value} (a)', f"%include {value}", f"start: @{value}", value):
        yield CHAT, HI | {"response_format": {"type": "lark", "lark": grammar}}
    yield CHAT, HI | {"response_format": {"type": "regex", "regex": value}}


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """What is imported and read when it is first needed."""
    vocabulary.prepare(load_tokenizer())
    form = {"name": "f", "schema": {"type": "object", "not": {"$ref": "#/a"}, "a": False}, "strict": False}
    held_house().post(CHAT, HI | {"response_format": {"type": "json_schema", "json_schema": form}})
    House().post(ITEMS, {"input": "Hi"})


def answered(watched: Watched, house: House | tools.House, asked: list[tuple[str, dict[str, Any]]]) -> list[int]:
    """The statuses of requests, none of which touched anything, and none was answered with what is in the file."""

    async def ask(app: Any) -> list[int]:
        replies = [await post(app, path, body) for path, body in asked]
        assert not any(b"secret-content" in reply.body for reply in replies)
        return [reply.status for reply in replies]

    statuses = house.run(ask)
    assert watched.touched() == []
    return statuses


@pytest.mark.parametrize("path", SOUND)
def test_no_text_of_a_request_is_a_path(path, tmp_path, monkeypatch):
    """Guards the machine's files: every text of a sound request in turn, replaced by a path, a URL, an address."""
    with watching(tmp_path, monkeypatch) as watched:
        hostile = spelled(watched)
        bodies = [SOUND[path]]
        for number, at in enumerate(places(SOUND[path])):  # two spellings for each, not all: it takes time
            bodies += [replaced(SOUND[path], at, hostile[(number + i) % len(hostile)]) for i in (0, 2)]
        limit = "max_output_tokens" if path == ITEMS else "max_tokens"
        first, *others = answered(watched, House(), [(path, {limit: 2} | body) for body in bodies])
        assert first == 200 and set(others) <= {200, 400, 404}
        assert [line for line in watched.heard if line.startswith("open")] == []


def test_no_field_that_names_a_file_elsewhere_does_here(tmp_path, monkeypatch):
    """Guards the same with images, files, containers, templates, ids of what OpenAI keeps; in URLs and headers."""
    with watching(tmp_path, monkeypatch) as watched:
        asked = [each for value in spelled(watched) for each in elsewhere(value)]
        assert set(answered(watched, House(), asked)) <= {200, 400}

        async def look(app: Any) -> None:
            for value in spelled(watched):
                for path in (f"/v1/models/{value}", f"{ITEMS}/{value}", value, f"/v1/{value}"):
                    for method in ("GET", "DELETE"):
                        assert (await get(app, path, method, {"accept": value})).status in (404, 405)

        House().run(look)
        assert watched.touched() == []


def test_no_schema_and_no_grammar_leads_anywhere(tmp_path, monkeypatch):
    """Guards files and the network behind a server: `$ref` in every place, also where only the last check looks."""
    with watching(tmp_path, monkeypatch) as watched:
        asked = [each for value in spelled(watched)[::2] for each in held(value)]  # the path, as a URL, the address
        statuses = answered(watched, held_house('{"a": [1, true], "b": null}'), asked)
        assert statuses[1] == 200  # the first one that is checked in the end
        assert set(statuses) <= {200, 400, 500}  # what is said is not of every form
        assert [line for line in watched.heard if "json-schema.org" in line] == []


BROWSER = {"type": "web_search"}
PYTHON = {"type": "code_interpreter", "container": {"type": "auto"}}


@contextmanager
def offered(folder: Path, *names: str) -> Iterator[Offer]:
    """Tools as a server has them, with one page in the browser's folder."""
    pages = folder / "pages"
    pages.mkdir()
    (pages / "heron.md").write_text("A heron eats perch.")
    try:
        offer = Offer(Chosen(names, str(pages) if "browser" in names else None), max_output_characters=4000)
    except GptossError as error:
        if namespaces_are_here():
            raise
        pytest.skip(f"no user namespaces on this machine: {error}")
    try:
        yield offer
    finally:
        offer.close()


def test_no_text_of_a_request_is_a_path_to_tools(tmp_path, monkeypatch):
    """Guards files beside the tools' own: the same of requests that a server with tools takes, and that name them."""
    body = SOUND[ITEMS] | {"tools": [BROWSER], "max_output_tokens": 20}
    with offered(tmp_path, "browser") as offer, watching(tmp_path, monkeypatch) as watched:
        hostile, at = spelled(watched), list(places(body))
        bodies = [body, *(replaced(body, each, hostile[number % len(hostile)]) for number, each in enumerate(at))]
        house = tools.House(*[FINAL] * len(bodies), offer=offer, context_tokens=4096)
        first, *others = answered(watched, house, [(ITEMS, each) for each in bodies])
        assert first == 200 and set(others) <= {200, 400, 404}


def through_the_browser(value: str) -> list[str]:
    """Answers that call the browser with a text."""
    calls = {
        "open": {"id": value, "source": value, "view_source": True},
        "search": {"query": value, "source": value},
        "find": {"pattern": value},
    }
    return [
        running(json.dumps(arguments)).replace("to=python", f"to=browser.{function}")
        for function, arguments in calls.items()
    ]


def through_python(value: str) -> list[str]:
    """An answer that opens a file, and fetches."""
    attempt = "try:\n    print(f(v).read())\nexcept Exception as error:\n    print(error)"
    loop = f"for f in (open, urllib.request.urlopen):\n{textwrap.indent(attempt, '    ')}"
    return [running(f"import urllib.request\nv = {value!r}\n{loop}")]


@pytest.mark.parametrize(
    ("name", "declared", "calls", "fault"),
    [
        ("browser", BROWSER, through_the_browser, "there is no page"),
        ("python", PYTHON, through_python, "No such file"),
    ],
)
def test_a_model_that_is_talked_into_it_reaches_no_file(name, declared, calls, fault, tmp_path, monkeypatch):
    """Guards the same where the text of a request becomes a call, which is carried out."""
    with offered(tmp_path, name) as offer, watching(tmp_path, monkeypatch) as watched:
        said = [call for value in spelled(watched) for call in calls(value)]
        house = tools.House(*said, FINAL, offer=offer, most_rounds=len(said), context_tokens=1 << 16)
        response = house.post({"tools": [declared]}).json()
        assert watched.touched() == []
        outputs = [call["output"] for call in response["gptoss"]["calls"]]
        assert len(outputs) == len(said) and fault in outputs[0] and "secret-content" not in str(response)


def test_the_watch_sees(tmp_path, monkeypatch):
    """Guards these tests: a file that any thread opens or looks at, and an address that is asked, are noticed."""
    with watching(tmp_path, monkeypatch) as watched:
        assert watched.touched() == []
        thread = threading.Thread(target=lambda: open(watched.path).close())
        thread.start()
        thread.join()
        assert [line.split()[0] for line in watched.touched()] == ["open", "the"]
        watched.path.exists()
        assert any(line.startswith("os.stat") for line in watched.touched())
        socket.getaddrinfo("127.0.0.1", int(watched.url[:-1].split(":")[-1]))
        assert any(line.startswith("socket") for line in watched.touched())
