"""Tools as people switch them on: calls that are carried out, shown and saved, by commands of their own."""

import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from gptoss_jax.tools.tool import ToolOutput
from gptoss_jax.tools.toolbox import Toolbox
from tests import jobs, pages, processes, scripted, terminals
from tests.goldens.make import ROOT

SERVER = str(ROOT / "tests" / "mcp_server.py")
STDIO = shlex.join([sys.executable, SERVER])
PROXIES = {name for name in os.environ if name.lower().endswith("_proxy")}  # which would be asked for 127.0.0.1
OUTPUT = "2 + 3 = 5\x1b]0;owned\x07"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that calls `add` and then answers, and a home for caches."""
    folder = tmp_path_factory.mktemp("tools")
    scripted.write(folder / "adder", "adder")
    return folder


def _generate(folder, *arguments) -> processes.Done:
    environment = {"XDG_CACHE_HOME": str(folder / "home"), "NO_COLOR": None, **dict.fromkeys(PROXIES)}
    return processes.run("gptoss_jax.generate", "--checkpoint", folder / "adder", *arguments, environment=environment)


def test_calls_are_carried_out_until_the_model_answers(folder):
    """Guards the whole way: the answer alone on stdout, each call and its output on stderr, all of it in the file."""
    done = _generate(folder, "--mcp", STDIO, "--save", folder / "chat.json", "2 and 3?")
    assert (done.returncode, done.stdout) == (0, scripted.TOTAL + "\n"), done.stderr
    assert f"[call to functions.add]\n{scripted.SUM}\n[output after " in done.stderr
    assert OUTPUT in done.stderr  # through a pipe text stays exact
    said = [(m["role"], m["recipient"]) for m in json.loads((folder / "chat.json").read_text())]
    asked = [("system", None), ("developer", None), ("user", None)]
    assert said == [*asked, ("assistant", "functions.add"), ("tool", "assistant"), ("assistant", None)]


def test_the_pages_scripts_print_what_it_says(folder, tmp_path):
    """Guards newcomers: every script of docs/tools.md, as it stands there; kept programs alone are added."""
    scripted.write(tmp_path / "agent", "agent")
    shown = pages.scripts("tools.md")
    script = "\nprint('---')\n".join(each.script for each in shown)
    kept = "gptoss_jax.runtime.kept_programs.default_folder()"
    script = "import gptoss_jax.runtime.kept_programs\n" + script.replace(
        '"agent")', f'"agent", programs_folder={kept})'
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [pages.lines(text) for text in done.stdout.split("---\n")] == [each.prints for each in shown]


def test_json_has_the_rounds_and_http_servers_are_reached(folder):
    """Guards --json, for who studies what a model does with tools; and the other way to reach a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, SERVER, str(port)])
    try:
        asked = ("--mcp", f"http://127.0.0.1:{port}/mcp", "--json", "2 and 3?")
        deadline = time.monotonic() + 60  # until it listens
        while "attempts failed" in (done := _generate(folder, *asked)).stderr and time.monotonic() < deadline:
            assert server.poll() is None
    finally:
        server.kill()
        server.wait()
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["ended"], document["answers"][0]["final"]) == ("answered", scripted.TOTAL)
    [[call], []] = [each["calls"] for each in document["rounds"]]
    assert (call["name"], call["arguments"], call["output"], call["failed"]) == ("add", scripted.SUM, OUTPUT, False)
    assert document["settings"]["mcp"] == [f"http://127.0.0.1:{port}/mcp"]
    assert document["conversation"][-2]["content"][0]["text"] == OUTPUT


def test_a_chat_carries_out_calls_and_shows_no_escape_sequence(folder):
    """Guards the terminal against what a tool gives, and the chat's own rounds."""
    arguments = ("--checkpoint", folder / "adder", "--chat", "--mcp", STDIO)
    with terminals.run(folder, "gptoss_jax.generate", *arguments) as terminal:
        terminal.wait_for("\n>")
        terminal.say("2 and 3?\r", f"{scripted.TOTAL}\n>")
        os.write(terminal.descriptor, b"\x04")
        assert terminal.ended() == 0
        assert "2 + 3 = 5\\u001b]0;owned\\u0007" in terminal.text
        assert b"\x1b]0;owned" not in terminal.bytes


class _Killed(NamedTuple):
    """In a command's process: it is killed while its n-th call is carried out."""

    at: int

    def __call__(self) -> None:
        calls, call = itertools.count(1), Toolbox.call

        def dies(self: Toolbox, recipient: str, arguments: str) -> ToolOutput:
            if next(calls) == killed.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(self, recipient, arguments)

        killed = self
        Toolbox.call = dies


def test_a_batch_carries_out_calls_and_goes_on_after_kill_9(folder, tmp_path):
    """Guards rows in the middle of a round: they are done again from their start, each has one line, the same bytes."""
    asked, out = jobs.write_rows(tmp_path / "in.jsonl", [{"prompt": "2 and 3?", "seed": 0}] * 3), tmp_path / "out.jsonl"
    arguments = (asked, out, "--mcp", STDIO, "--max-new-tokens", 100, "--slots", 1)
    environment = {"XDG_CACHE_HOME": str(folder / "home")}
    killed = jobs.run(folder / "adder", *arguments, model=_Killed(3), environment=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = out.read_bytes() if out.exists() else b""
    assert len(before.splitlines()) < 3
    done = jobs.run(folder / "adder", *arguments, model=jobs.REAL, environment=environment)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(before)
    lines = jobs.read_rows(out)
    assert sorted(line["id"] for line in lines) == ["row-1", "row-2", "row-3"]
    assert [(line["final"], line["ended"], line["error"]) for line in lines] == [(scripted.TOTAL, "answered", None)] * 3
    outputs = [[call["output"] for each in line["rounds"] for call in each["calls"]] for line in lines]
    assert outputs == [[OUTPUT]] * 3
    assert len({json.dumps(line | {"id": "", "settings": ""}) for line in lines}) == 1
    other = jobs.run(folder / "adder", *arguments, "--tool-rounds", 3, model=jobs.REAL, environment=environment)
    assert other.returncode == 2 and "tool_rounds: 20 then, 3 now" in other.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tool", "browser"], "--browser-folder and --browser-hosts: got none, expected one of them"),
        (["--browser-folder", "x"], "got one without --tool browser, expected one of them beside --tool browser"),
        (["--tool", "shell"], "--tool is 'shell', expected one of python, python:stateful, browser"),
        (["--mcp", "/no/such server"], "MCP server /no/such server: "),
        (["--mcp", STDIO, "--n", "2"], "--n is 2, expected 1 beside --tool and --mcp"),
        (["--mcp", STDIO, "--raw"], "--tool, --mcp and --raw: leave one of them out"),
        (["--mcp", STDIO, "--tool-rounds", "0"], "--tool-rounds is 0, expected at least 1"),
    ],
)
def test_mistakes_are_one_line(folder, flags, said):
    """Guards people who try it: which flag, and what to do."""
    done = _generate(folder, *flags, "Hi")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
