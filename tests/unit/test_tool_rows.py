"""Rows of a batch whose calls are carried out: their lines, other rows meanwhile, what fails, hangs or is cut off."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from gptoss_jax.api.asked import Options
from gptoss_jax.engine.request import EngineConfig
from gptoss_jax.jobs import tool_rows
from gptoss_jax.jobs.inputs import Line
from gptoss_jax.jobs.rows import RowReader
from gptoss_jax.jobs.tool_rows import RowTools
from gptoss_jax.jobs.work import Reading, Task, Worker
from gptoss_jax.tools.choice import Offer
from gptoss_jax.tools.tool import ToolOutput
from gptoss_jax.tools.toolbox import Toolbox
from tests.made_answers import WEATHER, WORDS
from tests.round_models import CONFIG, FINAL, Interpreter, Weather, calling, engine, running

PARIS = '{"city": "Paris"}'
GIVEN = "<|start|>python to=assistant"
PYTHON = {"type": "code_interpreter", "container": {"type": "auto"}}


class _Offer(Offer):
    """Python, and an MCP server with one function; `opened` counts toolboxes."""

    names = ("python",)

    def __init__(self, python: Callable[[], Any] = Interpreter):
        self._servers: Any = [Weather(name="get_rain")]
        self._servers[0].name = "sky"
        self._declared, self._python, self.opened = {}, python, 0

    def open(self, names=None, servers=None) -> Toolbox:
        self.opened += 1
        return Toolbox([self._python()] if names else [], shared=self._servers if servers else [])


def _computes(prompt: str) -> str:
    """A model that runs what the user says, once, and then says so."""
    return (
        FINAL
        if GIVEN in prompt
        else running(prompt.rpartition("<|message|>")[2].removesuffix("<|end|><|start|>assistant"))
    )


def _tasks(reading: Reading, documents: Sequence[Any]) -> list[Task]:
    reader = RowReader()
    rows = [
        reader.read(i, Line("in.jsonl", i + 1, json.dumps(document).encode())) for i, document in enumerate(documents)
    ]
    return [reading.task(row) for row in rows]


def _worked(
    documents: Sequence[Any],
    says: Sequence[str] | Callable[[str], str] = _computes,
    *,
    offer: _Offer | None = None,
    rounds: int = 20,
    slots: int = 2,
    context: int = 1024,
    put: Callable[[dict[str, Any]], None] = lambda line: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """The lines of these rows by their ids."""
    made, tools, lines = engine(says, context, slots), RowTools(offer or _Offer(), rounds), {}
    sizes = EngineConfig(slots=slots, max_context_tokens=context)

    def keep(found: Sequence[bytes]) -> None:
        for line in map(json.loads, found):
            lines[line.get("id") if "custom_id" not in line else line["custom_id"]] = line
            put(line)

    tasks = _tasks(Reading(Options(), CONFIG, sizes, None, tools), documents)
    Worker(made, WORDS, "m", keep, tools).run(tasks, interrupted)
    return lines


def _rows(*prompts: str) -> list[dict[str, Any]]:
    return [{"id": prompt, "prompt": prompt} for prompt in prompts]


def test_a_rows_calls_are_carried_out_and_stand_in_its_line():
    """Guards the line: the last answer as ever, all rounds beside it, tokens of all of them, and no clock."""
    line = _worked(_rows("1 + 1"))["1 + 1"]
    assert (line["final"], line["finish_reason"], line["ended"], line["error"]) == (
        "It rains.",
        "stop",
        "answered",
        None,
    )
    assert line["tool_calls"] == []
    first, last = line["rounds"]
    [call] = first["calls"]
    assert call == {"name": "python", "arguments": "1 + 1", "output": "ran 1 + 1", "failed": False}
    assert (last["answer"]["final"], last["calls"]) == ("It rains.", [])
    used = line["usage"]
    assert used["completion_tokens"] == sum(len(each["answer"]["token_ids"]) for each in line["rounds"])
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
    assert set(line["settings"]["builtin_tools"]) == {"python"}


def test_lines_are_the_same_in_any_batch():
    """Guards determinism: rounds of many rows, mixed by slots and threads, give each row's own bytes."""
    documents = _rows(*(f"{i} + {i}" for i in range(9)))
    alone = {key: line for row in documents for key, line in _worked([row], slots=1).items()}
    assert len(alone) == 9
    assert _worked(documents, slots=4) == alone


def test_openais_forms_have_calls_where_a_server_puts_them():
    """Guards /v1/responses and chat in the Batch form: items by what a row asks for; a chat has what is switched on."""
    body = {"input": "2 * 3", "tools": [PYTHON], "max_tool_calls": 1}
    documents = [
        {"custom_id": "items", "method": "POST", "url": "/v1/responses", "body": body},
        {"custom_id": "none", "method": "POST", "url": "/v1/responses", "body": {"input": "2 * 3"}},
        {
            **{"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions"},
            "body": {"messages": [{"role": "user", "content": "2 * 3"}]},
        },
    ]
    found = {key: line["response"]["body"] for key, line in _worked(documents).items()}
    kinds = [item["type"] for item in found["items"]["output"]]
    assert kinds == ["reasoning", "code_interpreter_call", "reasoning", "message"]
    assert (found["items"]["tools"], found["items"]["max_tool_calls"]) == ([PYTHON], 1)
    assert [item["type"] for item in found["none"]["output"]][-1] == "function_call"
    [choice] = found["chat"]["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It rains.", "stop")
    assert found["chat"]["gptoss"]["calls"][0]["output"] == "ran 2 * 3"


