"""Decoding steps in which slots are held to masks and forced ids: compiled when the first such request comes.

The masks meet the bans in `Sampling.allowed`, so that a step is what it is without them, to the last operation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, UInt32

from gptoss_jax.engine import programs
from gptoss_jax.engine.programs import Programs, SlotOptions, SlotState
from gptoss_jax.engine.sampling import MASK_BITS, Draw
from gptoss_jax.model.kv_cache import KVCache
from gptoss_jax.model.transformer import Params


class Holds(NamedTuple):
    """What slots are held to during one dispatch; `held.HeldSlots` says what each array means."""

    mask: UInt32[Array, "B V32"]
    stands_below: Int32[Array, "B"]
    forced: Int32[Array, "B S"]
    takes_part: Bool[Array, "B"]


AXES: Any = Holds._make([("batch", None), ("batch",), ("batch", None), ("batch",)])


def decode_held(
    forms: Programs,
    params: Params,
    cache: KVCache,
    options: SlotOptions,
    state: SlotState,
    steps: Int32[Array, ""],
    holds: Holds,
) -> tuple[Draw, KVCache, SlotState]:
    """As `programs.decode`; a slot that pauses keeps its state, and takes no further step of this dispatch."""
    forms, allowed = forms.of_dispatch(options), options.sampling.allowed & holds.mask

    def goes_on(carry):
        i, going, _, _, state = carry
        return (i < steps) & jnp.any(going & (state.remaining > 0))

    def one_step(carry):
        i, going, draws, cache, state = carry
        now, later = _forced(holds, i), _forced(holds, i + 1)
        step_options = _with_allowed(options, jnp.where((now >= 0)[:, None], _only(now, allowed.shape[1]), allowed))
        visible = state._replace(remaining=jnp.where(going, state.remaining, 0))
        draw, cache, new = forms.decode_step(params, cache, step_options, visible)
        state = new._replace(remaining=jnp.where(going, new.remaining, state.remaining))
        going = going & jnp.where(now >= 0, later >= 0, draw.token < holds.stands_below)
        draws = jax.lax.dynamic_update_slice_in_dim(draws, programs.packed(draw)[:, None], i, 1)
        return i + 1, going, draws, cache, state

    draws = programs.no_draws(state.token.shape[0])
    carry = (jnp.int32(0), holds.takes_part, draws, cache, state)
    _, _, draws, cache, state = jax.lax.while_loop(goes_on, one_step, carry)
    return programs.unpacked(draws), cache, state


def _forced(holds: Holds, step: Int32[Array, ""]) -> Int32[Array, "B"]:
    """The id that comes at a step whatever is drawn; negative where there is none."""
    at_step = jax.lax.dynamic_index_in_dim(holds.forced, step, axis=1, keepdims=False)
    return jnp.where(step < holds.forced.shape[1], at_step, -1)


def _only(token: Int32[Array, "B"], words: int) -> UInt32[Array, "B V32"]:
    """The mask that allows one id."""
    bit = jnp.uint32(1) << (token % MASK_BITS).astype(jnp.uint32)
    at = jnp.arange(words, dtype=jnp.int32) == (token // MASK_BITS)[:, None]
    return jnp.where(at, bit[:, None], jnp.uint32(0))


def _with_allowed(options: SlotOptions, allowed: UInt32[Array, "B V32"]) -> SlotOptions:
    return options._replace(sampling=options.sampling._replace(allowed=allowed))
