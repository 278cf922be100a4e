"""Requests of token ids in, token events out: admission, chunked prefill, many decoding steps per dispatch.

Knows no text. Rows are slots of a batch of fixed size; a request takes a free row and the pages that its prompt and
answer can need, and gives both back when it ends, while other rows go on (continuous batching). All programs are
compiled before the first token, so nothing compiles while requests of mixed lengths come and go.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from gptoss_jax import kv_cache, sampling
from gptoss_jax.config import ModelConfig
from gptoss_jax.kv_cache import KVCache
from gptoss_jax.model import Model, Params, step
from gptoss_jax.sampling import Sampling, SamplingParams
from gptoss_jax.sharding import Sharding

MAX_STOP_IDS = 8
MAX_STEPS_PER_DISPATCH = 64
SECONDS_PER_DISPATCH = 0.1  # decoding steps are grouped up to about this long, so that text still flows
NO_TOKEN = -2  # in place of a token: the row took no step

FinishReason = Literal["stop", "length", "error"]


class RequestError(ValueError):
    """A request that this engine can never serve."""


class NumericsError(ValueError):
    """The model gave logits that are not finite: its weights or a kernel are at fault."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What the programs are compiled for.

    Attributes:
        rows: requests that run at once.
        max_context_tokens: prompt and answer of one request, at most.
        prefill_widths: tokens per row of each prefill program; a prompt goes through the widest, its tail through the
            narrowest that holds it.
        pool_tokens: tokens that the full-attention layers can hold for all rows together; a request waits until its
            pages are free. None: enough for every row at its longest.
    """

    rows: int = 1
    max_context_tokens: int = 4096
    prefill_widths: tuple[int, ...] = (128,)
    pool_tokens: int | None = None

    def __post_init__(self):
        for name in ("rows", "max_context_tokens", "pool_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if not self.prefill_widths or min(self.prefill_widths) < 1:
            raise ValueError(f"prefill_widths is {self.prefill_widths}, expected widths of at least 1")


@dataclasses.dataclass(frozen=True)
class Request:
    """Token ids to go on from.

    Attributes:
        token_ids: the prompt.
        stop_ids: ids after which the answer ends; the id itself is part of the answer.
        max_new_tokens: length of the answer at most; None: as far as the context goes.
        sampling: how tokens are drawn.
    """

    token_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    max_new_tokens: int | None = None
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)

    def check(self, config: ModelConfig, engine_config: EngineConfig) -> int:
        """How many tokens the answer may have at most.

        Raises:
            RequestError: no model of `config` in an engine of `engine_config` can serve this.
        """
        context = engine_config.max_context_tokens
        if context > config.max_context_tokens:
            raise RequestError(f"max_context_tokens is {context}, the model has {config.max_context_tokens} at most")
        if not self.token_ids:
            raise RequestError("the prompt has no tokens, expected at least one")
        for position, token in enumerate(self.token_ids):
            if not 0 <= token < config.vocab_size:
                raise RequestError(
                    f"token id {token} at position {position} is outside the vocabulary, "
                    f"expected 0 to {config.vocab_size - 1}"
                )
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise RequestError(f"{len(self.stop_ids)} stop ids, expected at most {MAX_STOP_IDS}")
        if any(not 0 <= stop < config.vocab_size for stop in self.stop_ids):
            raise RequestError(f"stop ids {self.stop_ids}, expected ids from 0 to {config.vocab_size - 1}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        limit = self.max_new_tokens or context - len(self.token_ids)
        if limit < 1 or len(self.token_ids) + limit > context:
            raise RequestError(
                f"a prompt of {len(self.token_ids)} tokens and an answer of up to {max(limit, 1)} exceed the context "
                f"of {context} tokens: shorten them, or raise max_context_tokens"
            )
        return limit


class Event(NamedTuple):
    """News of one request: tokens in the order drawn; the last event of a request says why it ended."""

    request_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural logarithm, at temperature 1
    finish_reason: FinishReason | None


class Programs(NamedTuple):
    """What an engine runs on the devices, compiled for its shapes."""

    prefill: dict[int, Any]  # by width
    decode: Any


class RowState(NamedTuple):
    """What decoding carries for B rows beside the cache. A row is active while it has tokens left to draw."""

    token: Int32[Array, "B"]  # drawn, not yet in the cache
    remaining: Int32[Array, "B"]
    stop_ids: Int32[Array, "B Z"]
    sampling: Sampling


@dataclasses.dataclass
class _Row:
    """The host's view of one admitted request."""

    request_id: int
    request: Request
    limit: int  # tokens of the answer at most
    pages: list[int]
    prefilled: int = 0
    generated: int = 0


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
        programs: Programs | None = None,
    ):
        sharding.check(config, engine_config.rows)
        self.config, self.engine_config, self.sharding, self.params = config, engine_config, sharding, params
        rows, context = engine_config.rows, engine_config.max_context_tokens
        self._pages_per_row = kv_cache.num_pages(context)
        self._shards = sharding.size("rows")
        pool_pages = rows * self._pages_per_row
        if engine_config.pool_tokens is not None:
            pool_pages = kv_cache.num_pages(engine_config.pool_tokens)
        self._pages_per_shard = -(-pool_pages // self._shards)
        self._free_pages = [list(range(self._pages_per_shard)) for _ in range(self._shards)]
        self._rows: list[_Row | None] = [None] * rows
        self._waiting: collections.deque[tuple[int, Request, int]] = collections.deque()
        self._ids = itertools.count()
        self._seconds_per_step = SECONDS_PER_DISPATCH
        self._cache, self._state = self._allocate(cache_dtype)
        self._page_table = np.zeros((rows, self._pages_per_row), np.int32)
        began = time.perf_counter()
        self.programs = programs or self._compile(model)
        self.compile_seconds = time.perf_counter() - began

    # ---- set-up ----

    def _allocate(self, cache_dtype: jnp.dtype) -> tuple[KVCache, RowState]:
        rows = self.engine_config.rows
        cache = kv_cache.allocator(
            self.config,
            self.sharding,
            rows=rows,
            pages=self._pages_per_shard * self._shards,
            max_context_tokens=self.engine_config.max_context_tokens,
            dtype=cache_dtype,
        )()
        state = RowState(
            token=np.zeros(rows, np.int32),  # pyright: ignore[reportArgumentType]
            remaining=np.zeros(rows, np.int32),  # pyright: ignore[reportArgumentType]
            stop_ids=np.full((rows, MAX_STOP_IDS), NO_TOKEN, np.int32),  # pyright: ignore[reportArgumentType]
            sampling=Sampling(np.zeros(rows, np.float32), np.zeros(rows, np.uint32)),  # pyright: ignore
        )
        return cache, self._to_rows(state)

    def _to_rows(self, tree: Any) -> Any:
        """Host arrays with a leading row axis -> device arrays, each row on its data shard."""
        put = lambda x: jax.device_put(x, self.sharding.named(("rows", *(None,) * (np.ndim(x) - 1))))  # noqa: E731
        return jax.tree.map(put, tree)

    def _compile(self, model: Model) -> Programs:
        """The prefill program of each width, and the decoding program."""
        cache_sharding, state_sharding = jax.tree.map(lambda x: x.sharding, (self._cache, self._state))
        row = self.sharding.named(("rows",))
        num_token_ids = self.config.num_token_ids
        prefill = jax.jit(
            functools.partial(_prefill, model, num_token_ids),
            donate_argnums=1,
            out_shardings=(row, row, cache_sharding),
        )
        decode = jax.jit(
            functools.partial(_decode, model, num_token_ids),
            donate_argnums=(1, 2),
            out_shardings=(row, row, cache_sharding, state_sharding),
        )
        counts = np.zeros(self.engine_config.rows, np.int32)
        programs = {}
        for width in sorted(set(self.engine_config.prefill_widths)):
            tokens = np.zeros((self.engine_config.rows, width), np.int32)
            arguments = self._to_rows((tokens, counts))
            programs[width] = prefill.lower(self.params, self._cache, self._state.sampling, *arguments).compile()
        return Programs(programs, decode.lower(self.params, self._cache, self._state, np.int32(1)).compile())

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

    def run(self) -> Iterator[Event]:
        """Events until every submitted request has ended.

        Raises:
            NumericsError: behind the events of the dispatch in which a request met logits that are not finite.
        """
        while not self.is_idle:
            events = self.tick()
            yield from events
            for event in events:
                if event.finish_reason == "error":
                    raise NumericsError(
                        f"request {event.request_id}: logits are not finite behind its last token; "
                        "check the checkpoint (convert --verify) and the kernels"
                    )

    def cancel(self, request_id: int) -> None:
        """Ends a request that nobody waits for any more; one that has ended already is left alone."""
        self._waiting = collections.deque(entry for entry in self._waiting if entry[0] != request_id)
        for i, row in enumerate(self._rows):
            if row is not None and row.request_id == request_id:
                self._release(i)
                state = jax.tree.map(np.array, self._state)
                state.remaining[i] = 0
                self._state = self._to_rows(state)

    def tick(self) -> list[Event]:
        """Admits what fits, then does one dispatch: a prefill chunk where prompts wait, else decoding steps."""
        self._admit()
        waiting = [i for i, row in enumerate(self._rows) if row and row.prefilled < len(row.request.token_ids)]
        if waiting:
            return self._prefill_chunk(waiting)
        return self._decode_steps() if any(self._rows) else []

    def _admit(self) -> None:
        """Gives waiting requests, oldest first, a free row each, and its pages."""
        admitted = []
        for i, row in enumerate(self._rows):
            if row is None and self._waiting:
                request_id, request, limit = self._waiting[0]
                free = self._free_pages[self._shard(i)]
                needed = kv_cache.num_pages(len(request.token_ids) + limit)
                if needed > len(free):
                    continue  # another shard may have them; else until a row ends
                self._waiting.popleft()
                pages = [free.pop() for _ in range(needed)]
                self._rows[i] = _Row(request_id, request, limit, pages)
                self._page_table[i, :needed] = pages
                admitted.append(i)
        if admitted:
            lengths = np.array(self._cache.lengths)
            lengths[admitted] = 0
            table = self._to_rows(self._page_table)
            self._cache = self._cache._replace(page_table=table, lengths=self._to_rows(lengths))
            self._write_state(admitted)

    def _write_state(self, admitted: Sequence[int]) -> None:
        """Tells the device how the newly admitted rows sample and stop; they are inactive until their first token."""
        state = jax.tree.map(np.array, self._state)
        for i in admitted:
            request = self._row(i).request
            state.remaining[i] = 0
            state.stop_ids[i] = [*request.stop_ids, *[NO_TOKEN] * (MAX_STOP_IDS - len(request.stop_ids))]
            state.sampling.temperature[i] = request.sampling.temperature
            state.sampling.seed[i] = request.sampling.seed
        self._state = self._to_rows(state)

    def _row(self, i: int) -> _Row:
        row = self._rows[i]
        assert row is not None, i
        return row

    def _shard(self, row: int) -> int:
        return row * self._shards // self.engine_config.rows

    def _release(self, i: int) -> None:
        self._free_pages[self._shard(i)].extend(self._row(i).pages)
        self._rows[i] = None

    # ---- dispatches ----

    def _prefill_chunk(self, waiting: Sequence[int]) -> list[Event]:
        """One chunk of every waiting prompt; a prompt's last chunk draws its first token."""
        left = {i: len(self._row(i).request.token_ids) - self._row(i).prefilled for i in waiting}
        widths = sorted(self.programs.prefill)
        width = next((w for w in widths if w >= max(left.values())), widths[-1])
        tokens = np.zeros((self.engine_config.rows, width), np.int32)
        counts = np.zeros(self.engine_config.rows, np.int32)
        for i in waiting:
            row = self._row(i)
            chunk = row.request.token_ids[row.prefilled : row.prefilled + width]
            tokens[i, : len(chunk)], counts[i] = chunk, len(chunk)
            row.prefilled += len(chunk)
        arguments = self._to_rows((tokens, counts))
        token, logprob, self._cache = self.programs.prefill[width](
            self.params, self._cache, self._state.sampling, *arguments
        )
        done = [i for i in waiting if self._row(i).prefilled == len(self._row(i).request.token_ids)]
        return self._start_rows(done, np.asarray(token), np.asarray(logprob)) if done else []

    def _start_rows(self, done: Sequence[int], token: np.ndarray, logprob: np.ndarray) -> list[Event]:
        state = jax.tree.map(np.array, self._state)
        events = []
        for i in done:
            limit = self._row(i).limit
            events.append(self._event(i, token[i : i + 1], logprob[i : i + 1]))
            state.token[i] = token[i]
            state.remaining[i] = limit - 1 if self._rows[i] else 0
        self._state = self._to_rows(state)
        return events

    def _decode_steps(self) -> list[Event]:
        """As many steps in one dispatch as take about SECONDS_PER_DISPATCH; none after every row has ended."""
        wanted = int(SECONDS_PER_DISPATCH / self._seconds_per_step)
        steps = max(1, min(wanted, MAX_STEPS_PER_DISPATCH))
        began = time.perf_counter()
        tokens, logprobs, self._cache, self._state = self.programs.decode(
            self.params, self._cache, self._state, np.int32(steps)
        )
        tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
        taken = int((tokens != NO_TOKEN).any(axis=0).sum())
        self._seconds_per_step = (time.perf_counter() - began) / max(taken, 1)
        events = []
        for i, row in enumerate(self._rows):
            drawn = tokens[i] != NO_TOKEN
            if row is not None:
                events.append(self._event(i, tokens[i][drawn], logprobs[i][drawn]))
        return events

    def _event(self, i: int, tokens: np.ndarray, logprobs: np.ndarray) -> Event:
        """What row i drew, as an event; a row that ended is released."""
        row = self._row(i)
        faulty = bool((tokens == sampling.FAULTY).any())
        if faulty:
            tokens, logprobs = tokens[:-1], logprobs[:-1]  # a fault ends the row: it is the last it drew
        row.generated += len(tokens)
        reason: FinishReason | None = None
        if faulty:
            reason = "error"
        elif tokens.size and int(tokens[-1]) in row.request.stop_ids:
            reason = "stop"
        elif row.generated >= row.limit:
            reason = "length"
        if reason:
            self._release(i)
        return Event(row.request_id, tuple(tokens.tolist()), tuple(logprobs.tolist()), reason)


# ---- the programs ----


def _prefill(
    model: Model,
    num_token_ids: int,
    params: Params,
    cache: KVCache,
    how: Sampling,
    tokens: Int32[Array, "B T"],
    counts: Int32[Array, "B"],
) -> tuple[Int32[Array, "B"], Float[Array, "B"], KVCache]:
    """A chunk of each row's prompt, and the token that each row would draw behind it."""
    logits, cache = step(model, params, tokens, counts, cache)
    token, logprob = sampling.sample(logits, how, cache.lengths, num_token_ids)
    return token, logprob, cache


def _decode(
    model: Model, num_token_ids: int, params: Params, cache: KVCache, state: RowState, steps: Int32[Array, ""]
) -> tuple[Int32[Array, "B Y"], Float[Array, "B Y"], KVCache, RowState]:
    """Up to `steps` tokens of each active row, one column per step."""
    rows = state.token.shape[0]

    def goes_on(carry):
        i, _, _, _, state = carry
        return (i < steps) & jnp.any(state.remaining > 0)

    def one_step(carry):
        i, tokens, logprobs, cache, state = carry
        active = state.remaining > 0
        logits, cache = step(model, params, state.token[:, None], active.astype(jnp.int32), cache)
        token, logprob = sampling.sample(logits, state.sampling, cache.lengths, num_token_ids)
        ended = sampling.is_stop(token, state.stop_ids) | (token == sampling.FAULTY)
        remaining = jnp.where(active & ~ended, state.remaining - 1, 0)
        column = (jnp.arange(rows, dtype=jnp.int32), i)
        tokens = tokens.at[column].set(jnp.where(active, token, NO_TOKEN))
        logprobs = logprobs.at[column].set(logprob)
        token = jnp.where(active, jnp.maximum(token, 0), state.token)
        return i + 1, tokens, logprobs, cache, state._replace(token=token, remaining=remaining)

    shape = (rows, MAX_STEPS_PER_DISPATCH)
    carry = (jnp.int32(0), jnp.full(shape, NO_TOKEN, jnp.int32), jnp.zeros(shape, jnp.float32), cache, state)
    _, tokens, logprobs, cache, state = jax.lax.while_loop(goes_on, one_step, carry)
    return tokens, logprobs, cache, state
