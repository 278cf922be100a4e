"""From an exchange to HTTP: a response that is whole or a stream of events; who leaves frees what was asked for."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gptoss_jax.engine.request import Request, RequestError
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.server import events, problems
from gptoss_jax.server.answering import Answering
from gptoss_jax.server.engine_thread import EngineThread, News
from gptoss_jax.server.exchange import Exchange
from gptoss_jax.server.metrics import Metrics
from gptoss_jax.server.problems import Problem
from gptoss_jax.server.tool_turn import Send as ToolSend

PATIENCE_SECONDS = 60.0  # that the next round of an answer waits for a place among those that wait
KEEP_ALIVE_SECONDS = 10.0  # of silence, after which proxies and clients may give up

Prepare = Callable[[], Awaitable[None]]


@runtime_checkable
class Turn(Protocol):
    """An exchange of one answer that goes on with what tools give."""

    async def more(self, answer: Answer, send: ToolSend) -> tuple[Request, AnswerStream] | None:
        """What the engine is asked after an answer, once its calls are carried out; None: it was the last."""
        ...

    def does_not_fit(self) -> None:
        """The engine's memory can never hold what `more` gave: the answer was the last."""
        ...

    def close(self) -> None:
        """Ends the tools, also while one works."""
        ...


class Work(NamedTuple):
    """What an exchange asks of the engine.

    Attributes:
        requests: all answers.
        streams: one for each.
        prepare: what else is to be done before.
        turn: what follows an answer; None: nothing.
    """

    requests: Sequence[Request]
    streams: Sequence[AnswerStream]
    prepare: Prepare | None = None
    turn: Turn | None = None


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
            if self._work.turn is not None:
                await asyncio.shield(asyncio.to_thread(self._work.turn.close))
            with contextlib.suppress(asyncio.CancelledError):
                await reply  # which raises what is a bug
        with contextlib.suppress(asyncio.CancelledError):
            await watch

    async def _reply(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, code = 200, None
        try:
            if self._work.prepare:
                await self._work.prepare()
            cached_tokens = await self._answer(self._work.requests, self._work.streams, send)
            if self._exchange.stream:
                await _send(send, self._exchange.end(self._whole_answers(), cached_tokens))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                document = self._exchange.whole(self._whole_answers(), cached_tokens)
                await JSONResponse(document, 200, dict(self._exchange.headers))(scope, receive, send)
        except (Problem, GptossError) as error:
            problem = error if isinstance(error, Problem) else problems.of_error(error)
            status, code = problem.status, problem.code
            await self._fail(problem, scope, receive, send)
        self._metrics.ended(scope["path"], status, code)

    async def _answer(self, requests: Sequence[Request], streams: Sequence[AnswerStream], send: Send) -> int:
        """All answers, in rounds if tools are run here; gives how many tokens of prompts the cache held."""
        cached_tokens, is_first = 0, True
        while True:
            answering = Answering(self._thread, requests, streams)
            try:
                async with await self._begun(answering, is_patient=not is_first):
                    await (self._stream(answering, send) if self._exchange.stream else self._read(answering))
            finally:
                first, last = answering.first_token_seconds, answering.last_token_seconds
                self._metrics.answered(answering.tokens, first, last)
            cached_tokens, is_first = cached_tokens + self._cached_tokens(answering), False
            more = await self._more(send)
            if more is None:
                return cached_tokens
            requests, streams = [more[0]], [more[1]]

    def _cached_tokens(self, answering: Answering) -> int:
        """Of each prompt as its first answer found it, as usage counts prompts: once, however many answers follow."""
        cached, num_prompts = answering.cached_tokens, len(self._exchange.asked)
        return sum(cached[:: len(cached) // num_prompts]) if cached else 0

    async def _begun(self, answering: Answering, *, is_patient: bool) -> Answering:
        """Asked of the engine; who `is_patient` has waited once, and is not sent away where many wait now."""
        deadline = time.monotonic() + (PATIENCE_SECONDS if is_patient else 0.0)
        while time.monotonic() < deadline and self._thread.num_open >= self._thread.most_open:
            await asyncio.sleep(0.1)
        return answering

    async def _more(self, send: Send) -> tuple[Request, AnswerStream] | None:
        """What the engine is asked next."""
        answer = self._answers[0] if self._answers else None
        if self._work.turn is None or answer is None:
            return None

        async def send_events(parts: Sequence[bytes]) -> None:
            if self._exchange.stream:
                await _send(send, parts)

        coming = asyncio.ensure_future(self._work.turn.more(answer, send_events))
        try:
            while not (await asyncio.wait([coming], timeout=KEEP_ALIVE_SECONDS))[0]:
                await send_events([events.KEEP_ALIVE])
            more = coming.result()
        finally:
            coming.cancel()
        try:
            self._thread.check([more[0]] if more else [])
        except RequestError:
            self._work.turn.does_not_fit()
            return None
        return more

    async def _read(self, answering: Answering) -> None:
        async for number, news in answering:
            self._note(number, news)

    async def _stream(self, answering: Answering, send: Send) -> None:
        if not self._has_started:
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
