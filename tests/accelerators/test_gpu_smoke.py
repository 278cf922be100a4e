"""The smoke checks of the GPU's benchmark: in Pallas's interpreter at toy size, on a GPU at the real one.

On a device: GPTOSS_JAX_TEST_PLATFORMS=cuda pytest tests/accelerators/test_gpu_smoke.py (with -o addopts= where beartype
is not installed).
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import true_width
from benchmarks.gpu import kernels_alone, models, ops, smoke, smoke_groups, timing, weights
from benchmarks.gpu.results import Results
from converters.random_checkpoint import with_vocab_size
from gptoss_jax.model import layers
from gptoss_jax.model.config import ModelConfig, parse_config
from gptoss_jax.model.layers import Kernels
from pallas_kernels import attention as attention_op
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels.attention import Attended
from pallas_kernels.choice import Hardware

ON_GPU = jax.default_backend() == "gpu"
SIZES, REPEATS = ("true", 20) if ON_GPU else ("toy", 2)
INTERPRETED = "attention=gpu-interpreted,expert_mlp=gpu-interpreted"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "max_position_embeddings": 4096,
}


def _config(layers: int = 2, **changed: int) -> ModelConfig:
    if ON_GPU:
        return parse_config(true_width.raw_config(layers))
    raw = with_vocab_size(true_width.raw_config(layers, Path("configs/tiny.json")), 512)
    return parse_config(raw | SMALL | changed)


def _kernels(names: str) -> Kernels:
    return layers.choose_kernels("auto" if ON_GPU else names, Hardware.of(jax.devices()[0]))[0]


def _run(tmp_path: Path, group: str, kernels: Kernels) -> Results:
    results = Results(tmp_path / "results.jsonl", f"smoke/{group}")
    smoke.run(results, _config(), kernels, sizes=SIZES, group=group, repeats=REPEATS)
    return results


@pytest.mark.parametrize("group", [name for name in smoke_groups.GROUPS[SIZES] if not name.startswith("model")])
def test_kernels(group, tmp_path):
    """Guards the checks themselves, which must pass for kernels that are right, before a device is at hand."""
    results = _run(tmp_path, group, _kernels(INTERPRETED))
    assert results.is_good and results.found("check")


@pytest.mark.parametrize("few_launches", [False, True])
def test_model(few_launches, tmp_path):
    """Guards the check of whole programs, of which the interpreter would take hours: with the portable kernels."""
    results = _run(tmp_path, "model", _kernels("reference")._replace(few_launches=few_launches))
    assert results.is_good and len(results.found("check")) == 5
    assert np.shape(results.found("drawn")[0]["tokens"]) == (2, 200)


# ---- what is wrong is found ----


def _wrong_experts(wrong: Any) -> Kernels:
    reference = expert_op.IMPLEMENTATIONS["reference"]

    def run(x: Any, expert_ids: Any, routing_weights: Any, weights: Any, *, limit: float) -> jax.Array:
        return wrong(reference.run(x, expert_ids, routing_weights, weights, limit=limit))

    return Kernels(expert_mlp=expert_op.ExpertMlp(run))


def _wrong_attention(wrong: Any) -> Kernels:
    def attend(q: Any, kv: Any, positions: Any, sinks: Any) -> Attended:
        return wrong(attention_op.IMPLEMENTATIONS["reference"](q, kv, positions, sinks))

    return Kernels(attention=attend)


def _last_bit(y: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(y[3, 5], jnp.uint32)
    return y.at[3, 5].set(jax.lax.bitcast_convert_type(bits ^ jnp.uint32(1), jnp.float32))


def _race(y: jax.Array) -> jax.Array:
    """Another element each time."""
    calls: list[int] = []

    def wrong(y: np.ndarray) -> np.ndarray:
        calls.append(1)
        return y + np.float32(len(calls) * 1e-3)

    return jax.pure_callback(wrong, jax.ShapeDtypeStruct(y.shape, y.dtype), y)


@pytest.mark.skipif(ON_GPU, reason="plants faults at toy size")
@pytest.mark.parametrize(
    ("group", "kernels", "said"),
    [
        ("exact8", _wrong_experts(_last_bit), "1 of "),
        ("gated", _wrong_experts(_last_bit), "1 of "),
        ("exact8", _wrong_experts(_race), "a race"),
        ("experts8", _wrong_experts(lambda y: y.at[2, 7].set(jnp.nan)), "off by inf (row 2)"),
        ("experts8", _wrong_experts(lambda y: y.at[1, :8].multiply(1.2)), "(row 1)"),
        ("windowed", _wrong_attention(lambda a: a._replace(lse=a.lse + 0.01)), "log-sum-exp by 1.0e-02"),
        ("paged_decode", _wrong_attention(lambda a: a._replace(out=a.out.at[0, 0, 1, :2].multiply(-1))), "(row 1)"),
    ],
)
def test_a_planted_fault_is_found(group, kernels, said, tmp_path, capsys):
    """Guards the checks: blind to one bit, one row, NaN, or to results that differ from call to call, they pass all."""
    assert not _run(tmp_path, group, kernels).is_good
    assert said in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD"))


@pytest.mark.skipif(ON_GPU, reason="is about the command's own process")
def test_an_error_ends_its_case_alone(tmp_path):
    """Guards what follows in a group: an error of the device is a verdict like others."""

    def fails(y: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS")

    results = _run(tmp_path, "exact8", _wrong_experts(fails))
    assert not results.is_good
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in results.found("check")[0]["error"]


# ---- what is timed ----


def test_the_kernels_of_an_op_are_found_whatever_is_around_them():
    """Guards the times of kernels alone: each gets the operands that it gets in the op."""
    config, kernel = _config(), _kernels(INTERPRETED).expert_mlp
    packed = weights.random_experts(config, kernel.layout)
    x, shares = jnp.ones((1, config.hidden_size), jnp.bfloat16), jnp.ones((1, 2), jnp.float32)
    ids = [jnp.asarray([pair], jnp.int32) for pair in ([0, 1], [2, 0])]

    def run(ids: Any, fixed: Any) -> jax.Array:
        return kernel.run(fixed[0], ids, fixed[1], fixed[2], limit=7.0)

    found = kernels_alone.find(run, ids, (x, shares, packed))
    assert len(found) >= 1 and all(each.turns == 2 for each in found)
    assert any(f is not None and f.nbytes == packed.gate_up_blocks.nbytes for f in found[0].fixed)
    last = found[-1]
    operands = [v if f is None else f for v, f in zip(last.varying[1], last.fixed, strict=True)]
    once = jnp.max(jnp.abs(jnp.asarray(last.run(*operands)[0], jnp.float32)))
    assert jnp.isfinite(once) and once > 0
    loop = timing.lowered(kernels_alone.step(last), kernels_alone.beside(last), jnp.float32(0), _others(last), 2, 2)
    [compiled] = timing.compile_loops([loop])
    assert isinstance(compiled, timing.Loop)
    assert timing.measure(compiled, 1).seconds > 0


def _others(kernel: kernels_alone.Kernel) -> tuple[Any, Any]:
    return kernel.varying, kernel.fixed


def test_a_wrong_op_is_not_timed(tmp_path, capsys):
    """Guards against fast nonsense."""
    config, kernels = _config(), _wrong_experts(lambda y: y * 1.1)
    published = weights.random_experts(config, kernels.expert_mlp.layout)
    results = Results(tmp_path / "results.jsonl", "ops/small")
    assert not ops._is_right(results, ops.experts(config, kernels, published, published, 3))
    assert not results.is_good and "it is not timed" in capsys.readouterr().out
    right = ops.experts(config, Kernels(), published, published, 3)
    assert ops._is_right(results, right)


def test_weights_take_a_program_for_each_shape_not_for_each_leaf():
    """Guards minutes of compiling: layers of the same shapes share their programs."""
    counts = []
    for depth in (2, 4):
        made: Any = weights._made
        made.clear_cache()
        whole = models.Whole.of(_config(depth), _kernels(INTERPRETED))
        params = whole.params()
        counts.append(made._cache_size())
        assert len(params["layers"]) == depth
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), whole.shapes())
    assert counts[0] == counts[1] < 16


def test_experts_that_are_hit_are_counted():
    """Guards shares of reading: as many as the router's choices of all slots differ, layer by layer."""
    whole = models.Whole.of(_config(), Kernels())
    params, cache = whole.params(), whole.empty(3, 64)
    token = jnp.asarray([1, 2, 3], jnp.int32)
    hit, _ = jax.jit(lambda p, c, t: models.experts_hit(whole, p, c, t))(params, cache, token)
    assert hit.shape == (2,) and all(2 <= count <= 3 for count in hit.tolist())
    params["layers"][0]["moe"]["router"]["bias"] = jnp.asarray([100, 100, -100], jnp.bfloat16)
    hit, _ = jax.jit(lambda p, c, t: models.experts_hit(whole, p, c, t))(params, cache, token)
    assert hit[0] == 2
