"""Requests through an engine, each read by its stream: finished answers, in order, as soon as they can be given."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gptoss_jax.engine.request import Event, NumericsError, Request
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.parsed import Delta

if TYPE_CHECKING:
    import gptoss_jax.engine.engine


class Sample(NamedTuple):
    """A finished answer, and when its tokens came."""

    answer: Answer
    deltas: list[Delta]
    first_token_seconds: float  # from the start of the run
    last_token_seconds: float


def collect(
    engine: "gptoss_jax.engine.engine.Engine",
    requests: Sequence[Request],
    streams: Sequence[AnswerStream],
    show: Callable[[list[Delta]], None] = lambda deltas: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[Sample]:
    """Runs the requests to their ends, or until interrupted, and gives their answers in order, each as soon as it can.

    An answer that meets logits which are not finite ends there ("error"); the others go on.

    Args:
        engine: runs them.
        requests: each `ends_at` its stream.
        streams: a reader for each request.
        show: gets what each event of any request brings.
        interrupted: asked before each dispatch.
    """
    streams_by_id = {engine.submit(request): stream for request, stream in zip(requests, streams, strict=True)}
    growing = {request_id: _Growing(stream, show) for request_id, stream in streams_by_id.items()}
    began = time.perf_counter()
    while not engine.is_idle and not interrupted():
        with contextlib.suppress(NumericsError):  # the event has said so
            for event in engine.run(until=interrupted):
                growing[event.request_id].take(event, time.perf_counter() - began)
                while growing and growing[first := next(iter(growing))].ended:
                    yield growing.pop(first).sample()
    for request_id, answer in growing.items():
        engine.cancel(request_id)
        yield answer.sample()


def run_one(engine: "gptoss_jax.engine.engine.Engine", request: Request) -> Iterator[Event]:
    """The events of a request; if the caller loses interest, the engine is free again."""
    request_id = engine.submit(request)
    at_exit = sys.is_finalizing  # kept here: modules may be gone when Python ends with an iterator half read

    def events() -> Iterator[Event]:
        try:
            yield from engine.run()
        finally:
            if not at_exit():
                engine.cancel(request_id)

    return events()


class _Growing:
    """An answer on its way to a `Sample`."""

    def __init__(self, stream: AnswerStream, show: Callable[[list[Delta]], None]):
        self._stream, self._show = stream, show
        self._deltas: list[Delta] = []
        self._times: list[float] = []
        self.ended = False

    def take(self, event: Event, seconds: float) -> None:
        self._times.append(seconds)
        self.ended = event.finish_reason is not None
        self._show_deltas(self._stream.take(event))

    def sample(self) -> Sample:
        answer, rest = self._stream.finish()
        self._show_deltas(rest)
        times = self._times or [0.0]
        return Sample(answer, self._deltas, times[0], times[-1])

    def _show_deltas(self, deltas: list[Delta]) -> None:
        self._deltas += deltas
        self._show(deltas)
