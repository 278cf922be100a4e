"""What a server does, in numbers that Prometheus reads."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gptoss_jax.server.engine_thread import EngineThread

if TYPE_CHECKING:
    import gptoss_jax.engine.engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """Counts of one server, in a registry of their own."""

    def __init__(self, thread: EngineThread, engine: "gptoss_jax.engine.engine.Engine"):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(thread, engine))
        self._requests = Counter(
            "gptoss_requests", "Requests that have ended.", ["path", "status"], registry=self._registry
        )
        self._errors = Counter("gptoss_errors", "Errors, inside of streams too.", ["code"], registry=self._registry)
        self._tokens = Counter("gptoss_answer_tokens", "Tokens of answers.", registry=self._registry)
        self._left = Counter("gptoss_disconnects", "Clients that left before the end.", registry=self._registry)
        self._first = Histogram(
            "gptoss_time_to_first_token_seconds", "From request to token.", buckets=_SECONDS, registry=self._registry
        )
        self._seconds = Histogram(
            "gptoss_request_seconds", "From request to the last token.", buckets=_SECONDS, registry=self._registry
        )
        self._rate = Histogram(
            "gptoss_tokens_per_second", "Of a request, after its first.", buckets=_RATES, registry=self._registry
        )

    def ended(self, path: str, status: int, code: str | None = None) -> None:
        """A request has ended; `code`: of its error."""
        self._requests.labels(path, str(status)).inc()
        if code:
            self._errors.labels(code).inc()

    def left(self, path: str) -> None:
        """A client has gone before its answer's end."""
        self._requests.labels(path, "left").inc()
        self._left.inc()

    def answered(self, tokens: int, first_seconds: float | None, last_seconds: float) -> None:
        """Tokens were drawn for a request."""
        self._tokens.inc(tokens)
        if first_seconds is None:
            return
        self._first.observe(first_seconds)
        self._seconds.observe(last_seconds)
        if last_seconds > first_seconds:
            self._rate.observe((tokens - 1) / (last_seconds - first_seconds))

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """What the engine says of itself when it is asked; whole numbers, which another thread may read."""

    def __init__(self, thread: EngineThread, engine: "gptoss_jax.engine.engine.Engine"):
        self._thread, self._engine = thread, engine

    def collect(self) -> Iterator[Metric]:
        """Prometheus' interface."""
        engine, done, runner = self._engine, self._engine.statistics, self._engine.runner
        gauges = {
            "gptoss_waiting": ("Answers that wait for a slot.", self._thread.num_waiting),
            "gptoss_running": ("Answers that hold a slot.", self._thread.num_running),
            "gptoss_slots": ("Slots.", engine.engine_config.slots),
            "gptoss_most_open": ("Answers that may run or wait.", self._thread.most_open),
            "gptoss_free_pages": ("Pages of the cache that no answer holds.", engine.num_free_pages),
            "gptoss_pages": ("Pages of the cache.", runner.pages_per_shard * runner.num_shards),
            "gptoss_prefix_hit_rate": ("Share of prompt tokens that were in the prefix cache.", done.hit_rate),
            "gptoss_is_open": ("1 while requests are taken.", float(self._thread.is_open)),
        }
        counters = {
            "gptoss_prompt_tokens": ("Tokens of prompts that got a slot.", done.prompt_tokens),
            "gptoss_cached_prompt_tokens": ("Those in the prefix cache.", done.cached_prompt_tokens),
            "gptoss_decode_steps": ("Decoding steps, of all slots at once.", done.decode_steps),
            "gptoss_preemptions": ("Answers that gave their pages back, to be drawn again.", done.preemptions),
            "gptoss_evictions": ("Blocks of the prefix cache that gave way.", done.evictions),
        }
        for name, (help_text, value) in gauges.items():
            yield GaugeMetricFamily(name, help_text, value=value)
        for name, (help_text, value) in counters.items():
            yield CounterMetricFamily(name, help_text, value=value)
