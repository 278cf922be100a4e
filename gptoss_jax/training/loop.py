"""The run around the training step: steps from where the saved state says, rows of metrics, validation, states.

Knows neither files of conversations nor how a step is computed. What a step does depends on the state and on the place
in the data alone, so that a run that goes on from a saved state does what one that was never interrupted does.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from gptoss_jax.errors import GptossError, short, shortened
from gptoss_jax.training import plot
from gptoss_jax.training.metrics import Metrics, Row
from gptoss_jax.training.packing import Position
from gptoss_jax.training.run_folder import RunFolder
from gptoss_jax.training.speed import Pace
from gptoss_jax.training.states import StateError, States, shapes

_NAMED_ROWS = 8  # of a batch, in an error


class NotFiniteError(GptossError):
    """A step whose loss or gradient is no finite number."""


@runtime_checkable
class Trains(Protocol):
    """What the loop needs of a `gptoss_jax.training.step.Trainer`."""

    def init(self) -> Any:
        """The state before the first step: a pytree with a `step`."""
        ...

    def step(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """The state after one more step, and a StepReport; `state` is deleted."""
        ...

    def is_quantized(self, step: int) -> bool:
        """Which of two programs the step after `step` of them is done by."""
        ...

    def evaluate(self, state: Any, batch: Any) -> Any:
        """An Evaluation."""
        ...


@runtime_checkable
class Data(Protocol):
    """What the loop needs of the conversations: see `gptoss_jax.training.feed.Feed`."""

    def take(self, position: Position) -> tuple[Any, Position]:
        """The Batch at a place in the data, always the same one, and the place after it."""
        ...

    def places(self, position: Position) -> Sequence[str]:
        """For each row of that batch: which conversations it holds, as file and line."""
        ...

    def validation(self) -> Iterable[Any]:
        """All batches of the validation data; none where there is none."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How long a run is, and after how many steps each it does what; 0 is after the last one only, when all is done.

    Attributes:
        total_steps: of the run.
        log_every: rows of metrics.
        evaluate_every: measurements on the validation data.
        save_every: states saved.
    """

    total_steps: int
    log_every: int = 1
    evaluate_every: int = 0
    save_every: int = 100

    def is_due(self, every: int, step: int) -> bool:
        """Whether what happens each `every` steps does after `step` of them."""
        return step == self.total_steps or bool(every and step % every == 0)


class Outcome(NamedTuple):
    """How a run, or this process's part of it, ended.

    Attributes:
        state: what the trainer's last step gave.
        step: how many steps are done.
        signal: number of the one that has stopped it; 0: all steps are done.
        last: the last row of metrics, if any.
    """

    state: Any
    step: int
    signal: int
    last: Row | None


class Loop:
    """One process's part of a run."""

    def __init__(
        self,
        trainer: Trains,
        data: Data,
        folder: RunFolder,
        schedule: Schedule,
        pace: Pace,
        *,
        note: Callable[[str], None] = lambda line: None,
        show: Callable[[str], None] = lambda line: None,
        stopped: Callable[[], int] = lambda: 0,
    ):
        """A loop over what is left of a run.

        Args:
            trainer: computes.
            data: what it learns.
            folder: of the run.
            schedule: how long, and how often what.
            pace: counts each step.
            note: gets lines that stay.
            show: gets a line after each step, which replaces the one before.
            stopped: number of the signal that is to stop the run; 0: none has come.
        """
        self._trainer, self._data, self._folder, self._schedule = trainer, data, folder, schedule
        self._pace, self._note, self._show, self._stopped = pace, note, show, stopped
        self._states = States(folder.states)

    def run(self) -> Outcome:
        """Does all steps that are left, or those up to a signal; the state is saved then.

        Raises:
            NotFiniteError: names the step and its batch; the last state that was saved is still there.
            StateError: the saved state is damaged.
            OSError: something cannot be written.
        """
        state, step, position = self._first_state()
        self._pace.start(step)
        with Metrics(self._folder.path, step) as metrics:
            if not metrics.has_tensorboard:
                self._note(
                    "no files for TensorBoard: tensorboardX is not installed (pip install 'gptoss-jax[finetune]')"
                )
            outcome = self._steps(state, step, position, metrics)
            if not self._plot(metrics):
                self._note("no plot of the loss: matplotlib is not installed (pip install 'gptoss-jax[finetune]')")
        return outcome

    def _first_state(self) -> tuple[Any, int, Position]:
        """Of the newest saved state; without one, of the beginning."""
        state, steps = self._trainer.init(), self._states.steps()
        if not steps:
            return state, 0, Position()
        position = _position(self._states.position(steps[-1]))
        like = shapes(state)
        del state  # or there would be two of them
        state = self._states.restore(steps[-1], like)
        self._note(f"going on from step {steps[-1]:,} of {self._schedule.total_steps:,}")
        return state, steps[-1], position

    def _steps(self, state: Any, step: int, position: Position, metrics: Metrics) -> Outcome:
        schedule, row = self._schedule, metrics.rows[-1] if metrics.rows else None
        batch, after = self._data.take(position)
        while step < schedule.total_steps and not self._stopped():
            state, report = self._trainer.step(state, batch)
            step += 1
            this, begun, position = batch, position, after
            batch, after = self._data.take(position)  # while the step computes
            row = self._evaluated(self._row(step, report, begun), state)
            self._pace.add(this, self._trainer.is_quantized(step - 1))
            if row.validation_loss is not None or schedule.is_due(schedule.log_every, step):
                router = (np.asarray(report.router.load), np.asarray(report.router.entropy))
                metrics.add(row, *router, self._pace.scalars())
            self._show(self._line(row))
            if schedule.is_due(schedule.save_every, step):
                self._save(step, state, position, metrics)
        number = 0 if step == schedule.total_steps else self._stopped()
        if number:
            self._save(step, state, position, metrics)
        return Outcome(state, step, number, row)

    def _row(self, step: int, report: Any, position: Position) -> Row:
        row = Row(
            step,
            float(report.loss),
            float(report.balance),
            float(report.gradient_norm),
            float(report.learning_rate),
            int(report.learned),
        )
        for name in ("loss", "balance", "gradient_norm"):
            if not math.isfinite(value := getattr(row, name)):
                raise NotFiniteError(self._not_finite(step, position, name, value))
        return row

    def _not_finite(self, step: int, position: Position, name: str, value: float) -> str:
        places = self._data.places(position)
        rows = [f"  row {number}: {shortened(place, 300)}" for number, place in enumerate(places[:_NAMED_ROWS])]
        more = [f"  and {len(places) - _NAMED_ROWS} more rows"] if len(places) > _NAMED_ROWS else []
        saved = self._states.steps()
        kept = f"the state after step {saved[-1]:,} is kept" if saved else "no state had been saved"
        first = f"step {step:,}: the {name.replace('_', ' ')} is {value}; {kept} in {self._folder.states}"
        advice = "try a lower --learning-rate, a longer --warmup, or without these conversations of the step's batch:"
        return "\n".join([first, advice, *rows, *more])

    def _evaluated(self, row: Row, state: Any) -> Row:
        """The row with the measures of the validation data, where that is due."""
        if not self._schedule.is_due(self._schedule.evaluate_every, row.step):
            return row
        with self._pace.paused():
            loss, right, learned = 0.0, 0, 0
            for batch in self._data.validation():
                found = self._trainer.evaluate(state, batch)
                loss, right, learned = loss + float(found.loss), right + int(found.right), learned + int(found.learned)
        if not learned:
            return row
        row = row._replace(validation_loss=loss / learned, validation_accuracy=right / learned)
        self._note(f"step {row.step:,}: validation loss {loss / learned:.4f}, accuracy {right / learned:.2%}")
        return row

    def _save(self, step: int, state: Any, position: Position, metrics: Metrics) -> None:
        with self._pace.paused():
            metrics.sync()
            self._states.save(step, state, position._asdict())
            self._plot(metrics)

    def _plot(self, metrics: Metrics) -> bool:
        """Whether the plot could be drawn, or there is nothing to draw."""
        rows, path = metrics.rows, self._folder.path
        return not rows or plot.write(path / plot.PLOT, rows, _title(rows[-1], path))

    def _line(self, row: Row) -> str:
        return f"step {row.step:,} of {self._schedule.total_steps:,}, loss {row.loss:.4f}, {self._pace.line()}"


def _title(row: Row, path: Path) -> str:
    return f"{path.name}: loss {row.loss:.4f} after {row.step:,} steps"


def _position(saved: Mapping[str, Any]) -> Position:
    try:
        return Position(int(saved["epoch"]), int(saved["row"]))
    except (KeyError, TypeError, ValueError):
        raise StateError(f"the saved place in the data is {short(saved)}: remove the last state") from None
