"""A response whose calls are carried out here: which tools a request may have, and the rounds of its answers."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gptoss_jax.api.asked import Asked
from gptoss_jax.api.responses import items_of_round
from gptoss_jax.api.tool_items import CallItem
from gptoss_jax.engine.request import Request
from gptoss_jax.errors import GptossError, short
from gptoss_jax.grammar.compiled import held_form
from gptoss_jax.harmony import render
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.tools import rounds
from gptoss_jax.tools.choice import Offer
from gptoss_jax.tools.rounds import Call, Called, Rounds
from gptoss_jax.tools.toolbox import Toolbox, declared

Send = Callable[[Sequence[bytes]], Awaitable[None]]
"""Sends events, where the response is a stream."""

MOST_CALLS_AT_ONCE = 32  # of all responses; more wait
_TOOL_OF = {"code_interpreter": "python", "web_search": "browser", "web_search_preview": "browser"}


class ServerTools:
    """The tools that whoever started the server has switched on."""

    def __init__(self, offer: Offer, most_rounds: int):
        """`most_rounds`: how often calls are carried out for one response at most."""
        self._offer, self.most_rounds = offer, most_rounds
        self.threads = ThreadPoolExecutor(MOST_CALLS_AT_ONCE, thread_name_prefix="tools")

    def opened(self, fields: dict[str, Any]) -> Toolbox | None:
        """A response's own tools: those of a request's `tools` that are offered, which are taken out of there.

        Functions of MCP servers stand there in their place. What is not offered stays, and is refused like anything
        else that the API does not know.
        """
        kept, names, servers = [], list[str](), list[str]()
        tools = fields.get("tools")
        for tool in tools if isinstance(tools, list) else ():
            kind = tool.get("type") if isinstance(tool, dict) else None
            if name := self._offered(_TOOL_OF.get(str(kind))):
                names.append(name)
            elif kind == "mcp" and tool.get("server_label") in self._offer.servers:
                _check_server(tool)
                servers.append(tool["server_label"])
            else:
                kept.append(tool)
        if not names and not servers:
            return None
        toolbox = self._offer.open(names, servers)
        functions = [{"type": "function", **function.model_dump(mode="json")} for function in toolbox.functions]
        fields["tools"] = [*kept, *functions]
        return toolbox

    def _offered(self, name: str | None) -> str | None:
        """The name under which a tool is offered: python may keep its state."""
        return next((each for each in self._offer.names if name and each.partition(":")[0] == name), None)

    def servers_of(self, toolbox: Toolbox) -> Mapping[str, str]:
        """Function -> its MCP server."""
        return {function.name: getattr(tool, "name", "") for tool in toolbox.tools for function in tool.functions}


def _check_server(tool: Mapping[str, Any]) -> None:
    for name in tool:
        if name not in ("type", "server_label", "server_description", "require_approval"):
            raise GptossError(f"tools, mcp: {short(name)} does not act here: the server's own settings do")
    if tool.get("require_approval", "never") != "never":
        raise GptossError("tools, mcp: require_approval is expected to be 'never': whoever runs the server approves")


@dataclasses.dataclass
class ToolTurn:
    """The rounds of one response.

    Attributes:
        asked: the request.
        tools: what is switched on.
        toolbox: the response's own.
        response_id: the response's own part of its id.
        rounds: where they stand.
        items: the output so far.
        prompt_tokens: of all rounds so far.
    """

    asked: Asked
    tools: ServerTools
    toolbox: Toolbox
    response_id: str
    rounds: Rounds = dataclasses.field(init=False)
    items: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    _calls: int = 0

    def __post_init__(self):
        options = self.asked.options
        self.rounds = Rounds(
            self.asked.conversation,
            self.toolbox,
            declared(self.asked.conversation),
            most_rounds=self.tools.most_rounds,
            most_tokens=options.max_new_tokens,
        )
        self.prompt_tokens = len(self.asked.token_ids)
        # A call may be asked for once, not for ever.
        vocab = self.asked.vocab_path
        self._later_form = None if self.asked.form is None else held_form(options.settings, vocab_path=vocab)

    @property
    def answer_id(self) -> str:
        """From which the items of the answer under way have their ids."""
        return self._answer_id(len(self.rounds.rounds))

    @property
    def next_answer_id(self) -> str:
        """The same of the answer after it."""
        return self._answer_id(len(self.rounds.rounds) + 1)

    def _answer_id(self, number: int) -> str:
        return f"{self.response_id}/{number}" if number else self.response_id

    def is_ours(self, recipient: str) -> bool:
        """Whether calls to `recipient` are no client's to answer."""
        return self.toolbox.takes(recipient) or recipient not in declared(self.asked.conversation)

    def output_of(self, answer: Answer) -> list[dict[str, Any]]:
        """The items of an answer that `take` has not been given yet."""
        return items_of_round(self.asked, answer, self.answer_id, self.is_ours)

    def take(self, answer: Answer) -> list[tuple[Call, CallItem]]:
        """Adds an answer; the calls to be carried out, and their items. None: the rounds have ended."""
        self.items += self.output_of(answer)
        servers = self.tools.servers_of(self.toolbox)
        calls = self.rounds.take(answer)
        first, self._calls = self._calls, self._calls + len(calls)
        return [(call, CallItem(call, self.response_id, first + at, servers)) for at, call in enumerate(calls)]

    async def carry_out(self, call: Call) -> Called:
        """One call, in a thread: others' answers flow meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.tools.threads, rounds.called_now, self.toolbox, call)

    def put(self, called: Sequence[tuple[Called, CallItem]]) -> None:
        """Adds what the calls gave that `take` returned last."""
        self.rounds.put([each for each, _ in called])
        self.items += [item.document(each.output) for each, item in called]

    def next_request(
        self, model_stop_ids: Sequence[int], stream: AnswerStream, max_context_tokens: int
    ) -> Request | None:
        """What the engine is asked next; None: the conversation no longer fits its context."""
        ids = tuple(render.render(self.rounds.messages, None, vocab_path=self.asked.vocab_path))
        room, left = max_context_tokens - len(ids), self.rounds.tokens_left
        if room < 1:
            self.rounds.does_not_fit()
            return None
        self.prompt_tokens += len(ids)
        return dataclasses.replace(
            self.asked.request(model_stop_ids),
            token_ids=ids,
            max_new_tokens=None if left is None else min(left, room),
            ends_at=stream.ends_at,
            constraint=self._later_form,
        )

    def close(self) -> None:
        """Ends the tools, whatever they are doing."""
        self.toolbox.close()
