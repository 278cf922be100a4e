"""Speed of the C++ experts beside a plainer kernel in the same process: a change that halves it must not pass."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
from cpu_kernels.expert_mlp import expert_mlp
from tests.structures import expert_weights

MISSING = cpu_kernels.why_not()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
INSTRUCTION_SETS: tuple[str, ...] = () if MISSING else cpu_kernels.instruction_sets()
VECTORS = [name for name in INSTRUCTION_SETS if name.startswith("avx")]
HIDDEN, INNER = 2880, 2880  # gpt-oss' own, of one expert
ROUNDS = 15

# At least so many times the speed of exact float32 products by the same instruction set: 1.1 to 1.65 where measured, so
# that half of it is below, and what other work takes of a machine is not.
TIMES_FLOAT32 = 0.75
TOKENS = {"decode": 1, "prefill": 48}


@pytest.fixture(scope="module")
def weights():
    """One expert of true width: its weights stay in cache, so that arithmetic shows."""
    rng = np.random.default_rng(0)

    def packed(outputs, inputs):
        blocks = rng.integers(0, 256, (1, outputs, inputs // 32, 16), dtype=np.uint8)
        return blocks, rng.integers(119, 123, (1, outputs, inputs // 32), dtype=np.uint8)

    def bias(outputs):
        return np.zeros((1, outputs), jnp.bfloat16)

    arrays = *packed(2 * INNER, HIDDEN), bias(2 * INNER), *packed(HIDDEN, INNER), bias(HIDDEN)
    return jax.tree.map(jnp.asarray, expert_weights(*arrays))


def _seconds(run, x, *rest) -> float:
    began = time.perf_counter()
    run(x, *rest).block_until_ready()
    return time.perf_counter() - began


@pytest.mark.parametrize("case", TOKENS)
@pytest.mark.parametrize("isa", VECTORS)
def test_int16_blocks_keep_their_speed_beside_float32(isa, case, weights):
    """Guards what whole numbers are for: both take turns and medians are compared, as machines do other things."""
    tokens = TOKENS[case]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, HIDDEN)), jnp.float32)
    rest = jnp.zeros((tokens, 1), jnp.int32), jnp.ones((tokens, 1), jnp.float32), weights
    run = jax.jit(functools.partial(expert_mlp, limit=7.0))
    with cpu_kernels.instruction_set(isa):
        inputs = {"float32": x, "bfloat16": x.astype(jnp.bfloat16)}
        for each in inputs.values():
            _seconds(run, each, *rest)
        rounds = [{name: _seconds(run, each, *rest) for name, each in inputs.items()} for _ in range(ROUNDS)]
    ratio = statistics.median(r["float32"] for r in rounds) / statistics.median(r["bfloat16"] for r in rounds)
    print(f"{isa}, {case}: {ratio:.2f} times the speed of float32")
    assert ratio >= TIMES_FLOAT32
