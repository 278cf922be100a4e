"""The first pass over a job's input: how many rows, who is who among them, and what is wrong with which.

What it keeps grows by some 60 bytes a row, whatever the rows hold.
"""

import array
import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptoss_jax.errors import Fault, short
from gptoss_jax.jobs.inputs import Inputs, Line
from gptoss_jax.jobs.rows import ID_KEYS, FormName, Row, RowError, RowReader, answers_whom, id_digest, place_of

MAX_FAULTS = 10_000  # kept for people; of more, the number


class Ids:
    """The ids of N rows, each as 128 bits of its hash: finds the row of an id, and rows whose id another has.

    Attributes:
        is_repeated: bool [N]: an earlier row has the same id.
    """

    def __init__(self, digests: bytes):
        """`digests`: 16 bytes a row."""
        self._digests = halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)
        self._order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: of equal ids the first row comes first
        self._sorted = halves[self._order]
        self.is_repeated = np.zeros(len(halves), np.bool_)
        self.is_repeated[self._order[1:]] = (self._sorted[1:] == self._sorted[:-1]).all(axis=1)

    def find(self, digest: bytes) -> int | None:
        """The row with this digest; None: there is none."""
        high, low = np.frombuffer(digest, np.uint64)
        first, end = (int(np.searchsorted(self._sorted[:, 0], high, side)) for side in ("left", "right"))
        for place in range(first, end):
            if self._sorted[place, 1] == low:
                return int(self._order[place])
        return None

    def first_with_id_of(self, ordinal: int) -> int | None:
        """The first row that has the id of this one."""
        return self.find(self._digests[ordinal].tobytes())


class Places:
    """Where each row stands, and the checksum of what stands there."""

    def __init__(self):
        self._file_of, self._number_of, self._checksum_of = array.array("I"), array.array("Q"), array.array("I")
        self._numbers_of_files: dict[str, int] = {}
        self._files: list[str] = []

    def __len__(self) -> int:
        return len(self._number_of)

    def append(self, line: Line) -> None:
        """Notes the place of the next row."""
        if line.file not in self._numbers_of_files:
            self._numbers_of_files[line.file] = len(self._files)
            self._files.append(line.file)
        self._file_of.append(self._numbers_of_files[line.file])
        self._number_of.append(line.number)
        self._checksum_of.append(zlib.crc32(line.text))

    def file(self, ordinal: int) -> str:
        """The file that a row stands in."""
        return self._files[self._file_of[ordinal]]

    def where(self, ordinal: int) -> str:
        """File and line, for people."""
        return place_of(self.file(ordinal), self._number_of[ordinal])

    def has(self, ordinal: int, line: Line) -> bool:
        """Whether this is the line that stood there."""
        is_there = ordinal < len(self) and self.where(ordinal) == place_of(line.file, line.number)
        return is_there and self._checksum_of[ordinal] == zlib.crc32(line.text)

    def rows_of_files(self) -> dict[str, int]:
        """How many rows each file has."""
        counts = np.bincount(np.asarray(self._file_of, np.int64), minlength=len(self._files))
        return dict(zip(self._files, counts.tolist(), strict=True))


@dataclass(frozen=True)
class Survey:
    """What the first pass found.

    Attributes:
        places: of all rows.
        ids: alike.
        digest: SHA-256 of all rows as they stand, in hexadecimal.
        forms: that of each file.
        blank_lines: left out.
        num_faults: rows that cannot be answered.
        faults: the first of them.
    """

    places: Places
    ids: Ids
    digest: str
    forms: Mapping[str, FormName]
    blank_lines: int
    num_faults: int
    faults: tuple[Fault, ...]

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.places)

    def checked(self, row: Row) -> Row:
        """The row, refused where an earlier one has its id."""
        if not self.ids.is_repeated[row.ordinal]:
            return row
        return row.refused(_repeated(row.form, self.ids, self.places, row.ordinal), keeps_id=False)

    def find(self, document: Mapping[str, Any]) -> int:
        """The ordinal of the row that a line of output answers.

        Raises:
            RowError: it answers none of these.
        """
        whom = answers_whom(document)
        ordinal = self.ids.find(id_digest(whom)) if isinstance(whom, str) else whom
        if ordinal is None or not 0 <= ordinal < self.num_rows:
            raise RowError(f"it answers the row {short(whom)}, which the input does not have")
        return ordinal


def survey(inputs: Inputs, fault_of: Callable[[Row], str] = lambda row: row.fault) -> Survey:
    """Reads all rows once.

    Args:
        inputs: the files.
        fault_of: what is wrong with a row; "" if nothing is.

    Raises:
        GptossError: a file that cannot be read.
    """
    reader, places, digest, digests = RowReader(), Places(), hashlib.sha256(), bytearray()
    is_faulty, faults = bytearray(), list[tuple[int, Fault]]()
    for ordinal, line in enumerate(inputs.lines()):
        row = reader.read(ordinal, line)
        places.append(line)
        digest.update(line.text + b"\n")
        digests += _nobody(ordinal) if row.id is None else id_digest(row.id)
        fault = fault_of(row)
        is_faulty.append(bool(fault))
        if fault and len(faults) < MAX_FAULTS:
            faults.append((ordinal, Fault(row.where, fault)))
    ids = Ids(bytes(digests))
    for ordinal in np.flatnonzero(ids.is_repeated)[: MAX_FAULTS - len(faults)].tolist():
        form = reader.forms.get(places.file(ordinal), "plain")
        faults.append((ordinal, Fault(places.where(ordinal), _repeated(form, ids, places, ordinal))))
    num_faults = int((np.frombuffer(is_faulty, np.bool_) | ids.is_repeated).sum())
    in_order = tuple(fault for _, fault in sorted(faults))
    return Survey(places, ids, digest.hexdigest(), reader.forms, inputs.blank_lines, num_faults, in_order)


def _nobody(ordinal: int) -> bytes:
    """In place of the digest of a row without an id: no other row's."""
    return b"\xff" * 8 + ordinal.to_bytes(8, "little")


def _repeated(form: FormName, ids: Ids, places: Places, ordinal: int) -> str:
    first = ids.first_with_id_of(ordinal)
    whose = "another row" if first is None else places.where(first)
    return f"{ID_KEYS[form]} is that of {whose}, expected one that no other row has"
