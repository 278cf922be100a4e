"""/v1/responses: a request and its response, which is kept, so that the next one can go on from it."""

from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.api import responses
from gptoss_jax.api.fields import boolean
from gptoss_jax.api.responses_stream import ResponsesStream
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.json_values import nonempty_list
from gptoss_jax.harmony.parsed import Delta
from gptoss_jax.server import bodies, events
from gptoss_jax.server.exchange import Model, new_id, now
from gptoss_jax.server.problems import Problem
from gptoss_jax.server.stored import Stored

FIELDS = responses.FIELDS


class ResponsesExchange:
    """See `exchange.Exchange`."""

    def __init__(self, body: Mapping[str, Any], model: Model, stored: Stored, owner: str):
        """Reads a request of `owner`'s, which may go on from a response in `stored`.

        Raises:
            GptossError, Problem: something that cannot be done as asked.
        """
        model.check_name(body)
        fields = bodies.sort(body, FIELDS)
        acting = dict(fields.acting)
        self._stored, self._owner = stored, owner
        self._keeps = boolean(acting.pop("store", True), "store") and stored.most > 0
        previous = acting.pop("previous_response_id", None)
        self._before = [] if previous is None else _items_of(previous, stored, owner)
        self._own = _items(acting.get("input"))
        if self._before:
            acting["input"] = [*self._before, *self._own]
        self._asked = responses.ask(acting, model.defaults(), model.vocab_path)
        self.asked, self.stream, self.headers = [self._asked], fields.stream, fields.headers
        self._id, self._name = new_id(), model.names[0]
        self._added = {"created_at": now(), "previous_response_id": previous, "store": self._keeps}
        self._events = ResponsesStream(self._asked, self._id, self._name, added=self._added)
        self._finished: dict[str, Any] = {}

    def begin(self) -> Sequence[bytes]:
        """The events that say that it is under way."""
        return events.named(self._events.begin())

    def take(self, number: int, deltas: Sequence[Delta]) -> Sequence[bytes]:
        """Events with what came."""
        return events.named(self._events.take(deltas))

    def finish(self, number: int, deltas: Sequence[Delta], answer: Answer) -> Sequence[bytes]:
        """The last events of all items."""
        taken = self._events.take(deltas)
        last, self._finished = self._events.finish(answer)
        return events.named([*taken, *last])

    def end(self, answers: Sequence[Answer], cached_tokens: int) -> Sequence[bytes]:
        """The last event, with the whole response."""
        return events.named(self._events.last(self._kept(self._finished, cached_tokens)))

    def fail(self, problem: Problem) -> Sequence[bytes]:
        """The error, in both ways in which clients look for it."""
        return events.named(self._events.fail(problem.document()["error"]))

    def whole(self, answers: Sequence[Answer], cached_tokens: int) -> dict[str, Any]:
        """The response."""
        document = responses.response(self._asked, answers, self._id, self._name) | self._added
        return self._kept(document, cached_tokens)

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
