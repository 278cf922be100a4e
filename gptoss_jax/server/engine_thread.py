"""The engine in a thread of its own: answers asked for from any thread, bounded in number, cancelled, ended in order.

Knows neither HTTP nor asyncio. All of an engine, and each answer's stream, belongs to the thread. What is new goes to
whoever asked, once after each dispatch, through one function that says how: an event loop has one for other threads.
"""

import collections
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from gptoss_jax.engine.request import Event, Request
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.parsed import Delta

if TYPE_CHECKING:
    import gptoss_jax.engine.engine

T = TypeVar("T")

_CLOSED, _FAILED = "the server is shutting down", "the engine has failed"


class QueueFullError(GptossError):
    """As many requests wait as may; `retry_seconds` says when to ask again."""

    def __init__(self, message: str, retry_seconds: int):
        super().__init__(message)
        self.retry_seconds = retry_seconds


class ClosedError(GptossError):
    """No answer comes: the server ends, or its engine has failed."""


class News(NamedTuple):
    """What is new of one answer; the last news has the answer, or why there is none.

    Attributes:
        deltas: what is to be shown.
        tokens: drawn since the last news.
        answer: the whole of it, with the last news; its finish_reason is "error" where numbers were not finite.
        error: in place of an answer.
        cached_tokens: of the prompt, which the prefix cache held.
    """

    deltas: Sequence[Delta]
    tokens: int = 0
    answer: Answer | None = None
    error: ClosedError | None = None
    cached_tokens: int = 0

    @property
    def is_last(self) -> bool:
        """Whether nothing more comes of this answer."""
        return self.answer is not None or self.error is not None


Put = Callable[[int, News], None]
"""Takes news of the answer with this number among those that were asked for together."""
Sends = list[tuple[Put, int, News]]


class Ticket:
    """Stands for answers that were asked for together; `EngineThread.cancel` takes it."""


class _Asked(NamedTuple):
    ticket: Ticket
    requests: Sequence[Request]
    streams: Sequence[AnswerStream]
    put: Put


class _Open:
    """An answer under way."""

    def __init__(self, asked: _Asked, number: int):
        self.ticket, self.put, self.number = asked.ticket, asked.put, number
        self.stream, self.began, self.has_tokens = asked.streams[number], time.monotonic(), False


def put_now(sends: Sends) -> None:
    """Hands news over in the engine's thread."""
    for put, number, news in sends:
        put(number, news)


