"""A job's input: files of any number and length -> lines, as often as wanted, in bounded memory. Reads no JSON."""

import collections
import contextlib
import functools
import glob
import io
import os
import stat
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from gptoss_jax import files, jsonl
from gptoss_jax.files import FileError
from gptoss_jax.jobs import places
from gptoss_jax.jobs.places import BUFFER_BYTES, Place


class Line(NamedTuple):
    """One row of an input, unread.

    Attributes:
        file: as the user named it; of a glob its match; "stdin".
        number: from 1: the line of a JSONL file, the row of a Parquet file.
        text: the row's JSON as it stands, without the line's end; of a Parquet row compact and without nulls.
        fault: why it cannot be read; `text` is empty then.
    """

    file: str
    number: int
    text: bytes
    fault: str = ""


class _Source(NamedTuple):
    """A file of an input: what it is called, what all names of it have in common, and how it is opened."""

    name: str
    identity: object
    open: Callable[[], io.BufferedReader]
    is_copy: bool = False  # that only this process has


class Inputs:
    """The rows of a job, read as often as wanted: JSONL, plain or packed with gzip or zstd, and Parquet.

    Attributes:
        names: what they are given as.
        files: what `Line.file` may be, in the order of the lines.
        blank_lines: how many the last whole pass found.
    """

    def __init__(self, names: Sequence[str]):
        """Finds the files.

        Args:
            names: paths, globs, fsspec's URLs; "-" is stdin, which is copied now.

        Raises:
            FileError: a name stands for no file, or for one that cannot be read; a file is given twice.
        """
        for name, count in collections.Counter(names).items():
            if count > 1:  # said before a pipe is waited for twice
                raise FileError(name, "is given twice")
        self.names = tuple(names)
        self._sources = [source for name in names for source in _sources(name)]
        _check_distinct(self._sources)
        self.files = tuple(source.name for source in self._sources)
        self.blank_lines = 0

    def __contains__(self, name: str) -> bool:
        """Whether a file is one of these, by whatever name."""
        found = places.find(name).identity()
        return any(source.identity == found for source in self._sources)

    def check_others_can_read(self) -> None:
        """Raises FileError for what only this process can read again: stdin and pipes."""
        for source in self._sources:
            if source.is_copy:
                raise FileError(source.name, "cannot be read by other processes, expected a file")

    def lines(self) -> Iterator[Line]:
        """Each row, in the order of the files; blank lines are passed over.

        Raises:
            FileError: a file is gone, damaged, or of another kind; the message says after which line.
        """
        blank_lines = 0
        for source in self._sources:
            with source.open() as file:
                for number, text, fault in rows(file, source.name):
                    if text or fault:
                        yield Line(source.name, number, text, fault)
                    else:
                        blank_lines += 1
        self.blank_lines = blank_lines


def _sources(name: str) -> list[_Source]:
    if name == "-":
        if sys.stdin is None:
            raise FileError("stdin", "is closed")
        return [_copied(sys.stdin.buffer, "stdin")]
    return [_source(place) for place in _matches(places.find(name))]


def _matches(place: Place) -> list[Place]:
    """The files that a name stands for: one, or as many as its * finds. A file that is there is itself."""
    if not glob.has_magic(place.path) or (not place.store and os.path.lexists(place.path)):
        return [place]
    if place.store and place.name.lower().startswith("http"):  # ? begins a query, and nothing lists the files
        return [place]
    matches = _remote_matches(place) if place.store else _local_matches(place)
    if not matches:
        raise FileError(place.name, "matches no file")
    return matches


def _local_matches(place: Place) -> list[Place]:
    found = sorted(glob.glob(place.path, recursive=True))
    return [Place(path, None, path) for path in found if not os.path.isdir(path)]


