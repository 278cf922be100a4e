"""The GPU's benchmark, end to end at toy size on the CPU: what it prints is what it says."""

import json
import types
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, true_width
from converters.random_checkpoint import with_vocab_size
from tests import processes

CASES = ("--batch", 1, "--contexts", "16,4000", "--prefill", 8, "--op-tokens", 1, "--op-attention", "1x1x40")
SMALL = ("--copy-elements", 4096, "--matrix-side", 32, "--calls", 1, "--steps", 1, "--chunk", 8, "--check-tokens", 2)
SMALL += ("--check-attention", "2x1", "--memory-gib", 0.002, "--notransformers")
CONFIG = with_vocab_size(true_width.raw_config(2, Path("configs/tiny.json")), 512) | {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize("kernels", ["reference", "attention=gpu-interpreted,expert_mlp=gpu-interpreted"])
def test_command_measures_and_says_what_it_left_out(tmp_path, kernels):
    """Guards flags that are not read, rates that do not follow from one another, a case left out without a word."""
    out, config = tmp_path / "results.json", tmp_path / "small.json"
    config.write_text(json.dumps(CONFIG))
    done = processes.run("benchmarks.gpu", "--models", config, *CASES, *SMALL, "--kernels", kernels, "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == result
    assert result["kernels"].count("asked for by name") == (2 if "interpreted" in kernels else 3)
    assert result["kernels"].count("gpu-interpreted") == kernels.count("gpu-interpreted")
    assert result["jax"] and result["date"]
    assert [error["op"].split(",")[0] for error in result["errors"]] == ["expert_mlp", "attention"]
    assert all(0 < error["error"] < gpu.BF16_ERROR for error in result["errors"])
    assert [(case["slots"], case["context_tokens"]) for case in result["decode"]] == [(1, 16)]
    assert any("1 slots after" in line and "pool" in line for line in result["left_out"])
    assert [case["prompt_tokens"] for case in result["prefill"]] == [8]
    assert [case["op"] for case in result["ops"]] == [
        "expert_mlp, 1 tokens",
        "paged attention, 1 sequences of 1 after 40",
    ]
    for case in result["ops"]:
        roofline = max(case["bytes_seconds"], case["operations_seconds"])
        assert case["share_of_roofline"] == pytest.approx(roofline / case["seconds"])


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    """Guards against fast nonsense: an error above the bound of bfloat16 ends the run."""
    run = gpu.Run(minutes=1)
    monkeypatch.setattr(gpu.flags, "FLAGS", types.SimpleNamespace(check_tokens=["1"], check_attention=["3x1"]))
    monkeypatch.setattr(gpu, "attention_error", lambda *_: 0.1)
    monkeypatch.setattr(gpu.Experts, "error", lambda *_: 1e-3)

    nothing: Any = types.SimpleNamespace(name="tiny", config=None)
    with pytest.raises(
        ValueError, match=r"tiny: attention, 3 sequences of 1 is off by 1\.0e-01, at most 2e-02 expected"
    ):
        gpu.check(run, nothing, gpu.Experts(nothing, nothing, nothing), nothing)


@pytest.mark.parametrize("found", [[1.0, float("nan")], [1.0, float("inf")]])
def test_errors_that_are_not_finite_never_pass(found):
    """Guards the check of kernels: NaN is larger than no bound."""
    assert gpu.relative_error(found, [1.0, 1.0]) == float("inf")


def test_without_time_cases_are_left_out_and_said():
    """Guards the lease of a machine: no further case is begun, and the report says which."""
    run = gpu.Run(minutes=0)
    assert not run.has_time_for("decoding 8 slots")
    assert run.report["left_out"] == ["decoding 8 slots: no time"]
