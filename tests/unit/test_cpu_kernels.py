"""The C++ matrix products on every instruction set of this machine: right, exact, the same bits in any batch.

tests/unit/test_kernels.py holds them to the contract of every implementation; this is about what C++ can get wrong.
"""

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import cpu_kernels
from cpu_kernels.expert_mlp import expert_mlp
from cpu_kernels.linear import linear
from gptoss_jax.model.config import read_config
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels import linear as linear_op
from pallas_kernels import mxfp4
from pallas_kernels.choice import Hardware
from pallas_kernels.expert_mlp import reference
from tests.structures import expert_weights

ROOT = Path(__file__).parents[2]
MODEL = read_config(ROOT / "configs" / "gpt-oss-20b.json")
MISSING = cpu_kernels.why_not()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
INSTRUCTION_SETS: tuple[str, ...] = () if MISSING else cpu_kernels.instruction_sets()
DTYPES = (jnp.float32, jnp.bfloat16)
LIMIT = 7.0


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    """Each instruction set of this machine in turn."""
    with cpu_kernels.instruction_set(request.param):
        yield request.param


def _on_all_sets(run) -> dict[str, np.ndarray]:
    found = {}
    for name in INSTRUCTION_SETS:
        with cpu_kernels.instruction_set(name):
            found[name] = np.asarray(run())
    return found


def _assert_same_bits(found: dict[str, np.ndarray], *, except_on: str | None) -> None:
    """Of the instruction sets that share one order of adding, where they round alike too."""
    same = {name: result for name, result in found.items() if name != except_on}
    for name, result in same.items():
        np.testing.assert_array_equal(result, next(iter(same.values())), err_msg=name)


# ---- linear ----


WEIGHTS = {"bfloat16": ml_dtypes.bfloat16, "int8": np.int8}


def _linear_arguments(rows, outputs, inputs, dtype, weights=ml_dtypes.bfloat16):
    rng = np.random.default_rng([rows, outputs, inputs])
    x = rng.standard_normal((rows, inputs)).astype(dtype)
    w = rng.integers(-127, 128, (outputs, inputs)) if weights == np.int8 else rng.standard_normal((outputs, inputs))
    return jnp.asarray(x), jnp.asarray(w.astype(weights))


