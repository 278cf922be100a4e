"""What an engine runs on devices, as pure functions of cache and slots' state; the home of batch invariance.

Two forms behind one interface: all slots in one batch, or one slot at a time. `choose` says which of them an engine
needs so that a request's bits depend on no other request.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from gptoss_jax.engine import sampling
from gptoss_jax.engine.sampling import Draw, Sampling
from gptoss_jax.engine.sampling_params import MAX_TOP_LOGPROBS
from gptoss_jax.model import kv_cache
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.invariant_sum import row_sum
from gptoss_jax.model.kv_cache import KVCache, Rings
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.transformer import Model, Params, step

MAX_STEPS_PER_DISPATCH = 64
NO_TOKEN = -2  # in place of a token: the slot took no step


class SlotOptions(NamedTuple):
    """What B slots were admitted with: constant until the next request takes the slot."""

    stop_ids: Int32[Array, "B Z"]
    sampling: Sampling


class SlotState(NamedTuple):
    """What a step changes for B slots, beside the cache; a step gives all of it anew.

    A slot is active while it has tokens left to draw.
    """

    token: Int32[Array, "B"]  # drawn, not yet in the cache
    remaining: Int32[Array, "B"]
    drawn: Int32[Array, "B V"]  # how often the answer holds each id


OPTIONS_AXES: Any = SlotOptions(stop_ids=("batch", None), sampling=sampling.AXES)  # pyright: ignore[reportArgumentType]
STATE_AXES: Any = SlotState._make([("batch",), ("batch",), ("batch", "vocab")])
DRAW_AXES: Any = Draw._make([("batch",), ("batch",), ("batch", None), ("batch", None)])


class Chunks(NamedTuple):
    """What goes into the cache in one step, for C slots."""

    tokens: Int32[Array, "C T"]
    counts: Int32[Array, "C"]  # tokens of each chunk; 0: the slot takes no part
    budget: Int32[Array, "C"]  # tokens that may be drawn after the chunk; 0: the prompt goes on


def admit(
    lengths: Int32[Array, "B"],
    options: SlotOptions,
    state: SlotState,
    slot: Int32[Array, ""],
    cached: Int32[Array, ""],
    new: Any,
) -> tuple[Array, SlotOptions, SlotState]:
    """The slot with `new` options and state, without their leading axis, and `cached` tokens in its cache."""

    def put(every: Array, one: Array) -> Array:
        return every.at[slot].set(one)

    return lengths.at[slot].set(cached), *jax.tree.map(put, (options, state), new)


class RingCopy(NamedTuple):
    """Which rings are copied to which, counted within the data shard."""

    source: Int32[Array, "shards"]
    target: Int32[Array, "shards"]
    times: Int32[Array, "shards"]  # 1 where it is made, 0 in the other shards


def copy_rings(sharding: Sharding, config: ModelConfig, source: Rings, target: Rings, copy: RingCopy) -> Rings:
    """`target` with a copy of one of the rings of `source`: from a slot to a snapshot, or back.

    In place, as bits in a loop, for the reason that `kv_cache` writes them so.
    """

    def on_shard(source: Rings, target: Rings, copy: RingCopy) -> Rings:
        def copied(x: Array, y: Array) -> Array:
            new = _as_bits(jax.lax.dynamic_slice_in_dim(x, copy.source[0], 1))
            pasted = jax.lax.dynamic_update_slice_in_dim(_as_bits(y), new, copy.target[0], 0)
            return jax.lax.bitcast_convert_type(pasted, y.dtype)

        def copy_once(_, target: Rings) -> Rings:
            return jax.tree.map(copied, source, target)

        return jax.lax.fori_loop(0, copy.times[0], copy_once, target)

    axes = kv_cache.ring_axes(config)
    of_shards: Any = RingCopy(("batch",), ("batch",), ("batch",))  # pyright: ignore[reportArgumentType]
    return sharding.map(on_shard, in_axes=(axes, axes, of_shards), out_axes=axes)(source, target, copy)


def _as_bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def halt(remaining: Int32[Array, "B"], halted: Bool[Array, "B"]) -> Int32[Array, "B"]:
    """Tokens that slots may still draw, where some are `halted`."""
    return jnp.where(halted, 0, remaining)


# ---- one step ----


class ModelStep(NamedTuple):
    """One step of the model and its draw, specialised to what is known when it is compiled."""

    model: Model
    config: ModelConfig
    sharding: Sharding
    asked: sampling.Asked | None = None  # of all the steps that it is called for

    def __call__(
        self, params: Params, cache: KVCache, options: SlotOptions, state: SlotState, chunks: Chunks
    ) -> tuple[Draw, KVCache, SlotState]:
        """The chunks go into the cache, and slots with a budget draw the token that follows."""
        logits, cache = step(self.model, params, chunks.tokens, chunks.counts, cache)
        total = row_sum(self.sharding.mesh.size)
        draw = sampling.sample(
            logits, options.sampling, state.drawn, cache.lengths, self.config.num_token_ids, total, self.asked
        )
        draws = chunks.budget > 0
        ended = sampling.is_stop(draw.token, options.stop_ids) | (draw.token == sampling.FAULTY)
        state = SlotState(
            token=jnp.where(draws, jnp.maximum(draw.token, 0), state.token),
            remaining=jnp.where(draws, jnp.where(ended, 0, chunks.budget - 1), state.remaining),
            drawn=sampling.record(state.drawn, draw.token, draws),
        )
        return draw._replace(token=jnp.where(draws, draw.token, NO_TOKEN)), cache, state


def _next_chunks(state: SlotState) -> Chunks:
    """Of decoding: the token drawn last, for every active slot."""
    return Chunks(state.token[:, None], (state.remaining > 0).astype(jnp.int32), state.remaining)


# ---- two forms of a step ----


@runtime_checkable
class Programs(Protocol):
    """How slots share the arithmetic of a step."""

    @property
    def num_chunks(self) -> int | None:
        """C, the chunks that one prefill takes: one for each data shard; None: one for each slot."""
        ...

    def of_dispatch(self, options: SlotOptions) -> "Programs":
        """The same for many steps with these options: what follows from them is computed once."""
        ...

    def prefill(
        self,
        params: Params,
        cache: KVCache,
        options: SlotOptions,
        state: SlotState,
        chunks: Chunks,
        at: Int32[Array, "shards"],
    ) -> tuple[Draw, KVCache, SlotState]:
        """A chunk of each prompt; `at` is the slot of each shard's chunk, counted within the shard, where C asks it."""
        ...

    def decode_step(
        self, params: Params, cache: KVCache, options: SlotOptions, state: SlotState
    ) -> tuple[Draw, KVCache, SlotState]:
        """The next token of each active slot."""
        ...


