"""Requests of token ids in, token events out: continuous batching over slots and pages. Knows no text, and no devices.

A request takes a free slot and the pages of its prompt; more pages follow as its answer grows. Where they run short the
scheduler names a sequence that gives its own back and is computed again later: what its caller has seen stays as it is.
"""

import collections
import itertools
import operator
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.engine import sampling
from gptoss_jax.engine.page_pool import PagePool
from gptoss_jax.engine.programs import MAX_STEPS_PER_DISPATCH, NO_TOKEN
from gptoss_jax.engine.request import (
    NOT_FINITE,
    EngineConfig,
    Event,
    FinishReason,
    NumericsError,
    Request,
    RequestError,
)
from gptoss_jax.engine.runner import Chunk, Compiled, ModelRunner
from gptoss_jax.engine.sampling import Draw
from gptoss_jax.engine.scheduler import Decode, Prefill, Scheduler
from gptoss_jax.engine.sequence import Sequence
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.kv_cache import PAGE_TOKENS, num_pages
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.transformer import Model, Params

SECONDS_PER_DISPATCH = 0.1  # decoding steps are grouped up to about this long, so that text still flows


class Engine:
    """Runs requests. `submit` them, then `run` until all have ended, or call `tick` yourself.

    Attributes:
        engine_config: what its programs are compiled for.
        runner: the part on the devices.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        config: ModelConfig,
        sharding: Sharding,
        cache_dtype: jnp.dtype,
        engine_config: EngineConfig,
        *,
        scheduler: Scheduler | None = None,
        compiled: Compiled | None = None,
        report: Callable[[int, int], object] = lambda done, total: None,
    ):
        """`scheduler`: another policy than `Scheduler`'s; `compiled` and `report`: see `ModelRunner`."""
        self.config, self.engine_config = config, engine_config
        self._scheduler = scheduler or Scheduler()
        shards, context = sharding.size("batch"), engine_config.max_context_tokens
        pages = -(-_pool_pages(engine_config) // shards)
        self.runner = ModelRunner(
            *(model, params, config, sharding, cache_dtype, engine_config),
            pages_per_shard=pages,
            compiled=compiled,
            report=report,
        )
        self._pools = [PagePool(pages) for _ in range(shards)]
        self._most_tokens = min(context, pages * PAGE_TOKENS)  # of one sequence
        self._running: dict[int, Sequence] = {}  # by slot
        self._waiting: list[Sequence] = []
        self._ids = itertools.count()
        self._seconds_per_forward = SECONDS_PER_DISPATCH

    @property
    def deterministic(self) -> bool:
        """Whether a request's bits are the same in any company: see `EngineConfig`."""
        return self.runner.deterministic

    @property
    def compiled(self) -> Compiled:
        """The programs, for another engine just like this one."""
        return self.runner.compiled

    @property
    def compile_seconds(self) -> float:
        """What compiling them took."""
        return self.runner.compile_seconds

    # ---- requests ----

    def submit(self, request: Request) -> int:
        """Queues a request and gives its id; without a limit of its own, its answer goes on as far as memory does.

        Raises:
            RequestError: it has no tokens, ids outside the vocabulary, or can never fit the context or the page pool.
        """
        limit, prompt = request.check(self.config, self.engine_config), len(request.token_ids)
        if request.max_new_tokens is None:
            limit = max(1, min(limit, self._most_tokens - prompt))
        if prompt + limit > self._most_tokens:
            raise RequestError(
                f"{prompt + limit} tokens exceed a page pool of {self._pools[0].num_pages * PAGE_TOKENS}: "
                "shorten the request, or raise pool_tokens"
            )
        sequence = Sequence(next(self._ids), request, limit)
        self._waiting.append(sequence)
        return sequence.request_id

    @property
    def is_idle(self) -> bool:
        """Whether every submitted request has ended."""
        return not self._waiting and not self._running

    def run(self, until: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Events until every submitted request has ended, or `until`, asked before each dispatch, says so.

        Raises:
            NumericsError: after the events of the dispatch in which a request met logits that are not finite.
        """
        while not self.is_idle and not until():
            events = self.tick()
            yield from events
            for event in events:
                if event.finish_reason == "error":
                    step = event.step + len(event.token_ids)
                    raise NumericsError(f"request {event.request_id}, step {step}: {NOT_FINITE}")

    def cancel(self, request_id: int) -> None:
        """Ends a request that nobody waits for any more; one that has ended already is left alone."""
        self._waiting = [sequence for sequence in self._waiting if sequence.request_id != request_id]
        for slot, sequence in list(self._running.items()):
            if sequence.request_id == request_id:
                self._release(slot)
                self.runner.halt([slot])

    def tick(self) -> list[Event]:
        """Admits what fits, then does one dispatch, a chunk of prompts or decoding steps, as the scheduler says."""
        self._admit()
        match self._scheduler.next(self._running.values()):
            case Prefill(sequences):
                return self._prefill(sequences)
            case Decode(max_steps):
                return self._decode(max_steps or MAX_STEPS_PER_DISPATCH)
            case None:
                return []

    # ---- slots and pages ----

    def _admit(self) -> None:
        """Gives sequences that wait a free slot each, and pages for all that the caller knows of them.

        A page for each sequence that may still grow stays free, so that nobody is admitted only to be preempted.
        """
        for slot in range(self.engine_config.slots):
            if slot in self._running or not self._waiting:
                continue
            sequence, pool = self._scheduler.admit(self._waiting), self._pools[self.runner.shard_of(slot)]
            wanted = num_pages(sequence.num_known)
            if wanted + self._num_growing(self.runner.shard_of(slot)) > pool.num_free:
                continue  # another shard may have them; else until a sequence ends
            self._waiting.remove(sequence)
            self._running[slot] = sequence
            self.runner.admit(slot, sequence.request, sequence.tokens[: sequence.drawn])
            self._take_pages(slot, wanted)

    @property
    def _decoding(self) -> dict[int, Sequence]:
        """Sequences whose prompt is read, by slot."""
        return {slot: sequence for slot, sequence in self._running.items() if not sequence.num_unread}

    def _num_growing(self, shard: int) -> int:
        """Sequences of a shard that may come to need another page."""
        return sum(
            num_pages(sequence.most_cached) > len(sequence.pages)
            for slot, sequence in self._running.items()
            if self.runner.shard_of(slot) == shard
        )

    def _take_pages(self, slot: int, wanted: int) -> None:
        """Has the sequence in a slot hold `wanted` pages at least."""
        sequence, pool = self._running[slot], self._pools[self.runner.shard_of(slot)]
        if wanted > len(sequence.pages):
            sequence.pages += pool.allocate(wanted - len(sequence.pages))
            self.runner.set_pages(slot, sequence.pages)

    def _release(self, slot: int) -> None:
        self._pools[self.runner.shard_of(slot)].release(self._running.pop(slot).pages)

    def _preempt(self, slot: int) -> None:
        """Sends the sequence in a slot back to wait, without its pages."""
        sequence = self._running[slot]
        self._release(slot)
        self.runner.halt([slot])
        sequence.restart(draw_again=self.runner.deterministic)
        self._waiting.append(sequence)

    def _make_room(self, steps: int) -> int:
        """Takes the pages for up to `steps` decoding steps; where even one does not fit, sequences give way.

        Returns:
            For how many steps every sequence that still runs has pages.
        """
        while shards := [shard for shard in range(len(self._pools)) if self._missing_pages(shard, steps) > 0]:
            if steps > 1:
                steps //= 2
                continue
            for shard in shards:
                self._preempt(self._slot_to_preempt(shard))
        for slot, sequence in self._decoding.items():
            self._take_pages(slot, num_pages(sequence.cached_after(steps)))
        return steps

    def _missing_pages(self, shard: int, steps: int) -> int:
        """Pages that the sequences of a shard lack for so many steps, over those that are free."""
        its = (sequence for slot, sequence in self._decoding.items() if self.runner.shard_of(slot) == shard)
        wanted = (num_pages(sequence.cached_after(steps)) - len(sequence.pages) for sequence in its)
        return sum(max(0, pages) for pages in wanted) - self._pools[shard].num_free

    def _slot_to_preempt(self, shard: int) -> int:
        slots = {id(sequence): slot for slot, sequence in self._running.items() if self.runner.shard_of(slot) == shard}
        return slots[id(self._scheduler.preempt([self._running[slot] for slot in slots.values()]))]

    # ---- dispatches ----

    def _prefill(self, sequences: list[Sequence]) -> list[Event]:
        """One chunk of these prompts, or of as many as fit; a prompt's last chunk draws the next token."""
        slot_of = {sequence.request_id: slot for slot, sequence in self._running.items()}
        width, slots = self.runner.choose_chunk({slot_of[s.request_id]: s.num_unread for s in sequences})
        chunks = {slot: self._chunk(self._running[slot], width) for slot in slots}
        draw = self.runner.prefill(width, chunks)
        for slot, chunk in chunks.items():
            self._running[slot].prefilled += len(chunk.tokens)
        places = {slot: self.runner.place_of(slot) for slot in slots if not self._running[slot].num_unread}
        return self._events(draw, {slot: np.s_[place : place + 1] for slot, place in places.items()})

    def _chunk(self, sequence: Sequence, width: int) -> Chunk:
        tokens = sequence.prompt[sequence.prefilled :][:width]
        is_last = len(tokens) == sequence.num_unread
        return Chunk(tokens, sequence.limit - sequence.drawn if is_last else 0)

    def _decode(self, most: int) -> list[Event]:
        """As many steps in one dispatch as take about SECONDS_PER_DISPATCH; none after every slot has ended."""
        forwards = self._forwards_per_step()
        wanted = int(SECONDS_PER_DISPATCH / (self._seconds_per_forward * forwards))
        steps = self._make_room(max(1, min(wanted, most)))
        began = time.perf_counter()
        draws = self.runner.decode(steps)
        token = np.asarray(draws.token)
        taken = int((token != NO_TOKEN).any(axis=0).sum())
        self._seconds_per_forward = (time.perf_counter() - began) / (max(taken, 1) * forwards)
        return self._events(draws, {slot: np.s_[slot, token[slot] != NO_TOKEN] for slot in self._decoding})

    def _forwards_per_step(self) -> int:
        """How often a decoding step runs the model: for all slots at once, or for each slot of the busiest shard."""
        if self.runner.forms.decode.num_chunks is None:
            return 1
        busy = collections.Counter(self.runner.shard_of(slot) for slot in self._decoding)
        return max(busy.values(), default=1)

    # ---- events ----

    def _events(self, draw: Draw, where: dict[int, Any]) -> list[Event]:
        """What slots drew, as events; `where` says which elements of `draw` are a slot's. Those that ended are free."""
        if not where:
            return []  # nothing to wait for
        running = {slot: self._running[slot] for slot in where}
        asked = any(sequence.request.sampling.top_logprobs for sequence in running.values())
        host = jax.tree.map(np.asarray, draw if asked else draw._replace(top_ids=None, top_logprobs=None))
        events = {slot: self._event(slot, jax.tree.map(operator.itemgetter(at), host)) for slot, at in where.items()}
        # The device has seen for itself where a stop id or the limit ends an answer, and where it is faulty.
        self.runner.halt(
            [slot for slot, event in events.items() if running[slot].request.ends_at and event.finish_reason == "stop"]
        )
        return [event for event in events.values() if event.token_ids or event.finish_reason]

    def _event(self, slot: int, draw: Draw) -> Event:
        """What a slot drew, [steps], as an event; a sequence that ended is released."""
        sequence = self._running[slot]
        faulty = sampling.FAULTY in draw.token  # a fault ends the answer: it is the last that was drawn
        drawn = draw.token.tolist()[: len(draw.token) - faulty]
        # What is drawn again after a preemption is what the caller has seen already, bit by bit.
        again = min(max(0, len(sequence.tokens) - sequence.drawn), len(drawn))
        sequence.drawn += len(drawn)
        step, (tokens, reason) = len(sequence.tokens), _until_end(sequence, drawn[again:])
        if faulty and not reason:
            reason = "error"
        sequence.tokens += tokens
        if reason:
            self._release(slot)
        new = slice(again, again + len(tokens))
        top = _top(draw, new, sequence.request.sampling.top_logprobs)
        return Event(sequence.request_id, tuple(tokens), tuple(draw.logprob[new].tolist()), reason, step, top)


def _pool_pages(engine_config: EngineConfig) -> int:
    """Pages of all shards together."""
    if engine_config.pool_tokens is not None:
        return num_pages(engine_config.pool_tokens)
    return engine_config.slots * num_pages(engine_config.max_context_tokens)


def _until_end(sequence: Sequence, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
    """New tokens up to where the answer ends, and why it does; None if it goes on."""
    request = sequence.request
    for count, token in enumerate(tokens, 1):
        if (request.ends_at and request.ends_at(token)) or token in request.stop_ids:
            return tokens[:count], "stop"
    return tokens, "length" if len(sequence.tokens) + len(tokens) >= sequence.limit else None


def _top(draw: Draw, new: slice, asked: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """The likeliest ids, and their log probabilities, of each new token."""
    if not asked:
        return ()
    ids, logprobs = draw.top_ids[new, :asked].tolist(), draw.top_logprobs[new, :asked].tolist()
    return tuple(tuple(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True))
