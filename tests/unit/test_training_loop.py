"""The run around a training step: resumed anywhere it is the same run, and what goes wrong is named."""

import hashlib
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptoss_jax.model.config import parse_config
from gptoss_jax.training import metrics as metrics_files
from gptoss_jax.training import plot, speed
from gptoss_jax.training.loop import Loop, NotFiniteError, Schedule
from gptoss_jax.training.metrics import Metrics, MetricsError, Row
from gptoss_jax.training.packing import Position
from gptoss_jax.training.run_folder import RunFolder, RunRecord
from gptoss_jax.training.speed import Counts, Pace
from gptoss_jax.training.states import StateError, States
from tests.fake_trainer import EXPERTS, LAYERS, FakeData, FakeTrainer
from tests.goldens.make import tiny_config

RECORD = RunRecord({"steps": 6}, {"sha256": "0"}, {"weights": "1"}, {"jax": "2"})
CONFIG = parse_config(tiny_config())


def _run(path: Path, *, trainer: FakeTrainer | None = None, stop_after: int | None = None, **schedule):
    """A run in a folder, to its end or to a signal after some steps of this process."""
    trainer, schedule = trainer or FakeTrainer(), {"total_steps": 6, "save_every": 2, "evaluate_every": 3} | schedule

    def stopped() -> int:
        return signal.SIGINT if stop_after is not None and trainer.steps >= stop_after else 0

    with RunFolder(path, RECORD) as folder:
        pace = Pace(CONFIG, 6, method="full", rate=1e12)
        return Loop(trainer, FakeData(), folder, Schedule(**schedule), pace, stopped=stopped).run()


def _digest(state) -> str:
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))).hexdigest()


def _csv(path: Path) -> list[bytes]:
    return [(path / name).read_bytes() for name in (metrics_files.METRICS, metrics_files.ROUTER)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Any]:
    """The folder of a run that nothing has interrupted, which tests only read, and its state."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    return path, _run(path).state


@pytest.fixture(scope="module")
def whole(finished) -> tuple[str, list[bytes]]:
    """What such a run ends with."""
    return _digest(finished[1]), _csv(finished[0])


@pytest.fixture
def unplotted(monkeypatch) -> None:
    """Without plots, which take longer than all else."""
    monkeypatch.setattr(plot, "write", lambda path, rows, title: False)


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_run_that_a_signal_stops_goes_on_to_the_same_end(after, whole, tmp_path, unplotted):
    """Guards resuming: another weight, momentum or batch, a step done twice, a row missing or twice."""
    first = _run(tmp_path / "run", stop_after=after)
    assert (first.step, first.signal) == (after, signal.SIGINT)
    second = _run(tmp_path / "run")
    assert (second.step, second.signal, int(second.state.step)) == (6, 0, 6)
    assert (_digest(second.state), _csv(tmp_path / "run")) == whole


def test_rows_after_the_saved_state_are_cut_when_a_crash_left_them(whole, tmp_path, unplotted):
    """Guards metrics after `kill -9` between two saves: no step that is done again may stand there twice."""
    with pytest.raises(NotFiniteError):
        _run(tmp_path / "run", trainer=FakeTrainer(broken_at=6))  # rows to step 5, a state of step 4
    with open(tmp_path / "run" / metrics_files.METRICS, "a") as file:
        file.write("6,0.1")  # as a crash in the middle of writing leaves it
    assert (_digest(_run(tmp_path / "run").state), _csv(tmp_path / "run")) == whole


def test_a_finished_run_is_not_run_again(finished, whole, tmp_path, unplotted):
    """Guards the end: the same command must find the result's state, and compute nothing."""
    shutil.copytree(finished[0], tmp_path / "run")
    trainer = FakeTrainer()
    assert _digest(_run(tmp_path / "run", trainer=trainer).state) == whole[0]
    assert trainer.steps == 0


def test_a_loss_that_is_no_number_names_its_step_and_its_conversations(tmp_path, unplotted):
    """Guards against training on in silence, and against a saved state that holds what is no number."""
    with pytest.raises(NotFiniteError) as caught:
        _run(tmp_path / "run", trainer=FakeTrainer(broken_at=4))
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("step 4: the loss is nan; the state after step 2 is kept in ")
    assert lines[2:] == [
        "  row 0: data.jsonl, line 4",
        "  row 1: data.jsonl, line 5; data.jsonl, line 6",
    ]
    assert States(tmp_path / "run" / "states").steps() == [2]


def test_the_last_two_states_are_kept_and_what_a_crash_left_is_removed(tmp_path, unplotted):
    """Guards the disk: states of a long run must not fill it, half written ones neither."""
    _run(tmp_path / "run", save_every=1)
    states = tmp_path / "run" / "states"
    assert sorted(path.name for path in states.iterdir()) == ["step-00000005", "step-00000006"]
    (states / ".unfinished-step-00000007").mkdir()
    assert States(states).steps() == [5, 6]
    assert not (states / ".unfinished-step-00000007").exists()


