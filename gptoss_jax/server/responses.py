"""/v1/responses: a request and its response, which is kept, so that the next one can go on from it."""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.api import hosted_tools, responses
from gptoss_jax.api.asked import Asked
from gptoss_jax.api.fields import boolean
from gptoss_jax.api.responses_stream import ResponsesStream
from gptoss_jax.engine.request import Request
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.json_values import nonempty_list
from gptoss_jax.harmony.parsed import Delta
from gptoss_jax.server import bodies, events
from gptoss_jax.server.exchange import Model, new_id, now
from gptoss_jax.server.problems import Problem
from gptoss_jax.server.stored import Stored
from gptoss_jax.server.tool_turn import Send, ServerTurn

FIELDS = responses.FIELDS


class ResponsesExchange:
    """See `exchange.Exchange`.

    Attributes:
        turn: its rounds, where it has tools that are run here.
    """

    def __init__(self, body: Mapping[str, Any], model: Model, stored: Stored, owner: str):
        """Reads a request of `owner`'s, which may go on from a response in `stored`.

        Raises:
            GptossError, Problem: something that cannot be done as asked.
        """
        model.check_name(body)
        fields = bodies.sort(body, FIELDS, own=("store",))
        acting = dict(fields.acting)
        self._stored, self._owner = stored, owner
        self._keeps = boolean(acting.pop("store", True), "store") and stored.most > 0
        previous = acting.pop("previous_response_id", None)
        self._before = [] if previous is None else _items_of(previous, stored, owner)
        self._own = _items(acting.get("input"))
        if self._before:
            acting["input"] = [*self._before, *self._own]
        self._id, self._name, self._model = new_id(), model.names[0], model
        self._asked, self.turn = self._ask(acting, fields.acting.get("tools"))
        self.asked, self.stream, self.headers = [self._asked], fields.stream, fields.headers
        self._added = {"created_at": now(), "previous_response_id": previous, "store": self._keeps}
        self._events = ResponsesStream(self._asked, self._id, self._name, added=self._added)
        self._finished: dict[str, Any] = {}

    def _ask(self, acting: dict[str, Any], tools: object) -> tuple[Asked, ServerTurn | None]:
        """What the engine is asked, and the rounds of tools that are run here, if the request has some."""
        model, defaults = self._model, self._model.defaults()
        if model.tools is None:
            hosted_tools.wanted(acting, None)  # refuses those that a request asks for
        toolbox = None if model.tools is None else model.tools.opened(acting)
        if toolbox is None or model.tools is None:
            return responses.ask(acting, defaults, model.vocab_path), None
        try:
            asked = responses.ask(acting, dataclasses.replace(defaults, toolbox=toolbox), model.vocab_path)
            asked = dataclasses.replace(asked, echo={**asked.echo, "tools": tools})
            toolbox.most_calls = asked.most_calls
            return asked, ServerTurn(asked, model.tools, toolbox, self._id)
        except BaseException:
            toolbox.close()
            raise

    # ---- rounds: see `replies.Turn` ----

    async def more(self, answer: Answer, send: Send) -> tuple[Request, AnswerStream] | None:
        """Carries out an answer's calls; what the engine is asked next."""
        turn = self.turn
        assert turn is not None
        called = []
        for call, item in turn.take(answer):
            await send(events.named(self._events.begin_call(item)))
            called.append(await turn.carry_out(call))
            await send(events.named(self._events.end_call(item, called[-1].output)))
        turn.rounds.put(called)
        if turn.rounds.ended is not None:
            return None
        stream = AnswerStream(self._model.tokenizer, stop_strings=self._asked.options.stop)
        sizes = self._model.stop_ids, stream, self._model.max_context_tokens
        request = await asyncio.to_thread(turn.next_request, *sizes)
        return None if request is None else (request, stream)

    def does_not_fit(self) -> None:
        """The answer was the last."""
        if self.turn is not None:
            self.turn.rounds.does_not_fit()

    def close(self) -> None:
        """Ends the tools."""
        if self.turn is not None:
            self.turn.close()

    # ---- events and the response ----

    def begin(self) -> Sequence[bytes]:
        """The events that say that it is under way."""
        return events.named(self._events.begin())

    def take(self, number: int, deltas: Sequence[Delta]) -> Sequence[bytes]:
        """Events with what came."""
        return events.named(self._events.take(deltas))

    def finish(self, number: int, deltas: Sequence[Delta], answer: Answer) -> Sequence[bytes]:
        """The last events of all items."""
        taken = self._events.take(deltas)
        if self.turn is not None:
            output = self.turn.output_of(answer)
            return events.named([*taken, *self._events.finish_round(output, self.turn.next_answer_id)])
        last, self._finished = self._events.finish(answer)
        return events.named([*taken, *last])

    def end(self, answers: Sequence[Answer], cached_tokens: int) -> Sequence[bytes]:
        """The last event, with the whole response."""
        finished = self._finished if self.turn is None else self._document(answers)
        return events.named(self._events.last(self._kept(finished, cached_tokens)))

    def fail(self, problem: Problem) -> Sequence[bytes]:
        """The error, in both ways in which clients look for it."""
        return events.named(self._events.fail(problem.document()["error"]))

    def whole(self, answers: Sequence[Answer], cached_tokens: int) -> dict[str, Any]:
        """The response."""
        return self._kept(self._document(answers), cached_tokens)

    def _document(self, answers: Sequence[Answer]) -> dict[str, Any]:
        if (turn := self.turn) is None:
            return responses.response(self._asked, answers, self._id, self._name) | self._added
        return responses.response_of_turn(turn, self._id, self._name) | self._added

    def _kept(self, document: dict[str, Any], cached_tokens: int) -> dict[str, Any]:
        """The whole response, kept if it is to be."""
        details = document["usage"]["input_tokens_details"] | {"cached_tokens": cached_tokens}
        document["usage"] = document["usage"] | {"input_tokens_details": details}
        if self._keeps and document["status"] in ("completed", "incomplete"):
            self._stored.add(document, self._before, self._own, self._owner)
        return document


def _items_of(previous: object, stored: Stored, owner: str) -> Sequence[Any]:
    if kept := stored.find(previous, owner):
        return kept.items
    message = f"previous_response_id {str(previous)[:80]!r} is not kept here, or no more: send the whole input"
    raise Problem(400, message, param="previous_response_id", code="previous_response_not_found")


def _items(value: object) -> list[Any]:
    """A request's own input as items; what it must not be, the form says."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    return nonempty_list(value, "input") if isinstance(value, list) else []
