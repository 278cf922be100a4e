"""The GPU's benchmark, end to end at toy size on a CPU, with no more than a bare machine with JAX has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import true_width
from converters.random_checkpoint import with_vocab_size
from tests.goldens.make import ROOT

ABSENT = ("openai_harmony", "pydantic", "prompt_toolkit", "beartype", "pyte", "safetensors", "tiktoken", "zstandard")
BLOCK = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
SECTIONS = ("smoke/model_graphs", "smoke/model_launches", "limits", "ops", "decode", "prefill", "profile")
SMALL = ("--limit-mib", 1, "--matrix-side", 32, "--loop-ms", 0.001, "--dispatches", 2, "--memory-gib", 0.005)
CASES = ("--batch", 3, "--contexts", "16,4000", "--prefill", 16, "--chunk", 8, "--steps", 2)
OPS = ("--op-tokens", 2, "--op-attention", "2x1x40", "--op-windows", "")
SMOKE = ("--smoke-sizes", "toy", "--smoke-groups", "model_graphs,model_launches", "--repeats", 2, "--at-once", 1)
PATIENT = ("--patience", 10, "--minutes", 60)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Two layers of the tiny model with a small vocabulary."""
    raw = with_vocab_size(true_width.raw_config(2, Path("configs/tiny.json")), 512)
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps(raw | {"max_position_embeddings": 4096}))
    return path


def _run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    (folder / "absent").mkdir(exist_ok=True)
    (folder / "absent" / "sitecustomize.py").write_text(BLOCK)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "absent"), str(ROOT)])}
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)


def test_every_section_on_a_bare_machine(config, tmp_path):
    """Guards the first minute on a device: imports of what it has not, flags that nobody reads, figures not on disk."""
    out, common = tmp_path / "results.jsonl", ("--models", config, "--kernels", "reference")
    only = ("--only", "smoke,ops,decode,prefill,profile", "--programs", tmp_path / "programs")
    done = _run(tmp_path, *common, *only, *SMALL, *CASES, *OPS, *SMOKE, *PATIENT, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert {name.removesuffix(f"/{config}") for name in report["ended"]} >= set(SECTIONS)
    assert set(report["ended"].values()) == {"ok"}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len([line for line in lines if line["kind"] == "drawn"]) == 2
    assert all(line["ok"] for line in lines if line["kind"] == "check")
    assert "with and without command buffers" in [line["what"] for line in lines if line["kind"] == "check"]
    [decoded], [prefill] = report["decode"], report["prefill"]
    assert (decoded["slots"], decoded["context_tokens"], prefill["prompt_tokens"]) == (3, 16, 16)
    assert 4 <= decoded["experts_hit_per_layer"] <= 7
    assert next(line["what"] for line in report["left_out"]) == "decoding 3 slots after 4,000"
    whole = ["expert_mlp, 2 tokens", "paged attention, 2 x 1 tokens after 40"]
    assert [(line["op"], line["part"]) for line in report["op"]] == [(op, "whole") for op in whole]
    for line in report["op"]:
        assert line["fastest_seconds"] <= line["seconds"] <= line["slowest_seconds"]
        assert line["share_of_roofline"] == pytest.approx(line["roofline_seconds"] / line["seconds"])
    assert all(line["error"] < 2e-2 for line in report["error"]) and len(report["error"]) == 2
    assert (tmp_path / "programs").is_dir()


def test_what_is_blocked_is_absent(tmp_path):
    """Guards the test above: with a finder that hides nothing it would pass on any machine."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", "import pydantic"], env=environment, capture_output=True, text=True)
    assert "No module named 'pydantic'" in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--only", "smoke,opps", "--only opps, expected some of smoke, limits, ops"),
        ("--models", "gpt-oss-20", "--models gpt-oss-20: no such config"),
        ("--batch", "1,0", "--batch 0, expected numbers from 1 on"),
        ("--op-attention", "1x1", "--op-attention 1x1, expected SEQUENCESxTOKENSxTOKENS"),
        ("--prefill", "3000", "--prefill 3000 is no multiple of --chunk 2048"),
        ("--smoke-groups", "exact9", "--smoke-groups exact9, expected some of model"),
        ("--out", "absent/x.jsonl", "--out absent/x.jsonl: no such folder"),
        ("--section", "decode", "--section decode, expected limits, smoke/GROUP"),
    ],
)
def test_mistakes_are_one_line(flag, value, message, tmp_path):
    """Guards the lease of a machine: a name that is nothing must not cost the minutes before it is met."""
    done = _run(tmp_path, flag, value)
    assert (done.returncode, message in done.stderr, done.stderr.count("\n")) == (2, True, 1), done.stderr
