"""The engine's thread, without a model and without HTTP: what is asked is answered, bounded, cancelled, and ended."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import pytest

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.request import EngineConfig, Request, RequestError
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.answer import AnswerStream
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.model.config import read_config
from gptoss_jax.server.answering import Answering, deliver_to
from gptoss_jax.server.engine_thread import ClosedError, EngineThread, News, QueueFullError
from tests.fake_runner import VOCAB, FakeRunner, answer
from tests.goldens.make import ROOT

CONFIG = dataclasses.replace(
    read_config(ROOT / "configs" / "tiny.json"), vocab_size=VOCAB, stop_ids=(VOCAB - 2,), pad_id=VOCAB - 1
)
SIZES = EngineConfig(slots=2, max_context_tokens=256, prefill_widths=(16,), prefix_snapshots=0)


@pytest.fixture(scope="module", autouse=True)
def _vocabulary() -> None:
    load_tokenizer()  # which takes seconds, once


class SlowRunner(FakeRunner):
    """One that waits in each dispatch until `gate` is open, and can be made to fail."""

    def __init__(self, sizes: EngineConfig):
        super().__init__(sizes)
        self.gate, self.fails = threading.Event(), False
        self.gate.set()

    def prefill(self, width: int, chunks: Any) -> Any:
        self._wait()
        return super().prefill(width, chunks)

    def decode(self, steps: int) -> Any:
        self._wait()
        return super().decode(min(steps, 1))

    def _wait(self) -> None:
        self.gate.wait(20)
        if self.fails:
            raise MemoryError("the device is gone")


class Running:
    """An engine's thread with a slow runner, and what it put."""

    def __init__(self, most_waiting: int = 4, sizes: EngineConfig = SIZES):
        self.runner = SlowRunner(sizes)
        self.engine = Engine(self.runner, CONFIG, sizes)
        self.thread = EngineThread(self.engine, most_waiting=most_waiting)
        self.news: list[tuple[str, int, News]] = []
        self.ended = threading.Event()

    def __enter__(self) -> "Running":
        self.thread.start(on_end=self.ended.set)
        return self

    def __exit__(self, *error: object) -> None:
        self.runner.gate.set()
        self.thread.close(0.0)
        assert self.thread.join(60.0)

    def ask(self, name: str, *prompts: tuple[int, ...], count: int = 8) -> Any:
        streams = [AnswerStream(load_tokenizer()) for _ in prompts]
        asked = [Request(prompt, (), count, ends_at=s.ends_at) for prompt, s in zip(prompts, streams, strict=True)]
        return self.thread.ask(asked, streams, lambda number, news: self.news.append((name, number, news)))

    def last(self, name: str, number: int = 0) -> News | None:
        return next((n for who, which, n in self.news if (who, which) == (name, number) and n.is_last), None)

    def tokens(self, name: str, number: int = 0) -> list[int]:
        news = self.last(name, number)
        assert news is not None and news.answer is not None
        return list(news.answer.parsed.token_ids)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Waits for something that comes soon."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


def test_answers_are_those_of_the_requests_alone():
    """Guards against news of one answer that goes to another: many askers from many threads at once."""
    prompts = [(i, i + 1, 7 * i % 500) for i in range(30)]
    with Running(most_waiting=30) as running:
        askers = [threading.Thread(target=running.ask, args=(str(p[0]), p, p[::-1])) for p in prompts[:15]]
        for asker in askers:
            asker.start()
        until(lambda: all(running.last(str(p[0]), 1) and running.last(str(p[0]), 0) for p in prompts[:15]))
        for prompt in prompts[:15]:
            assert running.tokens(str(prompt[0]), 0) == answer(prompt, 8)
            assert running.tokens(str(prompt[0]), 1) == answer(prompt[::-1], 8)
        until(lambda: running.thread.num_open == 0)
        counted = sum(news.tokens for _, _, news in running.news)
        assert counted == 8 * 30


def test_a_full_queue_refuses_and_says_when_to_ask_again():
    """Guards memory against more requests than can be answered; room that is given back can be taken."""
    with Running(most_waiting=2) as running:
        running.runner.gate.clear()
        for i in range(4):
            running.ask(str(i), (i,))
        with pytest.raises(QueueFullError, match="4 answers are under way or wait, at most 4 may") as caught:
            running.ask("more", (9,))
        assert 1 <= caught.value.retry_seconds <= 60
        with pytest.raises(QueueFullError):
            running.thread.call(lambda: None)
        with pytest.raises(GptossError, match="5 answers at once, expected at most 4"):
            running.thread.check([Request((1,), (), 2)] * 5)
        with pytest.raises(RequestError, match="exceed the context"):
            running.thread.check([Request((1,) * 300, ())])
        running.runner.gate.set()
        until(lambda: running.thread.num_open == 0)
        running.ask("more", (9,))
        until(lambda: running.last("more"))


