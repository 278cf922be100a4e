"""The CPU's benchmark at toy size: what it prints is what it says."""

import json
from pathlib import Path

import pytest

from benchmarks import true_width, under_load
from converters.random_checkpoint import with_vocab_size
from gptoss_jax.model.config import parse_config
from tests import processes

LAYERS = 2


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    """The tiny model with a small vocabulary."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(with_vocab_size(json.loads(Path("configs/tiny.json").read_text()), 512)))
    return path


@pytest.fixture(scope="module")
def raw(config_file):
    """Its config.json, cut to two layers."""
    return true_width.raw_config(LAYERS, config_file)


def run(config_file: Path, *arguments) -> processes.Done:
    """The command on a tiny model, measuring little."""
    sizes = ("--layers", LAYERS, "--config", config_file, "--steps", 2, "--rounds", 1, "--chunk", 8, "--notransformers")
    return processes.run("benchmarks.cpu", *sizes, *arguments)


def test_command_measures_every_case(config_file):
    """Guards flags that are not read, a last line that is no JSON, rates that do not follow from one another."""
    lengths = ("--contexts", "16,150", "--batch", "1,2", "--prefill", 20, "--prefill-batch", 2)
    done = run(config_file, *lengths, "--kernels", "reference", "--cache-gib", 150 * 1024 / 2**30)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kernels"].count("reference") == 3
    assert [(case["slots"], case["context_tokens"]) for case in result["decode"]] == [
        (1, 16),
        (2, 16),
        (1, 150),
        (2, 150),
    ]
    assert [(case["slots"], case["prompt_tokens"], case["chunk_tokens"]) for case in result["prefill"]] == [(2, 20, 8)]
    measured = [case for case in result["decode"] if "left_out" not in case]
    assert len(measured) == 3 and "GiB, above --cache-gib" in result["decode"][3]["left_out"]
    for case in measured:
        rate = case["step_bytes"] * case["tokens_per_second"] / case["slots"]
        assert case["bytes_per_second"] == pytest.approx(rate, rel=0.01)
        assert case["share_of_reading"] == pytest.approx(rate / case["read_bytes_per_second"], rel=0.1, abs=1e-3)


def test_peers_take_turns(config_file, tmp_path):
    """Guards llama.cpp's options misspelt or its figures misread: stand-ins answer so, and note what they are asked."""
    asked = tmp_path / "asked"
    for name, answer in (
        ("llama-bench", '[{"avg_ts": 50.0}]'),
        ("llama-batched-bench", 'log\n{"speed_pp": 7.0, "speed_tg": 80.0}'),
    ):
        (tmp_path / name).write_text(
            f"#!/bin/sh\necho {name} \"$GLIBC_TUNABLES\" \"$@\" >> {asked}\nprintf '%s' '{answer}'"
        )
        (tmp_path / name).chmod(0o755)
    programs = ("--llama-bench", tmp_path / "llama-bench", "--llama-batched-bench", tmp_path / "llama-batched-bench")
    lengths = ("--contexts", "16,20", "--peer-contexts", 16, "--batch", "1,2", "--prefill", 5, "--rounds", 2)
    done = run(config_file, *lengths, *programs, "--gguf", "w.gguf")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [case.get("llama.cpp") for case in result["decode"]] == [50.0, 80.0, None, None]
    assert [case.get("llama.cpp, huge pages") for case in result["decode"]] == [50.0, 80.0, None, None]
    assert result["prefill"][0]["llama.cpp"] == 50.0
    first = result["decode"][0]
    assert first["over llama.cpp"] == pytest.approx(first["tokens_per_second"] / 50.0, rel=0.5)
    lines = asked.read_text().splitlines()
    assert len(lines) == 2 * 2 * 3  # rounds, kinds of pages, cases
    assert lines[0].startswith("llama-bench  -r 1 -o json -m w.gguf -t ") and lines[0].endswith("-p 0 -n 2 -d 16")
    assert lines[1].startswith("llama-bench glibc.malloc.hugetlb=1 ") and "-lm none" in lines[1]
    assert lines[4].startswith("llama-batched-bench  --output-format jsonl ") and "-npl 2 -npp 16 -ntg 2" in lines[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --checkpoint or --layers"),
        (("--layers", 3), "3 layers, expected an even number"),
        (("--layers", 2, "--instruction-set", "z80"), "--instruction-set z80: this machine has"),
        (("--layers", 2, "--llama-bench", "x"), "--llama-bench and --gguf belong together"),
        (("--layers", 2, "--config", "configs/tiny.json", "--contexts", "16,x"), "16,x: expected whole numbers"),
    ],
)
def test_usage_errors(arguments, message):
    """Guards against tracebacks, and measurements that begin before the flags are known to be good."""
    done = processes.run("benchmarks.cpu", *arguments)
    assert (done.returncode, message in done.stderr, done.stderr.count("\n")) == (2, True, 1), done.stderr


def test_prefill_operations_are_counted(raw):
    """Guards the share of the peak: a term that is forgotten, or counted for every token in place of the last."""
    config = parse_config(raw)
    tokens, window = 300, config.sliding_window
    keys = sum(min(p + 1, window) for p in range(tokens)) + sum(p + 1 for p in range(tokens))
    scores = 2 * 2 * config.num_heads * config.head_dim * keys
    projections = 2 * config.head_dim * (config.num_heads + config.num_kv_heads) * config.hidden_size
    experts = config.experts_per_token * 3 * config.hidden_size * config.intermediate_size
    per_token = 2 * LAYERS * (projections + experts + config.num_experts * config.hidden_size)
    unembedding = 2 * config.vocab_size * config.hidden_size
    assert under_load.prefill_operations(config, 3, tokens) == 3 * (per_token * tokens + scores + unembedding)
