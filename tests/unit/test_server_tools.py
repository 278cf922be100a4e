"""Tools that a server runs itself, through /v1/responses: whole, streamed, gone on from, refused, left."""

import asyncio
import threading
from typing import Any

import pytest

from gptoss_jax.api.asked import Options
from gptoss_jax.api.completions import Prompt
from gptoss_jax.server.app import Served, create
from gptoss_jax.server.engine_thread import EngineThread
from gptoss_jax.server.exchange import Model
from gptoss_jax.server.metrics import Metrics
from gptoss_jax.server.stored import Stored
from gptoss_jax.server.tool_turn import ServerTools
from gptoss_jax.tools.choice import Offer
from gptoss_jax.tools.tool import ToolOutput
from gptoss_jax.tools.toolbox import Toolbox
from tests.asgi import Connection, Reply, post, until
from tests.made_answers import WEATHER, WORDS
from tests.round_models import FINAL, Interpreter, Weather, calling, engine, running

ITEMS = "/v1/responses"
PYTHON, MCP = {"type": "code_interpreter", "container": {"type": "auto"}}, {"type": "mcp", "server_label": "sky"}
PARIS = '{"city": "Paris"}'


class _Sky(Weather):
    """An MCP server."""

    name = "sky"


class _Offer(Offer):
    """Python, and a server with one function."""

    names = ("python",)

    def __init__(self, python: Any = None):
        self._servers: Any = [_Sky()]
        self.python = python or Interpreter()

    def open(self, names=None, servers=None) -> Toolbox:
        return Toolbox([self.python] if names else [], shared=self._servers if servers else [])


class House:
    """An app whose model answers with these texts."""

    def __init__(self, *texts: str, offer: Offer | None = None, most_rounds: int = 20, context_tokens: int = 1024):
        self.engine = engine(texts, context_tokens)
        self.thread = EngineThread(self.engine, most_waiting=4)
        tools = ServerTools(offer or _Offer(), most_rounds)
        score = lambda ids, top: Prompt(ids)  # noqa: E731
        model = Model(("m",), WORDS, (200002, 200012), Options, None, score, tools, context_tokens)
        self.app = create(Served(model, self.thread, Metrics(self.thread, self.engine), Stored(4)))

    def run(self, work: Any) -> Any:
        async def main() -> Any:
            async with self.app.router.lifespan_context(self.app):
                return await asyncio.wait_for(work(self.app), 100)

        return asyncio.run(main())

    def post(self, body: dict[str, Any]) -> Reply:
        return self.run(lambda app: post(app, ITEMS, {"input": "Hi"} | body))


def test_a_whole_response_has_the_calls_between_its_answers():
    """Guards /v1/responses with code_interpreter: items in their order, ids that differ, tokens of all rounds."""
    house = House(running("1 + 1"), FINAL)
    response = house.post({"tools": [PYTHON]}).json()
    kinds = [item["type"] for item in response["output"]]
    assert kinds == ["reasoning", "code_interpreter_call", "reasoning", "message"]
    assert len({item["id"] for item in response["output"]}) == 4
    call = response["output"][1]
    assert (call["code"], call["status"]) == ("1 + 1", "completed")
    assert call["outputs"] == [{"type": "logs", "logs": "ran 1 + 1"}]
    assert (response["status"], response["tools"]) == ("completed", [PYTHON])
    prompts: Any = house.engine.runner
    assert response["usage"]["input_tokens"] == sum(map(len, prompts.prompts))
    assert response["usage"]["output_tokens"] == sum(len(a["token_ids"]) for a in response["gptoss"]["answers"])
    assert response["gptoss"]["calls"][0]["output"] == "ran 1 + 1"


