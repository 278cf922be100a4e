"""How many connections may be open, and how long each may keep others waiting: uvicorn's, closed when one is too many.

Or when its client sends or reads too slowly. uvicorn itself ends only connections on which nothing at all comes between
two requests, and its own bound on their number closes none. A body that is being read has its limit in `bodies`, with a
response that says so.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptoss_jax.server.problems import Problem

HEAD_SECONDS = 10.0  # for a request's head, since the connection was made or the last response ended
READING_SECONDS = 60.0  # that a client may read nothing of a response that waits for it


class BoundedConnection(H11Protocol):
    """uvicorn's protocol: one of so many, with a timer while the client is to send, and one while it is to read."""

    most_open: int  # at once: each is an open file of the process, which needs some for other things

    _sending: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """asyncio's."""
        super().connection_made(transport)
        if len(self.connections) > self.most_open:
            self._refuse()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """uvicorn's."""
        super().on_response_complete()
        self._watch()
        self._await_reader()

    def pause_writing(self) -> None:
        """asyncio's: more waits for the client than is kept for it."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """asyncio's: it has read."""
        super().resume_writing()
        self._reading = _cancelled(self._reading)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self._sending, self._reading = _cancelled(self._sending), _cancelled(self._reading)
        super().connection_lost(exc)

    def _refuse(self) -> None:
        """Says so and hangs up, whatever the client is about to ask: to wait for that would be one more open file."""
        said = f"{self.most_open} connections are open, and no more may be: ask again later"
        reply = Problem(503, said, code="too_many_connections", headers={"Connection": "close"}).response()
        head = h11.Response(status_code=reply.status_code, headers=reply.raw_headers, reason=b"Service Unavailable")
        for event in (head, h11.Data(data=bytes(reply.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """Starts the timer when the client begins to owe a head, or the rest of a body that nobody reads any more."""
        is_answered = self.cycle is None or self.cycle.response_complete
        if not is_answered or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._sending = _cancelled(self._sending)
        elif self._sending is None and not self.transport.is_closing():  # what is left of a response is sent first
            self._sending = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _await_reader(self) -> None:
        """Ends the connection unless fewer bytes of this response wait after a while."""
        unread_bytes, cycle = self.transport.get_write_buffer_size(), self.cycle

        def look() -> None:
            left = self.transport.get_write_buffer_size()
            if cycle is self.cycle and left:
                self.transport.abort() if left >= unread_bytes else self._await_reader()

        self._reading = _cancelled(self._reading)
        if unread_bytes:
            self._reading = self.loop.call_later(READING_SECONDS, look)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
