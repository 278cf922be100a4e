"""Every benchmark as people run it, at toy size: --help says what its flags are, a run ends in a line of JSON."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ahead_of_time, compilers, true_width
from converters.random_checkpoint import with_vocab_size
from tests import processes

FOLDER = Path(true_width.__file__).parent
TINY = FOLDER.parent / "configs" / "tiny.json"
MODULES = {path.stem: path for path in FOLDER.glob("*.py")} | {
    path.parent.name: path for path in FOLDER.glob("*/__main__.py")
}
COMMANDS = sorted(name for name, path in MODULES.items() if 'if __name__ == "__main__":' in path.read_text())
CUT = ("--config", "CONFIG", "--layers", 2)
GPU_SIZES = ("--only", "limits", "--limit-mib", 1, "--matrix-side", 32, "--loop-ms", 0.01, "--dispatches", 1)
BATCH_SIZES = ("--scale", 0.02, "--slots", 2, "--rows", 3, "--alone-rows", 1, "--prefix-rows", 3, "--rounds", 1)
TOYS: dict[str, tuple[Any, ...]] = {  # CONFIG: a small config.json; FILE: one to write
    "ahead_of_time": ("models", "--target", "v6e"),
    "batch": ("--config", "CONFIG", *BATCH_SIZES),
    "compilers": (),
    "cpu": (*CUT, "--contexts", 16, "--batch", 1, "--prefill", 8, "--steps", 2, "--rounds", 1, "--notransformers"),
    "cpu_attention": ("--contexts", 64, "--chunk", 4, "--rounds", 1),
    "cpu_dense_experts": ("--tokens", 16, "--hidden", 24, "--inner", 40, "--rounds", 1),
    "cpu_packed_attention": ("--rows", 1, "--tokens", 40, "--conversations", "20,40", "--rounds", 1),
    "cpu_products": ("--config", "CONFIG", "--rows", 1, "--copies-mib", 1, "--rounds", 1),
    "gpu": GPU_SIZES,  # all of it in test_gpu_benchmark.py
    "huge_pages": ("--outputs", 512, "--repeats", 1),
    "sampling": ("--config", "CONFIG", "--repeats", 1),
    "serve": ("--scale", 0.1, "--slots", 2, "--connections", 2, "--requests", 2, "--rounds", 1, "--minutes", 0.01),
    "slot_by_slot": (*CUT, "--rows", 2, "--steps", 1),
    "structured": ("--answers", 2, "--rows", 2, "--tokens", 160, "--rounds", 1, "--config", "TINY", "--layers", 2),
    "tpu_experts": ("--only", "v6e", "--tokens", 1, "--experts", 32),
    "unrolled_or_scanned": (*CUT, "--experts", 4, "--steps", 1),
    "write_gguf": (*CUT, "FILE"),
}
WHEELS = {  # why a benchmark cannot run here
    "ahead_of_time": ahead_of_time.missing("tpu"),
    "tpu_experts": ahead_of_time.missing("tpu"),
    "write_gguf": None
    if importlib.util.find_spec("gguf")
    else "the gguf package is not installed: make gates installs it",
}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    """Two layers of the tiny model with a small vocabulary and a short context."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    raw = with_vocab_size(true_width.raw_config(2, Path("configs/tiny.json")), 512)
    path.write_text(json.dumps(raw | {"max_position_embeddings": 4096}))
    return path


def test_every_benchmark_has_a_toy_run():
    """Guards this file: a new benchmark has to stand in its table."""
    assert list(TOYS) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name):
    """Guards --help: what the benchmark measures, the command to copy, and each of its flags."""
    done = processes.run(f"benchmarks.{name}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python -m benchmarks.{name}" in done.stdout
    flags = {str(argument).lstrip("-") for argument in TOYS[name] if str(argument).startswith("--")}
    assert all(f"--{flag}" in done.stdout or f"--[no]{flag.removeprefix('no')}" in done.stdout for flag in flags)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "compilers"])
def test_toy_run(name, config_file, tmp_path):
    """Guards a benchmark that nobody runs for months: it ends with what it found, or says which wheel it lacks."""
    files = {"CONFIG": config_file, "TINY": TINY, "FILE": tmp_path / "model.gguf"}
    done = processes.run(f"benchmarks.{name}", *(files.get(argument, argument) for argument in TOYS[name]))
    if missing := WHEELS.get(name):
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{name}: {missing}\n")
        return
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])


def test_compilers_are_those_of_this_jax():
    """Guards `make gates`: wheels of another version than JAX's would not load, or compile something else."""
    wheels = processes.run("benchmarks.compilers").stdout.split()
    assert wheels == compilers.wheels()
    assert any(wheel.startswith("libtpu==") for wheel in wheels)
    assert f"jax-cuda13-plugin=={ahead_of_time.jax.__version__}" in wheels


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ahead_of_time", ("models", "--target", "H300"), "unknown target H300, expected some of H200"),
        ("ahead_of_time", ("model",), "model asked for, expected one of models, kernels, launches"),
        ("tpu_experts", ("--only", "v7"), "unknown generation v7, expected some of v5e"),
        ("gpu", ("20b",), "20b: expected flags only"),
        ("slot_by_slot", ("--layers", 3), "3 layers, expected an even number of them"),
    ],
)
def test_mistakes_are_one_line(name, arguments, message):
    """Guards flags: a name that is nothing must not give an empty table, or a traceback."""
    done = processes.run(f"benchmarks.{name}", *arguments)
    assert (done.returncode, message in done.stderr, done.stderr.count("\n")) == (2, True, 1), done.stderr
