"""An agent's loop by clients that are not Python's: OpenAI's two packages for Node, and curl, against a real server."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import scripted
from tests.commands.test_serve import DIRECT, Server, serving

PACKAGES = Path(sys.prefix) / "npm" / "node_modules"  # where `make gates` installs openai and @openai/agents
LOOP = [f"get_weather{scripted.CALL}", scripted.CONCLUSION]
FUNCTION = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory) -> Iterator[Server]:
    """A model that calls a function, and that concludes once it has read the result."""
    model = scripted.write(tmp_path_factory.mktemp("agent") / "model", "agent")
    with serving("--checkpoint", model, "--model-names", "scripted") as server:
        yield server


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
@pytest.mark.skipif(not PACKAGES.is_dir(), reason=f"no packages in {PACKAGES}: `make gates` asks npm for them")
def test_openais_packages_for_node(agent, tmp_path):
    """Guards both APIs, whole and streamed, as `openai` and `@openai/agents` read and continue them."""
    script = shutil.copy(Path(__file__).with_name("clients.mjs"), tmp_path)
    (tmp_path / "node_modules").symlink_to(PACKAGES)  # beside the script, where modules are looked for
    command = ["node", script, agent.url, "scripted"]
    done = subprocess.run(command, capture_output=True, text=True, env=DIRECT, timeout=120)
    assert done.returncode == 0, done.stderr + agent.stderr
    found = json.loads(done.stdout)
    assert len(found) == 8
    for client, loop in found.items():
        assert "".join(loop).replace(" ", "") == "".join(LOOP).replace(" ", ""), client


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("stream", [False, True])
def test_curl_in_a_loop_of_chats(agent, stream):
    """Guards the wire itself: what a shell sees, and gives back."""
    messages: list[Any] = [{"role": "user", "content": "What is it like in Paris?"}]
    tools = [{"type": "function", "function": FUNCTION}]
    said = []
    for _ in range(2):
        text = _curl(agent, "chat/completions", {"messages": messages, "tools": tools, "stream": stream})
        message = _streamed_message(text) if stream else json.loads(text)["choices"][0]["message"]
        messages.append({name: value for name, value in message.items() if value})
        for call in message.get("tool_calls") or ():
            said.append(call["function"]["name"] + call["function"]["arguments"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": scripted.RESULT})
    assert [*said, messages[-1]["content"]] == LOOP


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("stream", [False, True])
def test_curl_in_a_loop_of_responses(agent, stream):
    """Guards the same through responses, of which the second goes on from the first, which is kept."""
    tools = [{"type": "function", **FUNCTION}]
    first = _response(agent, {"input": "What is it like in Paris?", "tools": tools, "stream": stream})
    (call,) = [item for item in first["output"] if item["type"] == "function_call"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": scripted.RESULT}
    going_on = {"input": [result], "tools": tools, "stream": stream, "previous_response_id": first["id"]}
    second = _response(agent, going_on)
    assert [call["name"] + call["arguments"], second["output"][-1]["content"][0]["text"]] == LOOP


def _curl(server: Server, path: str, body: dict[str, Any]) -> str:
    command = ["curl", "-sN", f"{server.url}/v1/{path}", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return subprocess.run(command, capture_output=True, text=True, env=DIRECT, check=True, timeout=60).stdout


def _events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def _streamed_message(text: str) -> dict[str, Any]:
    assert text.endswith("data: [DONE]\n\n")
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning": "", "tool_calls": []}
    for choice in [choice for event in _events(text) for choice in event["choices"]]:
        for name in ("content", "reasoning", "tool_calls"):
            message[name] += choice["delta"].get(name) or type(message[name])()
    return message


def _response(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    text = _curl(server, "responses", body)
    return _events(text)[-1]["response"] if body["stream"] else json.loads(text)
