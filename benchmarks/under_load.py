"""An engine's programs on caches that are already full, for benchmarks: no long prompt has to be run first.

A step's time does not depend on the values of keys and values, so they are random, one page over and over.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.engine import sampling
from gptoss_jax.engine.programs import RowState
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model import kv_cache
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.kv_cache import PAGE_TOKENS, KVCache
from gptoss_jax.model.transformer import DTYPE_POLICIES

NO_STOP = -2
CACHE_DTYPE = DTYPE_POLICIES["bfloat16"].cache


def start(config: ModelConfig, rows: int, context_tokens: int, room: int) -> tuple[KVCache, RowState]:
    """Rows with `context_tokens` behind them and room for more, each on a token of its own."""
    capacity = context_tokens + room
    sizes = (config, rows, rows * kv_cache.num_pages(capacity), capacity)
    cache = jax.jit(filled, static_argnums=(0, 1, 2, 3))(*sizes)
    return behind(cache, context_tokens), greedy(config, rows)


def filled(config: ModelConfig, rows: int, pages: int, max_context_tokens: int) -> KVCache:
    """A cache of `rows` rows over a pool of `pages` pages, both full of random keys and values."""
    empty = kv_cache.empty(config, rows=rows, pages=pages, max_context_tokens=max_context_tokens, dtype=CACHE_DTYPE)
    page = jax.random.normal(jax.random.key(0), (PAGE_TOKENS, config.num_kv_heads * config.head_dim), CACHE_DTYPE)

    def fill(layer: jax.Array) -> jax.Array:
        repeats = -(-layer.shape[1] // PAGE_TOKENS)
        return jnp.broadcast_to(jnp.tile(page, (repeats, 1))[: layer.shape[1]], layer.shape)

    return empty._replace(k=tuple(map(fill, empty.k)), v=tuple(map(fill, empty.v)))


def behind(cache: KVCache, context_tokens: int) -> KVCache:
    """`cache` with each row `context_tokens` long, on pages of its own."""
    rows, width = cache.page_table.shape
    own = min(width, _pool_pages(cache) // rows)
    table = np.zeros((rows, width), np.int32)
    table[:, :own] = np.arange(rows * own, dtype=np.int32).reshape(rows, own)
    return cache._replace(page_table=jnp.asarray(table), lengths=jnp.full(rows, context_tokens, jnp.int32))


def _pool_pages(cache: KVCache) -> int:
    return max(layer.shape[0] for layer in cache.k[1::2])  # odd layers attend to everything


def greedy(config: ModelConfig, rows: int) -> RowState:
    """Rows that draw the likeliest token for ever, each from a token of its own."""
    drawn = sampling.row(SamplingParams(temperature=0.0), (), config.vocab_size, config.num_token_ids)
    every = jax.tree.map(lambda x: jnp.asarray(np.stack([x] * rows)), drawn)
    token = jnp.asarray(np.random.default_rng(rows).integers(0, config.num_token_ids, rows), jnp.int32)
    stop_ids = jnp.full((rows, 8), NO_STOP, jnp.int32)
    return RowState(token, jnp.full(rows, 1 << 30, jnp.int32), stop_ids, every)


def prefill_operations(config: ModelConfig, rows: int, tokens: int) -> int:
    """Multiplications and additions of a prompt's forward pass: matrices, and attention's two products."""
    expert = 3 * config.intermediate_size * config.hidden_size
    per_layer = config.experts_per_token * expert + config.num_experts * config.hidden_size
    weights = config.attention_bytes // 2 + config.num_layers * per_layer
    banded = sum(config.has_sliding_window(i) for i in range(config.num_layers))
    window = min(tokens, config.sliding_window)
    keys = (config.num_layers - banded) * tokens * (tokens + 1) // 2
    keys += banded * (window * (window + 1) // 2 + (tokens - window) * window)
    attention = 4 * config.num_heads * config.head_dim * keys
    return rows * (2 * weights * tokens + attention + config.unembedding_bytes)
