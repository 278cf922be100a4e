"""Answers for a coroutine: asked of the engine's thread, awaited on a loop, cancelled when their reader leaves."""

import asyncio
import time
from collections.abc import Callable, Sequence

from gptoss_jax.engine.request import Request
from gptoss_jax.harmony.answer import AnswerStream
from gptoss_jax.server.engine_thread import EngineThread, News, Sends, Ticket, put_now


def deliver_to(loop: asyncio.AbstractEventLoop) -> Callable[[Sends], None]:
    """For `EngineThread.start`: hands news over on an event loop, with one wake-up a dispatch."""

    def deliver(sends: Sends) -> None:
        try:
            loop.call_soon_threadsafe(put_now, sends)
        except RuntimeError:  # the loop is closed: nobody reads any more
            pass

    return deliver


class Answering:
    """Some answers under way, for one reader: `async with` asks for them, and cancels what is left at its end.

    Iterating gives the number of an answer and its news, until the last of all answers.

    Attributes:
        first_token_seconds: from asking to the first token of any answer; None: none has come.
        last_token_seconds: the same of the last.
        tokens: drawn so far.
        cached_tokens: of each answer's prompt, which the prefix cache held.
    """

    def __init__(self, thread: EngineThread, requests: Sequence[Request], streams: Sequence[AnswerStream]):
        self._thread, self._requests, self._streams = thread, requests, streams
        self._news: asyncio.Queue[tuple[int, News]] = asyncio.Queue()
        self._ticket: Ticket | None = None
        self._num_open = len(requests)
        self._began = 0.0
        self.first_token_seconds: float | None = None
        self.last_token_seconds = 0.0
        self.tokens, self.cached_tokens = 0, [0] * len(requests)

    async def __aenter__(self) -> "Answering":
        """Raises QueueFullError or ClosedError as `EngineThread.ask`."""
        self._began = time.monotonic()
        self._ticket = self._thread.ask(self._requests, self._streams, self._put)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._ticket is not None and self._num_open:
            self._thread.cancel(self._ticket)

    def _put(self, number: int, news: News) -> None:
        self._news.put_nowait((number, news))

    def __aiter__(self) -> "Answering":
        return self

    async def __anext__(self) -> tuple[int, News]:
        if not self._num_open:
            raise StopAsyncIteration
        number, news = await self._news.get()
        if news.tokens:
            self.last_token_seconds = time.monotonic() - self._began
            self.first_token_seconds = self.first_token_seconds or self.last_token_seconds
            self.tokens += news.tokens
        self.cached_tokens[number] = news.cached_tokens or self.cached_tokens[number]
        self._num_open -= news.is_last
        return number, news
