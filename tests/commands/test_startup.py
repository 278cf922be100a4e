"""How soon commands answer where no model is needed: help and obvious mistakes, reported before JAX is imported."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.gate import TinyModel
from tests.goldens import make as golden

COMMANDS = (
    "gptoss_jax.generate",
    "gptoss_jax.score",
    "converters.convert",
    "converters.random_weights",
    "converters.export",
    "gptoss_jax.plan",
)
SLACK = 2  # CPUs differ, and a busy one takes longer for the same
HELP_CPU_SECONDS = 0.5 * SLACK
MISTAKE_CPU_SECONDS = 1.0 * SLACK
FIRST_TOKEN_CPU_SECONDS = 2.5 * SLACK

# Runs a module as `python -m` does, and writes at its end what it took.
RUN = """
import atexit, json, resource, runpy, sys

def write_usage():
    used = resource.getrusage(resource.RUSAGE_SELF)
    with open(sys.argv.pop(), "w") as file:
        json.dump({"seconds": used.ru_utime + used.ru_stime, "modules": sorted(sys.modules)}, file)

report, module = sys.argv[1:3]
sys.argv[:3] = [module]
atexit.register(lambda: (sys.argv.append(report), write_usage()))
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


class Done(NamedTuple):
    """How a command ended, what it printed, its processor time, and the modules that it imported."""

    returncode: int
    stdout: str
    stderr: str
    cpu_seconds: float
    modules: set[str]

    @property
    def packages(self) -> set[str]:
        """The outermost ones."""
        return {name.partition(".")[0] for name in self.modules}


