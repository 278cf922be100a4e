"""Requests through an engine, each read by its stream: finished answers, in order, as soon as they can be given."""

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gptoss_jax.engine.request import Event, Request
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.parsed import Delta

if TYPE_CHECKING:
    import gptoss_jax.engine.engine


AHEAD = 2  # requests that an engine knows of for each slot: those that wait take a slot as soon as one is free


class Sample(NamedTuple):
    """A finished answer, and when its tokens came."""

    answer: Answer
    deltas: list[Delta]
    first_token_seconds: float  # from the start of the run
    last_token_seconds: float


def as_they_end(
    engine: "gptoss_jax.engine.engine.Engine",
    asked: Iterable[tuple[Request, AnswerStream] | None],
    show: Callable[[list[Delta]], None] = lambda deltas: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[list[tuple[int, Sample]]]:
    """Runs requests to their ends, or until interrupted, and gives after each dispatch what has ended with it.

    An answer that meets logits which are not finite ends there ("error"); the others go on. After an interruption
    comes what had come ("cancelled") of all that were under way.

    Args:
        engine: runs them.
        asked: requests, each with the stream that its `ends_at` belongs to; taken as slots become free, so that there
            may be millions. None: there are no more as yet; the next one is asked for after a dispatch.
        show: gets what each event of any request brings.
        interrupted: asked before each dispatch.
    """
    coming, numbers, growing = iter(asked), itertools.count(), dict[int, tuple[int, _Growing]]()
    most = AHEAD * engine.engine_config.slots
    began = time.perf_counter()
    while not interrupted():
        more_may_come = False
        for pair in itertools.islice(coming, most - len(growing)):
            if more_may_come := pair is None:
                break
            request, stream = pair
            growing[engine.submit(request)] = next(numbers), _Growing(stream, show)
        if not growing:
            if more_may_come:
                continue
            return
        ended = []
        for event in engine.tick():
            number, answer = growing[event.request_id]
            answer.take(event, time.perf_counter() - began)
            if answer.ended:
                del growing[event.request_id]
                ended.append((number, answer.sample()))
        if ended:
            yield ended
    for request_id in growing:
        engine.cancel(request_id)
    yield [(number, answer.sample()) for number, answer in growing.values()]


def collect(
    engine: "gptoss_jax.engine.engine.Engine",
    requests: Sequence[Request],
    streams: Sequence[AnswerStream],
    show: Callable[[list[Delta]], None] = lambda deltas: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[Sample]:
    """The answer to each request, in their order, each as soon as it can be given; arguments as for `as_they_end`."""
    ended, following = dict[int, Sample](), 0
    for samples in as_they_end(engine, zip(requests, streams, strict=True), show, interrupted):
        ended.update(samples)
        while following in ended:
            yield ended.pop(following)
            following += 1
    for number in range(following, len(streams)):  # an interruption came first
        yield ended.pop(number) if number in ended else _Growing(streams[number], show).sample()


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
