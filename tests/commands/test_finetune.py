"""The command that fine-tunes, as people run it: a real model, its result loaded, mistakes in one line, signals."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.checkpoints import peft
from gptoss_jax.model.config import parse_config
from gptoss_jax.training import metrics
from tests import finetunes
from tests.goldens.make import ROOT

SHORT = ("--row-tokens", "160", "--batch-rows", "2", "--quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and conversations that it can be trained on."""
    folder = tmp_path_factory.mktemp("finetune")
    finetunes.model(folder, finetunes.chats(folder / "chats.jsonl"))
    return folder


@pytest.fixture(scope="module")
def full(folder) -> tuple[Path, Any]:
    """A run of all weights to its end, and what it printed."""
    done = finetunes.run(
        *_basic(folder, "full"), *FULL, "--steps", "30", "--validation", "0.2", "--evaluate-every", "10"
    )
    assert done.returncode == 0, done.stderr
    return folder / "full", done


FULL = ("--method", "full", "--compact-vocabulary", "--learning-rate", "1e-2")


def _basic(folder: Path, name: str, options: tuple[str, ...] = SHORT[:-1]) -> tuple[Any, ...]:
    return (
        *("--checkpoint", folder / "model", "--data", folder / "chats.jsonl", "--output", folder / name),
        *options,
    )


def test_a_run_learns_and_writes_all_its_files(full):
    """Guards the promise of the help text: metrics, router, plot, TensorBoard, a result; and that the loss falls."""
    path, done = full
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    expected = {"run.json", "metrics.csv", "router.csv", "tensorboard", "loss.png", "states", "tokens", "checkpoint"}
    assert names == expected
    rows = metrics.read(path / metrics.METRICS)
    assert [row.step for row in rows] == list(range(1, 31))
    assert rows[-1].loss < rows[0].loss / 2
    measured = [row for row in rows if row.validation_loss is not None]
    assert [row.step for row in measured] == [10, 20, 30]
    assert "of them learned; an epoch is" in done.stderr and "conversations for validation" in done.stderr
    assert "of this machine's float32 matrix rate" in done.stderr and "tokens/s" in done.stderr
    assert done.stdout == ""


def test_the_result_is_a_checkpoint_that_loads(full, folder):
    """Guards --method full: what was trained is what the other commands run, and its loss is what was measured."""
    path, _ = full
    model = gptoss_jax.load(path / "checkpoint", dtype="float32")
    assert not model.weights_are_random
    before = gptoss_jax.load(folder / "model", dtype="float32")
    ids = [200006, 1428, 200008, 4827, 382, 220, 18]
    assert np.isfinite(model.logits(ids)).all()
    assert np.abs(model.logits(ids) - before.logits(ids)).max() > 0.1


def test_an_adapter_is_a_peft_folder(folder):
    """Guards --method lora, the default: every target that was asked for has its factors, all of which have learned."""
    options = ("--lora-rank", "3", "--lora-targets", "attention,router", "--steps", "4", "--learning-rate", "1e-2")
    done = finetunes.run(*_basic(folder, "lora"), *options)
    assert done.returncode == 0, done.stderr
    found = peft.read(folder / "lora" / "adapter", parse_config(finetunes.NARROW))
    names = ("attention/q", "attention/k", "attention/v", "attention/out", "moe/router")
    assert set(found) == {f"layers/{layer}/{name}" for layer in range(2) for name in names}
    assert all(np.abs(factors.b).max() > 0 and factors.b.shape[-1] == 3 for factors in found.values())


def test_a_finished_run_says_so(full, folder):
    """Guards the same command once more: it must find that nothing is left, in no time, and change nothing."""
    before = finetunes.digest(full[0])
    options = ("--steps", "30", "--validation", "0.2", "--evaluate-every", "10")
    done = finetunes.run(*_basic(folder, "full"), *FULL, *options)
    assert (done.returncode, "nothing is left to do" in done.stderr) == (0, True)
    assert finetunes.digest(full[0]) == before


def test_another_run_in_the_same_folder_is_refused(full, folder):
    """Guards a run that goes on with other numbers: each difference is named, in the file's words."""
    options = ("--steps", "31", "--validation", "0.2", "--seed", "7")
    done = finetunes.run(*_basic(folder, "full"), *FULL, *options)
    assert done.returncode == 2
    assert "is of another run than this one" in done.stderr
    assert "asked, steps: 30 then, 31 now\n" in done.stderr and "asked, seed: 0 then, 7 now\n" in done.stderr


def test_interrupted_it_saves_and_says_how_to_go_on(folder):
    """Guards Ctrl-C and schedulers' SIGTERM: the step under way is done, its state kept, the exit code tells."""
    out = folder / "stopped"
    options = (*_basic(folder, "stopped"), *FULL, "--steps", "400", "--save-every", "0")

    def press(number: int) -> Any:
        def meanwhile(process: Any) -> None:
            for _ in range(600):
                if (out / metrics.METRICS).exists() and len(metrics.read(out / metrics.METRICS)) > 2:
                    break
                time.sleep(0.1)
            os.kill(process.pid, number)

        return meanwhile

    done = finetunes.run(*options, meanwhile=press(signal.SIGTERM))
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "which is saved: the same command goes on" in done.stderr
    (state,) = (out / "states").iterdir()
    assert int(state.name.removeprefix("step-")) >= 2
    done = finetunes.run(*options, meanwhile=lambda process: (time.sleep(0.5), press(signal.SIGINT)(process)))
    assert done.returncode == 128 + signal.SIGINT, done.stderr


