"""From an exchange to HTTP: a response that is whole or a stream of events; who leaves frees what was asked for."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gptoss_jax.engine.request import Request
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.server import events, problems
from gptoss_jax.server.answering import Answering
from gptoss_jax.server.engine_thread import EngineThread, News
from gptoss_jax.server.exchange import Exchange
from gptoss_jax.server.metrics import Metrics
from gptoss_jax.server.problems import Problem

KEEP_ALIVE_SECONDS = 10.0  # of silence, after which proxies and clients may give up

Prepare = Callable[[], Awaitable[None]]


class Work(NamedTuple):
    """What an exchange asks of the engine.

    Attributes:
        requests: all answers.
        streams: one for each.
        prepare: what else is to be done before.
    """

    requests: Sequence[Request]
    streams: Sequence[AnswerStream]
    prepare: Prepare | None = None


class Reply(Response):
    """The response of an exchange; what is under way is cancelled when the client has gone."""

    def __init__(self, exchange: Exchange, work: Work, thread: EngineThread, metrics: Metrics):
        self._exchange, self._work, self._thread, self._metrics = exchange, work, thread, metrics
        self._answers: list[Answer | None] = [None] * len(work.requests)
        self._has_started = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: replies, or ends when `receive` says that nobody listens."""
        reply = asyncio.create_task(self._reply(scope, receive, send))
        watch = asyncio.create_task(_until_left(receive))
        try:
            await asyncio.wait((reply, watch), return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                self._metrics.left(scope["path"])
        finally:
            for task in (reply, watch):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reply  # which raises what is a bug
        with contextlib.suppress(asyncio.CancelledError):
            await watch

    async def _reply(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, code = 200, None
        try:
            if self._work.prepare:
                await self._work.prepare()
            answering = Answering(self._thread, self._work.requests, self._work.streams)
            try:
                async with answering:
                    await (self._stream(answering, send) if self._exchange.stream else self._read(answering))
            finally:
                first, last = answering.first_token_seconds, answering.last_token_seconds
                self._metrics.answered(answering.tokens, first, last)
            if not self._exchange.stream:
                document = self._exchange.whole(self._whole_answers(), answering.cached_tokens)
                await JSONResponse(document, 200, dict(self._exchange.headers))(scope, receive, send)
        except (Problem, GptossError) as error:
            problem = error if isinstance(error, Problem) else problems.of_error(error)
            status, code = problem.status, problem.code
            await self._fail(problem, scope, receive, send)
        self._metrics.ended(scope["path"], status, code)

    async def _read(self, answering: Answering) -> None:
        async for number, news in answering:
            self._note(number, news)

    async def _stream(self, answering: Answering, send: Send) -> None:
        await self._start(send)
        await _send(send, self._exchange.begin())
        coming = aiter(answering)
        while (found := await self._next(coming, send)) is not None:
            number, news = found
            if _problem(news):  # what came before it is not lost
                await _send(send, self._exchange.take(number, news.deltas))
            self._note(number, news)
            if news.answer is None:
                await _send(send, self._exchange.take(number, news.deltas))
            else:
                await _send(send, self._exchange.finish(number, news.deltas, news.answer))
        await _send(send, self._exchange.end(self._whole_answers(), answering.cached_tokens))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self, coming: Answering, send: Send) -> tuple[int, News] | None:
        """The next news; while none comes, the connection is kept alive."""
        while True:
            try:
                return await asyncio.wait_for(anext(coming, None), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                await _send(send, [events.KEEP_ALIVE])

    async def _start(self, send: Send) -> None:
        given = {"content-type": events.CONTENT_TYPE, "cache-control": "no-store", "x-accel-buffering": "no"}
        headers = [
            (name.encode(), value.encode("latin-1")) for name, value in {**given, **self._exchange.headers}.items()
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._has_started = True

    async def _fail(self, problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._has_started:
            await problem.response()(scope, receive, send)
            return
        await _send(send, self._exchange.fail(problem))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _note(self, number: int, news: News) -> None:
        """Keeps an answer that has ended.

        Raises:
            Problem, ClosedError: there is none.
        """
        if news.error:
            raise news.error
        if problem := _problem(news):
            raise problem
        if news.answer is not None:
            self._answers[number] = news.answer

    def _whole_answers(self) -> list[Answer]:
        return [answer for answer in self._answers if answer is not None]


def _problem(news: News) -> Problem | None:
    """Why an answer that has ended is none."""
    return problems.of_ending(news.answer.finish_reason) if news.answer else None


async def _send(send: Send, parts: Sequence[bytes]) -> None:
    if parts:
        await send({"type": "http.response.body", "body": b"".join(parts), "more_body": True})


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