def test_functions_of_a_row_end_it_as_ever():
    """Guards rows whose functions are the client's: the call is in the line, and nobody here answers it."""
    row = {"id": "a", "prompt": "Umbrella?", "tools": [WEATHER]}
    line = _worked([row], [running("2"), calling("get_weather", PARIS)])["a"]
    assert line["tool_calls"] == [{"name": "get_weather", "arguments": PARIS}]
    assert (line["ended"], len(line["rounds"][0]["calls"])) == ("handed_over", 1)
    mcp = _worked(_rows("Umbrella?"), [calling("get_rain", PARIS), FINAL])["Umbrella?"]
    assert mcp["rounds"][0]["calls"][0]["output"] == '{"rain": true}'


def test_what_has_no_conversation_has_no_tools():
    """Guards prompts that are whole: their bytes are the client's, and `tool_choice` "none" is obeyed."""
    documents = [{"id": "ids", "token_ids": [1, 2]}, {"id": "none", "prompt": "1", "tool_choice": "none"}]
    lines = _worked(documents, [running("x"), running("x")])
    assert all("rounds" not in line for line in lines.values())
    assert lines["none"]["settings"]["builtin_tools"] == []


def test_a_row_that_asks_for_several_answers_is_refused():
    """Guards against rounds of one row that nobody could tell apart; the others go on."""
    lines = _worked([{"id": "two", "prompt": "?", "n": 2}, *_rows("1")])
    assert lines["two"]["error"]["message"] == "n is 2, expected 1 for a row whose tools are run here"
    assert lines["1"]["final"] == "It rains."


def test_a_tool_that_fails_is_an_output_and_one_that_cannot_be_had_ends_its_row_alone(monkeypatch):
    """Guards a night's work against one tool: the model reads what went wrong; no row takes others with it."""
    broken = _worked(_rows("1"), offer=_Offer(lambda: Interpreter(broken=True)))["1"]
    assert broken["rounds"][0]["calls"][0]["failed"] and broken["final"] == "It rains."
    offer = _Offer()
    made: Iterator[Any] = iter([Interpreter, Interpreter, None])

    def second_fails() -> Any:
        found = next(made)
        if found is None:
            raise OSError("no more processes")
        return found()

    offer._python = second_fails
    lines = _worked(_rows("1", "2"), offer=offer, slots=1)
    errors = [line["error"] for line in lines.values() if line["error"]]
    assert [(error["code"], error["message"]) for error in errors] == [
        ("tools_failed", "its tools cannot go on: OSError: no more processes")
    ]
    assert len(lines) == 2


def test_rows_finish_while_a_tool_hangs():
    """Guards the others of a batch with one slot: a tool that works until its time limit holds no slot meanwhile."""
    others_done = threading.Event()

    class Slow(Interpreter):
        def call(self, recipient: str, arguments: str) -> ToolOutput:
            if arguments == "slow":
                return ToolOutput("late", failed=not others_done.wait(60))
            return super().call(recipient, arguments)

    order: list[str] = []

    def put(line: dict[str, Any]) -> None:
        order.append(line["id"])
        if len(order) == 3:
            others_done.set()

    lines = _worked(_rows("slow", "1", "2", "3"), offer=_Offer(Slow), slots=1, put=put)
    assert order[-1] == "slow" and len(order) == 4
    assert lines["slow"]["rounds"][0]["calls"][0] == {
        **{"name": "python", "arguments": "slow", "output": "late", "failed": False}
    }


def test_tools_that_work_are_bounded(monkeypatch):
    """Guards the machine: where as many work as may, others wait, and all are answered in the end."""
    monkeypatch.setattr("gptoss_jax.jobs.work.MOST_WORKING", 2)
    monkeypatch.setattr(tool_rows, "MOST_CALLS_AT_ONCE", 1)
    at_once, most, lock = [0], [0], threading.Lock()

    class Counted(Interpreter):
        def call(self, recipient: str, arguments: str) -> ToolOutput:
            with lock:
                at_once[0] += 1
                most[0] = max(most[0], at_once[0])
            threading.Event().wait(0.01)
            with lock:
                at_once[0] -= 1
            return super().call(recipient, arguments)

    assert len(_worked(_rows(*map(str, range(12))), offer=_Offer(Counted))) == 12
    assert most[0] == 1


def test_an_interruption_stops_tools_and_their_rows_have_no_line():
    """Guards Ctrl-C in a tool's time: the run ends at once, and the row is whole the next time."""
    working, closed = threading.Event(), threading.Event()

    class Hanging(Interpreter):
        def call(self, recipient: str, arguments: str) -> ToolOutput:
            working.set()
            closed.wait(60)
            return ToolOutput("late")

        def close(self) -> None:
            if working.is_set():
                closed.set()

    assert _worked(_rows("1"), offer=_Offer(Hanging), interrupted=working.is_set) == {}
    assert closed.is_set()


@pytest.mark.parametrize(("rounds", "context", "ended"), [(1, 1024, "rounds"), (20, 300, "context")])
def test_rounds_and_context_run_out(rounds, context, ended):
    """Guards a batch against a model that calls for ever: its line says why it was left."""
    lines = _worked(_rows("x"), lambda prompt: running("1 " * 20), rounds=rounds, context=context)
    assert lines["x"]["ended"] == ended
    assert lines["x"]["remarks"]


def test_toolboxes_are_opened_for_rows_that_call():
    """Guards the survey of a million rows: what tools declare is looked up once, a sandbox made for who needs it."""
    offer = _Offer()
    _worked(_rows("1", "2"), lambda prompt: FINAL, offer=offer)
    assert offer.opened == 1
