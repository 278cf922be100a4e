"""Experts with dense weights in C++, on every instruction set of this machine: right, and the same bits each time.

tests/unit/test_dense_experts.py holds them to the contract of every implementation; this is about what C++ can get
wrong.
"""

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import cpu_kernels
from cpu_kernels.dense_experts import expert_mlp
from pallas_kernels import expert_mlp as expert_op
from tests.structures import expert_weights

ROOT = Path(__file__).parents[2]
MISSING = cpu_kernels.why_not()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
INSTRUCTION_SETS: tuple[str, ...] = () if MISSING else cpu_kernels.instruction_sets()
LIMIT = 0.8  # low, so that a good part of the activations is clamped
SHAPES = {  # tokens, hidden, expert hidden, experts, top_k: no two sizes alike
    "one of each": (1, 1, 1, 2, 1),
    "less than a vector": (9, 7, 5, 4, 3),
    "one more than vectors": (70, 33, 49, 5, 3),
    "more tokens than a chunk": (1100, 19, 24, 3, 2),
    "more experts than assignments": (2, 40, 18, 23, 3),
    "no token": (0, 24, 18, 3, 2),
}


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    """Each instruction set of this machine in turn."""
    with cpu_kernels.instruction_set(request.param):
        yield request.param


def call_of(tokens, hidden, inner, experts, top_k):
    """x, expert ids of which some are out of range, routing weights, dense weights, and a gradient of y."""
    rng = np.random.default_rng([tokens, hidden, inner])

    def normal(*sizes: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(sizes), jnp.float32)

    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]) if tokens else np.zeros((0, top_k))
    ids[3::4] = np.where(rng.random(ids[3::4].shape) < 0.5, experts, ids[3::4])
    ids[5:7] = -1
    gate_up, down = normal(experts, 2 * inner, hidden) / hidden**0.5, normal(experts, hidden, inner) / inner**0.5
    biases = normal(experts, 2 * inner), normal(experts, hidden)
    weights = expert_weights(gate_up, None, biases[0], down, None, biases[1])
    return normal(tokens, hidden), jnp.asarray(ids, jnp.int32), normal(tokens, top_k), weights, normal(tokens, hidden)


def with_gradients(run, x, ids, routing_weights, weights, by_y) -> list[np.ndarray]:
    """The result, then the gradients to x, routing weights and the four arrays of weights."""
    y, pull = jax.vjp(lambda x, shares, w: run(x, ids, shares, w, limit=LIMIT), x, routing_weights, weights)
    return [np.asarray(array) for array in jax.tree.leaves((y, pull(by_y)))]


@pytest.fixture(scope="module")
def of_reference():
    """By shape, what the reference gives, which is compiled once."""
    run = functools.partial(with_gradients, expert_op.DENSE_IMPLEMENTATIONS["reference"].run)
    return {shape: run(*call_of(*SHAPES[shape])) for shape in SHAPES if shape != "no token"}


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "no token"])
def test_value_and_gradients(isa, shape, of_reference):
    """Guards the last rows, columns and inputs where nothing divides by a vector, a tile, a panel or a chunk."""
    found = with_gradients(expert_mlp, *call_of(*SHAPES[shape]))
    for a, b in zip(found, of_reference[shape], strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * max(1, np.abs(b).max()))


def test_no_token(isa):
    """Guards an empty batch: gradients of zeros, not what memory held."""
    y, by_x, by_routing, *by_weights = with_gradients(expert_mlp, *call_of(*SHAPES["no token"]))
    assert y.size == by_x.size == by_routing.size == 0
    assert len(by_weights) == 4 and not any(array.any() for array in by_weights)


def test_experts_without_tokens_have_gradients_of_zeros(isa):
    """Guards uninitialised memory: an expert that no token is assigned to, or all of them."""
    x, ids, shares, weights, by_y = call_of(*SHAPES["one more than vectors"])
    for kept in (2, None):
        found = with_gradients(expert_mlp, x, jnp.where(ids == kept, ids, -1), shares, weights, by_y)
        for gradient in found[3:]:
            assert not np.delete(gradient, [] if kept is None else kept, axis=0).any()
            assert kept is None or gradient[kept].any()


