"""Requests of token ids in, token events out: continuous batching over slots and pages. Knows no text, and no devices.

A request takes a free slot and the pages of its prompt; more pages follow as its answer grows. Where they run short the
scheduler names a sequence that gives its own back and is computed again later: what its caller has seen stays as it is.
"""

import collections
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from gptoss_jax.engine import sampling
from gptoss_jax.engine.pace import Holding, Pace
from gptoss_jax.engine.placement import Placement
from gptoss_jax.engine.programs import MAX_STEPS_PER_DISPATCH, NO_TOKEN
from gptoss_jax.engine.request import NOT_FINITE, EngineConfig, Event, NumericsError, Request, RequestError
from gptoss_jax.engine.runner import Chunk, ModelRunner, block_tokens
from gptoss_jax.engine.sampling import Draw
from gptoss_jax.engine.scheduler import Decode, Prefill, Scheduler
from gptoss_jax.engine.sequence import Sequence
from gptoss_jax.engine.statistics import Statistics
from gptoss_jax.errors import short
from gptoss_jax.model.config import ModelConfig

SECONDS_PER_DISPATCH = 0.1  # decoding steps are grouped up to about this long, so that text still flows
STEPS_PER_DISPATCH_ON_SEVERAL_HOSTS = 8


class Engine:
    """Runs requests. `submit` them, then `run` until all have ended, or call `tick` yourself, as a server does.

    All of it belongs to one thread, `Request.ends_at` included, which `tick` calls.

    Attributes:
        runner: the part on the devices.
        config: the architecture, by which requests are checked.
        engine_config: slots and lengths.
        statistics: what it has done so far.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: ModelConfig,
        engine_config: EngineConfig,
        *,
        scheduler: Scheduler | None = None,
    ):
        """`engine_config` is what the runner was made for; `scheduler`: another policy than `Scheduler`'s."""
        self.runner, self.config, self.engine_config = runner, config, engine_config
        self._scheduler, self.statistics = scheduler or Scheduler(), Statistics()
        block = block_tokens(engine_config, runner.page_tokens)
        self._placement = Placement(runner, self._scheduler, engine_config.slots, block, self.statistics)
        self._ids = itertools.count()
        self._seconds_per_forward = SECONDS_PER_DISPATCH
        self._pace = Pace(waits=runner.on_several_hosts)

    # ---- requests ----

    def submit(self, request: Request) -> int:
        """Queues a request and gives its id; without a limit of its own, its answer goes on as far as memory does.

        Raises:
            RequestError: it is no Request, has no tokens, ids outside the vocabulary, or can never fit the context or
                the page pool.
        """
        sequence = Sequence(next(self._ids), request, self.check(request))
        self._placement.waiting.append(sequence)
        return sequence.request_id

    def check(self, request: Request) -> int:
        """How many tokens the answer may have at most; raises as `submit` does, which asks this first."""
        if not isinstance(request, Request):
            raise RequestError(f"the request is {short(request)}, expected Request")
        limit, prompt = request.check(self.config, self.engine_config), len(request.token_ids)
        pool_tokens = self.runner.pages_per_shard * self.runner.page_tokens
        if request.max_new_tokens is None:
            limit = max(1, min(limit, pool_tokens - prompt))
        if prompt + limit > pool_tokens:
            raise RequestError(
                f"{prompt + limit} tokens exceed a page pool of {pool_tokens}: "
                "shorten the request, or raise pool_tokens"
            )
        return limit

    @property
    def num_waiting(self) -> int:
        """Submitted requests that have no slot: who submits as answers end need not have more than a few of them."""
        return len(self._placement.waiting)

    @property
    def waiting_ids(self) -> tuple[int, ...]:
        """Those of submitted requests that have no slot, the oldest first; preempted ones are among them."""
        return tuple(sequence.request_id for sequence in self._placement.waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._placement.running)

    @property
    def num_free_pages(self) -> int:
        """Pages of all shards that no request holds; all of them are `pages_per_shard * num_shards` of the runner."""
        return self._placement.num_free_pages

    @property
    def is_idle(self) -> bool:
        """Whether every submitted request has ended."""
        return not self._placement.waiting and not self._placement.running

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
        place = self._placement
        place.waiting = [sequence for sequence in place.waiting if sequence.request_id != request_id]
        for slot in [slot for slot, sequence in place.running.items() if sequence.request_id == request_id]:
            place.release(slot)
            self.runner.halt([slot])

    def tick(self) -> list[Event]:
        """Admits what fits, then does one dispatch, a chunk of prompts or decoding steps, as the scheduler says."""
        self._placement.admit()
        match self._scheduler.next(self._placement.running.values()):
            case Prefill(sequences):
                return self._prefill(sequences)
            case Decode(max_steps):
                return self._decode(max_steps or MAX_STEPS_PER_DISPATCH)
            case None:
                return []

    # ---- dispatches ----

    def _prefill(self, sequences: list[Sequence]) -> list[Event]:
        """One chunk of these prompts, or of as many as fit; a prompt's last chunk draws the next token."""
        running = self._placement.running
        slot_of = {sequence.request_id: slot for slot, sequence in running.items()}
        width, slots = self.runner.choose_chunk({slot_of[s.request_id]: s.num_unread for s in sequences})
        chunks = {slot: _chunk(running[slot], width) for slot in slots}
        draw = self.runner.prefill(width, chunks)
        self._pace.ended(None)
        self.statistics.prefill_dispatches += 1
        for slot, chunk in chunks.items():
            running[slot].prefilled += len(chunk.tokens)
            self._placement.keep_block(slot)
        drew = [slot for slot, chunk in chunks.items() if chunk.budget]
        places = {slot: self.runner.place_of(slot) for slot in drew}
        return self._events(draw, {slot: np.s_[place : place + 1] for slot, place in places.items()})

    def _decode(self, most: int) -> list[Event]:
        """As many steps in one dispatch as take about SECONDS_PER_DISPATCH; none after every answer has ended."""
        forwards = self._forwards_per_step()
        if self.runner.on_several_hosts:  # whose clocks differ
            wanted = STEPS_PER_DISPATCH_ON_SEVERAL_HOSTS
        else:
            wanted = int(SECONDS_PER_DISPATCH / (self._seconds_per_forward * forwards))
        steps = self._placement.make_room(max(1, min(wanted, most)))
        holding = self._hold(self._seconds_per_forward * forwards) if self._placement.held else None
        gave_up = [] if holding is None else self._give_up(holding.faulty)
        began = time.perf_counter()
        if holding is None:
            draws = self.runner.decode(steps)
        else:
            self._pace.begins(began)
            draws = self.runner.decode_held(min(steps, holding.steps), holding.slots)
        token = np.asarray(draws.token)
        taken = int((token != NO_TOKEN).any(axis=0).sum())
        self.statistics.decode_dispatches += 1
        self.statistics.decode_steps += taken
        ended = time.perf_counter()
        self._seconds_per_forward = (ended - began) / (max(taken, 1) * forwards)
        self._pace.ended(ended)
        self._pace.took(taken, ended - began)
        where = {slot: np.s_[slot, token[slot] != NO_TOKEN] for slot in self._placement.decoding}
        return gave_up + self._events(draws, where)

    def _hold(self, step_seconds: float) -> Holding:
        """What holds the slots of the next dispatch, and for how many steps."""
        decoding = self._placement.decoding
        return self._pace.hold(self.runner.unheld(), self._placement.held, decoding.keys(), step_seconds)

    def _give_up(self, slots: list[int]) -> list[Event]:
        """Ends the answers in these slots."""
        self.runner.halt(slots)
        return [self._placement.release(slot).give_up() for slot in slots]

    def _forwards_per_step(self) -> int:
        """How often a decoding step runs the model: for all slots at once, or for each slot of the busiest shard."""
        if self.runner.decodes_in_one_batch:
            return 1
        busy = collections.Counter(map(self.runner.shard_of, self._placement.decoding))
        return max(busy.values(), default=1)

    def _events(self, draw: Draw, where: dict[int, Any]) -> list[Event]:
        """What slots drew, as events; `where` says which elements of `draw` are a slot's. Those that ended are free."""
        if not where:
            return []  # nothing to wait for
        running = {slot: self._placement.running[slot] for slot in where}
        asked = any(sequence.request.sampling.top_logprobs for sequence in running.values())
        host = jax.tree.map(np.asarray, draw if asked else draw._replace(top_ids=None, top_logprobs=None))
        events = {slot: _event(running[slot], host, at) for slot, at in where.items()}
        ended = {slot: event.finish_reason for slot, event in events.items() if event.finish_reason}
        for slot, reason in ended.items():
            self._placement.release(slot, faulty=reason == "error")
        # The device has seen for itself where a stop id or the limit ends an answer, and where it is faulty.
        self.runner.halt([slot for slot in ended if ended[slot] == "stop" and running[slot].request.ends_at])
        return [event for event in events.values() if event.token_ids or event.finish_reason]


def _chunk(sequence: Sequence, width: int) -> Chunk:
    """The next `width` tokens of a prompt; with the last of them the answer goes on, unless it is held to a form."""
    count = min(width, sequence.num_unread)
    tokens = sequence.prompt[sequence.prefilled : sequence.prefilled + count]
    draws = count == sequence.num_unread and sequence.held is None
    return Chunk(tokens, sequence.limit - sequence.drawn if draws else 0)


def _event(sequence: Sequence, draw: Draw, at: Any) -> Event:
    """What a sequence drew, which stands in `draw` at `at`; a fault ends its answer, so it is drawn last."""
    tokens = draw.token[at].tolist()
    faulty = sampling.FAULTY in tokens
    top = None if draw.top_ids is None else (draw.top_ids[at], draw.top_logprobs[at])
    drawn = tokens[: len(tokens) - faulty]
    event = sequence.take(drawn, draw.logprob[at], top, faulty=faulty)
    if sequence.held and not event.finish_reason:
        sequence.held.advance(drawn)
    return event
