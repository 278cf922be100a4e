"""A runner without a model: its cache holds token ids in pages and rings, and a token is drawn from all it reads there.

A page that two sequences hold, a chunk in the wrong place, a ring of another prefix or a slot that goes on after its
end changes what is drawn.
"""

import collections
import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.held import HeldSlots
from gptoss_jax.engine.programs import MAX_STEPS_PER_DISPATCH, NO_TOKEN
from gptoss_jax.engine.request import EngineConfig
from gptoss_jax.engine.runner import NOTHING_PENDING, ModelRunner, num_snapshots
from gptoss_jax.engine.sampling import Draw
from gptoss_jax.model.config import read_config
from gptoss_jax.model.kv_cache import PAGE_TOKENS, num_pages
from tests.goldens.make import ROOT

VOCAB = 512
WINDOW = 50  # tokens of a ring


def next_token(tokens) -> int:
    """What is drawn after `tokens`."""
    return _draw_from(tokens, tokens[-WINDOW:])


def _draw_from(held, window) -> int:
    """What is drawn where full attention sees `held`, and sliding windows see `window`."""
    return zlib.crc32(np.asarray([*held, *window], np.int64).tobytes()) % VOCAB


def answer(prompt, count: int) -> list[int]:
    """The `count` tokens that follow a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


CONFIG = dataclasses.replace(
    read_config(ROOT / "configs" / "tiny.json"), vocab_size=VOCAB, stop_ids=(VOCAB - 2,), pad_id=VOCAB - 1
)
BOTH = pytest.mark.parametrize("one_batch", [False, True], ids=["slot by slot", "batched"])


class FakeRunner(ModelRunner):
    """See the top of this file.

    `dispatches` lists what it did, "prefill" or "decode", and which slots took part; `steps`, of each that decoded.
    """

    def __init__(
        self,
        engine_config: EngineConfig,
        *,
        num_shards: int = 1,
        one_batch: bool = False,
        several_hosts: bool = False,
        page_tokens: int = PAGE_TOKENS,
    ):
        slots, tokens = engine_config.slots, engine_config.pool_tokens
        self.deterministic, self._one_batch, self.num_shards = not one_batch, one_batch, num_shards
        self._several_hosts = several_hosts
        own = num_pages(engine_config.max_context_tokens, page_tokens)
        pages = slots * own if tokens is None else num_pages(tokens, page_tokens)
        self.page_tokens = page_tokens
        self.pages_per_shard = -(-pages // num_shards)
        self._slots_per_shard = slots // num_shards
        self.compiled = SimpleNamespace(prefill=dict.fromkeys(engine_config.prefill_widths))
        self.snapshots_per_shard = -(-num_snapshots(engine_config, page_tokens) // num_shards)
        self._memory = np.full((num_shards, self.pages_per_shard, page_tokens), -1)
        self._rings = np.full((slots, WINDOW), -1)
        self._ring_copies = np.full((num_shards, self.snapshots_per_shard, WINDOW), -1)
        self._pages = [[] for _ in range(slots)]
        self._lengths, self._token = np.zeros(slots, int), np.zeros(slots, int)
        self._remaining, self._stop_ids = np.zeros(slots, int), [tuple[int, ...]() for _ in range(slots)]
        self.dispatches, self.steps = [], []

    @property
    def on_several_hosts(self) -> bool:
        return self._several_hosts

    @property
    def prefills_in_one_batch(self) -> bool:
        return self._one_batch

    @property
    def decodes_in_one_batch(self) -> bool:
        return self._one_batch

    def admit(self, slot, request, drawn, cached=0, pending=NOTHING_PENDING) -> None:
        assert self._remaining[slot] == 0, "the slot still draws"
        self._lengths[slot], self._stop_ids[slot], self._pages[slot] = cached, request.stop_ids, []
        self._token[slot], self._remaining[slot] = pending

    def save_rings(self, slot, snapshot) -> None:
        self._ring_copies[self.shard_of(slot), snapshot] = self._rings[slot]

    def restore_rings(self, slot, snapshot) -> None:
        self._rings[slot] = self._ring_copies[self.shard_of(slot), snapshot]

    def set_pages(self, slot, pages) -> None:
        assert list(pages[: len(self._pages[slot])]) == self._pages[slot], "a page moved"
        self._pages[slot] = list(pages)

    def halt(self, slots) -> None:
        self._remaining[list(slots)] = 0

    def prefill(self, width, chunks) -> Draw:
        self.dispatches.append(("prefill", list(chunks)))
        token = np.full(len(self._pages) if self._one_batch else self.num_shards, NO_TOKEN)
        for slot, chunk in chunks.items():
            assert len(chunk.tokens) <= width
            self._write(slot, self._as_read(chunk.tokens, self._lengths[slot], width))
            if chunk.budget:
                token[self.place_of(slot)] = self._draw(slot, chunk.budget)
        return _draws(token)

    def decode(self, steps) -> Draw:
        self.steps.append(steps)
        self.dispatches.append(("decode", np.flatnonzero(self._remaining).tolist()))
        token = np.full((len(self._pages), MAX_STEPS_PER_DISPATCH), NO_TOKEN)
        for step in range(steps):
            for slot in np.flatnonzero(self._remaining).tolist():
                self._write(slot, [self._token[slot]])
                token[slot, step] = self._draw(slot, self._remaining[slot])
        return _draws(token)

    def unheld(self) -> HeldSlots:
        return HeldSlots(len(self._pages), VOCAB, MAX_STEPS_PER_DISPATCH)

    def decode_held(self, steps, held) -> Draw:
        self.steps.append(steps)
        self.dispatches.append(("decode held", np.flatnonzero(self._remaining * held.takes_part).tolist()))
        token = np.full((len(self._pages), MAX_STEPS_PER_DISPATCH), NO_TOKEN)
        going = held.takes_part.copy()
        for step in range(steps):
            for slot in np.flatnonzero(self._remaining * going).tolist():
                forced = held.forced[slot, step]
                allowed = np.unpackbits(held.mask[slot].view(np.uint8), bitorder="little")[:VOCAB]
                self._write(slot, [self._token[slot]])
                ids = [forced] if forced >= 0 else np.flatnonzero(allowed).tolist()
                token[slot, step] = drawn = self._draw(slot, self._remaining[slot], ids)
                goes_on = held.forced[slot, step + 1] >= 0 if forced >= 0 else drawn < held.stands_below[slot]
                going[slot] = goes_on
        return _draws(token)

    def _as_read(self, tokens, start, width) -> list[int]:
        """What the cache holds of a chunk's tokens."""
        return list(tokens)

    def _write(self, slot, tokens) -> None:
        for token in tokens:
            page, place = divmod(self._lengths[slot], self.page_tokens)
            self._memory[self.shard_of(slot), self._pages[slot][page], place] = token
            self._rings[slot, self._lengths[slot] % WINDOW] = token
            self._lengths[slot] += 1

    def _draw(self, slot, budget, ids: Sequence[int] = range(VOCAB)) -> int:
        """The id among `ids` that the cache says."""
        length = int(self._lengths[slot])
        held = self._memory[self.shard_of(slot), self._pages[slot]].reshape(-1)[:length]
        window = self._rings[slot, np.arange(max(0, length - WINDOW), length) % WINDOW]
        self._token[slot] = token = ids[_draw_from(held, window) % len(ids)]
        self._remaining[slot] = 0 if token in self._stop_ids[slot] else budget - 1
        return token