def test_the_same_bits_on_every_instruction_set():
    """Guards the one order of adding that all share; portable code has no fused multiplication."""
    found = {}
    for name in INSTRUCTION_SETS[:-1]:
        with cpu_kernels.instruction_set(name):
            found[name] = with_gradients(expert_mlp, *call_of(*SHAPES["one more than vectors"]))
    for name, arrays in found.items():
        for a, b in zip(arrays, next(iter(found.values())), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_tokens_do_not_depend_on_their_neighbours(isa):
    """Guards rows that share a panel, and the order in which a token's assignments are added up."""
    x, ids, shares, weights, by_y = call_of(*SHAPES["one more than vectors"])
    whole = with_gradients(expert_mlp, x, ids, shares, weights, by_y)[:3]
    for at in (slice(0, 1), slice(7, 9), slice(30, 69)):
        alone = with_gradients(expert_mlp, x[at], ids[at], shares[at], weights, by_y[at])[:3]
        for a, b in zip(alone, whole, strict=True):
            np.testing.assert_array_equal(a, b[at])


def test_not_a_number_stays_where_it_is(isa):
    """Guards a run that diverges: the NaN of a token shows in its result and in the gradient, and in no other token."""
    x, ids, shares, weights, by_y = call_of(*SHAPES["less than a vector"])
    y, by_x, _, by_gate_up, *_ = with_gradients(expert_mlp, x.at[2, 3].set(jnp.nan), ids, shares, weights, by_y)
    assert (np.isnan(y).any(axis=1) == (np.arange(len(x)) == 2)).all()
    assert np.isnan(by_x[2]).all() and np.isfinite(np.delete(by_x, 2, axis=0)).all()
    assert set(np.flatnonzero(np.isnan(by_gate_up).any(axis=(1, 2)))) == set(np.asarray(ids[2]))


def digests() -> list[str]:
    """What a call over several chunks amounts to, on this process's threads."""
    found = with_gradients(expert_mlp, *call_of(2100, 40, 24, 5, 3))
    return [hashlib.sha256(array.tobytes()).hexdigest() for array in found]


@pytest.mark.parametrize("threads", [1, 5])
def test_bits_do_not_depend_on_the_number_of_threads(threads):
    """Guards a resumed run on another machine: no sum is cut by threads, and each run gives the same bits."""
    code = "from tests.unit.test_cpu_dense_experts import digests; print(*digests())"
    environment = {**os.environ, "NPROC": str(threads), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == digests() == digests()


def test_inside_loops_and_meshes():
    """Guards gradients from eight devices at once, and through a loop, on a pool of fewer threads than callers."""
    x, ids, shares, weights, by_y = call_of(64, 40, 24, 5, 3)

    def loss(x, weights):
        def layer(_, x):
            return x + 0.1 * expert_mlp(x, ids_here(x), shares[: len(x)], weights, limit=LIMIT)

        return jnp.sum(jax.lax.fori_loop(0, 3, layer, x) * by_y[: len(x)])[None]

    def ids_here(x):
        return ids[: len(x)]

    mesh, rows = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    x = jnp.tile(x[:8], (8, 1))  # the same eight tokens on each device
    run = jax.shard_map(loss, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)
    (by_x, by_weights) = jax.jit(jax.grad(lambda x, w: jnp.sum(run(x, w)), argnums=(0, 1)))(x, weights)
    (alone, once) = jax.jit(jax.grad(lambda x, w: jnp.sum(loss(x, w)), argnums=(0, 1)))(x[:8], weights)
    np.testing.assert_array_equal(np.asarray(by_x), np.tile(alone, (8, 1)))
    for a, b in zip(jax.tree.leaves(by_weights), jax.tree.leaves(once), strict=True):
        np.testing.assert_allclose(a, 8 * b, rtol=1e-5, atol=1e-5)


def test_other_dtypes_and_adapters_are_refused():
    """Guards weights that are read as what they are not, and adapters left out silently."""
    x, ids, shares, weights, _ = call_of(*SHAPES["less than a vector"])
    with pytest.raises(
        TypeError, match=r"x, gate_up, down and their biases of bfloat16, float32, float32, .* expected"
    ):
        expert_mlp(x.astype(jnp.bfloat16), ids, shares, weights, limit=LIMIT)
    adapter = expert_op.Adapter(jnp.zeros((4, 2, 7)), jnp.zeros((4, 10, 2)))
    with pytest.raises(NotImplementedError, match="this kernel has no adapters; the reference has"):
        expert_mlp(x, ids, shares, weights._replace(gate_up_adapter=adapter), limit=LIMIT)


def test_shapes_that_do_not_fit_are_refused():
    """Guards memory: a kernel that trusts a shape reads, or writes, beyond the end of an array."""
    x, ids, shares, weights, by_y = call_of(*SHAPES["less than a vector"])
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"dense_experts: expected x \[T, D\]"):
        expert_mlp(x, ids, shares, weights._replace(down_bias=weights.down_bias[:2]), limit=LIMIT)
    arrays = x, ids, shares, weights.gate_up_blocks, weights.gate_up_bias, weights.down_blocks, weights.down_bias
    results = [jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in (x, *arrays[2:])]
    handler = jax.ffi.ffi_call("cpu_kernels_dense_experts_gradient", results)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"dense_experts_gradient: expected y's gradient \[T, D\]"):
        handler(*arrays, by_y[:3], limit=np.float32(LIMIT))