def test_a_damaged_state_is_named(finished, tmp_path):
    """Guards a resume from half of a state: it must say which folder, and that the one before would do."""
    shutil.copytree(finished[0], tmp_path / "run")
    state = tmp_path / "run" / "states" / "step-00000006"
    for file in (state / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(StateError, match=r"step-00000006 is damaged .*remove it"):
        _run(tmp_path / "run")
    (state / "position.json").write_text("{}")
    with pytest.raises(StateError, match="of another step"):
        _run(tmp_path / "run")


def test_validation_is_measured_when_it_is_due(finished):
    """Guards sums over batches taken for means, and a measurement at each step or at none."""
    rows = metrics_files.read(finished[0] / metrics_files.METRICS)
    assert [row.step for row in rows] == [1, 2, 3, 4, 5, 6]
    measured = [row for row in rows if row.validation_loss is not None]
    assert [row.step for row in measured] == [3, 6]
    assert measured[0].validation_accuracy == pytest.approx(6 / 8)


def test_rows_are_logged_as_often_as_asked(tmp_path, unplotted):
    """Guards --log-every and --evaluate-every: a row for each that is due, and for the last step."""
    _run(tmp_path / "run", log_every=4, evaluate_every=0)
    assert [row.step for row in metrics_files.read(tmp_path / "run" / metrics_files.METRICS)] == [4, 6]


def test_router_statistics_have_a_row_per_layer(finished):
    """Guards loads of one layer written for another, or of the first expert only."""
    header, *lines = (finished[0] / metrics_files.ROUTER).read_text().splitlines()
    assert header == "step,layer,entropy," + ",".join(f"load_{i}" for i in range(EXPERTS))
    assert len(lines) == 6 * LAYERS
    assert lines[4] == "2,1,1.609438,0.2,0.2,0.2,0.2,0.2"


def test_metrics_of_something_else_are_refused(tmp_path):
    """Guards a file of somebody else's that would be rewritten."""
    (tmp_path / metrics_files.METRICS).write_text("a,b\n1,2\n")
    with pytest.raises(MetricsError, match="columns"):
        Metrics(tmp_path, 0)
    (tmp_path / metrics_files.METRICS).write_text(",".join(Row._fields) + "\n1,2\n")
    with pytest.raises(MetricsError, match="no row of a run"):
        Metrics(tmp_path, 0)


def test_numbers_in_csv_are_the_same_float32(tmp_path):
    """Guards rounding: what is read for the plot, or compared after a resume, is what was measured."""
    loss = float(np.float32(1) / np.float32(3))
    with Metrics(tmp_path, 0) as metrics:
        metrics.add(Row(1, loss, 0.0, 1e-12, 3e-4, 5), np.ones((1, 1)), np.zeros(1))
    (row,) = metrics_files.read(tmp_path / metrics_files.METRICS)
    assert np.float32(row.loss) == np.float32(loss)
    assert row.validation_loss is None


def test_tensorboard_files_hold_the_scalars(finished):
    """Guards files that TensorBoard shows as empty."""
    files = sorted((finished[0] / metrics_files.TENSORBOARD).iterdir())
    content = b"".join(file.read_bytes() for file in files)
    for name in (b"learning_rate", b"validation/loss", b"router_entropy/layer_2"):
        assert name in content


def test_the_plot_is_a_picture(tmp_path):
    """Guards a run whose plot fails at its end: of one row, of many, with and without validation."""
    rows = [Row(i + 1, 3 / (i + 1), 1.0, 1.0, 1e-4, 7, 2.0 if i % 5 == 0 else None, 0.5) for i in range(40)]
    for count in (1, 40):
        assert plot.write(tmp_path / "loss.png", rows[:count], "a run")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_smoothing_keeps_the_mean_at_the_ends():
    """Guards a curve that falls to zero at both ends, where fewer values are in the mean."""
    assert plot.smoothed(np.ones(500)) == pytest.approx(np.ones(500))
    assert plot.smoothed(np.arange(5.0)) == pytest.approx([0.5, 1, 2, 3, 3.5])


# ---- speed ----


def test_useful_operations_are_those_of_the_products():
    """Guards the share of the matrix rate: a factor of two, padding, all experts in place of top_k."""
    counts = speed.count(FakeData().take(Position())[0], window=3)
    assert counts == Counts(14, 14, 2 * 28, 2 * (1 + 2 + 5 * 3))
    hidden, inner, layers = 96, 160, 5
    per_layer = 2 * 64 * (6 + 2) * hidden + 4 * 3 * inner * hidden + 7 * hidden
    products = 14 * (layers * per_layer + 512 * hidden)
    scores = 2 * 6 * 64 * (3 * counts.keys_window + 2 * counts.keys_full)
    assert speed.useful_flop(CONFIG, counts, method="full") == 2 * 3 * (products + scores)
    assert speed.useful_flop(CONFIG, counts, method="lora") == 2 * (2 * products + 3 * scores)
    fewer = speed.useful_flop(CONFIG, counts, method="full", vocab_rows=100)
    assert speed.useful_flop(CONFIG, counts, method="full") - fewer == 2 * 3 * 14 * 412 * hidden


def test_the_pace_counts_neither_compiling_nor_pauses():
    """Guards tokens/s and the time left: a program's first step compiles it, validation and saving are no training."""
    now = [0.0]
    pace = Pace(CONFIG, 10, method="full", rate=1e9, clock=lambda: now[0])
    pace.start(2)
    assert pace.line() == "compiling and measuring"
    now[0] = 100.0
    pace.add(FakeData().take(Position())[0])
    for step in range(2):
        now[0] += 2.0
        pace.add(FakeData().take(Position(0, step))[0])
        with pace.paused():
            now[0] += 50.0
    assert pace.seconds == 4.0
    assert pace.tokens_per_second == 7.0
    assert pace.seconds_left == 10.0  # of 10 steps 5 are done
    now[0] += 100.0
    pace.add(FakeData().take(Position())[0], "quantized")
    assert (pace.seconds, pace.seconds_left) == (4.0, 8.0)
    assert pace.line().endswith("8 s left") and "7 tokens/s" in pace.line()
    assert "of this machine's float32 matrix rate, 1.0 GFLOP/s" in pace.summary()


def test_durations_read_well():
    """Guards 3,600 s in a progress line."""
    assert [speed.duration(s) for s in (7.4, 65.0, 11220.0)] == ["7 s", "1 min 5 s", "3 h 7 min"]
