"""Two layers of true width: greedy tokens in few dispatches and in many, and logits beside the portable kernels'.

Shows what no kernel alone does: donated caches over many dispatches, a ring that goes round, programs as CUDA graphs
(the group runs in two processes, of which one has none; the driver compares their tokens).
"""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import under_load
from benchmarks.gpu import weights
from benchmarks.gpu.comparing import Compare, exactly, near
from benchmarks.gpu.models import Whole
from gptoss_jax.model import layers
from gptoss_jax.model.transformer import step

if TYPE_CHECKING:
    from benchmarks.gpu.smoke import Smoke

SLOTS = 2
BEFORE_TOKENS, TOKENS = 100, 200  # the ring of 128 goes round twice
DISPATCHES = (64, 64, 64, 8)  # steps in each, TOKENS in all
WIDTHS = (1, 40)  # of the chunks whose logits are compared
LOGITS_ERROR = 3e-2  # of a sequence's


def model(smoke: "Smoke", what: str) -> None:
    """See the top of this file."""
    whole = Whole.of(smoke.config, smoke.kernels)
    separate = whole.separate_params()
    params = whole.joined(separate)
    program = under_load.decode_program(under_load.forms(whole.step))
    few, kept = _drawn(whole, program, params, DISPATCHES)
    many, held = _drawn(whole, program, params, (1,) * TOKENS)
    smoke.results.add("drawn", {"tokens": few.tolist()}, f"{what}: {few.shape[1]} greedy tokens of {SLOTS} slots drawn")
    smoke.verdict(f"{what}: {TOKENS} dispatches draw what {len(DISPATCHES)} do", many, exactly(few))
    smoke.verdict(f"{what}: tokens are tokens", few.min(), _at_least(0))
    same = sum(np.count_nonzero(a != b) for a, b in zip(kept, held, strict=True))
    smoke.verdict(f"{what}: bits of the caches that differ", same, exactly(0))
    portable = weights.published_params(whole.declared, whole.layout, separate)
    _compare_logits(smoke, what, (whole, params), (Whole.of(smoke.config, layers.Kernels()), portable))


def _drawn(whole: Whole, program: Any, params: Any, dispatches: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tokens [B, T], and the caches' bits then."""
    cache, options, state = under_load.start(whole.config, [under_load.GREEDY] * SLOTS, BEFORE_TOKENS, TOKENS)
    found = []
    for steps in dispatches:
        draws, cache, state = program(params, cache, options, state, jnp.int32(steps))
        found.append(np.asarray(draws.token)[:, :steps])
    return np.concatenate(found, axis=1), [np.asarray(x).view(np.uint16) for x in (*cache.k, *cache.v)]


def _at_least(least: int) -> Compare:
    def compare(found: np.ndarray) -> tuple[bool, str, dict[str, Any]]:
        return bool(found >= least), f"the least is {int(found)}", {"least": int(found)}

    return compare


def _compare_logits(smoke: "Smoke", what: str, *models: tuple[Whole, Any]) -> None:
    """A token and a chunk after a full cache, each sequence's logits beside those of the portable kernels.

    `models` are a model and its weights, with the kernels and with the portable ones.
    """
    config = smoke.config
    for width in WIDTHS:
        ids = jax.random.randint(jax.random.key(width), (SLOTS, width), 0, config.num_token_ids, jnp.int32)
        counts = jnp.full(SLOTS, width, jnp.int32)
        cache = under_load.start(config, [under_load.GREEDY] * SLOTS, BEFORE_TOKENS, TOKENS).cache
        found, expected = (
            jax.jit(functools.partial(step, whole.declared))(params, ids, counts, cache)[0] for whole, params in models
        )
        smoke.verdict(f"{what}: logits after a chunk of {width}", found, near(expected, LOGITS_ERROR))
