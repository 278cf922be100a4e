"""MCP servers as tools, over a process's streams: what is called, and every way in which a server fails."""

import shlex
import sys
import time

import pytest

from gptoss_jax.errors import GptossError
from gptoss_jax.tools.mcp import McpServer, connect_all
from gptoss_jax.tools.toolbox import Toolbox
from tests.goldens.make import ROOT

SERVER = shlex.join([sys.executable, str(ROOT / "tests" / "mcp_server.py")])


@pytest.fixture(scope="module")
def servers():
    """Two of the same, so that names clash."""
    connected = connect_all([SERVER, SERVER], call_seconds=1.0)
    yield connected
    for server in connected:
        server.close()


def test_tools_are_functions_and_the_later_ones_of_a_name_have_their_servers_in_front(servers):
    """Guards two servers that both `search`: each is called by a name of its own."""
    first, second = ([function.name for function in server.functions] for server in servers)
    assert first == ["add", "sleep", "end", "picture"]
    assert second == [f"sums_and_more_{name}" for name in first]
    assert servers[0].functions[0].parameters["properties"]["a"]["type"] == "integer"
    assert servers[1].call("functions.sums_and_more_add", '{"a": 1, "b": 2}').text.startswith("1 + 2 = 3")
    box = Toolbox([], shared=servers)
    assert box.takes("functions.add")
    assert not box.takes("add")


def test_results_are_texts_and_mistakes_are_outputs(servers):
    """Guards what a model reads: texts, a line for a picture, and why its own arguments do not do."""
    server = servers[0]
    assert server.call("functions.picture", "").text == "[image, image/png: not shown here]"
    wrong = server.call("functions.add", '{"a": "x", "b": 2}')
    assert wrong.failed
    assert "a valid integer" in wrong.text
    for arguments in ("{", "[1]"):
        assert server.call("functions.add", arguments).failed


def test_a_server_that_hangs_or_dies_is_an_output(servers):
    """Guards the conversation against a server: its call fails after a time, and so do all calls once it is gone."""
    server, began = servers[1], time.monotonic()
    late = server.call("functions.sums_and_more_sleep", '{"seconds": 2}')
    assert (late.failed, late.text) == (True, "MCP server sums_and_more gave no answer within 1 s")
    assert time.monotonic() - began < 10
    for name, arguments in (("end", "{}"), ("add", '{"a": 1, "b": 2}')):
        gone = server.call(f"functions.sums_and_more_{name}", arguments)
        assert (gone.failed, gone.text) == (
            True,
            "MCP server sums_and_more: the call failed: MCPError Connection closed",
        )


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ("/no/such thing", r"MCP server /no/such thing: .*No such file"),
        ("'", "MCP server ': expected a command or a URL"),
        (shlex.join([sys.executable, "-c", "import nothing"]), "Connection closed .*No module named 'nothing'"),
    ],
)
def test_a_server_that_does_not_start_is_a_mistake_in_one_line(server, said):
    """Guards the first try of everybody: which server, and what it said."""
    with pytest.raises(GptossError, match=said):
        McpServer(server)
