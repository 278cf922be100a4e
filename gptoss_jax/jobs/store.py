"""Where the finished lines of a job are, who may write them, and how the parts of several writers become one file.

Beside OUT lie OUT.job.json, which says what the job is, and, where lines cannot be appended to OUT itself (it is to be
in order, compressed, Parquet or remote, or several processes work on it), OUT.parts with a journal for each writer.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gptoss_jax.errors import short
from gptoss_jax.jobs import journal, outputs
from gptoss_jax.jobs import record as records
from gptoss_jax.jobs.journal import CHECKED, PLAIN, Journal, JournalError
from gptoss_jax.jobs.record import Record, RecordError
from gptoss_jax.jobs.rows import RowError
from gptoss_jax.jobs.survey import Survey
from gptoss_jax.whole_files import sync_folder

_SUFFIX = ".journal"
_LINES_AT_ONCE = 1000
MAX_OPEN_FILES = 512  # systems allow a process 1,024, and a job may have more shards


class Layout(NamedTuple):
    """The files of a job.

    Attributes:
        out: the output, as it was named: a path or a URL.
        state: a local path; the names of the other files begin with it.
    """

    out: str
    state: str

    @property
    def record(self) -> Path:
        """What the job is."""
        return Path(f"{self.state}.job.json")

    @property
    def summary(self) -> Path:
        """What became of it, for programs."""
        return Path(f"{self.state}.summary.json")

    @property
    def parts(self) -> Path:
        """The folder of journals; once OUT is written it is gone."""
        return Path(f"{self.state}.parts")

    def part(self, name: str) -> Path:
        """The journal of one writer."""
        return self.parts / f"{name}{_SUFFIX}"

    @property
    def joined(self) -> Path:
        """What that folder is called while it is removed."""
        return Path(f"{self.state}.joined")

    @property
    def is_finished(self) -> bool:
        """Whether OUT has been made of parts, all of them. Of one that lines are appended to, the lines say it."""
        record = records.read(self.record)
        has_parts = record is not None and not record.output.get("appended")
        return has_parts and not self.parts.exists() and outputs.exists(self.out)


class Store:
    """The lines of a job as one writer sees them. Use it in a `with` block.

    Attributes:
        layout: the files.
        part: the name of this writer's journal; None: OUT itself.
    """

    def __init__(self, layout: Layout, part: str | None, record: Record, *, restart: bool = False):
        """Opens the journal, under its lock, of the job that `record` describes.

        Args:
            layout: the files.
            part: see the class.
            record: what the job is.
            restart: throws away what an earlier job has written there.

        Raises:
            JournalError: another process writes it.
            RecordError: what is there is another job's, or no job's.
        """
        self.layout, self.part = layout, part
        if not restart and (existing := records.read(layout.record)):  # before anything is made
            existing.check_same(record, layout.record)
        if part is not None:
            if not layout.record.exists() and outputs.exists(layout.out):
                raise _not_ours(layout)
            layout.parts.mkdir(exist_ok=True)
            sync_folder(layout.parts.parent)
        self._journal = Journal(layout.out if part is None else layout.part(part), PLAIN if part is None else CHECKED)
        try:
            if restart:
                self._clear(record)
                records.write(layout.record, record)
            else:
                self._check(record)
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        self._journal.close()

    def _check(self, record: Record) -> None:
        existing = records.read(self.layout.record)
        if existing:
            existing.check_same(record, self.layout.record)
        elif not self._journal.is_empty or (self.part is not None and outputs.exists(self.layout.out)):
            raise _not_ours(self.layout)
        else:
            records.create(self.layout.record, record)

    def _clear(self, record: Record) -> None:
        if not self.layout.record.exists():
            self._check(record)  # nothing to throw away, or nothing of ours
        self._journal.clear()
        for path in parts(self.layout):
            if path != self._journal.path:
                with Journal(path, CHECKED):  # raises where somebody writes it
                    path.unlink()
        if self.part is None:
            remove_parts(self.layout)

    def lines(self) -> Iterator[bytes]:
        """All lines of this writer, then of the others so far; what a crash left half written of its own is cut off.

        Where lines are appended to OUT there are no others: parts may lie there that a `take_over` had begun.
        """
        yield from (entry.line for entry in self._journal.repaired())
        for path in parts(self.layout) if self.part is not None else ():
            if path != self._journal.path:
                yield from (entry.line for entry in journal.entries(path, CHECKED))

    def done(self, survey: Survey, note: Callable[[Any], None]) -> np.ndarray:
        """Which rows have a line, bool [N]; `note` gets the document of each.

        Raises:
            JournalError: a line that answers no row, or in OUT a second one that answers the same.
        """
        return done_rows(self.lines(), survey, str(self._journal.path), note, may_repeat=self.part is not None)

    def append(self, lines: Sequence[bytes]) -> None:
        """Adds finished lines; they are on the disk when this returns.

        Raises:
            OSError: they are not, and none of them is there.
        """
        self._journal.append(lines)


def _not_ours(layout: Layout) -> RecordError:
    return RecordError(f"{layout.out} is there already, and no job wrote it: name another OUT, or remove it")


def parts(layout: Layout) -> list[Path]:
    """The journals of all writers."""
    return sorted(layout.parts.glob(f"*{_SUFFIX}")) if layout.parts.exists() else []


class PartsReader:
    """Reads what all writers add to the parts of a job, as often as it is asked."""

    def __init__(self, layout: Layout):
        self._layout, self._ends = layout, dict[Path, int]()

    def new_lines(self) -> Iterator[bytes]:
        """The finished lines that have come since it was asked last; at first all."""
        for path in parts(self._layout):
            for offset, line in journal.entries(path, CHECKED, self._ends.get(path, 0)):
                self._ends[path] = offset + len(CHECKED.pack(line)) + 1
                yield line


def take_over(layout: Layout, part: str, record: Record) -> None:
    """Has a job whose lines were appended to OUT go on in parts, of which `record` says so: OUT's lines become one.

    Killed at any moment, it can be done again, or the job can go on as before: the record is what counts.

    Raises:
        JournalError: another process writes OUT.
        RecordError: the job is another one.
    """
    appended = records.read(layout.record)
    if appended is None or not appended.output.get("appended"):
        return
    replace(appended, output=record.output).check_same(record, layout.record)
    layout.parts.mkdir(exist_ok=True)
    with Journal(layout.out, PLAIN), Journal(layout.part(part), CHECKED) as own:
        own.clear()
        lines = journal.entries(layout.out, PLAIN)
        while some := list(itertools.islice(lines, _LINES_AT_ONCE)):
            own.append([line for _, line in some])
        records.write(layout.record, record)


def done_rows(
    lines: Iterator[bytes],
    survey: Survey,
    where: str,
    note: Callable[[Any], None] = lambda document: None,
    *,
    may_repeat: bool = False,
) -> np.ndarray:
    """Which rows have one of the lines, bool [N].

    Args:
        lines: of a job's output.
        survey: of its input.
        where: what errors call the lines.
        note: gets the document of each row's first line.
        may_repeat: whether rows may have several, as in the journals of writers that did not know of each other.

    Raises:
        JournalError: a line that answers no row, or one row's second.
    """
    done = np.zeros(survey.num_rows, np.bool_)
    for number, line in enumerate(lines, 1):
        document = json.loads(line)
        ordinal = _ordinal(document, survey, f"{where}, line {number}")
        if not done[ordinal]:
            _note(document, note, f"{where}, line {number}")
        elif not may_repeat:
            raise JournalError(f"{where}, line {number}: the row {survey.places.where(ordinal)} has a line already")
        done[ordinal] = True
    return done


def _note(document: dict[str, Any], note: Callable[[Any], None], where: str) -> None:
    try:
        note(document)
    except (AttributeError, KeyError, TypeError):  # somebody has edited OUT
        raise JournalError(f"{where}: {short(document)} is no line of a job's output") from None


def _ordinal(document: dict[str, Any], survey: Survey, where: str) -> int:
    try:
        return survey.find(document)
    except RowError as error:
        raise JournalError(f"{where}: {error}") from None


class Merged:
    """The lines of all parts in the order of the input, each row's first.

    Attributes:
        num_repeated: lines of rows that another line has answered already.
    """

    def __init__(self, layout: Layout, survey: Survey, note: Callable[[Any], None] = lambda document: None):
        """Reads where each line stands: some 12 bytes a row are kept; `note` gets the document of each row's first."""
        self._paths = parts(layout)
        self._part_of = np.full(survey.num_rows, -1, np.int32)
        self._offset_of = np.zeros(survey.num_rows, np.int64)
        self.num_repeated = 0
        for part, path in enumerate(self._paths):
            for number, entry in enumerate(journal.entries(path, CHECKED), 1):
                document, where = json.loads(entry.line), f"{path}, line {number}"
                ordinal = _ordinal(document, survey, where)
                if self._part_of[ordinal] >= 0:
                    self.num_repeated += 1
                else:
                    _note(document, note, where)
                    self._part_of[ordinal], self._offset_of[ordinal] = part, entry.offset

    @property
    def missing(self) -> np.ndarray:
        """Ordinals of the rows that have no line."""
        return np.flatnonzero(self._part_of < 0)

    def lines(self) -> Iterator[bytes]:
        """One for each row."""
        files = dict[int, BinaryIO]()
        try:
            for part, offset in zip(self._part_of.tolist(), self._offset_of.tolist(), strict=True):
                if part not in files:
                    if len(files) == MAX_OPEN_FILES:
                        files.pop(next(iter(files))).close()
                    files[part] = open(self._paths[part], "rb")
                files[part].seek(offset)
                line = CHECKED.unpack(files[part].readline().removesuffix(b"\n"))
                if line is None:
                    raise JournalError(f"{self._paths[part]} has changed: the same command reads it again")
                yield line
        finally:
            for file in files.values():
                file.close()


def remove_parts(layout: Layout) -> None:
    """Removes the journals, once OUT holds all that was in them: at once, as others see it, or what a crash left."""
    shutil.rmtree(layout.joined, ignore_errors=True)
    if layout.parts.exists():
        layout.parts.rename(layout.joined)
        sync_folder(layout.parts.parent)
        shutil.rmtree(layout.joined, ignore_errors=True)
