"""Requests of token ids in, token events out: admission, chunked prefill, many decoding steps per dispatch.

Knows no text. Rows are slots of a batch of fixed size; a request takes a free row and the pages that its prompt and
answer can need, and gives both back when it ends, while other rows go on (continuous batching). All programs are
compiled before the first token, so nothing compiles while requests of mixed lengths come and go.

Deterministic engines run one row (of each data shard) at a time, so that a row's arithmetic has the same shapes
whatever runs beside it; the others run all rows in one batch, where sums of other shapes round differently. Where
kernels keep rows apart, as those for CPUs do, decoding is deterministic in one batch too.
"""

import collections
import dataclasses
import itertools
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.engine import programs, sampling
from gptoss_jax.engine.programs import MAX_STEPS_PER_DISPATCH, NO_TOKEN, RowState
from gptoss_jax.engine.request import (
    MAX_STOP_IDS,
    NOT_FINITE,
    EngineConfig,
    Event,
    FinishReason,
    NumericsError,
    Request,
    RequestError,
)
from gptoss_jax.engine.sampling import Draw
from gptoss_jax.model import kv_cache
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.kv_cache import KVCache
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.transformer import Model, Params

SECONDS_PER_DISPATCH = 0.1  # decoding steps are grouped up to about this long, so that text still flows


class Compiled(NamedTuple):
    """The programs of an engine, compiled for its shapes."""

    admit: Any
    prefill: dict[int, Any]  # by width
    decode: Any


