"""Who may ask: API keys, compared in constant time, and no pages in browsers unless they are named."""

import hashlib
import hmac
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gptoss_jax.server.problems import Problem

ANYBODY = ""
"""The owner where no keys are asked for."""
OPEN_PATHS = ("/health",)  # which say nothing but whether the server is well


class Keys:
    """API keys; of each only its digest is held."""

    def __init__(self, keys: Sequence[str] = ()):
        """None: anybody may ask."""
        self._digests = [_digest(key) for key in keys]

    def owner(self, authorization: str) -> str | None:
        """Whose key a header `Authorization: Bearer KEY` has; None: nobody's. Every key is compared, whole."""
        if not self._digests:
            return ANYBODY
        scheme, _, key = authorization.partition(" ")
        given, found = _digest(key.strip()), None
        for digest in self._digests:
            if hmac.compare_digest(given, digest):
                found = digest.hex()
        return found if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


class Gate:
    """Lets requests through to an app, with their `owner` in the scope's state; what it refuses has an error object.

    A page in a browser has an `Origin`; without this check any page that somebody looks at could ask a server on their
    machine, or, by a name that comes to mean this machine, read its answers.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, origins: Collection[str] = ()):
        self._app, self._keys, self._origins = app, keys, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and (problem := self._problem(scope)):
            await problem.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> Problem | None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins:
            return Problem(403, "pages in browsers may not ask: --allow-origins names those that may", code="origin")
        if scope["path"] in OPEN_PATHS or (scope["method"] == "OPTIONS" and origin is not None):
            return None
        owner = self._keys.owner(headers.get("authorization", ""))
        if owner is None:
            challenge = {"WWW-Authenticate": "Bearer"}
            return Problem(401, "no API key, or a wrong one", code="invalid_api_key", headers=challenge)
        scope.setdefault("state", {})["owner"] = owner
        return None
