"""Each form of each kernel against float32 and against itself, by the ops' contracts alone.

Three checks of each: what is exact must be so, bit for bit (one-hot activations give the weights), or every row near
the reference in float32; the same call gives the same bits, twenty times (no kernel here has atomics, so a difference
is a race); memory that nobody wrote holds NaN, in pools, rings and in what the device hands out.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import smoke_attention, smoke_experts, smoke_model, smoke_placement
from benchmarks.gpu.comparing import Compare
from benchmarks.gpu.results import Results
from benchmarks.gpu.smoke_groups import GROUPS
from gptoss_jax.errors import GptossError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.layers import Kernels

NAN_BYTES = 256 << 20  # left behind in the device's memory before a call


class Smoke(NamedTuple):
    """What checks need."""

    results: Results
    config: ModelConfig
    kernels: Kernels
    repeats: int

    def judge(self, what: str, run: Callable[..., Any], arguments: tuple[Any, ...], compare: Compare) -> bool:
        """Runs a jitted function several times, which must give the same bits, and compares what it gives."""
        first = None
        for call in range(self.repeats):
            leave_nan_behind()
            found = np.asarray(run(*arguments))
            first = found if first is None else first
            if found.tobytes() != first.tobytes():
                wrong = np.count_nonzero(found.reshape(-1).view(np.uint8) != first.reshape(-1).view(np.uint8))
                said = f"call {call} differs from the first in {wrong} bytes: a race"
                return self.results.judge({"call": call, "bytes": wrong}, what, said, ok=False)
        return self.verdict(what, first, compare)

    def verdict(self, what: str, found: Any, compare: Compare) -> bool:
        """Compares, keeps what comes out, and gives whether it is right."""
        ok, said, entry = compare(np.asarray(found))
        return self.results.judge(entry, what, said, ok=ok)


def leave_nan_behind() -> None:
    """Fills memory with NaN and frees it, so that what a kernel does not write shows."""
    if jax.default_backend() == "gpu":
        jnp.full((NAN_BYTES // 4,), jnp.nan, jnp.float32).block_until_ready()


CHECKS: dict[str, Callable[..., Any]] = {
    "exact": smoke_experts.exact,
    "gated": smoke_experts.gated,
    "experts": smoke_experts.experts,
    "paged": smoke_attention.paged,
    "windowed": smoke_attention.windowed,
    "placed": smoke_placement.placed,
    "model": smoke_model.model,
}


def run(results: Results, config: ModelConfig, kernels: Kernels, *, sizes: str, group: str, repeats: int) -> None:
    """One group. An error of the compiler or the device ends a case, and what follows says whether all of it is lost.

    Raises:
        GptossError: there is no such group.
    """
    if group not in GROUPS[sizes]:
        raise GptossError(f"smoke has no group {group}, expected one of {', '.join(GROUPS[sizes])}")
    smoke = Smoke(results, config, kernels, repeats)
    for case in GROUPS[sizes][group]:
        what = f"{case.check} {', '.join(f'{name} {value}' for name, value in case.sizes.items())}"[:90].rstrip()
        try:
            functools.partial(CHECKS[case.check], smoke, what)(**case.sizes)
        except (jax.errors.JaxRuntimeError, NotImplementedError, TypeError, ValueError) as error:
            results.judge({"error": str(error)[:2000]}, what, str(error)[:300], ok=False)