class BatchedPrograms(NamedTuple):
    """All slots in one batch: weights are read once for all of them."""

    step: ModelStep

    num_chunks = None

    def of_dispatch(self, options):
        """See `Programs`."""
        return self._replace(step=self.step._replace(asked=sampling.Asked.of(options.sampling)))

    def prefill(self, params, cache, options, state, chunks, at):
        """A chunk of each slot's prompt; slots without one have a chunk of no tokens."""
        del at  # every slot has a chunk
        return self.step(params, cache, options, state, chunks)

    def decode_step(self, params, cache, options, state):
        """The next token of each active slot; the others take part with no token."""
        return self.step(params, cache, options, state, _next_chunks(state))


class SlotBySlotPrograms(NamedTuple):
    """One slot of each data shard at a time, in a loop whose length is data: only active slots cost anything.

    The arithmetic is compiled for one sequence whatever the batch, so that its sums are always in the same order.
    """

    step: ModelStep

    @property
    def num_chunks(self) -> int:
        """C, one chunk for each data shard."""
        return self.step.sharding.size("batch")

    def of_dispatch(self, options):
        """See `Programs`; one slot asks for less than all."""
        del options
        return self

    def prefill(self, params, cache, options, state, chunks, at):
        """A chunk of one prompt for each data shard, that of slot `at`, whose cache and state alone are taken out."""
        sharding, cache_axes = self.step.sharding, kv_cache.axes(self.step.config)
        its_cache = sharding.take_slot(cache, at, cache_axes)
        its_options = sharding.take_slot(options, at, OPTIONS_AXES)
        its_state = sharding.take_slot(state, at, STATE_AXES)
        draw, its_cache, its_state = self.step(params, its_cache, its_options, its_state, chunks)
        cache = sharding.put_slot(cache, its_cache, at, cache_axes)
        return draw, cache, sharding.put_slot(state, its_state, at, STATE_AXES)

    def decode_step(self, params, cache, options, state):
        """The next token of each active slot: as many iterations as the busiest data shard has active slots."""
        sharding = self.step.sharding
        active = (state.remaining > 0).reshape(self.num_chunks, -1)
        order = jnp.argsort(~active, axis=1, stable=True).astype(jnp.int32)  # the active slots of each shard first

        def one_slot(i, carry):
            draws, cache, state = carry
            at = order[:, i]
            chunks = _next_chunks(sharding.take_slot(state, at, STATE_AXES))
            draw, cache, state = self.prefill(params, cache, options, state, chunks, at)
            return sharding.put_slot(draws, draw, at, DRAW_AXES), cache, state

        most = jnp.max(jnp.sum(active, axis=1, dtype=jnp.int32))
        return jax.lax.fori_loop(0, most, one_slot, (_no_draw(state.token.shape[0]), cache, state))


