"""The flags that say which tools a model may call, and that these are run here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from absl import flags

from gptoss_jax.cli.flag_values import naming_flags
from gptoss_jax.cli.mistakes import spelled
from gptoss_jax.errors import GptossError
from gptoss_jax.tools.choice import TOOLS, Chosen, Offer
from gptoss_jax.tools.tool import MOST_ROUNDS

if TYPE_CHECKING:
    from gptoss_jax.tools.toolbox import Toolbox

TOOL_FLAGS = ("tool", "browser_folder", "browser_hosts", "mcp", "tool_rounds")
_ONE_ANSWER = ("raw", "token_ids", "coordinator", "builtin_tools")  # flags that tools have no place beside


def define_flags() -> None:
    """The flags named in TOOL_FLAGS; `chosen` reads all but the last."""
    flags.DEFINE_multi_string(
        "tool", [], f"NAME: A tool that it may call, run here: {', '.join(TOOLS)}; repeat it for several."
    )
    flags.DEFINE_string("browser_folder", None, "DIR: Pages that --tool browser searches: text, Markdown, HTML.")
    flags.DEFINE_list("browser_hosts", [], "HOSTS: Hosts that --tool browser may read over the network: a.org,b.org.")
    flags.DEFINE_multi_string(
        "mcp", [], "SERVER: An MCP server whose tools it may call: 'COMMAND ARGS' or http(s)://...; repeat for several."
    )
    flags.DEFINE_integer("tool_rounds", MOST_ROUNDS, "N: How often its calls are carried out for one prompt, at most.")


def chosen(options: flags.FlagValues) -> Chosen | None:
    """The tools that the flags name; None: there are none.

    Raises:
        GptossError: flags that do not go together.
    """
    if options.tool_rounds < 1:
        raise GptossError(f"--tool-rounds is {options.tool_rounds}, expected at least 1")
    with naming_flags({"tool browser": "tool browser"}):
        found = Chosen(tuple(options.tool), options.browser_folder, tuple(options.browser_hosts), tuple(options.mcp))
    return found if found.names or found.mcp else None


@contextmanager
def opened(options: flags.FlagValues) -> "Iterator[Toolbox | None]":
    """The tools of one conversation, stopped when the block ends; None: the flags name none.

    Raises:
        GptossError: a tool that cannot be had, or flags that do not go together.
    """
    with offered(options) as offer:
        if offer is None:
            yield None
            return
        toolbox = offer.open()
        try:
            yield toolbox
        finally:
            toolbox.close()


@contextmanager
def offered(options: flags.FlagValues) -> Iterator[Offer | None]:
    """Tools for conversations, stopped when the block ends; None: the flags name none. Raises as `opened`."""
    found = chosen(options)
    if found is None:
        yield None
        return
    from gptoss_jax.runtime.tool_answers import output_characters  # here, since it is slow to import

    for name in _ONE_ANSWER:
        if name in options and options[name].value:
            raise GptossError(f"--tool, --mcp and {spelled(name)}: leave one of them out")
    if "n" in options and options.n > 1:
        raise GptossError(f"--n is {options.n}, expected 1 beside --tool and --mcp")
    offer = Offer(found, max_output_characters=output_characters(options.max_context_tokens))
    try:
        yield offer
    finally:
        offer.close()