LINEAR_SHAPES = {  # rows, outputs, inputs
    "router": (3, MODEL.num_experts, MODEL.hidden_size),
    "keys": (7, MODEL.num_kv_heads * MODEL.head_dim, MODEL.hidden_size),
    "attention's output": (1, 96, MODEL.num_heads * MODEL.head_dim),
    "one input": (2, 5, 1),
    "one output": (6, 1, 100),
    "less than a block": (1, 33, 31),
    "one more than a block": (4, 31, 33),
    "no row": (0, 31, 33),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", LINEAR_SHAPES)
def test_linear(isa, shape, weights, dtype):
    """Guards the last inputs, rows and outputs where nothing divides by a vector, a tile or a panel."""
    x, w = _linear_arguments(*LINEAR_SHAPES[shape], dtype, WEIGHTS[weights])
    found = np.asarray(jax.jit(linear)(x, w))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    scale = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w, np.float64)).T
    assert found.dtype == np.float32
    assert (np.abs(found - exact) <= 2e-6 * scale).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_linear_has_the_same_bits_on_every_instruction_set(weights, dtype):
    """Guards the one order of adding that all share, so that a checkpoint answers alike on different machines.

    Portable code has no fused multiply-add: its bits are the others' only where every product is exact. The bfloat16
    dot product has an order of its own, and no part in products of float32.
    """
    x, w = _linear_arguments(13, 70, 1000, dtype, WEIGHTS[weights])
    differs = "avx512bf16" if dtype == jnp.bfloat16 else "portable"
    _assert_same_bits(_on_all_sets(lambda: jax.jit(linear)(x, w)), except_on=differs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_linear_of_a_token_does_not_depend_on_its_neighbours(isa, weights, dtype):
    """Guards tiles of one to many rows: each number of rows takes another path, and none may be seen in the bits."""
    x, w = _linear_arguments(23, 39, 1700, dtype, WEIGHTS[weights])
    whole = np.asarray(linear(x, w))
    for rows in range(1, 24):
        np.testing.assert_array_equal(np.asarray(linear(x[:rows], w)), whole[:rows])


def test_linear_keeps_infinities_and_nan_where_they_are(isa):
    """Guards the zeros after the last input, which must not meet an infinity, and tokens from a neighbour's NaN."""
    x, w = _linear_arguments(5, 6, 33, jnp.float32)
    x = x.at[1, 32].set(jnp.inf).at[3, 0].set(jnp.nan)
    w = jnp.abs(w)
    found = np.asarray(linear(x, w))
    assert np.isposinf(found[1]).all() and np.isnan(found[3]).all()
    assert np.isfinite(found[[0, 2, 4]]).all()


def test_linear_refuses_other_dtypes():
    """Guards weights that are read as what they are not."""
    x, w = _linear_arguments(1, 2, 3, jnp.float32)
    with pytest.raises(
        TypeError, match="linear of float32 and float32, expected float32 or bfloat16, and bfloat16 or int8"
    ):
        linear(x, w.astype(jnp.float32))


# ---- experts ----

EXPERT_SHAPES = {  # tokens, hidden, expert hidden, experts, top_k: no two sizes alike
    "one token": (1, 96, 160, 7, 4),
    "a few tokens": (9, 64, 96, 5, 3),
    "more assignments to an expert than a batch takes": (300, 32, 64, 3, 2),
    "true width": (2, MODEL.hidden_size, MODEL.intermediate_size, 3, 2),
}


def _expert_arguments(tokens, hidden, inner, experts, top_k, dtype):
    rng = np.random.default_rng([tokens, hidden, inner])

    def packed(out, inputs):
        blocks = rng.integers(0, 256, (experts, out, inputs // 32, 16), dtype=np.uint8)
        return blocks, rng.integers(119, 123, (experts, out, inputs // 32), dtype=np.uint8)

    def bias(out):
        return rng.standard_normal((experts, out)).astype(ml_dtypes.bfloat16)

    weights = expert_weights(*packed(2 * inner, hidden), bias(2 * inner), *packed(hidden, inner), bias(hidden))
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    x = rng.standard_normal((tokens, hidden)).astype(dtype)
    routing_weights = rng.random((tokens, top_k)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(ids), jnp.asarray(routing_weights), jax.tree.map(jnp.asarray, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EXPERT_SHAPES)
def test_expert_mlp(isa, shape, dtype):
    """Guards the sorting, the interleaved gate, and the rounding between the two products, against the reference."""
    arguments = _expert_arguments(*EXPERT_SHAPES[shape], dtype)
    found = np.asarray(jax.jit(functools.partial(expert_mlp, limit=LIMIT))(*arguments))
    expected = np.asarray(jax.jit(functools.partial(reference.expert_mlp, limit=LIMIT))(*arguments))
    # With bfloat16 an inner activation may round the other way: 2^-8 of one of many terms.
    tolerance = 3e-6 if dtype == jnp.float32 else 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 64, 96, 5, 3), (30, 19 * 32, 37 * 32, 2, 1)])
def test_experts_have_the_same_bits_on_every_instruction_set(shape, dtype):
    """Guards exp, division and rounding too: they are the same operations everywhere.

    Sums of bfloat16 activations are exact in whole numbers, whichever instructions make them and however many tokens
    lie side by side; in the second shape there are more than a vector of any set's, and blocks for more than its lanes.
    """
    tokens, hidden, inner, experts, top_k = shape
    arguments = _expert_arguments(tokens, hidden, inner, experts, top_k, dtype)
    found = _on_all_sets(lambda: expert_mlp(*arguments, limit=LIMIT))
    _assert_same_bits(found, except_on=None if dtype == jnp.bfloat16 else "portable")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_do_not_depend_on_how_many_share_their_expert(isa, dtype):
    """Guards the ways of few rows and of many, vectors that are full and ones that are not, against each other."""
    x, ids, routing_weights, weights = _expert_arguments(41, 18 * 32, 64, 1, 1, dtype)
    whole = np.asarray(expert_mlp(x, ids, routing_weights, weights, limit=LIMIT))
    for count in (1, 3, 8, 9, 13, 24, 40):
        some = np.asarray(expert_mlp(x[:count], ids[:count], routing_weights[:count], weights, limit=LIMIT))
        np.testing.assert_array_equal(some, whole[:count])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_stay_with_their_token(isa, bad):
    """Guards whole numbers, which know no NaN: a fault in the model has to reach the logits, of its own token alone."""
    x, ids, routing_weights, weights = _expert_arguments(20, 96, 64, 1, 1, jnp.bfloat16)
    expected = np.asarray(expert_mlp(x, ids, routing_weights, weights, limit=LIMIT))
    found = np.asarray(expert_mlp(x.at[3, 40].set(bad).at[18, 0].set(bad), ids, routing_weights, weights, limit=LIMIT))
    assert np.isnan(found[[3, 18]]).all()
    others = np.delete(np.arange(20), [3, 18])
    np.testing.assert_array_equal(found[others], expected[others])


def _one_expert_that_passes_inputs_on(width):
    """Inner activations are 64 times the inputs: gates are saturated, and linear parts are the inputs less 1."""
    rng = np.random.default_rng(0)
    gate_up = np.zeros((1, 2 * width, width // 32, 16), np.uint8)
    for i in range(width):
        gate_up[0, 2 * i + 1, i // 32, i % 32 // 2] = 2 << 4 * (i % 2)  # the code of 1
    gate_up_bias = np.tile(np.array([64, -1], ml_dtypes.bfloat16), (1, width))
    down = rng.integers(0, 256, (1, width, width // 32, 16), dtype=np.uint8)
    down_scales = rng.integers(119, 123, down.shape[:3], dtype=np.uint8)
    biases = gate_up_bias, np.zeros((1, width), ml_dtypes.bfloat16)
    weights = expert_weights(
        gate_up, np.full(gate_up.shape[:3], 127, np.uint8), biases[0], down, down_scales, biases[1]
    )
    codes = np.array(mxfp4.CODES)[np.stack([down & 15, down >> 4], axis=-1)].reshape(width, -1, 32)
    return weights, (codes * 2.0 ** (down_scales[0].astype(float)[..., None] - 127)).reshape(width, width)


@pytest.mark.parametrize(("octaves", "lost"), [(7, 0.0), (16, 2.0**-15)])
def test_blocks_keep_what_bfloat16_has(isa, octaves, lost):
    """Guards the power of two of a block of activations: too small a one overflows, and too large a one rounds.

    Inputs within 2^-7 of their block's largest are exact and so are sums; smaller ones lose 2^-15 of that largest.
    """
    rows, width = 20, 96
    rng = np.random.default_rng(octaves)
    size = 2.0 ** -rng.integers(0, octaves + 1, (rows, width)) * rng.choice([-1, 1], (rows, width))
    x = (size * rng.uniform(1, 1.99, size.shape)).astype(ml_dtypes.bfloat16)
    weights, w = _one_expert_that_passes_inputs_on(width)
    ids, ones = np.zeros((rows, 1), np.int32), np.ones((rows, 1), np.float32)
    found = np.asarray(expert_mlp(*jax.tree.map(jnp.asarray, (x, ids, ones, weights)), limit=100.0)) / 64
    wide = x.astype(np.float64)
    largest = np.abs(wide).reshape(rows, -1, 32).max(axis=-1)
    allowed = 2.0**-22 * np.abs(wide) @ np.abs(w).T + lost * largest @ np.abs(w).reshape(width, -1, 32).sum(axis=-1).T
    assert (np.abs(found - wide @ w.T) <= allowed).all()


def test_tokens_do_not_depend_on_their_neighbours(isa):
    """Guards the order in which a token's assignments are added up, however many tokens share its experts."""
    x, ids, routing_weights, weights = _expert_arguments(300, 32, 64, 3, 2, jnp.bfloat16)
    whole = np.asarray(expert_mlp(x, ids, routing_weights, weights, limit=LIMIT))
    for at in (slice(0, 1), slice(5, 7), slice(17, 23), slice(100, 299)):
        alone = expert_mlp(x[at], ids[at], routing_weights[at], weights, limit=LIMIT)
        np.testing.assert_array_equal(np.asarray(alone), whole[at])


def test_assignments_outside_the_experts_are_skipped(isa):
    """Guards padding and experts of another device: ids of any value, and NaN beside them, leave the others alone."""
    x, ids, routing_weights, weights = _expert_arguments(9, 64, 96, 5, 3, jnp.float32)
    expected = np.array(expert_mlp(x, ids, routing_weights, weights, limit=LIMIT))
    ids = ids.at[2].set(jnp.array([-1, 5, 2**31 - 1])).at[4].set(-(2**31))
    x, routing_weights = x.at[4].set(jnp.nan), routing_weights.at[2].set(jnp.nan)
    expected[[2, 4]] = 0
    np.testing.assert_array_equal(np.asarray(expert_mlp(x, ids, routing_weights, weights, limit=LIMIT)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_under_every_scale_is_exact(isa, dtype):
    """Guards nibble order, sign, the scale's bias and subnormal weights, which XLA's threads would flush to zero.

    Token f of expert e makes inner activation f 1 and the others 0, so that the result is column f of e's down: bytes
    16 e to 16 e + 15, under one scale per row. (Beyond scale byte 252 the codes overflow. As whole numbers, which
    meet bfloat16 activations, weights under scale byte 0 are zero.)
    """
    experts, inner, hidden = 16, 32, 256
    one, saturated = 2, 64.0  # the code of 1, and a gate at which the sigmoid is 1
    gate_up = np.zeros((experts, 2 * inner, hidden // 32, 16), np.uint8)
    for f in range(inner):
        gate_up[:, 2 * f, 0, f // 2] = one << 4 * (f % 2)
    gate_up_bias = np.tile(np.array([0, 1 / saturated - 1], ml_dtypes.bfloat16), (experts, inner))
    down = np.tile(np.arange(256, dtype=np.uint8).reshape(experts, 1, 1, 16), (1, hidden, 1, 1))
    scales = np.where(np.arange(hidden) <= 252, np.arange(hidden), 127).astype(np.uint8)
    down_scales, down_bias = np.tile(scales[:, None], (experts, 1, 1)), np.zeros((experts, hidden), ml_dtypes.bfloat16)
    gate_up_scales = np.full(gate_up.shape[:3], 127, np.uint8)
    weights = expert_weights(gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias)
    x = np.tile(saturated * np.eye(inner, hidden), (experts, 1)).astype(dtype)
    ids = np.repeat(np.arange(experts, dtype=np.int32), inner)[:, None]
    arguments = jax.tree.map(jnp.asarray, (x, ids, np.ones(ids.shape, np.float32), weights))
    found = expert_mlp(*arguments, limit=100.0)
    codes = np.array(mxfp4.CODES)[np.stack([down & 15, down >> 4], axis=-1)].reshape(experts, hidden, inner)
    expected = (codes * 2.0 ** (scales[:, None].astype(float) - 127)).transpose(0, 2, 1).reshape(-1, hidden)
    assert ((np.abs(expected[:, 1]) < 2.0**-126) & (expected[:, 1] != 0)).any()  # subnormal
    if dtype == jnp.bfloat16:
        expected[:, 0] = 0
    np.testing.assert_array_equal(np.asarray(found), expected.astype(np.float32))


def test_swiglu_over_its_whole_range(isa):
    """Guards exp's ends: gates from -200, where it overflows, to the limit; a NaN is passed on."""
    hidden = inner = 32
    identity = np.zeros((hidden, 1, 16), np.uint8)
    for i in range(hidden):
        identity[i, 0, i // 2] = 2 << 4 * (i % 2)
    gate_up = np.zeros((1, 2 * inner, 1, 16), np.uint8)
    gate_up[0, 0::2] = identity  # the linear part is 0

    def bytes_of(scale: int, rows: int) -> np.ndarray:
        return np.full((1, rows, 1), scale, np.uint8)

    def zeros(rows: int) -> np.ndarray:
        return np.zeros((1, rows), ml_dtypes.bfloat16)

    in_gate_up, in_down = (bytes_of(127, 2 * inner), zeros(2 * inner)), (bytes_of(127, hidden), zeros(hidden))
    weights = expert_weights(gate_up, *in_gate_up, identity[None], *in_down)

    def run(*arguments) -> np.ndarray:
        return np.asarray(expert_mlp(*jax.tree.map(jnp.asarray, arguments), limit=LIMIT))

    x = np.linspace(-200, 12, 64 * hidden).reshape(-1, hidden).astype(np.float32)
    ids, routing_weights = np.zeros((64, 1), np.int32), np.ones((64, 1), np.float32)
    found = run(x, ids, routing_weights, weights)
    gate = np.minimum(x.astype(np.float64), LIMIT)
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-reference.ALPHA * gate))
    np.testing.assert_allclose(found, expected, rtol=2e-6 * 60, atol=1e-36)  # alpha and its product are rounded
    near = np.abs(x) < 8
    np.testing.assert_allclose(found[near], expected[near], rtol=3e-6)
    x = np.zeros((2, hidden), np.float32)
    x[0, 3], x[1, 3] = np.nan, np.inf
    assert np.isnan(
        run(x, ids[:2], routing_weights[:2], weights)
    ).all()  # zeros of other weights times infinity are NaN


def test_experts_refuse_other_dtypes():
    """Guards biases that are read as what they are not."""
    x, ids, routing_weights, weights = _expert_arguments(1, 32, 64, 3, 2, jnp.float32)
    weights = weights._replace(down_bias=weights.down_bias.astype(jnp.float32))
    with pytest.raises(TypeError, match="expert_mlp of float32 with biases of bfloat16 and float32, expected"):
        expert_mlp(x, ids, routing_weights, weights, limit=LIMIT)


def test_shapes_that_do_not_fit_are_refused():
    """Guards memory: a kernel that trusts a shape reads, or writes, beyond the end of an array."""
    x, ids, routing_weights, weights = _expert_arguments(2, 32, 64, 3, 2, jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"expert_mlp: expected blocks \[E, O, I / 32, 16\]"):
        expert_mlp(x, ids, routing_weights, weights._replace(down_scales=weights.down_scales[:2]), limit=LIMIT)
    handler = jax.ffi.ffi_call("cpu_kernels_linear", jax.ShapeDtypeStruct((2, 9), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"linear: expected w \[O, I\]"):
        handler(x, jnp.zeros((9, 31), jnp.bfloat16))


# ---- inside XLA ----


def test_kernels_work_inside_loops_branches_and_meshes():
    """Guards calls from eight devices at once, and from control flow, on a pool of fewer threads than callers."""
    x, ids, routing_weights, weights = _expert_arguments(16, 64, 96, 5, 3, jnp.float32)
    w = jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)) / 16, jnp.bfloat16)

    def layers(linear, expert_mlp, x, ids, routing_weights):
        def layer(i, x):
            more = jax.lax.cond(
                i % 2 == 0, lambda: linear(x, w), lambda: expert_mlp(x, ids, routing_weights, weights, limit=LIMIT)
            )
            return 0.5 * x + 0.01 * more

        return jax.lax.fori_loop(0, 10, layer, x)

    mesh, rows = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    run = jax.jit(
        jax.shard_map(
            functools.partial(layers, linear, expert_mlp),
            mesh=mesh,
            in_specs=(rows, rows, rows),
            out_specs=rows,
            check_vma=False,
        )
    )
    alone = jax.jit(functools.partial(layers, linear, expert_mlp))(x, ids, routing_weights)
    expected = jax.jit(functools.partial(layers, linear_op.IMPLEMENTATIONS["reference"], reference.expert_mlp))
    np.testing.assert_array_equal(np.asarray(run(x, ids, routing_weights)), np.asarray(alone))
    np.testing.assert_allclose(np.asarray(alone), np.asarray(expected(x, ids, routing_weights)), rtol=1e-4, atol=1e-5)


def digests() -> list[str]:
    """What a dense product and a few experts amount to, on this process's threads."""
    x, w = _linear_arguments(13, 700, 200, jnp.float32)
    results = linear(x, w), expert_mlp(*_expert_arguments(70, 64, 96, 5, 3, jnp.float32), limit=LIMIT)
    return [hashlib.sha256(np.asarray(result).tobytes()).hexdigest() for result in results]


_COUNTED = """
import os
from tests.unit.test_cpu_kernels import digests
found = digests()
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print(sum("XLAEigen" in name for name in names), *found)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.parametrize("threads", [1, 5])
def test_bits_do_not_depend_on_the_number_of_threads(threads):
    """Guards sums that are cut by threads; and one thread, which must not wait for a helper that cannot start."""
    environment = {**os.environ, "NPROC": str(threads), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", _COUNTED], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(threads), *digests()]


# ---- which one runs ----


def test_the_best_instruction_set_is_in_use_and_said():
    """Guards the kernel line: it names what runs."""
    assert INSTRUCTION_SETS[-1] == "portable" and len(set(INSTRUCTION_SETS)) == len(INSTRUCTION_SETS)
    for op in (linear_op, expert_op):
        choice = op.choose("auto", Hardware("cpu"))
        arithmetic = ", bfloat16 as int16 blocks" if op is expert_op else ""
        assert (choice.name, choice.reason) == ("cpu", f"C++ for {INSTRUCTION_SETS[0]}{arithmetic}")
        assert op.choose("auto", Hardware("gpu", "NVIDIA A100", "8.0")).name == "reference"
    with pytest.raises(ValueError, match=r"instruction set 'mmx', expected one of .*portable"):
        with cpu_kernels.instruction_set("mmx"):
            pass


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    """Guards a checkout that is newer than what was installed: a traceback of ctypes names no way out."""
    monkeypatch.setattr(cpu_kernels, "HANDLERS", (*cpu_kernels.HANDLERS, "not_yet_written"))
    with pytest.raises(cpu_kernels.Unavailable, match="built from other sources; installing again builds it anew"):
        cpu_kernels.library.__wrapped__()


def test_without_a_library_the_line_says_what_is_lost(monkeypatch):
    """Guards an installation without a compiler: it works, says so, and refuses what was asked for by name."""
    monkeypatch.setattr(cpu_kernels, "why_not", lambda: "cpu_kernels was installed without a C++ compiler")
    choice = linear_op.choose("auto", Hardware("cpu"))
    assert choice.name == "streamed"
    assert choice.reason.endswith(
        "float32 copies of the weights; slow: cpu_kernels was installed without a C++ compiler"
    )
    assert expert_op.choose("auto", Hardware("cpu")).name == "reference"
    with pytest.raises(ValueError, match=r"linear kernel 'cpu' cannot run: cpu_kernels was installed without a C\+\+"):
        linear_op.choose("cpu", Hardware("cpu"))
