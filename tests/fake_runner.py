"""A runner without a model: its cache holds token ids in pages, and a token is drawn from all that it reads there.

A page that two sequences hold, a chunk in the wrong place or a slot that goes on after its end changes what is drawn.
"""

import zlib
from types import SimpleNamespace

import numpy as np

from gptoss_jax.engine.programs import MAX_STEPS_PER_DISPATCH, NO_TOKEN
from gptoss_jax.engine.request import EngineConfig
from gptoss_jax.engine.runner import ModelRunner
from gptoss_jax.engine.sampling import Draw
from gptoss_jax.model.kv_cache import PAGE_TOKENS, num_pages

VOCAB = 512


def next_token(tokens) -> int:
    """What is drawn after `tokens`."""
    return zlib.crc32(np.asarray(tokens, np.int64).tobytes()) % VOCAB


def answer(prompt, count: int) -> list[int]:
    """The `count` tokens that follow a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeRunner(ModelRunner):
    """See the top of this file.

    `dispatches` lists what it did, "prefill" or "decode", and which slots took part; `steps`, of each that decoded.
    """

    def __init__(
        self, engine_config: EngineConfig, *, num_shards: int = 1, one_batch: bool = False, several_hosts: bool = False
    ):
        slots, tokens = engine_config.slots, engine_config.pool_tokens
        self.deterministic, self._one_batch, self.num_shards = not one_batch, one_batch, num_shards
        self._several_hosts = several_hosts
        pages = slots * num_pages(engine_config.max_context_tokens) if tokens is None else num_pages(tokens)
        self.pages_per_shard = -(-pages // num_shards)
        self._slots_per_shard = slots // num_shards
        self.compiled = SimpleNamespace(prefill=dict.fromkeys(engine_config.prefill_widths))
        self._memory = np.full((num_shards, self.pages_per_shard, PAGE_TOKENS), -1)
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

    def admit(self, slot, request, drawn) -> None:
        assert self._remaining[slot] == 0, "the slot still draws"
        self._lengths[slot], self._stop_ids[slot], self._pages[slot] = 0, request.stop_ids, []

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
            self._write(slot, chunk.tokens)
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

    def _write(self, slot, tokens) -> None:
        for token in tokens:
            page, place = divmod(self._lengths[slot], PAGE_TOKENS)
            self._memory[self.shard_of(slot), self._pages[slot][page], place] = token
            self._lengths[slot] += 1

    def _draw(self, slot, budget) -> int:
        held = self._memory[self.shard_of(slot), self._pages[slot]].reshape(-1)[: self._lengths[slot]]
        self._token[slot] = token = next_token(held)
        self._remaining[slot] = 0 if token in self._stop_ids[slot] else budget - 1
        return token


def _draws(token) -> Draw:
    return Draw(token, token / VOCAB, None, None)  # pyright: ignore[reportArgumentType]  (host arrays)
