"""Lines appended to a file, each on the disk before it counts; what a crash left half written is cut off.

One process at a time writes a journal: it holds the file's lock for as long as it has it open.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gptoss_jax.errors import GptossError
from gptoss_jax.whole_files import sync_folder


class JournalError(GptossError):
    """A journal that another process writes, or that holds what no job wrote."""


class Framing(NamedTuple):
    """How a line stands in the file.

    Attributes:
        pack: a line without its end -> what is written, without its end.
        unpack: the reverse; None: this is no line that was written whole.
    """

    pack: Callable[[bytes], bytes]
    unpack: Callable[[bytes], bytes | None]


def _json_object(line: bytes) -> bytes | None:
    try:
        return line if isinstance(json.loads(line), dict) else None
    except (ValueError, RecursionError):  # no JSON, or no UTF-8; nested without end
        return None


def _with_checksum(line: bytes) -> bytes:
    return b"%08x %08x " % (len(line), zlib.crc32(line)) + line


def _checked(framed: bytes) -> bytes | None:
    line = framed[18:]
    return line if framed == _with_checksum(line) else None


PLAIN = Framing(bytes, _json_object)
"""A file that is itself the result: a line is good if it is a JSON object."""
CHECKED = Framing(_with_checksum, _checked)
"""A file of our own: length and CRC-32 stand in front of each line, eight hexadecimal digits each."""


class Entry(NamedTuple):
    """A line that is in a journal, and where."""

    offset: int
    line: bytes


class Journal:
    """One file of lines, open for appending and locked. Use it in a `with` block.

    Attributes:
        path: the file, which is made if it is not there.
    """

    def __init__(self, path: str | Path, framing: Framing):
        """Raises JournalError where another process has it open, OSError as the file system does."""
        self.path, self._framing = Path(path), framing
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise JournalError(f"another process is writing {path}: wait for its end, or stop it") from None
        sync_folder(self.path.parent)
        self._size = os.fstat(self._descriptor).st_size

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back."""
        os.close(self._descriptor)

    @property
    def is_empty(self) -> bool:
        """Whether nothing stands in it."""
        return not self._size

    def repaired(self) -> Iterator[Entry]:
        """All lines. Once they are all read, a last one that was not written whole is cut off.

        Raises:
            JournalError: a line that was not written whole stands before one that was: nothing has been changed.
        """
        end = 0
        for entry in entries(self.path, self._framing):
            yield entry
            end = entry.offset + len(self._framing.pack(entry.line)) + 1
        if end < self._size:
            self._cut(end)

    def append(self, lines: Sequence[bytes]) -> None:
        """Puts lines at the end; they are on the disk when this returns.

        Raises:
            OSError: they are not, and the file is as it was before (a disk is full, say).
        """
        block = memoryview(b"".join(self._framing.pack(line) + b"\n" for line in lines))
        try:
            written = 0
            while written < len(block):
                written += os.write(self._descriptor, block[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            self._cut(self._size)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._size += len(block)

    def clear(self) -> None:
        """Takes all lines away."""
        self._cut(0)

    def _cut(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)
        os.fsync(self._descriptor)
        self._size = size


def entries(path: str | Path, framing: Framing, start: int = 0) -> Iterator[Entry]:
    """The lines of a journal that were written whole, from the byte `start` on, whoever writes it meanwhile.

    Raises:
        JournalError: one that was not stands before one that was.
    """
    torn = 0  # the number of the first line that is not whole
    with open(path, "rb") as file:
        offset = file.seek(start)
        for number, framed in enumerate(file, 1):
            if not framed.endswith(b"\n"):
                return  # it may be under way: what follows by now is its rest
            line = framing.unpack(framed[:-1])
            if line is None:
                torn = torn or number
            elif torn:
                raise JournalError(
                    f"{path}, line {torn} is no line that a job wrote, and others follow it: "
                    "remove it, and the same command answers its row again"
                )
            else:
                yield Entry(offset, line)
            offset += len(framed)
