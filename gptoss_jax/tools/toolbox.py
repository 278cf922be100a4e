"""The tools of one conversation: what its prompt declares, whose a call is, and outputs that are bounded text."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openai_harmony import DeveloperContent, Message, SystemContent

from gptoss_jax.errors import GptossError, check_list, one_line
from gptoss_jax.harmony import render
from gptoss_jax.harmony.settings import Settings, namespace
from gptoss_jax.tools.tool import Tool, ToolOutput

if TYPE_CHECKING:
    from openai_harmony import ToolDescription

MAX_OUTPUT_CHARACTERS = 20_000


class Toolbox:
    """Tools that one conversation offers; the first that takes a call answers it.

    Attributes:
        tools: all of them.
        builtin_tools: what the system message declares of them.
        functions: what the developer message declares of them.
        most_calls: how many calls are carried out, of all tools together; None: any number.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        shared: Sequence[Tool] = (),
        max_output_characters: int = MAX_OUTPUT_CHARACTERS,
    ):
        """`shared` tools are other conversations' too, so `close` leaves them open."""
        check_list("tools", tools, "tools")
        self._own, self._max_output_characters = tuple(tools), max_output_characters
        self.tools = (*self._own, *shared)
        self.most_calls: int | None = None
        self._num_calls = 0
        self.builtin_tools = tuple(tool.builtin for tool in self.tools if tool.builtin is not None)
        self.functions: tuple[ToolDescription, ...] = tuple(
            itertools.chain.from_iterable(tool.functions for tool in self.tools)
        )
        Settings(builtin_tools=self.builtin_tools, tools=self.functions)  # refuses two of a name

    def takes(self, recipient: str) -> bool:
        """Whether one of the tools answers calls to `recipient`."""
        return any(tool.takes(recipient) for tool in self.tools)

    def call(self, recipient: str, arguments: str) -> ToolOutput:
        """Answer one call; never raises, since what went wrong is for the model to read. Arguments as for `Tool`."""
        tool = next((tool for tool in self.tools if tool.takes(recipient)), None)
        if tool is None:
            return ToolOutput(f"there is no tool {one_line(recipient)[:80]!r}: {self._names()}", failed=True)
        if self.most_calls is not None and self._num_calls >= self.most_calls:
            return ToolOutput(f"not carried out: max_tool_calls is {self.most_calls}, and as many were", failed=True)
        self._num_calls += 1
        try:
            output = tool.call(recipient, arguments)
            return dataclasses.replace(output, text=bounded(as_text(output.text), self._max_output_characters))
        except Exception as error:  # a tool is others' code; its mistake must not end the conversation
            return ToolOutput(one_line(f"the tool failed: {type(error).__name__}: {error}"), failed=True)

    def settings(self, settings: Settings, messages: Sequence[Message]) -> Settings:
        """The settings with these tools declared, unless the conversation's own system or developer message does so.

        Raises:
            GptossError: two functions of one name, or a message of the conversation's own that lacks a tool.
        """
        known = declared(messages)
        own = {message.author.role.value for message in messages}
        functions = [tool for tool in self.functions if f"functions.{tool.name}" not in known]
        namespaces = {each.partition(".")[0] for each in known}
        builtin = [name for name in self.builtin_tools if namespace(name) not in namespaces]
        for role, missing in (("system", builtin), ("developer", [tool.name for tool in functions])):
            if missing and role in own:
                raise GptossError(
                    f"the conversation brings its own {role} message, which declares no {missing[0]}: "
                    "take that message out, or leave the tool out"
                )
        return dataclasses.replace(
            settings,
            builtin_tools=tuple(dict.fromkeys((*settings.builtin_tools, *builtin))),
            tools=(*settings.tools, *functions),
        )

    def close(self) -> None:
        """Stop what the tools started, but for those that are shared."""
        for tool in self._own:
            tool.close()

    def _names(self) -> str:
        names = [*map(namespace, self.builtin_tools), *(f"functions.{tool.name}" for tool in self.functions)]
        return f"expected {' or '.join(names)}" if names else "no tools are there"


def declared(messages: Sequence[Message]) -> frozenset[str]:
    """The recipients that the messages in front declare: "python", "browser.open", "functions.NAME"."""
    names: set[str] = set()
    for part in itertools.chain.from_iterable(message.content for message in messages):
        if isinstance(part, SystemContent | DeveloperContent):
            for namespace in (part.tools or {}).values():
                names |= {f"{namespace.name}.{tool.name}" for tool in namespace.tools} or {namespace.name}
    return frozenset(names)


def declared_with(messages: Sequence[Message], settings: Settings) -> frozenset[str]:
    """As `declared`, with the messages in front that the settings make."""
    return declared(render.with_opening(messages, settings))


def as_text(text: str) -> str:
    """Text that a tokenizer takes: half surrogate pairs, which are none, become question marks."""
    return text.encode(errors="replace").decode()


def bounded(text: str, most: int) -> str:
    """The text, its middle cut out where it is longer than `most` characters, with a line that says how much."""
    if len(text) <= most:
        return text
    half = most // 2
    cut = f"\n[{len(text) - 2 * half:,} of {len(text):,} characters are left out here]\n"
    return text[:half] + cut + text[len(text) - half :]
