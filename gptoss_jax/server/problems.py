"""What goes wrong with a request, as OpenAI's APIs say it: a status and an error object, inside a stream too."""

from collections.abc import Collection, Mapping
from typing import Any

from starlette.responses import JSONResponse

from gptoss_jax.engine.request import NOT_FINITE, NOT_HELD, NumericsError
from gptoss_jax.errors import GptossError
from gptoss_jax.grammar.forms import FormError
from gptoss_jax.grammar.vocabulary import NotInstalledError
from gptoss_jax.server.engine_thread import ClosedError, QueueFullError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Problem(Exception):
    """A request that gets an error in place of an answer.

    Attributes:
        status: HTTP's.
        message: one line.
        param: the field at fault, if it is one's.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = {},
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def document(self) -> dict[str, Any]:
        """The error object."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.document(), self.status, dict(self.headers))


def of_error(error: GptossError, fields: Collection[str] = ()) -> Problem:
    """The problem that an error of ours is; `fields`: names that a request of this kind may have."""
    message = str(error)
    if isinstance(error, QueueFullError):
        return Problem(429, message, code="queue_full", headers={"Retry-After": str(error.retry_seconds)})
    if isinstance(error, ClosedError):
        return Problem(503, message, code="unavailable", headers={"Connection": "close"})
    if isinstance(error, NumericsError):
        return numbers_failed()
    return Problem(400, message, param=_field(message, fields), code=_code(error))


def of_ending(finish_reason: str) -> Problem | None:
    """The problem that an answer with this ending is; None: it is an answer."""
    if finish_reason == "constraint":
        return Problem(500, NOT_HELD, code="constraint_error")
    return numbers_failed() if finish_reason == "error" else None


def numbers_failed() -> Problem:
    """The model's logits were not finite."""
    return Problem(500, NOT_FINITE, code="numerics_error")


def _field(message: str, fields: Collection[str]) -> str | None:
    """The field that a message begins with."""
    first = message.partition(" ")[0].rstrip(",:")
    if first == "tool":  # one of them, whose name follows
        first = "tools"
    return first if first.partition(".")[0] in fields else None


def _code(error: GptossError) -> str:
    match error:
        case FormError():
            return "invalid_form"
        case NotInstalledError():
            return "not_installed"
        case _:
            return "context_length_exceeded" if "exceed the context" in str(error) else "invalid_request"