class EngineThread:
    """Runs one engine. `start` it, `ask` from any thread, and in the end `close` and `join`.

    Attributes:
        most_open: answers that may be under way at once, those that wait among them.
        failure: what ended the thread before its time: a bug, or a device that is gone.
    """

    def __init__(self, engine: "gptoss_jax.engine.engine.Engine", *, most_waiting: int):
        """`most_waiting`: answers that may wait for a slot; to ask for more raises QueueFullError."""
        self._engine = engine
        self.most_open = engine.engine_config.slots + most_waiting
        self.failure: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._deliver: Callable[[Sends], None] = put_now
        self._on_end: Callable[[], None] = lambda: None
        # Shared between threads, under `_changed`:
        self._inbox: list[_Asked] = []
        self._calls: collections.deque[tuple[Future[Any], Callable[[], Any]]] = collections.deque()
        self._left: list[Ticket] = []
        self._num_open = 0
        self._deadline: float | None = None
        # The thread's own:
        self._open: dict[int, _Open] = {}
        self._sends: Sends = []
        self._mean_seconds = 1.0  # of an answer, the latest counting most

    # ---- for any thread ----

    def start(
        self, deliver: Callable[[Sends], None] = put_now, on_end: Callable[[], None] = lambda: None
    ) -> "EngineThread":
        """Begins to run.

        Args:
            deliver: gets what is new after each dispatch, in the engine's thread; it must not raise.
            on_end: called in the engine's thread when it ends.
        """
        self._deliver, self._on_end = deliver, on_end
        self._thread.start()
        return self

    def check(self, requests: Sequence[Request]) -> None:
        """Raises GptossError where the engine can never serve one of these, or the queue not all together."""
        for request in requests:
            self._engine.check(request)
        if len(requests) > self.most_open:
            raise GptossError(f"{len(requests)} answers at once, expected at most {self.most_open}")

    def ask(self, requests: Sequence[Request], streams: Sequence[AnswerStream], put: Put) -> Ticket:
        """Asks for an answer to each request, with the stream that its `ends_at` belongs to; `put` gets what comes.

        Raises:
            QueueFullError: not all of them have room now.
            ClosedError: nothing is taken any more.
        """
        asked = _Asked(Ticket(), requests, streams, put)
        with self._changed:
            self._take_room(len(requests))
            self._inbox.append(asked)
            self._changed.notify()
        return asked.ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends answers that nobody waits for any more, before the next dispatch; no news comes of them then."""
        with self._changed:
            self._left.append(ticket)
            self._changed.notify()

    def call(self, job: Callable[[], T]) -> "Future[T]":
        """Has the engine's thread do something else on its devices, between two dispatches; it counts as one answer.

        Raises:
            QueueFullError, ClosedError: as `ask`.
        """
        future: Future[T] = Future()
        with self._changed:
            self._take_room(1)
            self._calls.append((future, job))
            self._changed.notify()
        return future

    def close(self, finish_seconds: float) -> None:
        """From now on nothing is taken; what waits is refused, and what runs has so long to end. Waits for nothing.

        A second call may shorten the time. It may be called in a handler of a signal.
        """
        self._deadline = min(self._deadline or float("inf"), time.monotonic() + finish_seconds)
        threading.Thread(target=self._wake, daemon=True).start()  # who was interrupted may hold the lock

    def join(self, timeout_seconds: float | None = None) -> bool:
        """Waits for the thread's end after `close`; whether it has come."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    @property
    def num_open(self) -> int:
        """Answers under way, those that wait among them."""
        return self._num_open

    @property
    def num_running(self) -> int:
        """Answers that hold a slot."""
        return self._engine.num_running

    @property
    def num_waiting(self) -> int:
        """Answers that wait for a slot."""
        return max(0, self._num_open - self._engine.num_running)

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return self._deadline is None and self.failure is None

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _take_room(self, count: int) -> None:
        self.check_room(count)
        self._num_open += count

    def check_room(self, count: int) -> None:
        """Raises as `ask` where it would not take so many answers now."""
        if not self.is_open:
            raise ClosedError(_CLOSED if self.failure is None else _FAILED)
        if self._num_open + count > self.most_open:
            waiting = self.most_open - self._engine.engine_config.slots
            rounds = 1 + waiting / self._engine.engine_config.slots
            raise QueueFullError(
                f"{self._num_open} answers are under way or wait, at most {self.most_open} may: ask again later",
                max(1, min(60, round(self._mean_seconds * rounds / 2))),
            )

    # ---- the thread ----

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self.failure = error
        finally:
            self._refuse_all()
            self._on_end()

    def _turn(self) -> bool:
        """Waits until there is something to do, and does it up to one dispatch; false if nothing is left to do."""
        with self._changed:
            while not (self._inbox or self._left or self._calls or self._open or self._deadline is not None):
                self._changed.wait()
            left, self._left = self._left, []
            asked, self._inbox = self._inbox, []
            call = self._calls.popleft() if self._calls and self._deadline is None else None
        for each in asked:
            self._submit(each)
        for ticket in left:
            self._cancel(ticket)
        if call:
            self._do(*call)
        if self._deadline is not None:
            self._end_what_has_no_time(self._deadline)
        if not self._engine.is_idle:
            for event in self._engine.tick():
                self._take(event)
        self._send()
        return self._deadline is None or bool(self._open)

    def _submit(self, asked: _Asked) -> None:
        for number, request in enumerate(asked.requests):
            self._open[self._engine.submit(request)] = _Open(asked, number)

    def _cancel(self, ticket: Ticket) -> None:
        for request_id in [request_id for request_id, found in self._open.items() if found.ticket is ticket]:
            self._engine.cancel(request_id)
            self._close(request_id)

    def _do(self, future: "Future[Any]", job: Callable[[], Any]) -> None:
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(job())
        except GptossError as error:
            future.set_exception(error)
        except BaseException as error:  # a bug, which the thread does not survive either
            future.set_exception(error)
            raise
        finally:
            with self._changed:
                self._num_open -= 1

    def _take(self, event: Event) -> None:
        found = self._open[event.request_id]
        found.has_tokens = True
        deltas, answer = found.stream.take(event), None
        if event.finish_reason:
            answer, rest = found.stream.finish()
            deltas += rest
            self._close(event.request_id)
            self._mean_seconds += 0.2 * (time.monotonic() - found.began - self._mean_seconds)
        news = News(deltas, len(event.token_ids), answer, cached_tokens=event.cached_tokens)
        self._sends.append((found.put, found.number, news))

    def _close(self, request_id: int) -> None:
        del self._open[request_id]
        with self._changed:
            self._num_open -= 1

    # ---- its end ----

    def _end_what_has_no_time(self, deadline: float) -> None:
        """Ends what waits, and after the deadline all; a sequence that was preempted has begun, and goes on."""
        late = time.monotonic() >= deadline
        waiting = set(self._engine.waiting_ids)
        for request_id, found in list(self._open.items()):
            if late or (request_id in waiting and not found.has_tokens):
                self._engine.cancel(request_id)
                self._close(request_id)
                self._sends.append((found.put, found.number, News((), error=ClosedError(_CLOSED))))

    def _refuse_all(self) -> None:
        """Nobody waits for an answer that does not come."""
        why = _CLOSED if self.failure is None else _FAILED
        with self._changed:
            self._deadline = self._deadline or 0.0
            asked, self._inbox, calls = self._inbox, [], list(self._calls)
            self._calls.clear()
            self._num_open = 0
        error = News((), error=ClosedError(why))
        self._sends += [(found.put, found.number, error) for found in self._open.values()]
        self._sends += [(each.put, number, error) for each in asked for number in range(len(each.requests))]
        self._open.clear()
        for future, _ in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(ClosedError(why))
        self._send()

    def _send(self) -> None:
        sends, self._sends = self._sends, []
        if sends:
            self._deliver(sends)