class RoundingRunner(FakeRunner):
    """One whose cache shows in which chunk a token was read, or that it was drawn: as sums are rounded."""

    def _as_read(self, tokens, start, width) -> list[int]:
        chunk = zlib.crc32(f"{start} {len(tokens)} {width}".encode())
        return [token + VOCAB * chunk for token in tokens]


def _draws(token) -> Draw:
    return Draw(token, token / VOCAB, None, None)  # pyright: ignore[reportArgumentType]  (host arrays)


# ---- engines over it ----


def make_engine(config: EngineConfig, *, scheduler=None, num_shards=1, one_batch=False, page_tokens=64) -> Engine:
    """An engine over a fake runner."""
    runner = FakeRunner(config, num_shards=num_shards, one_batch=one_batch, page_tokens=page_tokens)
    return Engine(runner, CONFIG, config, scheduler=scheduler)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Ids that no other length and seed has."""
    return tuple((seed * 131 + 7 * length + i) % VOCAB for i in range(length))


def run_cancelling(engine: Engine, cancelled: Mapping[int, int]) -> Mapping[int, list[int]]:
    """Tokens of each request until all have ended; of some, `cancelled` says after how many ticks."""
    tokens, ticks = collections.defaultdict(list), 0
    while not engine.is_idle:
        for event in engine.tick():
            tokens[event.request_id] += event.token_ids
        ticks += 1
        assert ticks < 20_000
        for i in [i for i, after in cancelled.items() if after < ticks]:
            engine.cancel(i)
    return tokens


def run(engine: Engine) -> dict[int, list[int]]:
    """Tokens of each request until all have ended."""
    tokens = collections.defaultdict(list)
    for event in engine.run():
        assert event.step == len(tokens[event.request_id])
        tokens[event.request_id] += event.token_ids
    return tokens


def all_pages_are_free(engine: Engine) -> bool:
    """Whether no page was lost."""
    return all(pool.num_free == pool.num_pages for pool in engine._placement._pools)


def check_answers(engine: Engine, expected: Mapping[int, list[int]], cancelled: Mapping[int, int]) -> None:
    """Runs an engine until all have ended: who was not cancelled has its whole answer, and no page is lost."""
    tokens = run_cancelling(engine, cancelled)
    for i, whole in expected.items():
        assert tokens[i] == whole[: len(tokens[i])]
        assert i in cancelled or tokens[i] == whole
    assert all_pages_are_free(engine)
