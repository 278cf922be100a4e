"""Clients that send or read slowly, or not at all, or are too many: who is hung up on, and when; over socket pairs."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from gptoss_jax.server import connection
from gptoss_jax.server.connection import BoundedConnection

LIMIT = 0.2
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"
LARGE = 1 << 24


@pytest.fixture(autouse=True)
def _limits(monkeypatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", LIMIT)
    monkeypatch.setattr(connection, "READING_SECONDS", LIMIT)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once, after a while, after the body, or at length, as the path says."""
    if scope["path"] == "/late":
        await asyncio.sleep(2 * LIMIT)
    while scope["path"] == "/body" and (await receive()).get("more_body"):
        pass
    length = LARGE if scope["path"] == "/large" else 2
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % length)]})
    await send({"type": "http.response.body", "body": b"ok" * (length // 2)})


class Client:
    """One end of a connection."""

    def __init__(self, end: socket.socket):
        self._end, self._loop = end, asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._end, data)

    async def read(self, most: int = 1 << 16) -> bytes:
        """What comes next; nothing at the connection's end."""
        try:
            return await self._loop.sock_recv(self._end, most)
        except ConnectionError:
            return b""

    async def trickle(self, data: bytes) -> float:
        """Sends a byte at a time for as long as anybody listens, a fraction of the limit apart; seconds until then."""
        began = time.monotonic()
        try:
            for byte in data:
                await self.send(bytes([byte]))
                await asyncio.sleep(LIMIT / 8)
        except ConnectionError:
            pass
        return time.monotonic() - began


class Connection(BoundedConnection):
    """One of two."""

    most_open = 2


class House:
    """The app, to which clients connect."""

    def __init__(self):
        self._config = uvicorn.Config(app, http=Connection, lifespan="off", log_config=None)
        self._config.load()
        self._state, self._loop = ServerState(), asyncio.get_running_loop()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        before = len(self._state.connections)
        await self._loop.connect_accepted_socket(lambda: Connection(self._config, self._state, {}), theirs)
        try:
            yield Client(ours)
        finally:
            ours.close()
            while len(self._state.connections) > before:  # nothing is left of it
                await asyncio.sleep(0.01)


def running(work: Callable[[House], Awaitable[Any]]) -> Any:
    """What work in a house gives."""

    async def main() -> Any:
        async with asyncio.timeout(60):
            return await work(House())

    return asyncio.run(main())


def connected(work: Callable[[Client], Awaitable[Any]]) -> Any:
    """What a client gives that is connected to the app."""

    async def alone(house: House) -> Any:
        async with house.client() as client:
            return await work(client)

    return running(alone)


def test_who_sends_nothing_is_hung_up_on():
    """Guards file descriptors: a connection on which no request ever begins."""

    async def work(client: Client) -> tuple[bytes, float]:
        began = time.monotonic()
        return await client.read(), time.monotonic() - began

    said, seconds = connected(work)
    assert said == b"" and seconds >= LIMIT * 0.9


@pytest.mark.parametrize("first", [b"", GET, POST % b"/body" + b" " * 1000])
def test_a_head_that_comes_slowly_is_not_waited_for(first):
    """Guards the same against bytes that come now and then, in the first request or a later one."""

    async def work(client: Client) -> tuple[float, bytes]:
        if first:
            await client.send(first)
            assert (await client.read()).startswith(b"HTTP/1.1 200")
        seconds = await client.trickle(b"GET / HTTP/1.1\r\nX: " + b"a" * 1000)
        return seconds, await client.read()

    seconds, said = connected(work)
    assert said in (b"", b"ok") and LIMIT * 0.8 <= seconds < 20


def test_the_rest_of_a_body_that_nobody_reads_is_not_waited_for():
    """Guards the same against who is refused, and goes on to send."""

    async def work(client: Client) -> float:
        await client.send(POST % b"/")
        assert (await client.read()).startswith(b"HTTP/1.1 200")
        return await client.trickle(b" " * 900)

    assert connected(work) < 20


def test_who_is_in_time_is_answered():
    """Guards everybody else: several requests, an answer that takes longer than a head may, a body that is awaited."""

    async def work(client: Client) -> None:
        for _ in range(3):
            await client.send(GET)
            assert b"200" in await client.read()
            await asyncio.sleep(LIMIT / 2)
        await client.send(GET.replace(b"/ ", b"/late ", 1))
        assert b"200" in await client.read()
        await client.send(POST % b"/body")
        assert await client.trickle(b" " * 16) > LIMIT
        await client.send(b" " * 984)
        assert b"200" in await client.read()

    connected(work)


def test_who_reads_nothing_is_hung_up_on():
    """Guards memory: a response that waits for its client; one who reads slowly gets all of it."""

    async def read(client: Client, pause: float) -> int:
        await client.send(GET.replace(b"/ ", b"/large ", 1))
        await asyncio.sleep(pause)
        length = 0
        while length < LARGE and (part := await client.read(1 << 20)):
            length += len(part)
            await asyncio.sleep(LIMIT / 50)
        return length

    assert connected(lambda client: read(client, 0.0)) >= LARGE
    assert connected(lambda client: read(client, 3 * LIMIT)) < LARGE


def test_more_connections_than_may_be_open_are_refused():
    """Guards files that a process may open: who is too many hears so unasked, and is gone; all others are served.

    When one of those has left there is room again.
    """

    async def asks(client: Client) -> bytes:
        await client.send(GET)
        return await client.read()

    async def work(house: House) -> None:
        async with house.client() as first:
            async with house.client(), house.client() as third:
                head, _, body = (await third.read()).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503 Service Unavailable") and b"connection: close" in head.lower()
                error = json.loads(body)["error"]
                assert (error["type"], error["code"]) == ("server_error", "too_many_connections")
                assert await third.read() == b""
                assert b"200" in await asks(first)
            async with house.client() as later:
                assert b"200" in await asks(later)
                assert b"200" in await asks(first)

    running(work)