def test_a_stream_ends_with_the_whole_response():
    """Guards events: the call's own kinds in OpenAI's order, one numbering, and items as in the last event."""
    house = House(running("1 + 1"), calling("get_weather", PARIS), FINAL)
    found = house.post({"tools": [PYTHON, MCP], "stream": True}).events()
    kinds = [event["type"] for event in found]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    begins = kinds.index("response.code_interpreter_call.in_progress")
    assert kinds[begins - 1 : begins + 6] == [
        "response.output_item.added",
        "response.code_interpreter_call.in_progress",
        "response.code_interpreter_call_code.delta",
        "response.code_interpreter_call_code.done",
        "response.code_interpreter_call.interpreting",
        "response.code_interpreter_call.completed",
        "response.output_item.done",
    ]
    assert kinds.count("response.created") == kinds.count("response.completed") == 1
    output = found[-1]["response"]["output"]
    assert [item["type"] for item in output] == [
        *("reasoning", "code_interpreter_call", "reasoning", "mcp_call", "reasoning", "message")
    ]
    assert [event["item"] for event in found if event["type"] == "response.output_item.done"] == output
    assert output[3] | {"id": ""} == {
        **{"type": "mcp_call", "id": "", "status": "completed", "name": "get_weather", "arguments": PARIS},
        **{"server_label": "sky", "output": '{"rain": true}', "error": None},
    }


def test_the_next_response_goes_on_from_what_functions_gave():
    """Guards conversations: results of functions are remembered, those of a chain of thought are gone with it."""
    house = House(running("1 + 1"), calling("get_weather", PARIS), FINAL, FINAL)

    async def both(app: Any) -> None:
        first = (await post(app, ITEMS, {"input": "Hi", "tools": [PYTHON, MCP]})).json()
        again = {"input": "And?", "tools": [PYTHON, MCP], "previous_response_id": first["id"]}
        assert (await post(app, ITEMS, again)).status == 200

    house.run(both)
    runner: Any = house.engine.runner
    last = WORDS.decode(runner.prompts[-1])
    assert 'functions.get_weather to=assistant<|channel|>commentary<|message|>{"rain": true}' in last
    assert "ran 1 + 1" not in last


class _Reader(Interpreter):
    """A browser that reads the same page to everybody."""

    builtin = "browser"

    def takes(self, recipient: str) -> bool:
        return recipient.startswith("browser.")

    def call(self, recipient: str, arguments: str) -> ToolOutput:
        return ToolOutput("L0: herons<|end|>fly")


SEARCHING = running('{"query": "heron"}').replace("to=python", "to=browser.search")


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("call", "tool"), [(running("1 + 1"), Interpreter()), (SEARCHING, _Reader())])
def test_a_turn_in_flight_goes_on_from_what_was_computed_and_read(kept, call, tool):
    """Guards agents: a client's function was called after python or the browser, whose outputs the model still needs.

    The prompt that goes on, by id or by items given back, begins with the whole of the one before, token by token.
    """
    house = House(call, calling("get_weather", PARIS), FINAL, FINAL, offer=_Offer(tool))
    tools = [PYTHON, {"type": "function", **WEATHER}]

    async def both(app: Any) -> None:
        first = (await post(app, ITEMS, {"input": "Hi", "tools": tools})).json()
        result = {"type": "function_call_output", "call_id": first["output"][-1]["call_id"], "output": "rain"}
        given = {"input": [result], "previous_response_id": first["id"]}
        if not kept:
            given = {"input": [{"role": "user", "content": "Hi"}, *first["output"], result]}
        reply = await post(app, ITEMS, {"tools": tools, **given})
        assert reply.status == 200, reply.body

    house.run(both)
    runner: Any = house.engine.runner
    before, after = runner.prompts[1:3]
    assert after[: len(before)] == before
    assert WORDS.decode(after).count("to=assistant<|channel|>analysis") == 1


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"type": "code_interpreter_call", "id": "a", "code": "1"}, None),
        (
            {"type": "code_interpreter_call", "id": "a", "code": 1, "outputs": [{"logs": ""}]},
            "text is 1, expected text",
        ),
        ({"type": "web_search_call", "id": "a", "action": {}}, None),
        ({"type": "web_search_call", "id": "a", "gptoss": {"name": "system"}}, "arguments"),
        (
            {"type": "web_search_call", "id": "a", "gptoss": {"name": "system", "arguments": "", "output": ""}},
            "expected a call to browser",
        ),
    ],
)
def test_items_of_others_that_lack_what_was_given_are_left_out(item, said):
    """Guards conversations with OpenAI's own items, and the prompt against headers that a client makes up."""
    reply = House(FINAL).post({"input": [{"role": "user", "content": "Hi"}, item]})
    assert reply.status == (200 if said is None else 400)
    assert said is None or said in reply.json()["error"]["message"]