def test_who_leaves_frees_slot_and_pages():
    """Guards against leaks: running, waiting and not yet submitted answers are cancelled, others go on."""
    with Running() as running:
        free = running.engine.num_free_pages
        tickets = [running.ask(str(i), (i, 5), (i, 6), count=200) for i in range(3)]
        until(lambda: running.thread.num_running == 2)
        for ticket in tickets[:2]:
            running.thread.cancel(ticket)
        until(lambda: running.last("2", 0) and running.last("2", 1))
        until(lambda: running.engine.num_free_pages == free and running.thread.num_open == 0)
        assert running.tokens("2", 1) == answer((2, 6), 200)
        assert running.last("0") is None and running.last("1") is None
        running.runner.gate.clear()
        running.thread.cancel(running.ask("both", (1,)))  # in one turn
        running.runner.gate.set()
        until(lambda: running.thread.num_open == 0)
        assert running.engine.is_idle
        running.thread.cancel(tickets[2])  # it has ended already


def test_other_work_is_done_between_dispatches():
    """Guards scoring beside answers: it runs in the engine's thread, and its errors are its caller's."""
    with Running() as running:
        running.ask("a", (1, 2), count=50)
        assert running.thread.call(lambda: threading.current_thread().name).result(10) == "engine"
        refused = running.thread.call(lambda: running.engine.check(Request((), ())))
        with pytest.raises(RequestError, match="no tokens"):
            refused.result(10)
        running.runner.gate.clear()
        dropped = running.thread.call(lambda: 1)
        assert dropped.cancel()
        running.runner.gate.set()
        with pytest.raises(CancelledError):
            dropped.result(10)
        until(lambda: running.last("a"))
        until(lambda: running.thread.num_open == 0)
        assert running.tokens("a") == answer((1, 2), 50)


def test_closing_lets_end_what_runs_and_refuses_what_waits():
    """Guards SIGTERM: no answer under way is lost within the limit, and nobody waits for one that does not come."""
    with Running() as running:
        running.ask("runs", (1,), (2,), count=60)
        until(lambda: running.thread.num_running == 2)
        running.runner.gate.clear()
        running.ask("waits", (3,))
        future = running.thread.call(lambda: 1)
        running.thread.close(30.0)
        with pytest.raises(ClosedError, match="shutting down"):
            running.ask("late", (4,))
        assert not running.thread.is_open
        running.runner.gate.set()
        assert running.ended.wait(60)
        assert (running.tokens("runs", 0), running.tokens("runs", 1)) == (answer((1,), 60), answer((2,), 60))
        waits = running.last("waits")
        assert waits is not None and isinstance(waits.error, ClosedError)
        with pytest.raises(ClosedError):
            future.result(1)
        assert running.engine.is_idle and running.thread.failure is None


def test_closing_ends_at_its_limit():
    """Guards a stop that has a limit: what has not ended by then is ended, and says so."""
    with Running() as running:
        running.ask("runs", (1,), count=240)
        until(lambda: running.thread.num_running == 1)
        running.runner.gate.clear()
        running.thread.close(30.0)
        running.thread.close(0.0)
        running.runner.gate.set()
        assert running.ended.wait(60)
        last = running.last("runs")
        assert last is not None and last.answer is None and "shutting down" in str(last.error)
        assert running.engine.num_running == 0


def test_an_engine_that_fails_leaves_nobody_waiting():
    """Guards against a dead engine whose clients hang: all hear of it, and the traceback is kept."""
    with Running() as running:
        running.runner.gate.clear()
        running.ask("runs", (1,))
        running.ask("waits", (2,), (3,), (4,))
        futures = [running.thread.call(lambda: 1) for _ in range(2)]  # the first may be done before the dispatch
        running.runner.fails = True
        running.runner.gate.set()
        assert running.ended.wait(60)
        for name, number in (("runs", 0), ("waits", 0), ("waits", 1), ("waits", 2)):
            last = running.last(name, number)
            assert last is not None and "the engine has failed" in str(last.error)
        with pytest.raises(ClosedError):
            futures[1].result(10)
        with pytest.raises(ClosedError, match="the engine has failed"):
            running.ask("late", (5,))
        assert isinstance(running.thread.failure, MemoryError) and running.thread.num_open == 0


def test_a_coroutine_that_is_cancelled_frees_its_slot():
    """Guards connections that break: leaving the block, by an exception too, cancels; a loop gets its news."""

    async def read(running: Running, leaves_after: int | None) -> list[int]:
        streams = [AnswerStream(load_tokenizer())]
        asked = [Request((1, 2), (), 100, ends_at=streams[0].ends_at)]
        seen = 0
        async with Answering(running.thread, asked, streams) as answering:
            async for _, news in answering:
                seen += 1
                if seen == leaves_after:
                    raise ConnectionError
                if news.answer:
                    assert answering.tokens == 100 and answering.first_token_seconds is not None
                    return list(news.answer.parsed.token_ids)
        raise AssertionError("no last news")

    async def main(running: Running) -> None:
        running.thread.start(deliver_to(asyncio.get_running_loop()), running.ended.set)
        assert await read(running, None) == answer((1, 2), 100)
        with pytest.raises(ConnectionError):
            await read(running, 2)
        task = asyncio.create_task(read(running, None))
        while not running.engine.num_running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while running.thread.num_open:
            await asyncio.sleep(0.001)
        assert running.engine.is_idle

    running = Running()
    asyncio.run(asyncio.wait_for(main(running), 20))
    running.thread.close(0.0)
    assert running.thread.join(60.0)  # though the loop is closed
