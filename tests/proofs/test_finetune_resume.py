"""Fine-tuning that is killed: at any moment, as often as it happens, it ends with the bits of a run that is not."""

import math
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from gptoss_jax.training import metrics
from gptoss_jax.training.states import States
from tests import finetunes, jobs, processes

STEPS = 24
SHAPES = ("--row-tokens", "160", "--batch-rows", "2", "--steps", str(STEPS), "--save-every", "4", "--quiet")
METHODS = {
    "full": ("--compact-vocabulary", "--optimizer", "muon", "--quantize-from", "0.5", "--accumulate", "2"),
    "lora": ("--lora-rank", "3", "--lora-dropout", "0.2", "--lora-targets", "attention,router,experts"),
}
KILLED_AFTER = {"full": 5, "lora": 16}  # steps: between two saves; at one, where rounding has begun
DEATHS = {"full": (2, 5, 4, 13, 55), "lora": (2, 13, 33)}  # changes of the folder; half way at even ones
VALIDATION = ("--validation", "0.2", "--evaluate-every", "8")


class Whole(NamedTuple):
    """A run that nothing has interrupted: its folder, and what its result and metrics are."""

    path: Path
    result: str
    rows: tuple[bytes, bytes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and conversations that it is trained on."""
    folder = tmp_path_factory.mktemp("resume")
    finetunes.model(folder, finetunes.chats(folder / "chats.jsonl"))
    return folder


@pytest.fixture(scope="module", params=METHODS)
def whole(request, folder) -> tuple[str, Whole]:
    """The method, and its uninterrupted run."""
    method = request.param
    done = _run(folder, folder / method, method, prepare=Compiled(str(folder / "compiled"), writes=True))
    assert done.returncode == 0, done.stderr
    return method, Whole(folder / method, *_end(folder / method))


class Compiled(NamedTuple):
    """In a command's process: programs from JAX's cache, since each run would compile the same for most of its time.

    Only what is not killed writes: an entry that breaks off is read with a warning.
    """

    folder: str
    writes: bool = False

    def __call__(self) -> None:
        jax.config.update("jax_compilation_cache_dir", self.folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1 if self.writes else math.inf)


def _run(folder: Path, out: Path, method: str, *others: str, **options: Any) -> processes.Done:
    arguments = ("--checkpoint", folder / "model", "--data", folder / "chats.jsonl", "--output", out)
    options.setdefault("prepare", Compiled(str(folder / "compiled")))
    return finetunes.run(*arguments, *SHAPES, *VALIDATION, "--method", method, *METHODS[method], *others, **options)


def _end(path: Path) -> tuple[str, tuple[bytes, bytes]]:
    (result,) = (path / name for name in ("checkpoint", "adapter") if (path / name).exists())
    rows = (path / metrics.METRICS).read_bytes(), (path / metrics.ROUTER).read_bytes()
    return finetunes.digest(result), rows


def test_a_run_that_is_killed_at_random_moments_ends_the_same(whole, folder, tmp_path):
    """Guards `kill -9`: weights by their hash, every row of metrics and of the router, by their bytes."""
    method, uninterrupted = whole
    run = tmp_path / "run"
    moments, kills = random.Random(0), 0
    for step in sorted(moments.sample(range(STEPS), 5)):
        moment = step, moments.uniform(0, 0.3)
        done = _run(folder, tmp_path / "run", method, meanwhile=lambda process, m=moment: _kill_at(process, run, *m))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
    else:
        done = _run(folder, tmp_path / "run", method)
    assert done.returncode == 0, done.stderr
    assert kills > 0
    assert _end(tmp_path / "run") == (uninterrupted.result, uninterrupted.rows)


def test_a_run_that_is_killed_after_a_step_ends_the_same(whole, folder, tmp_path):
    """Guards moments that random ones miss."""
    method, uninterrupted = whole
    step = KILLED_AFTER[method]
    done = _run(folder, tmp_path / "run", method, meanwhile=lambda process: _kill_at(process, tmp_path / "run", step))
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = States(tmp_path / "run" / "states").steps()
    assert saved and saved[-1] < STEPS
    done = _run(folder, tmp_path / "run", method)
    assert done.returncode == 0, done.stderr
    assert _end(tmp_path / "run") == (uninterrupted.result, uninterrupted.rows)


def _kill_at(process: Any, path: Path, step: int, later: float = 0) -> None:
    """Kills a run some seconds after the row of a step stands in its metrics."""
    while process.is_alive():
        if (path / metrics.METRICS).exists() and any(row.step >= step for row in metrics.read(path / metrics.METRICS)):
            process.join(later)
            process.kill()
            return
        time.sleep(0.002)


def test_on_a_mesh_a_killed_run_ends_the_same(folder, tmp_path):
    """Guards shardings of a state that is read again: weights and moments on their devices, the same bits."""
    four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    options = ("--mesh", "data=2,tensor=2", "--steps", "7")
    writes = Compiled(str(folder / "compiled"), writes=True)
    whole = _run(folder, tmp_path / "whole", "lora", *options, environment=four, prepare=writes)
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "run"
    done = _run(folder, run, "lora", *options, environment=four, meanwhile=lambda process: _kill_at(process, run, 6))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert States(run / "states").steps() == [4]
    assert _run(folder, run, "lora", *options, environment=four).returncode == 0
    assert _end(run) == _end(tmp_path / "whole")


class Dying(NamedTuple):
    """In a command's process: dies before its n-th change below a folder, or half way through its n-th write."""

    folder: str
    at: int
    half_way: bool
    compiled: Compiled

    def __call__(self) -> None:
        self.compiled()
        jobs.Dying(self.folder, self.at, self.half_way).install()


def test_a_run_that_dies_while_it_saves_or_writes_its_result_ends_the_same(whole, folder, tmp_path):
    """Guards each state that the folder can be in: record, tokens, rows, states, plot, result, cut in the middle too.

    The last steps alone are run each time, from a copy of a run that was stopped before them.
    """
    method, uninterrupted = whole
    begun = tmp_path / "begun"
    done = _run(folder, begun, method, meanwhile=lambda process: _kill_at(process, begun, 21))
    assert done.returncode == -signal.SIGKILL, done.stderr
    deaths = 0
    for at in DEATHS[method]:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(begun, tmp_path / "run")
        dying = Dying(str(tmp_path / "run"), at, half_way=at % 2 == 0, compiled=Compiled(str(folder / "compiled")))
        died = _run(folder, tmp_path / "run", method, prepare=dying)
        deaths += died.returncode == -signal.SIGKILL
        assert died.returncode in (0, -signal.SIGKILL), died.stderr
        done = _run(folder, tmp_path / "run", method)
        assert done.returncode == 0, (at, done.stderr)
        assert _end(tmp_path / "run") == (uninterrupted.result, uninterrupted.rows), at
        if died.returncode == 0 and not dying.half_way:
            break
    assert deaths >= 2
