"""A response whose calls are carried out here: which tools a request may have, and the rounds of its answers."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gptoss_jax.api import hosted_tools
from gptoss_jax.api.asked import Asked
from gptoss_jax.api.responses import items_of_round
from gptoss_jax.api.tool_items import CallItem
from gptoss_jax.api.tool_turn import ToolTurn
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.tools import rounds
from gptoss_jax.tools.choice import Offer
from gptoss_jax.tools.rounds import Call, Called
from gptoss_jax.tools.toolbox import Toolbox

Send = Callable[[Sequence[bytes]], Awaitable[None]]
"""Sends events, where the response is a stream."""

MOST_CALLS_AT_ONCE = 32  # of all responses; more wait


class ServerTools:
    """The tools that whoever started the server has switched on."""

    def __init__(self, offer: Offer, most_rounds: int):
        """`most_rounds`: how often calls are carried out for one response at most."""
        self._offer, self.most_rounds = offer, most_rounds
        self.threads = ThreadPoolExecutor(MOST_CALLS_AT_ONCE, thread_name_prefix="tools")

    def opened(self, fields: dict[str, Any]) -> Toolbox | None:
        """A response's own tools, of those that a request asks for; see `hosted_tools.wanted`."""
        wanted = hosted_tools.wanted(fields, self._offer)
        return None if wanted is None else self._offer.open(*wanted)


class ServerTurn(ToolTurn):
    """The rounds of one response."""

    def __init__(self, asked: Asked, tools: ServerTools, toolbox: Toolbox, response_id: str):
        """`toolbox`: the response's own."""
        super().__init__(asked, toolbox, response_id, tools.most_rounds)
        self._toolbox, self._threads, self._num_calls = toolbox, tools.threads, 0

    @property
    def next_answer_id(self) -> str:
        """From which the items of the answer after the one under way have their ids."""
        return self.answer_id(len(self.rounds.rounds) + 1)

    def output_of(self, answer: Answer) -> list[dict[str, Any]]:
        """The items of an answer that `take` has not been given yet."""
        return items_of_round(self, answer, len(self.rounds.rounds))

    def take(self, answer: Answer) -> list[tuple[Call, CallItem]]:
        """Adds an answer; the calls to be carried out, and their items. None: the rounds have ended."""
        calls = self.rounds.take(answer)
        first, self._num_calls = self._num_calls, self._num_calls + len(calls)
        return [(call, CallItem(call, self.response_id, first + at, self.servers)) for at, call in enumerate(calls)]

    async def carry_out(self, call: Call) -> Called:
        """One call, in a thread: others' answers flow meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, rounds.called_now, self._toolbox, call)

    def close(self) -> None:
        """Ends the tools, whatever they are doing."""
        self._toolbox.close()