def test_a_loss_that_is_no_number_stops_the_run(folder):
    """Guards the exit code and the last good state: the step, its rows' files and lines are named."""
    options = ("--steps", "50", "--save-every", "1", "--learning-rate", "1e30", "--clip", "0", "--warmup", "0")
    done = finetunes.run(*_basic(folder, "broken"), "--method", "full", "--compact-vocabulary", *options)
    assert done.returncode == 2
    assert "is nan" in done.stderr or "is inf" in done.stderr
    assert f"row 0: {folder}/chats.jsonl, line " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "broken" / "checkpoint").exists()


# ---- what is wrong ----


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "--checkpoint is missing"),
        (("--checkpoint", "nowhere"), "nowhere"),
        (("--checkpoint", "model"), "--data is missing"),
        (("--checkpoint", "model", "--data", "chats.jsonl"), "--output is missing"),
        (("--checkpoint", "model", "--data", "nowhere.jsonl", "--output", "x"), "nowhere.jsonl: No such file"),
        (("more",), "unexpected argument 'more'"),
        (("--method", "full", "--lora-rank", "3"), "--lora-rank has an effect with --method lora only"),
        (("--compact-vocabulary",), "--compact-vocabulary has an effect with --method full only"),
        (("--lora-rank", "0"), "--lora-rank is 0, expected a whole number from 1"),
        (("--lora-targets", "router,heads"), "--lora-targets holds 'heads', expected some of attention, router"),
        (("--quantize-from", "0.5"), "--quantize-from needs method full"),
        (("--steps", "3", "--epochs", "2"), "--steps and --epochs: leave one of them out"),
        (("--batch-rows", "6", "--accumulate", "4"), "--batch-rows is 6, expected a multiple of accumulate, 4"),
        (("--optimizer", "sgd"), "--optimizer is 'sgd', expected one of adamw, muon"),
        (("--learning-rate", "0"), "--learning-rate is 0.0, expected a number above 0"),
        (("--save-every", "-1"), "--save-every is -1, expected at least 0"),
        (("--validation", "1.5"), "--validation is 1.5, expected files, or a share above 0 and below 1"),
        (("--channels", "thoughts"), "--channels holds 'thoughts'"),
    ],
)
def test_mistakes_in_flags_are_one_line(flags, expected, folder, monkeypatch):
    """Guards every flag: out of its range, alone where it needs another, or without effect."""
    monkeypatch.chdir(folder)
    done = finetunes.run(*flags, prepare=_Here(str(folder)))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("finetune: ") and expected in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


class _Here:
    """In a command's process: relative names are of a folder."""

    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self) -> None:
        os.chdir(self.folder)


def test_bad_conversations_are_listed_and_leave_no_run(folder):
    """Guards data that is mended and tried again: nothing of the first try may be in the way."""
    bad = ["no JSON", {"messages": [{"role": "user", "content": "Hi"}]}, {"messages": []}]
    finetunes.write_lines(folder / "bad.jsonl", bad)
    out = folder / "mended"
    arguments = ("--checkpoint", folder / "model", "--data", folder / "bad.jsonl", "--output", out, *SHORT)
    done = finetunes.run(*arguments, "--steps", "2", "--method", "full", "--compact-vocabulary")
    assert done.returncode == 2
    for number in (1, 2, 3):
        assert f"bad.jsonl, line {number}" in done.stderr or f"bad.jsonl:{number}" in done.stderr
    assert not out.exists()


def test_a_mesh_that_does_not_fit_leaves_no_run(folder):
    """Guards --mesh: the devices are counted before anything is kept, and the same folder may be tried again."""
    out = folder / "meshed"
    done = finetunes.run(*_basic(folder, "meshed"), "--method", "full", "--mesh", "expert=4")
    assert done.returncode == 2 and "4 devices" in done.stderr
    assert not out.exists()


# ---- without training ----


def test_a_dry_run_says_what_it_would_take(folder):
    """Guards --dry-run: on stdout, without a folder, of a config.json alone too, cut as a mesh cuts."""
    done = finetunes.run(*_basic(folder, "dry"), "--dry-run", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert "24 conversations, " in done.stdout and "steps: " in done.stdout and "in all" in done.stdout
    assert not (folder / "dry").exists()
    config = ROOT / "configs" / "gpt-oss-20b.json"
    whole, halves = (
        finetunes.run("--dry-run", "--checkpoint", config, "--dtype", "bfloat16", *mesh).stdout
        for mesh in ((), ("--mesh", "tensor=2"))
    )
    assert "base weights, not trained            12.8" in whole
    assert "base weights, not trained             6.4" in halves


def test_what_is_asked_is_kept_in_the_folder(full):
    """Guards run.json, from which people know years later what they ran."""
    record = json.loads((full[0] / "run.json").read_text())
    assert record["asked"]["method"] == "full" and record["asked"]["optimizer"]["learning_rate"] == 1e-2
    assert len(record["data"]["training"][0]) == 64 and len(record["source"]["weights"]) == 64
    assert {"jax", "optax", "numpy"} <= set(record["versions"])
