"""An engine's programs on caches that are already full, for benchmarks: no long prompt has to be run first.

A step's time does not depend on the values of keys and values, so they are random, one page over and over.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.engine import programs, sampling
from gptoss_jax.engine.programs import (
    NO_TOKEN,
    BatchedPrograms,
    Forms,
    ModelStep,
    SlotBySlotPrograms,
    SlotOptions,
    SlotState,
)
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model import kv_cache
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.config_ranges import MAX_STOP_IDS
from gptoss_jax.model.kv_cache import PAGE_TOKENS, KVCache
from gptoss_jax.model.transformer import DTYPE_POLICIES

GREEDY = SamplingParams(temperature=0.0)
CACHE_DTYPE = DTYPE_POLICIES["bfloat16"].cache


class Load(NamedTuple):
    """What a program takes beside the weights, in its order."""

    cache: KVCache
    options: SlotOptions
    state: SlotState

    def with_length(self, context_tokens: int) -> "Load":
        """The same with each sequence `context_tokens` long, whatever has been drawn."""
        return self._replace(cache=of_length(self.cache, context_tokens))


def start(config: ModelConfig, params: Sequence[SamplingParams], context_tokens: int, room: int) -> Load:
    """A slot for each of `params`, with `context_tokens` in the cache and room for more."""
    capacity, slots = context_tokens + room, len(params)
    sizes = (config, slots, slots * kv_cache.num_pages(capacity), capacity)
    cache = jax.jit(filled, static_argnums=(0, 1, 2, 3))(*sizes)
    return Load(of_length(cache, context_tokens), *drawing(config, params))


def filled(config: ModelConfig, slots: int, pages: int, max_context_tokens: int) -> KVCache:
    """A cache of `slots` slots over a pool of `pages` pages, both full of random keys and values."""
    empty = kv_cache.empty(config, slots=slots, pages=pages, max_context_tokens=max_context_tokens, dtype=CACHE_DTYPE)
    page = jax.random.normal(jax.random.key(0), (PAGE_TOKENS, config.num_kv_heads * config.head_dim), CACHE_DTYPE)

    def fill(layer: jax.Array) -> jax.Array:
        repeats = -(-layer.shape[1] // PAGE_TOKENS)
        return jnp.broadcast_to(jnp.tile(page, (repeats, 1))[: layer.shape[1]], layer.shape)

    return empty._replace(k=tuple(map(fill, empty.k)), v=tuple(map(fill, empty.v)))


def of_length(cache: KVCache, context_tokens: int) -> KVCache:
    """`cache` with each sequence `context_tokens` long, on pages of its own."""
    slots, width = cache.page_table.shape
    own = min(width, _pool_pages(cache) // slots)
    table = np.zeros((slots, width), np.int32)
    table[:, :own] = np.arange(slots * own, dtype=np.int32).reshape(slots, own)
    return cache._replace(page_table=jnp.asarray(table), lengths=jnp.full(slots, context_tokens, jnp.int32))


def _pool_pages(cache: KVCache) -> int:
    return max(layer.shape[0] for layer in cache.k[1::2])  # odd layers attend to everything


def drawing(config: ModelConfig, params: Sequence[SamplingParams]) -> tuple[SlotOptions, SlotState]:
    """Slots that draw for ever, each as its `params` say and from a token of its own."""
    slots = len(params)
    constants = [sampling.constants(each, (), config.vocab_size, config.num_token_ids) for each in params]
    stop_ids = jnp.full((slots, MAX_STOP_IDS), NO_TOKEN, jnp.int32)
    token = jnp.asarray(np.random.default_rng(slots).integers(0, config.num_token_ids, slots), jnp.int32)
    drawn = jnp.zeros((slots, config.vocab_size), jnp.int32)
    options = SlotOptions(stop_ids, jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *constants))
    return options, SlotState(token, jnp.full(slots, 1 << 30, jnp.int32), drawn)


# ---- programs ----


def forms(step: ModelStep, *, slot_by_slot: bool = False) -> Forms:
    """The forms of a step: all slots in one batch, or each by itself."""
    form = SlotBySlotPrograms(step) if slot_by_slot else BatchedPrograms(step)
    return Forms(form, form)


def decode_program(forms: Forms) -> Any:
    """Of (params, *load, steps), jitted: cache and state are donated."""
    return jax.jit(functools.partial(programs.decode, forms.decode), donate_argnums=(1, 3))


def prefill_program(forms: Forms) -> Any:
    """Of (params, *load, chunks, at), jitted: cache and state are donated."""
    return jax.jit(forms.prefill.prefill, donate_argnums=(1, 3))


# ---- the cost model ----


def prefill_operations(config: ModelConfig, slots: int, tokens: int) -> int:
    """Multiplications and additions of a prompt's forward pass: matrices, and attention's two products."""
    expert = 3 * config.intermediate_size * config.hidden_size
    per_layer = config.experts_per_token * expert + config.num_experts * config.hidden_size
    weights = config.attention_bytes // 2 + config.num_layers * per_layer
    windowed = sum(config.has_sliding_window(i) for i in range(config.num_layers))
    window = min(tokens, config.sliding_window)
    keys = (config.num_layers - windowed) * tokens * (tokens + 1) // 2
    keys += windowed * (window * (window + 1) // 2 + (tokens - window) * window)
    attention = 4 * config.num_heads * config.head_dim * keys
    return slots * (2 * weights * tokens + attention + config.unembedding_bytes)