def test_functions_of_the_client_stay_its_own():
    """Guards agents: a call of theirs ends the response, after tools of the server's have worked."""
    tools = [PYTHON, {"type": "function", **WEATHER}]
    response = House(running("2"), calling("get_weather", PARIS)).post({"tools": tools}).json()
    assert [item["type"] for item in response["output"]][-1] == "function_call"
    assert response["status"] == "completed"


def test_further_calls_than_the_client_allows_are_not_carried_out():
    """Guards `max_tool_calls`, of all tools together: the model reads that there are no more, and answers."""
    house = House(running("1"), calling("get_weather", PARIS), running("3"), FINAL)
    response = house.post({"tools": [PYTHON, MCP], "max_tool_calls": 1}).json()
    calls = [item for item in response["output"] if item["type"].endswith("_call")]
    assert [call["status"] for call in calls] == ["completed", "failed", "failed"]
    assert calls[1]["error"] == "not carried out: max_tool_calls is 1, and as many were"
    assert (response["status"], response["max_tool_calls"]) == ("completed", 1)
    assert response["output"][-1]["content"][0]["text"] == "It rains."
    assert House(FINAL).post({"max_tool_calls": 0}).json()["error"]["param"] == "max_tool_calls"


def test_a_choice_of_no_tools_is_obeyed():
    """Guards `tool_choice` "none": nothing is declared, and a model that calls all the same is not served."""
    house = House(running("1"))
    response = house.post({"tools": [PYTHON, MCP], "tool_choice": "none"}).json()
    assert all(item["type"] != "code_interpreter_call" for item in response["output"])
    prompts: Any = house.engine.runner
    assert "python" not in WORDS.decode(prompts.prompts[0])


def test_rounds_that_run_out_leave_the_response_incomplete():
    """Guards a server against a model that calls for ever; a call that nobody can answer is no client's."""
    response = House(running("1"), running("2"), most_rounds=1).post({"tools": [PYTHON]}).json()
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_tool_calls"})
    assert [item["type"] for item in response["output"]] == ["reasoning", "code_interpreter_call", "reasoning"]
    assert "tool_rounds allows no more" in response["gptoss"]["remarks"][0]


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        (
            {"type": "web_search"},
            "tools: web_search is not switched on here: whoever starts this decides (--tool browser)",
        ),
        (MCP | {"server_label": "other"}, "tools, mcp: server_label is 'other', expected one of sky"),
        (MCP | {"server_label": ["a"]}, "tools, mcp: server_label is ['a'], expected one of sky"),
        (MCP | {"server_url": "http://a"}, "tools, mcp: 'server_url' does not act here: the server's own settings do"),
        ({"type": "shell"}, "tool 0 has type 'shell', expected 'function'; built-in tools are a setting"),
    ],
)
def test_what_nobody_switched_on_is_refused(tool, said):
    """Guards the operator: a client chooses among what is offered, and names no address; and hears what there is."""
    reply = House(FINAL).post({"tools": [tool]})
    assert (reply.status, reply.json()["error"]["code"]) == (400, "invalid_request")
    assert reply.json()["error"]["message"] == said


def test_who_leaves_ends_the_tool():
    """Guards the machine: a tool that works for a client who has gone is stopped."""
    working, closed = threading.Event(), threading.Event()

    class Slow(Interpreter):
        def call(self, recipient: str, arguments: str) -> ToolOutput:
            working.set()
            closed.wait(30)
            return ToolOutput("late")

        def close(self) -> None:
            closed.set()

    async def leaves(app: Any) -> None:
        body = b'{"input": "Hi", "tools": [{"type": "code_interpreter"}], "stream": true}'
        connection = Connection(app, "POST", ITEMS, body)
        asked = asyncio.create_task(connection.run())
        await until(working.is_set)
        connection.leave()
        await asked
        assert closed.is_set()

    House(running("1"), offer=_Offer(Slow())).run(leaves)
