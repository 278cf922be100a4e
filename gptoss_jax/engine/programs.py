"""What an engine runs on the devices, as pure functions of its cache and its rows: admit, prefill, decode."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from gptoss_jax.engine import sampling
from gptoss_jax.engine.sampling import Draw, Sampling
from gptoss_jax.model import kv_cache
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.kv_cache import KVCache
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.transformer import Model, Params, step

MAX_STEPS_PER_DISPATCH = 64
NO_TOKEN = -2  # in place of a token: the row took no step


class RowState(NamedTuple):
    """What decoding carries for B rows beside the cache. A row is active while it has tokens left to draw."""

    token: Int32[Array, "B"]  # drawn, not yet in the cache
    remaining: Int32[Array, "B"]
    stop_ids: Int32[Array, "B Z"]
    sampling: Sampling


STATE_AXES = RowState._make([("batch",), ("batch",), ("batch", None), sampling.AXES])
DRAWS_AXES = Draw._make([("batch", None), ("batch", None), ("batch", None, None), ("batch", None, None)])
"""Of the draws of several steps: [B, steps, ...]."""


def admit(
    cache: KVCache, state: RowState, i: Int32[Array, ""], pages: Int32[Array, "M"], row: RowState
) -> tuple[KVCache, RowState]:
    """Row i, as new: its pages, nothing in them, and how it samples and stops."""
    put = lambda all_rows, new: all_rows.at[i].set(new)  # noqa: E731
    cache = cache._replace(page_table=put(cache.page_table, pages), lengths=put(cache.lengths, 0))
    return cache, jax.tree.map(put, state, row)


class Programs(NamedTuple):
    """What the programs are specialised to, beside shapes.

    Rows run alone, one at a time (one of each data shard), where a row's arithmetic is to have the same shapes whatever
    the batch: sums may be in an order that follows from the shapes.
    """

    model: Model
    config: ModelConfig
    sharding: Sharding
    prefills_alone: bool
    decodes_alone: bool

    def prefill(
        self,
        params: Params,
        cache: KVCache,
        state: RowState,
        tokens: Int32[Array, "C T"],
        counts: Int32[Array, "C"],
        budget: Int32[Array, "C"],
        at: Int32[Array, "shards"],
    ) -> tuple[Draw, KVCache, RowState]:
        """A chunk of each prompt, and what is drawn behind it: C is all rows, or those of one turn.

        Args:
            params: the model's weights.
            cache: of all rows; so is `state`.
            state: how they draw.
            tokens: the chunks.
            counts: tokens of each chunk; 0: the row takes no part.
            budget: tokens that may be drawn behind the chunk; 0: the prompt goes on.
            at: where they run alone, which of its rows each shard runs.
        """
        if not self.prefills_alone:
            return self._advance(params, cache, state, tokens, counts, budget)
        return self._advance_row(params, cache, state, tokens, counts, budget, at)

    def decode(
        self, params: Params, cache: KVCache, state: RowState, steps: Int32[Array, ""]
    ) -> tuple[Draw, KVCache, RowState]:
        """Up to `steps` tokens of each active row: draws [B, MAX_STEPS_PER_DISPATCH, ...]."""

        def goes_on(carry):
            i, _, _, state = carry
            return (i < steps) & jnp.any(state.remaining > 0)

        def one_step(carry):
            i, draws, cache, state = carry
            draw, cache, state = self._decode_step(params, cache, state)
            return i + 1, jax.tree.map(lambda all_steps, new: all_steps.at[:, i].set(new), draws, draw), cache, state

        empty = _no_draw(state.token.shape[0])
        draws = jax.tree.map(lambda x: jnp.repeat(x[:, None], MAX_STEPS_PER_DISPATCH, axis=1), empty)
        return jax.lax.while_loop(goes_on, one_step, (jnp.int32(0), draws, cache, state))[1:]

    def _decode_step(self, params: Params, cache: KVCache, state: RowState) -> tuple[Draw, KVCache, RowState]:
        if not self.decodes_alone:
            active = (state.remaining > 0).astype(jnp.int32)
            return self._advance(params, cache, state, state.token[:, None], active, state.remaining)
        shards = self.sharding.size("batch")
        active = (state.remaining > 0).reshape(shards, -1)
        order = jnp.argsort(~active, axis=1, stable=True).astype(jnp.int32)  # the active rows of each shard first

        def one_row(i, carry):
            draws, cache, state = carry
            at = order[:, i]
            mine = self.sharding.take_slot(state, at, STATE_AXES)
            count = (mine.remaining > 0).astype(jnp.int32)
            draw, cache, state = self._advance_row(params, cache, state, mine.token[:, None], count, mine.remaining, at)
            return self.sharding.put_slot(draws, draw, at, _DRAW_AXES), cache, state

        most = jnp.max(jnp.sum(active, axis=1, dtype=jnp.int32))
        return jax.lax.fori_loop(0, most, one_row, (_no_draw(state.token.shape[0]), cache, state))

    def _advance_row(
        self, params: Params, cache: KVCache, state: RowState, tokens, counts, budget, at
    ) -> tuple[Draw, KVCache, RowState]:
        """`_advance` of one row of each shard."""
        cache_axes = kv_cache.axes(self.config)
        cache_row = self.sharding.take_slot(cache, at, cache_axes)
        state_row = self.sharding.take_slot(state, at, STATE_AXES)
        draw, cache_row, state_row = self._advance(params, cache_row, state_row, tokens, counts, budget)
        cache = self.sharding.put_slot(cache, cache_row, at, cache_axes)
        # Only what a step changes: XLA copies a row's bias, as wide as the vocabulary, if it is put back.
        changed = lambda s: (s.token, s.remaining, s.sampling.drawn)  # noqa: E731
        token, remaining, drawn = self.sharding.put_slot(changed(state), changed(state_row), at, changed(STATE_AXES))
        state = state._replace(token=token, remaining=remaining, sampling=state.sampling._replace(drawn=drawn))
        return draw, cache, state

    def _advance(
        self, params: Params, cache: KVCache, state: RowState, tokens, counts, budget
    ) -> tuple[Draw, KVCache, RowState]:
        """One step: `counts` of `tokens` go in, and rows with a `budget` draw the token behind them."""
        logits, cache = step(self.model, params, tokens, counts, cache)
        draw = sampling.sample(logits, state.sampling, cache.lengths, self.config.num_token_ids)
        draws = budget > 0
        ended = sampling.is_stop(draw.token, state.stop_ids) | (draw.token == sampling.FAULTY)
        state = RowState(
            token=jnp.where(draws, jnp.maximum(draw.token, 0), state.token),
            remaining=jnp.where(draws, jnp.where(ended, 0, budget - 1), state.remaining),
            stop_ids=state.stop_ids,
            sampling=sampling.record(state.sampling, draw.token, draws),
        )
        return draw._replace(token=jnp.where(draws, draw.token, NO_TOKEN)), cache, state


_DRAW_AXES = jax.tree.map(lambda a: (a[0], *a[2:]), DRAWS_AXES, is_leaf=lambda a: isinstance(a[0], str))


def _no_draw(rows: int) -> Draw:
    shape = (rows, sampling.MAX_TOP_LOGPROBS)
    return Draw(
        token=jnp.full(rows, NO_TOKEN, jnp.int32),
        logprob=jnp.zeros(rows, jnp.float32),
        top_ids=jnp.zeros(shape, jnp.int32),
        top_logprobs=jnp.zeros(shape, jnp.float32),
    )
