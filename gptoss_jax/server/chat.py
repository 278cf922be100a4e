"""/v1/chat/completions: a request and its response."""

from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.api import chat
from gptoss_jax.api.chat_stream import ChatStream, cached_document
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.parsed import Delta
from gptoss_jax.server import bodies, events
from gptoss_jax.server.exchange import Model, new_id, now
from gptoss_jax.server.problems import Problem

FIELDS = chat.FIELDS


class ChatExchange:
    """See `exchange.Exchange`."""

    def __init__(self, body: Mapping[str, Any], model: Model):
        """Reads a request.

        Raises:
            GptossError, Problem: something that cannot be done as asked.
        """
        model.check_name(body)
        fields = bodies.sort(body, FIELDS)
        self._asked = chat.ask(fields.acting, model.defaults(), model.vocab_path)
        self.asked, self.stream, self.headers = [self._asked], fields.stream, fields.headers
        self._id, self._created, self._model = new_id(), now(), model
        self._chunks = ChatStream(
            self._asked, self._id, model.names[0], created=self._created, with_usage=fields.with_usage
        )

    def begin(self) -> Sequence[bytes]:
        """A chunk for each choice."""
        return events.data(self._chunks.begin())

    def take(self, number: int, deltas: Sequence[Delta]) -> Sequence[bytes]:
        """Chunks with what came."""
        return events.data(self._chunks.take(number, deltas))

    def finish(self, number: int, deltas: Sequence[Delta], answer: Answer) -> Sequence[bytes]:
        """The last chunks of a choice."""
        return events.data([*self._chunks.take(number, deltas), *self._chunks.finish(number, answer)])

    def end(self, answers: Sequence[Answer], cached_tokens: int) -> Sequence[bytes]:
        """The usage, if it is asked for, and the end."""
        return [*events.data(self._chunks.end(answers, cached_tokens)), events.DONE]

    def fail(self, problem: Problem) -> Sequence[bytes]:
        """The error."""
        return events.data([problem.document()])

    def whole(self, answers: Sequence[Answer], cached_tokens: int) -> dict[str, Any]:
        """The response."""
        document = chat.response(self._asked, answers, self._id, self._model.names[0])
        return document | {"created": self._created, "usage": document["usage"] | cached_document(cached_tokens)}