def _remote_matches(place: Place) -> list[Place]:
    with places.faults_of(place.name):
        found = place.store.glob(place.path, detail=True)
        paths = sorted(path for path, status in found.items() if status["type"] == "file")
        return [Place(place.store.unstrip_protocol(path), place.store, path) for path in paths]


def _source(place: Place) -> _Source:
    """A file that is there and may be read; a pipe is copied, since it is read once only."""
    if place.store:
        with places.faults_of(place.name):
            kind = place.store.info(place.path)["type"]
        if kind == "directory":
            raise _folder(place)
        return _Source(place.name, place.identity(), place.open)
    with contextlib.suppress(OSError, ValueError):  # whatever is wrong, check_regular says it
        if stat.S_ISFIFO(os.stat(place.path).st_mode):
            with place.open() as pipe:
                return _copied(pipe, place.name)
    _open_regular(place).close()
    return _Source(place.name, place.identity(), functools.partial(_open_regular, place))


def _open_regular(place: Place) -> io.BufferedReader:
    if "\0" in place.path or not place.path:
        raise FileError(repr(place.name), "expected a file name")
    if os.path.isdir(place.path):
        raise _folder(place)
    try:
        files.check_regular(place.path)
    except FileError as error:
        raise FileError(place.name, error.what) from None
    return place.open()


def _folder(place: Place) -> FileError:
    return FileError(place.name, f"a folder, expected files: {place.name.rstrip('/')}/*.jsonl, say")


def _copied(file: Any, name: str) -> _Source:
    """What can be read once only, as a file that has no name and ends with the process."""
    try:
        copy = tempfile.TemporaryFile(buffering=0)

        def opened() -> io.BufferedReader:
            return io.BufferedReader(_Copy(copy.fileno()), BUFFER_BYTES)

        weakref.finalize(opened, copy.close)
        while chunk := file.read(BUFFER_BYTES):
            copy.write(chunk)
    except OSError as error:
        what = f"cannot be copied to {tempfile.gettempdir()}: {error.strerror}; TMPDIR names another folder"
        raise FileError(name, what) from None
    return _Source(name, _identity_of(file), opened, is_copy=True)


def _identity_of(file: Any) -> object:
    """A file's that is redirected into stdin; of what has no descriptor its own."""
    try:
        return places.identity(os.fstat(file.fileno()))
    except OSError:
        return file


class _Copy(io.RawIOBase):
    """A file read by its descriptor, at a position of its own."""

    def __init__(self, descriptor: int):
        self._descriptor, self._at = descriptor, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._descriptor, len(buffer), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: os.fstat(self._descriptor).st_size}[whence]
        self._at = start + offset
        return self._at


def _check_distinct(sources: Sequence[_Source]) -> None:
    first: dict[object, str] = {}
    for name, identity, *_ in sources:
        if identity in first:
            raise FileError(name, f"is given twice, the first time as {first[identity]}")
        first[identity] = name


def rows(
    file: io.BufferedReader, name: str, max_line_bytes: int = jsonl.MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes, str]]:
    """Each row of a file: its number from 1, its JSON, and why it has none; a blank line has neither.

    Raises:
        FileError: the file is damaged, or of another kind.
    """
    too_long = f"the row is longer than {max_line_bytes:,} bytes, which no context holds"
    if file.peek(4).startswith(b"PAR1"):
        for number, text, fault in parquet(name).rows(file, name):
            yield (number, text, fault) if len(text) <= max_line_bytes else (number, b"", too_long)
        return
    for number, line in jsonl.lines(file, name, max_line_bytes):
        yield (number, b"", too_long) if line is None else (number, line, "")


def parquet(name: str) -> ModuleType:
    """The module that reads and writes Parquet.

    Raises:
        FileError: the package that it needs is not installed.
    """
    try:
        from gptoss_jax.jobs import parquet
    except ModuleNotFoundError as error:
        what = f"Parquet needs the package {error.name}: pip install 'gptoss-jax[batch]', or use JSONL"
        raise FileError(name, what) from None
    return parquet