class Forms(NamedTuple):
    """The form in which prompts are read, and the one in which answers are drawn."""

    prefill: Programs
    decode: Programs


def choose(model: Model, config: ModelConfig, sharding: Sharding, *, deterministic: bool) -> Forms:
    """The forms that keep every bit of a request the same in any company, if that is asked; else the fast ones.

    Kernels that are batch invariant add in one order whatever the batch, so that decoding may share a batch; sums over
    several devices are XLA's, whose order follows from the shapes. A prompt's chunks follow from its own length only
    where it is read alone.
    """
    one_step = ModelStep(model, config, sharding)
    batched, slot_by_slot = BatchedPrograms(one_step), SlotBySlotPrograms(one_step)
    if not deterministic:
        return Forms(batched, batched)
    invariant = model.batch_invariant and sharding.mesh.size == 1
    return Forms(slot_by_slot, batched if invariant else slot_by_slot)


def decode(
    programs: Programs,
    params: Params,
    cache: KVCache,
    options: SlotOptions,
    state: SlotState,
    steps: Int32[Array, ""],
) -> tuple[Draw, KVCache, SlotState]:
    """Up to `steps` tokens of each active slot: draws [B, MAX_STEPS_PER_DISPATCH, ...]; ends when no slot is active."""

    def goes_on(carry):
        i, _, _, state = carry
        return (i < steps) & jnp.any(state.remaining > 0)

    def one_step(carry):
        i, draws, cache, state = carry
        draw, cache, state = programs.decode_step(params, cache, options, state)
        return i + 1, jax.lax.dynamic_update_slice_in_dim(draws, packed(draw)[:, None], i, 1), cache, state

    programs, draws = programs.of_dispatch(options), no_draws(state.token.shape[0])
    _, draws, cache, state = jax.lax.while_loop(goes_on, one_step, (jnp.int32(0), draws, cache, state))
    return unpacked(draws), cache, state


def no_draws(slots: int) -> Int32[Array, "B steps Z"]:
    """Of a dispatch in which nobody has taken a step yet, packed."""
    return jnp.repeat(packed(_no_draw(slots))[:, None], MAX_STEPS_PER_DISPATCH, axis=1)


def packed(draw: Draw) -> Int32[Array, "B Z"]:
    """A draw as one array, so that a step writes down one."""
    numbers = [draw.token[:, None], draw.logprob[:, None], draw.top_ids, draw.top_logprobs]
    return jnp.concatenate([jax.lax.bitcast_convert_type(x, jnp.int32) for x in numbers], axis=1)


def unpacked(numbers: Int32[Array, "*steps Z"]) -> Draw:
    """The inverse of `packed`, of many steps."""
    token, logprob, top_ids, top_logprobs = jnp.split(numbers, (1, 2, 2 + MAX_TOP_LOGPROBS), axis=-1)
    logprob, top_logprobs = (jax.lax.bitcast_convert_type(x, jnp.float32) for x in (logprob, top_logprobs))
    return Draw(token[..., 0], logprob[..., 0], top_ids, top_logprobs)


def _no_draw(slots: int) -> Draw:
    shape = (slots, MAX_TOP_LOGPROBS)
    return Draw(
        token=jnp.full(slots, NO_TOKEN, jnp.int32),
        logprob=jnp.zeros(slots, jnp.float32),
        top_ids=jnp.zeros(shape, jnp.int32),
        top_logprobs=jnp.zeros(shape, jnp.float32),
    )
