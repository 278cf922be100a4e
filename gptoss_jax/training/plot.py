"""The loss of a run as a picture: training and validation loss over steps, and the learning rate below them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax import pictures
from gptoss_jax.training.metrics import Row

PLOT = "loss.png"
_SMOOTHED_OVER = 0.02  # of the run: the width of the mean that is drawn over the single steps' losses
_MOST_POINTS = 4000


def write(path: Path, rows: Sequence[Row], title: str) -> bool:
    """Draws the rows, of which there is at least one, as a PNG at `path`, whole; False: matplotlib is not installed.

    Raises:
        WriteError: it cannot be written.
    """
    figure = pictures.figure()
    if figure is None:
        return False
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_losses(losses, rows)
    losses.set_title(title, fontsize=10)
    rates.plot([row.step for row in rows], [row.learning_rate for row in rows], color="tab:gray", linewidth=1)
    rates.set(xlabel="step", ylabel="learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    pictures.write(path, figure)
    return True


def _draw_losses(axes: Any, rows: Sequence[Row]) -> None:
    every = -(-len(rows) // _MOST_POINTS)
    steps, losses = (np.array([getattr(row, name) for row in rows]) for name in ("step", "loss"))
    axes.plot(steps[::every], losses[::every], color="tab:blue", alpha=0.3, linewidth=0.8, label="training, each step")
    axes.plot(steps[::every], smoothed(losses)[::every], color="tab:blue", linewidth=1.5, label="training, mean")
    measured = [row for row in rows if row.validation_loss is not None]
    if measured:
        points = [row.step for row in measured], [row.validation_loss for row in measured]
        axes.plot(*points, color="tab:orange", marker="o", markersize=3, linewidth=1.5, label="validation")
    if losses.min() > 0 and losses.max() > 20 * losses.min():
        axes.set_yscale("log")
    axes.set_ylabel("loss, nats per learned token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def smoothed(values: np.ndarray) -> np.ndarray:
    """At each place the mean of the values around it, fewer of them near the ends; [N] -> [N]."""
    half = max(1, round(len(values) * _SMOOTHED_OVER / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
