"""The server as people run it: a process, real clients, signals; what they see is what the model says alone."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptoss_jax.server.connection import HEAD_SECONDS
from tests import pages, processes, scripted
from tests.serve_clients import FEW_FILES, SUM

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
DIRECT = {name: value for name, value in os.environ.items() if name not in PROXIES}
SIZES = ("--port", 0, "--slots", 4, "--max-context-tokens", 512, "--queue", 8, "--finish-seconds", 20)
SOLVED = "417 + 258 = 675."
FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
LOOP = ['get_time{"city":"Tokyo"}', "In Tokyo it is 08:15."]


class Server:
    """A server's process, its address, and what it has said."""

    slow: subprocess.Popen[str]

    def __init__(self, process: Any, folder: Path):
        self.process, self._stderr = process, folder / "stderr"
        deadline = time.monotonic() + 300
        while not (found := re.search(r"serving .* at (\S+)/v1", self.stderr)):
            assert process.is_alive() and time.monotonic() < deadline, self.stderr
            time.sleep(0.05)
        self.url = found[1]

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def ask(self, scenario: str, *arguments: str) -> dict[str, Any]:
        done = self.start(scenario, *arguments)
        out, error = done.communicate(timeout=120)
        assert done.returncode == 0, error + self.stderr
        return json.loads(out.splitlines()[-1])

    def start(self, scenario: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.serve_clients", scenario, self.url, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=DIRECT)


@contextlib.contextmanager
def serving(*arguments: Any, prepare: Callable[[], None] | None = None) -> Iterator[Server]:
    """A server that runs as long as the block; `prepare` is called in its process before."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = [str(folder / stream) for stream in ("stdin", "stdout", "stderr")]
        for each in names:
            Path(each).touch()
        redirect = processes._Redirect(names, prepare)
        process = processes.start("gptoss_jax.serve", *arguments, *SIZES, prepare=redirect, environment={})
        try:
            yield Server(process, folder)
        finally:
            process.kill()
            process.join()


def _with_few_files() -> None:
    """And asyncio's own loop, which accepts many connections before one of them is counted."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    sys.modules["uvloop"] = None  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    """The demo model, served; to slow clients too, who hinder nobody in the tests that follow."""
    with serving(prepare=_with_few_files) as server:
        server.slow = server.start("slow")
        yield server


def test_openais_client_gets_the_same_answer_by_every_api(demo):
    """Guards the APIs as clients read them: whole and streamed alike, usage, log probabilities, a prompt given back."""
    found = demo.ask("answers")
    assert found["models"] == ["gptoss-demo"]
    texts = ("chat", "streamed", "response", "streamed_response")
    assert [found[name] for name in texts] == [SOLVED] * 4
    assert found["reasoning"] == found["streamed_reasoning"] != ""
    assert found["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    assert found["streamed_usage"]["total_tokens"] == found["usage"]["total_tokens"]
    assert "".join(token for token, _ in found["logprobs"]) == SOLVED
    assert {count for _, count in found["logprobs"]} == {2}
    assert {"response.created", "response.reasoning_text.delta", "response.completed"} <= set(found["kinds"])
    assert found["echoed"][1].startswith("The sky") and len(found["echoed_logprobs"]) == 2
    assert found["echoed_logprobs"][0][0] is None and found["echoed_logprobs"][0][1] < 0


def test_the_pages_python_prints_what_it_says(demo):
    """Guards newcomers: every script of docs/serve.md, as it stands there, and what the page says that it prints.

    Where chunks end depends on the machine's pace, so the marks between them do not count.
    """
    shown = pages.scripts("serve.md")
    script = "\nprint('---')\n".join(each.script for each in shown).replace("http://127.0.0.1:8000", demo.url)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=DIRECT, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = [pages.lines(text) for text in done.stdout.replace("|", "").split("---\n")]
    assert printed == [[line.replace("|", "") for line in each.prints] for each in shown]


def test_the_pages_curl_prints_what_it_says(demo):
    """Guards the first thing that people type."""
    [(command, printed)] = re.findall(r"    \$ (curl .*?)\n    (\{.*?)\n", pages.text("serve.md"), re.DOTALL)
    command = command.replace("http://127.0.0.1:8000", demo.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=DIRECT, timeout=120)
    assert done.stdout == printed + "\n", done.stderr


def test_an_agent_calls_a_function_and_reads_its_result(demo):
    """Guards agent loops through both APIs, streamed or not, by items given back or by kept responses."""
    assert demo.ask("agents") == dict.fromkeys(
        [
            *("chat", "chat streamed", "responses, items", "responses, items, streamed"),
            *("responses, kept", "responses, kept, streamed"),
        ],
        LOOP,
    )


def test_what_is_refused_and_what_acts_in_its_place(demo):
    """Guards errors as OpenAI's client has them, and the headers that say what was ignored or mapped."""
    found = demo.ask("errors")
    assert found["model"] == ["NotFoundError", "model_not_found", "model"]
    assert found["effort"] == ["BadRequestError", "invalid_request", "reasoning_effort"]
    assert found["length"] == ["BadRequestError", "context_length_exceeded", None]
    assert found["previous"] == ["BadRequestError", "previous_response_not_found", "previous_response_id"]
    assert found["headers"] == {
        "x-gptoss-ignored": "best_guess",
        "x-gptoss-mapped": "reasoning_effort: minimal -> low",
    }


def test_answers_are_held_to_what_the_client_asked_for(demo):
    """Guards forms through the server as OpenAI's client sends and parses them: both APIs, whole and streamed."""
    found = demo.ask("held")
    assert found["parsed"] == [{"answer": 675, "operation": "difference"}] * 4
    assert [json.loads(text) for text in found["json_object"]] == [{"answer": 675}] * 2
    assert all(re.fullmatch("[0-9]{3}", text) for text in found["regex"])
    assert all(re.fullmatch("it is [0-9]{3}", text) for text in found["lark"])


def test_calls_are_forced_through_both_apis(demo):
    """Guards `tool_choice`: any function, one, those allowed; strict arguments; streamed as whole."""
    found = demo.ask("calls")
    assert len(found) == 12
    for name, calls in found.items():
        [[function, arguments]] = calls
        assert function == ("get_time" if ", required" in name else "get_forecast"), name
        assert set(json.loads(arguments)) == ({"city"} if function == "get_time" else {"city", "days"}), name


def test_every_streamed_answer_has_its_schema(demo):
    """Guards the promise: of streams at temperatures up to 3, beside some that are free, none is invalid or cut."""
    assert demo.ask("many") == {"free": 2, "valid": 13}


def test_forms_that_cannot_be_held_name_the_keyword(demo):
    """Guards people with a schema: OpenAI's error object, with the field and the keyword, before any answer."""
    found = demo.ask("mistakes")
    for name, field in {"chat": "response_format", "stream": "response_format", "responses": "text.format"}.items():
        refusal = f'{field}, schema has "uniqueItems", which cannot be enforced: take it out, or set strict to false'
        code, param, message = found[name]
        assert (code, param) == ("invalid_form", field) and message.startswith(refusal)
    assert found["function"][:2] == ["invalid_form", "tools"] and '"uniqueItems"' in found["function"][2]
    assert found["nobody"][:2] == ["invalid_request", "tool_choice"]
    assert found["regex"][:2] == ["invalid_form", "response_format"]


def test_clients_that_leave_free_their_slots_within_a_second(demo):
    """Guards against leaks: streams, whole answers and those that wait, all of which go at once."""
    found = demo.ask("leaving")
    assert found["seconds"] < 1.0 and found["leaked_pages"] == 0


def test_slow_clients_are_hung_up_on(demo):
    """Guards connections: some that send nothing, or a byte now and then, in a head or in a body that was refused."""
    out, error = demo.slow.communicate(timeout=90)
    found = json.loads(out)
    assert found["open"] == 0 and len(found["seconds"]) == 3, error
    assert min(found["seconds"].values()) > HEAD_SECONDS - 1, found
    assert "h11_impl" not in demo.stderr  # nobody fills the log by what they send


def test_idle_connections_are_bounded(demo):
    """Guards files and everybody else: half as many are open, one too many hears so unasked; in a crowd too."""
    assert demo.ask("crowd") == {"beyond": ["HTTP/1.1 503"] * 8}
    assert "out of system resource" not in demo.stderr


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl(demo):
    """Guards the first line that people copy."""
    body = json.dumps({"messages": [{"role": "user", "content": SUM}], "temperature": 0})
    command = ["curl", "-s", f"{demo.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, env=DIRECT, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == SOLVED


def test_sigterm_lets_end_what_runs(demo):
    """Guards a stop: what runs ends, what waits hears that it will not be answered, and the exit code is 0."""
    client = demo.start("ending")
    assert client.stdout and client.stdout.readline() == "under way\n"
    os.kill(demo.process.pid, signal.SIGTERM)
    out, error = client.communicate(timeout=60)
    assert json.loads(out) == {"done": 4, "refused": 1}, error
    demo.process.join(30)
    assert demo.process.exitcode == 0 and "Traceback" not in demo.stderr


def test_numbers_that_fail_end_one_answer_and_keys_are_asked_for(tmp_path):
    """Guards a server against one bad answer, and against those without its key."""
    model = scripted.write(tmp_path / "model", "thinker", spoilt=" look")
    (tmp_path / "keys").write_text("sk-one\nsk-two\n")
    with serving("--checkpoint", model, "--model-names", "broken", "--api-key-file", tmp_path / "keys") as server:
        found = server.ask("faults", "sk-two")
        assert found["whole"] == "numerics_error"
        text, code = found["streamed"]
        assert code == "numerics_error" and scripted.REASONING.startswith(text) and text
        assert found["events"] == ["response.created", "response.failed", "numerics_error"]
        assert found["others"] == "length"
        assert found["wrong"] == "invalid_api_key"
        assert "Traceback" not in server.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["x"], "serve: x: expected flags only (--checkpoint names the model)"),
        (["--port", 70000], "serve: --port is 70000, expected 0 to 65535"),
        (["--queue", -1], "serve: --queue is -1, expected at least 0"),
        (
            ["--connections", FILES // 2 + 1],
            f"serve: --connections is {FILES // 2 + 1}, expected 1 to {FILES // 2}, half of the files that this "
            "process may open (ulimit -n)",
        ),
        (["--host", "192.0.2.1"], "serve: --host 192.0.2.1 --port 8000: Cannot assign requested address"),
        (["--api-key-file", "/dev/null"], "serve: /dev/null holds no key, expected one a line"),
        (["--temperature", -1], "serve: --temperature is -1.0, expected 0 to 10000"),
        (
            ["--coordinator", "a:1"],
            "serve: --coordinator: a server runs on one host; others can have their own",
        ),
    ],
)
def test_bad_flags_get_one_line(arguments, error):
    """Guards people against tracebacks: one line and exit code 2, before weights are read."""
    done = processes.run("gptoss_jax.serve", "--quiet", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", error + "\n")


def test_help_names_every_flag():
    """Guards --help: what the command does, and each of its flags."""
    done = processes.run("gptoss_jax.serve", "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(flag in done.stdout for flag in ("--api-key-file", "--queue", "--finish-seconds", "--pool-tokens"))
