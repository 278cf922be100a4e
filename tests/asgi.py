"""A client of an ASGI app in the same process, without sockets: what a server passes to an app, and takes from it."""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """A response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The JSON of each event; "[DONE]" as it is."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Connection:
    """One request, which its client may break off."""

    def __init__(
        self, app: Any, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}, chunk: int = 1 << 16
    ):
        given = {"content-type": "application/json", **headers}
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self._app, self._left, self.sent = app, asyncio.Event(), list[Any]()
        self._parts = [body[at : at + chunk] for at in range(0, len(body), chunk)] or [b""]

    async def _receive(self) -> dict[str, Any]:
        if self._parts:
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts)}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        await asyncio.sleep(0)

    def leave(self) -> None:
        self._left.set()

    async def run(self) -> Reply:
        await self._app(self._scope, self._receive, self._send)
        if not self.sent:
            return Reply(0, {}, b"")
        start = self.sent[0]
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Reply(start["status"], headers, b"".join(each.get("body", b"") for each in self.sent[1:]))


async def post(app: Any, path: str, body: object, headers: Mapping[str, str] = {}) -> Reply:
    """The response to a JSON body, or to bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await Connection(app, "POST", path, data, headers).run()


async def get(app: Any, path: str, method: str = "GET", headers: Mapping[str, str] = {}) -> Reply:
    """The response to a request without a body."""
    return await Connection(app, method, path, headers=headers).run()


async def until(condition: Callable[[], object]) -> None:
    """Waits for something that comes soon, where the machine is not busy with other things."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)