def run(tmp_path: Path, module: str, *arguments: object) -> Done:
    """A command in a new process."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-c", RUN, report, module, *arguments]
    done = subprocess.run(
        list(map(str, command)), cwd=golden.ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )
    used = json.loads(report.read_text())
    return Done(done.returncode, done.stdout, done.stderr, used["seconds"], set(used["modules"]))


@pytest.mark.parametrize("module", COMMANDS)
def test_help_comes_at_once(module, tmp_path):
    """Guards --help, and with it every flag's mistake, against an import of what only a model needs."""
    done = run(tmp_path, module, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout.lower() or "--" in done.stdout
    assert done.packages.isdisjoint({"jax", "jaxlib", "flax", "orbax", "tensorstore"})
    assert done.packages.isdisjoint({"openai_harmony", "pydantic", "rich", "prompt_toolkit", "tqdm"})
    assert done.cpu_seconds < HELP_CPU_SECONDS


@pytest.mark.parametrize("module", COMMANDS)
def test_an_installed_command_has_the_same_help(module):
    """Guards the console scripts, for which the command's module is not `__main__`, and absl's own ways to help."""
    script = f"import sys; from gptoss_jax.cli import scripts; scripts.{module.split('.')[-1]}()"
    helps = [
        subprocess.run([sys.executable, *how], cwd=golden.ROOT, capture_output=True, text=True, timeout=60, check=True)
        for how in (["-c", script, "-h"], ["-c", script, "--helpshort"], ["-m", module, "--help"])
    ]
    assert helps[0].stdout == helps[1].stdout == helps[2].stdout
    assert "\n  --" in helps[0].stdout
    assert not helps[0].stdout.startswith("None")


def test_the_version_is_told_at_once(tmp_path):
    """Guards --version, and a prompt that is spelled like it."""
    done = run(tmp_path, GENERATE, "--version")
    assert done[:3] == (0, f"gptoss-jax {importlib.metadata.version('gptoss-jax')}\n", "")
    assert "jax" not in done.packages
    done = run(tmp_path, GENERATE, "--checkpoint", "absent", "--", "--version")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A model, and files and folders that are not what a command expects."""
    folder = tmp_path_factory.mktemp("places")
    good = TinyModel(golden.tiny_config()).write(folder / "good")
    llama = folder / "llama"
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps(golden.tiny_config() | {"model_type": "llama"}))
    (llama / "model.safetensors").write_bytes((next(good.glob("*.safetensors"))).read_bytes())
    (folder / "empty").mkdir()
    (folder / "broken.json").write_text("[{")
    (folder / "long.json").write_text(f'[{{"role": "user", "content": {"1" * 5000}}}]')
    files = {"BROKEN": folder / "broken.json", "LONG": folder / "long.json"}
    return {"GOOD": good, "LLAMA": llama, "EMPTY": folder / "empty", "ABSENT": folder / "absent", **files}


GENERATE, SCORE, CONVERT, RANDOM, *_ = COMMANDS
MISTAKES = {
    "missing folder": (GENERATE, "--checkpoint ABSENT Hello", "absent: no such folder, expected a checkpoint's folder"),
    "wrong folder": (GENERATE, "--checkpoint EMPTY Hello", "empty: no *.safetensors and no model.safetensors.index"),
    "a file": (GENERATE, "--checkpoint BROKEN Hello", "broken.json: a file, expected a checkpoint's folder"),
    "another model": (GENERATE, "--checkpoint LLAMA Hello", "config.json: model_type is 'llama', expected 'gpt_oss'"),
    "bad flag": (
        GENERATE,
        "--checkpoint GOOD --temprature 1 Hello",
        "unknown flag --temprature: did you mean --temperature?",
    ),
    "bad value": (GENERATE, "--checkpoint GOOD --top-p 2 Hello", "--top-p is 2.0, expected 0 to 1"),
    "bad messages": (GENERATE, "--checkpoint GOOD --messages BROKEN", "broken.json, line 1, column 3: "),
    "long number": (
        GENERATE,
        "--checkpoint GOOD --messages LONG",
        "long.json: a number of 5000 digits is out of range",
    ),
    "half of hosts": (GENERATE, "--checkpoint GOOD --coordinator a:1 Hello", "has an effect with --num-processes and"),
    "no address": (
        SCORE,
        "--checkpoint GOOD --coordinator a --num-processes 2 --process-id 0 Hello",
        "--coordinator is 'a', expected HOST:PORT such as 10.0.0.1:8476, or auto",
    ),
    "no coordinator": (
        GENERATE,
        "--checkpoint GOOD --process-id 1 Hello",
        "have an effect with --coordinator HOST:PORT",
    ),
    "no such process": (
        GENERATE,
        "--checkpoint GOOD --coordinator a:1 --num-processes 2 --process-id 2 Hello",
        "--process-id is 2, expected 0 to 1",
    ),
    "chat of hosts": (GENERATE, "--checkpoint GOOD --chat --coordinator auto", "--chat and --coordinator: leave one"),
    "bad tools": (GENERATE, "--checkpoint GOOD --tools BROKEN Hello", "broken.json, line 1, column 3: "),
    "bad chat": (GENERATE, "--checkpoint GOOD --chat --messages BROKEN", "broken.json, line 1, column 3: "),
    "score missing": (SCORE, "--checkpoint ABSENT Hello", "absent: no such folder, expected a checkpoint's folder"),
    "score another": (SCORE, "--checkpoint LLAMA Hello", "config.json: model_type is 'llama', expected 'gpt_oss'"),
    "score short": (SCORE, "--checkpoint GOOD --token-ids 1", "--token-ids is 1 token long, expected at least 2"),
    "convert missing": (CONVERT, "ABSENT EMPTY/out", "absent: no such folder, expected a checkpoint's folder"),
    "convert another": (CONVERT, "LLAMA EMPTY/out", "config.json: model_type is 'llama', expected 'gpt_oss'"),
    "convert one folder": (CONVERT, "GOOD", "expected two folders, SRC DST, got "),
    "random config": (RANDOM, "ABSENT --config BROKEN", "broken.json, line 1, column 3: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_obvious_mistake_is_reported_at_once(name, places, tmp_path):
    """Guards patience: seconds of imports before one hears of a typing error."""
    module, line, message = MISTAKES[name]
    for place, path in places.items():
        line = line.replace(place, str(path))
    done = run(tmp_path, module, *line.split())
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert done.stdout == ""
    assert "jax" not in done.packages
    assert done.cpu_seconds < MISTAKE_CPU_SECONDS


def test_what_needs_no_conversation_needs_none_of_its_packages(places, tmp_path):
    """Guards machines that have JAX and little else: texts and ids are scored without harmony, JSON forms or a chat."""
    done = run(tmp_path, SCORE, "--checkpoint", places["GOOD"], "--token-ids", "1,2,3", "--compilation-cache", "")
    assert done.returncode == 0, done.stderr
    assert done.packages.isdisjoint({"openai_harmony", "pydantic", "prompt_toolkit"})


def test_the_first_token_comes_soon(tmp_path):
    """Guards the start with a warm cache: back ends for other devices, Orbax, traces and compilations take seconds."""
    vocabulary = {"vocab_size": 201_088, "eos_token_id": 200_002, "pad_token_id": 199_999}
    checkpoint = TinyModel(golden.two_layers_config() | vocabulary).write(tmp_path / "published")
    line = f"--checkpoint {checkpoint} --compilation-cache {tmp_path / 'programs'} --max-new-tokens 1 Hello"
    cold, *warm = (run(tmp_path, GENERATE, *line.split()) for _ in range(3))
    assert [done.returncode for done in (cold, *warm)] == [0] * 3, cold.stderr
    assert min(done.cpu_seconds for done in warm) < FIRST_TOKEN_CPU_SECONDS
    for done in warm:
        assert done.modules.isdisjoint(
            {"jax.experimental.mosaic", "jax.experimental.pallas", "orbax.checkpoint", "tensorstore", "prompt_toolkit"}
        )


def test_the_package_itself_needs_no_jax():
    """Guards whoever wants a name that needs none: requests, sampling options, the error."""
    code = (
        "import sys, gptoss_jax; gptoss_jax.Request, gptoss_jax.SamplingParams, gptoss_jax.EngineConfig,"
        "gptoss_jax.GptossError; sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=golden.ROOT, check=True, timeout=60)
