"""What each step of a run has measured: rows of CSV files that a resumed run cuts to its step, and TensorBoard's files.

Rows hold nothing that depends on the clock, so that a run that was killed and went on ends with the same bytes.
"""

import contextlib
import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptoss_jax import whole_files
from gptoss_jax.errors import GptossError, short

METRICS, ROUTER, TENSORBOARD = "metrics.csv", "router.csv", "tensorboard"


class MetricsError(GptossError):
    """A CSV file of a run that holds something else than its rows."""


class Row(NamedTuple):
    """One row of metrics.csv.

    Attributes:
        step: steps done, this one included.
        loss: of this step, nats per learned token.
        balance: the auxiliary loss of the router, not weighted.
        gradient_norm: before it is clipped.
        learning_rate: of this step.
        learned_tokens: tokens that the loss is the mean of.
        validation_loss: after this step, nats per learned token; None: not measured at this step.
        validation_accuracy: share of those tokens that are the most likely ones; None as above.
    """

    step: int
    loss: float
    balance: float
    gradient_norm: float
    learning_rate: float
    learned_tokens: int
    validation_loss: float | None = None
    validation_accuracy: float | None = None


class Metrics:
    """The files of metrics of one run, open for its next rows. Use it in a `with` block.

    Attributes:
        rows: all rows so far, of earlier processes too.
        has_tensorboard: whether TensorBoard's files are written: tensorboardX is installed.
    """

    def __init__(self, folder: Path, step: int):
        """Opens the files in `folder`, without what stands there of steps after `step`.

        Raises:
            MetricsError: they hold something else than rows.
            WriteError: they cannot be written.
        """
        self.rows = [row for row in read(folder / METRICS) if row.step <= step]
        _rewrite(folder / METRICS, Row._fields, map(_texts, self.rows))
        routers = [row for row in _lines(folder / ROUTER) if _whole(row[0], folder / ROUTER) <= step]
        _rewrite(folder / ROUTER, _header(folder / ROUTER), routers)
        self._router_path, self._has_router_header = folder / ROUTER, (folder / ROUTER).stat().st_size > 0
        self._files = contextlib.ExitStack()
        self._metrics = self._files.enter_context(open(folder / METRICS, "a", newline=""))
        self._router = self._files.enter_context(open(folder / ROUTER, "a", newline=""))
        self._board = _board(folder / TENSORBOARD, step)
        self.has_tensorboard = self._board is not None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()
        if self._board is not None:
            self._board.close()

    def add(self, row: Row, load: np.ndarray, entropy: np.ndarray, others: Mapping[str, float] = {}) -> None:
        """Adds a row.

        Args:
            row: of metrics.csv.
            load: share of assignments per expert, [L, E].
            entropy: of the mean routing distribution per layer in nats, [L].
            others: what only TensorBoard shows, since it differs between two runs alike: speed.
        """
        self.rows.append(row)
        csv.writer(self._metrics, lineterminator="\n").writerow(_texts(row))
        router = csv.writer(self._router, lineterminator="\n")
        if not self._has_router_header:
            router.writerow(["step", "layer", "entropy", *(f"load_{expert}" for expert in range(load.shape[1]))])
            self._has_router_header = True
        for layer, (shares, nats) in enumerate(zip(load, entropy, strict=True)):
            router.writerow([row.step, layer, _text(float(nats)), *(_text(float(share)) for share in shares)])
        self._metrics.flush()
        self._router.flush()
        if self._board is not None:
            _show(self._board, row, load, entropy, others)

    def sync(self) -> None:
        """Puts all rows on the disk: to be called before the state of their step is."""
        for file in (self._metrics, self._router):
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """The rows of a metrics.csv; none where there is no such file. A line that a crash has cut is left out.

    Raises:
        MetricsError: the file holds something else.
    """
    if (header := _header(path)) and header != list(Row._fields):
        raise MetricsError(f"{path}: columns {short(header)}, expected {', '.join(Row._fields)}: remove it")
    return [_row(line, path) for line in _lines(path)]


def _row(line: Sequence[str], path: Path) -> Row:
    try:
        values = {name: float(text) if text else None for name, text in zip(Row._fields, line, strict=True)}
        counts = {name: int(line[Row._fields.index(name)]) for name in ("step", "learned_tokens")}
        return Row(**{**values, **counts})  # pyright: ignore[reportArgumentType]  (None only where a column is optional)
    except ValueError:
        raise MetricsError(f"{path}: {short(','.join(line))} is no row of a run: remove the file") from None


def _lines(path: Path) -> list[list[str]]:
    """Cells of each whole line after the header."""
    return list(csv.reader(_whole_lines(path)[1:]))


def _header(path: Path) -> list[str]:
    return next(iter(csv.reader(_whole_lines(path)[:1])), [])


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return path.read_bytes().decode(errors="replace").split("\n")[:-1]


def _whole(text: str, path: Path) -> int:
    try:
        return int(text)
    except ValueError:
        raise MetricsError(f"{path}: {short(text)} is no step: remove the file") from None


def _rewrite(path: Path, header: Sequence[str], lines: Iterator[list[str]] | list[list[str]]) -> None:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *lines] if header else [])
    whole_files.write_whole(path, out.getvalue().encode())


def _texts(row: Row) -> list[str]:
    return [_text(value) for value in row]


def _text(value: float | int | None) -> str:
    """The shortest text that gives the same float32 again."""
    return "" if value is None else str(value) if isinstance(value, int) else str(np.float32(value))


def _board(folder: Path, step: int) -> Any:
    """A writer of TensorBoard's files that hides what an earlier process wrote after `step`; None: not installed."""
    try:
        from tensorboardX import SummaryWriter  # here, since it is optional
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _show(board: Any, row: Row, load: np.ndarray, entropy: np.ndarray, others: Mapping[str, float]) -> None:
    measured = {name: value for name, value in row._asdict().items() if name != "step" and value is not None}
    for name, value in {**measured, **others}.items():
        board.add_scalar(name.replace("validation_", "validation/"), value, row.step)
    for layer, nats in enumerate(entropy):
        board.add_scalar(f"router_entropy/layer_{layer}", float(nats), row.step)
        board.add_scalar(f"router_largest_load/layer_{layer}", float(load[layer].max()), row.step)