@dataclasses.dataclass
class _Row:
    """The host's view of one admitted request."""

    request_id: int
    request: Request
    limit: int  # tokens of the answer at most
    pages: list[int]
    prefilled: int = 0
    generated: int = 0

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are not yet in the cache."""
        return len(self.request.token_ids) - self.prefilled


class Engine:
    """Runs requests. `submit` them, then `run` until all have ended, or call `tick` yourself."""

    def __init__(
        self,
        model: Model,
        params: Params,
        config: ModelConfig,
        sharding: Sharding,
        cache_dtype: jnp.dtype,
        engine_config: EngineConfig,
        compiled: Compiled | None = None,
        report: Callable[[int, int], object] = lambda done, total: None,
    ):
        """`compiled` are the programs of an engine just like this one; `report` hears how many of all are compiled."""
        sharding.check(config, engine_config.slots)
        self.config, self.engine_config, self.sharding, self.params = config, engine_config, sharding, params
        rows, context = engine_config.slots, engine_config.max_context_tokens
        self._pages_per_row = kv_cache.num_pages(context)
        self._shards = sharding.size("batch")
        pool_pages = rows * self._pages_per_row
        if engine_config.pool_tokens is not None:
            pool_pages = kv_cache.num_pages(engine_config.pool_tokens)
        self._pages_per_shard = -(-pool_pages // self._shards)
        self._free_pages = [list(range(self._pages_per_shard)) for _ in range(self._shards)]
        self._rows: list[_Row | None] = [None] * rows
        self._waiting: collections.deque[tuple[int, Request, int]] = collections.deque()
        self._ids = itertools.count()
        self._seconds_per_turn = SECONDS_PER_DISPATCH
        on_cpu = sharding.mesh.devices.flat[0].platform == "cpu"
        self.deterministic = on_cpu if engine_config.deterministic is None else engine_config.deterministic
        apart = model.batch_invariant and sharding.mesh.size == 1  # sums over devices are XLA's
        self.decodes_alone = self.deterministic and not apart
        self._cache, self._state = self._allocate(cache_dtype)
        began = time.perf_counter()
        self.programs = compiled or self._compile(model, report)
        self.compile_seconds = time.perf_counter() - began

    # ---- set-up ----

    def _allocate(self, cache_dtype: jnp.dtype) -> tuple[KVCache, RowState]:
        rows = self.engine_config.slots
        cache = kv_cache.allocator(
            self.config,
            self.sharding,
            rows=rows,
            pages=self._pages_per_shard * self._shards,
            max_context_tokens=self.engine_config.max_context_tokens,
            dtype=cache_dtype,
        )()
        one = self._row_state(Request((), ()))
        state = jax.tree.map(lambda x: np.broadcast_to(x, (rows, *np.shape(x))), one)
        return cache, jax.device_put(state, self.sharding.named_tree(programs.STATE_AXES))

    def _row_state(self, request: Request) -> RowState:
        """A row that has drawn nothing and is not active, on the host, without the leading axis."""
        stop_ids = [*request.stop_ids, *[NO_TOKEN] * (MAX_STOP_IDS - len(request.stop_ids))]
        config = self.config
        drawn = sampling.row(request.sampling, request.token_ids, config.vocab_size, config.num_token_ids)
        return RowState._make([np.int32(0), np.int32(0), np.array(stop_ids, np.int32), drawn])

    def _to_rows(self, *arrays: np.ndarray) -> list[jax.Array]:
        """Host arrays with a leading row axis -> device arrays, each row on its data shard."""
        return [jax.device_put(x, self.sharding.named(("batch", *(None,) * (x.ndim - 1)))) for x in arrays]

    def _compile(self, model: Model, report: Callable[[int, int], object]) -> Compiled:
        """The programs that admit, prefill (for each width) and decode."""
        layouts = jax.tree.map(lambda x: x.sharding, (self._cache, self._state))
        draws = self.sharding.named_tree(programs.DRAWS_AXES)
        run = programs.Programs(model, self.config, self.sharding, self.deterministic, self.decodes_alone)
        admit = jax.jit(programs.admit, donate_argnums=(0, 1), out_shardings=layouts)
        prefill = jax.jit(run.prefill, donate_argnums=(1, 2), out_shardings=(None, *layouts))
        decode = jax.jit(run.decode, donate_argnums=(1, 2), out_shardings=(draws, *layouts))
        widths = sorted(set(self.engine_config.prefill_widths))
        done = itertools.count(1)

        def build(program: Any, *arguments: Any) -> Any:
            compiled = program.lower(*arguments).compile()
            report(next(done), len(widths) + 2)
            return compiled

        carried = (self.params, self._cache, self._state)
        pages = np.zeros(self._pages_per_row, np.int32)
        return Compiled(
            admit=build(admit, *carried[1:], np.int32(0), pages, self._row_state(Request((), ()))),
            prefill={width: build(prefill, *carried, *self._prefill_arguments(width, {})) for width in widths},
            decode=build(decode, *carried, np.int32(1)),
        )

    # ---- requests ----

    def submit(self, request: Request) -> int:
        """Queues a request and gives its id.

        Raises:
            RequestError: it has no tokens, ids outside the vocabulary, or does not fit the context.
        """
        limit = request.check(self.config, self.engine_config)
        tokens = len(request.token_ids) + limit
        if kv_cache.num_pages(tokens) > self._pages_per_shard:
            raise RequestError(
                f"{tokens} tokens exceed a page pool of {self._pages_per_shard * kv_cache.PAGE_TOKENS}: "
                "shorten the request, or raise pool_tokens"
            )
        request_id = next(self._ids)
        self._waiting.append((request_id, request, limit))
        return request_id

    @property
    def is_idle(self) -> bool:
        """Whether every submitted request has ended."""
        return not self._waiting and not any(self._rows)

    def run(self, until: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Events until every submitted request has ended, or `until`, asked before each dispatch, says so.

        Raises:
            NumericsError: behind the events of the dispatch in which a request met logits that are not finite.
        """
        while not self.is_idle and not until():
            events = self.tick()
            yield from events
            for event in events:
                if event.finish_reason == "error":
                    raise NumericsError(
                        f"request {event.request_id}, step {event.step + len(event.token_ids)}: {NOT_FINITE}"
                    )

    def cancel(self, request_id: int) -> None:
        """Ends a request that nobody waits for any more; one that has ended already is left alone."""
        self._waiting = collections.deque(entry for entry in self._waiting if entry[0] != request_id)
        for i, row in enumerate(self._rows):
            if row is not None and row.request_id == request_id:
                self._release(i)
                self._halt([i])

    def tick(self) -> list[Event]:
        """Admits what fits, then does one dispatch: a prefill chunk where prompts wait, else decoding steps."""
        self._admit_waiting()
        if any(row and row.unread for row in self._rows):
            return self._prefill_chunk()
        return self._decode_steps() if any(self._rows) else []

    def _admit_waiting(self) -> None:
        """Gives waiting requests, oldest first, a free row each, and its pages."""
        for i, row in enumerate(self._rows):
            if row is None and self._waiting:
                request_id, request, limit = self._waiting[0]
                free = self._free_pages[self._shard(i)]
                needed = kv_cache.num_pages(len(request.token_ids) + limit)
                if needed > len(free):
                    continue  # another shard may have them; else until a row ends
                self._waiting.popleft()
                self._rows[i] = _Row(request_id, request, limit, [free.pop() for _ in range(needed)])
                pages = np.zeros(self._pages_per_row, np.int32)
                pages[:needed] = self._row(i).pages
                self._cache, self._state = self.programs.admit(
                    self._cache, self._state, np.int32(i), pages, self._row_state(request)
                )

    def _halt(self, rows: Sequence[int]) -> None:
        """Tells the device that these rows draw no more."""
        if not rows:
            return
        remaining = np.array(self._state.remaining)
        remaining[rows] = 0
        self._state = self._state._replace(remaining=self._to_rows(remaining)[0])

    def _row(self, i: int) -> _Row:
        row = self._rows[i]
        assert row is not None, i
        return row

    def _shard(self, row: int) -> int:
        return row * self._shards // self.engine_config.slots

    def _slot(self, row: int) -> int:
        """The row's place in what a prefill program takes and gives."""
        return self._shard(row) if self.deterministic else row

    def _release(self, i: int) -> None:
        self._free_pages[self._shard(i)].extend(self._row(i).pages)
        self._rows[i] = None

    # ---- dispatches ----

    def _prefill_chunk(self) -> list[Event]:
        """One chunk of prompts that wait; a prompt's last chunk draws its first token."""
        unread = {i: row.unread for i, row in enumerate(self._rows) if row and row.unread}
        width, chosen = self._choose_chunk(unread)
        chunks = {i: self._row(i).request.token_ids[-unread[i] :][:width] for i in chosen}
        draw, self._cache, self._state = self.programs.prefill[width](
            self.params, self._cache, self._state, *self._prefill_arguments(width, chunks)
        )
        for i, chunk in chunks.items():
            self._row(i).prefilled += len(chunk)
        done = [i for i in chosen if not self._row(i).unread]
        return self._events(draw, {i: np.s_[self._slot(i) : self._slot(i) + 1] for i in done})

    def _choose_chunk(self, unread: dict[int, int]) -> tuple[int, list[int]]:
        """The width of the next chunk, and the rows that take part in it.

        A deterministic engine takes one row of each data shard, and a width that follows from that row alone.
        """
        widths = sorted(self.programs.prefill)
        fitting = {i: next((w for w in widths if w >= left), widths[-1]) for i, left in unread.items()}
        if not self.deterministic:
            return max(fitting.values()), list(unread)
        width = next(iter(fitting.values()))
        first = {self._shard(i): i for i in reversed(unread) if fitting[i] == width}
        return width, list(first.values())

    def _prefill_arguments(self, width: int, chunks: dict[int, tuple[int, ...]]) -> list[jax.Array]:
        """Tokens, how many, how many may be drawn behind them, and in which row of the shard: of `Programs.prefill`."""
        slots = self._shards if self.deterministic else self.engine_config.slots
        tokens, counts = np.zeros((slots, width), np.int32), np.zeros(slots, np.int32)
        budget, at = np.zeros(slots, np.int32), np.zeros(self._shards, np.int32)
        for i, chunk in chunks.items():
            slot = self._slot(i)
            tokens[slot, : len(chunk)], counts[slot] = chunk, len(chunk)
            budget[slot] = self._row(i).limit if self._row(i).unread == len(chunk) else 0
            at[self._shard(i)] = i % (self.engine_config.slots // self._shards)
        return self._to_rows(tokens, counts, budget, at)

    def _decode_steps(self) -> list[Event]:
        """As many steps in one dispatch as take about SECONDS_PER_DISPATCH; none after every row has ended."""
        turns = self._turns_per_step()
        wanted = int(SECONDS_PER_DISPATCH / (self._seconds_per_turn * turns))
        steps = max(1, min(wanted, MAX_STEPS_PER_DISPATCH))
        began = time.perf_counter()
        draws, self._cache, self._state = self.programs.decode(self.params, self._cache, self._state, np.int32(steps))
        token = np.asarray(draws.token)
        taken = int((token != NO_TOKEN).any(axis=0).sum())
        self._seconds_per_turn = (time.perf_counter() - began) / (max(taken, 1) * turns)
        return self._events(draws, {i: np.s_[i, token[i] != NO_TOKEN] for i, row in enumerate(self._rows) if row})

    def _turns_per_step(self) -> int:
        """How often a decoding step runs the model: for all rows at once, or for each row of the busiest shard."""
        active = collections.Counter(self._shard(i) for i, row in enumerate(self._rows) if row)
        return max(active.values()) if self.decodes_alone else 1

    def _events(self, draw: Draw, where: dict[int, Any]) -> list[Event]:
        """What rows drew, as events; `where` says which elements of `draw` are a row's. Rows that ended are freed."""
        if not where:
            return []  # nothing to wait for
        watched = {i for i in where if self._row(i).request.ends_at}
        asked = any(self._row(i).request.sampling.top_logprobs for i in where)
        host = jax.tree.map(np.asarray, draw if asked else draw._replace(top_ids=None, top_logprobs=None))
        events = [self._event(i, jax.tree.map(operator.itemgetter(at), host)) for i, at in where.items()]
        # All other ends the device has seen for itself.
        self._halt(
            [i for i, event in zip(where, events, strict=True) if i in watched and event.finish_reason == "stop"]
        )
        return events

    def _event(self, i: int, draw: Draw) -> Event:
        """What row i drew, [steps], as an event; a row that ended is released."""
        row = self._row(i)
        tokens = draw.token.tolist()
        faulty = sampling.FAULTY in tokens  # a fault ends the row: it is the last it drew
        tokens = tokens[: len(tokens) - faulty]
        reason: FinishReason | None = "error" if faulty else None
        for drawn, token in enumerate(tokens, 1):
            if row.request.ends_at and row.request.ends_at(token):
                tokens, reason = tokens[:drawn], "stop"
                break
        step, count = row.generated, len(tokens)
        row.generated += count
        if not reason and count and tokens[-1] in row.request.stop_ids:
            reason = "stop"
        elif not reason and row.generated >= row.limit:
            reason = "length"
        if reason:
            self._release(i)
        top = _top(draw, row.request.sampling.top_logprobs, count)
        return Event(row.request_id, tuple(tokens), tuple(draw.logprob[:count].tolist()), reason, step, top)


def _top(draw: Draw, asked: int, count: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """The likeliest ids, and their log probabilities, of each of `count` tokens."""
    if not asked:
        return ()
    ids, logprobs = draw.top_ids[:count, :asked].tolist(), draw.top_logprobs[:count, :asked].tolist()
    return tuple(tuple(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True))
