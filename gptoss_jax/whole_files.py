"""Files that are written whole or not at all, under the name that was asked for and no other."""

import contextlib
import io
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gptoss_jax.errors import GptossError

_BUFFER_BYTES = 1 << 18
_DESCRIPTORS = ("/dev", "/dev/fd", "/proc/self/fd")  # /dev/stdout and its like, which may name a file


class WriteError(GptossError, OSError):
    """A file that cannot be written, and why, in one line that names it as it was asked for."""


def check_can_write(path: str | Path) -> None:
    """Asks before long work whether `write_whole` can put a file at `path`.

    Raises:
        WriteError: it cannot: `path` is a folder, or names one that is not there, or may not be written to.
    """
    target = _target(path)
    folder = os.path.dirname(target)
    try:
        found = stat.S_IFMT(os.stat(target).st_mode)
    except FileNotFoundError:
        found = None
    except OSError as error:  # a name that is too long, a file where a folder should be, links in a circle
        raise WriteError(f"cannot write {path}: {error.strerror}") from None
    if found == stat.S_IFDIR or str(path).endswith("/"):
        raise WriteError(f"cannot write {path}: it is a folder, expected a file name")
    if not os.path.isdir(folder):
        raise WriteError(f"cannot write {path}: there is no folder {folder}")
    if found and not os.access(target, os.W_OK):
        raise WriteError(f"cannot write {path}: it may not be written to")
    if not _is_written_in_place(target) and not os.access(folder, os.W_OK | os.X_OK):
        raise WriteError(f"cannot write {path}: no file can be made in the folder {folder}")


def write_whole(path: str | Path, content: bytes) -> None:
    """Puts a file at `path`, as `writing` does.

    Raises:
        WriteError: it cannot be written; what was there before is still there.
    """
    with writing(path) as out:
        out.write(content)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that is at `path` when the block ends, and whole; if the block raises, nothing has changed.

    It is on the disk then, whatever else writes it at the same time. A file that is there keeps its permissions, a link
    stays and its target is replaced; pipes, terminals and devices are written to as they are.

    Raises:
        WriteError: it cannot be written, the writing in the block too; what was there before is still there.
    """
    check_can_write(path)
    target = _target(path)
    if not _is_written_in_place(target):
        with _replacing(target, path) as out:
            yield out
        return
    with _faults_of(path):  # appended, since to empty it would empty what /dev/stdout has already
        descriptor = os.open(target, os.O_WRONLY | os.O_APPEND)
    with io.BufferedWriter(_Out(descriptor, path), _BUFFER_BYTES) as out:
        yield out


@contextlib.contextmanager
def _faults_of(path: str | Path) -> Iterator[None]:
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from None


class _Out(io.FileIO):
    """An open file, whose faults name the path that was asked for: those of what is read meanwhile do not."""

    def __init__(self, descriptor: int, path: str | Path):
        super().__init__(descriptor, "wb")
        self._path = path

    def write(self, data: Any) -> int:
        with _faults_of(self._path):
            return super().write(data)


def _target(path: str | Path) -> str:
    """The file that links lead to; /dev/stdout and its like stay themselves."""
    if "\0" in str(path) or not str(path):
        raise WriteError(f"cannot write {str(path)!r}: expected a file name")
    absolute = os.path.abspath(path)
    return absolute if os.path.dirname(absolute) in _DESCRIPTORS else os.path.realpath(absolute)


def _is_written_in_place(target: str) -> bool:
    is_special = os.path.exists(target) and not os.path.isfile(target)
    return is_special or os.path.dirname(target) in _DESCRIPTORS


def replace(target: str | Path, content: bytes) -> None:
    """Puts a file at `target` as `write_whole` does, but in place of whatever is there, a link or a pipe too.

    Raises:
        WriteError: it cannot be written; what was there before is still there.
    """
    with _replacing(target, target) as out:
        out.write(content)


@contextlib.contextmanager
def _replacing(target: str | Path, path: str | Path) -> Iterator[BinaryIO]:
    """A file beside `target` that takes its name in the end. Errors call it `path`."""
    folder = os.path.dirname(os.path.abspath(target))
    with _faults_of(path):
        descriptor, unfinished = tempfile.mkstemp(dir=folder, prefix=".unfinished-")
    try:
        with io.BufferedWriter(_Out(descriptor, path), _BUFFER_BYTES) as out:
            with _faults_of(path):
                _take_permissions(descriptor, target)
            yield out
            out.flush()
            with _faults_of(path):
                os.fsync(descriptor)
        with _faults_of(path):
            os.replace(unfinished, target)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    sync_folder(folder)


def _take_permissions(descriptor: int, target: str | Path) -> None:
    """Owner and permissions of the file that is there; else what the user's umask leaves."""
    there = os.lstat(target) if os.path.lexists(target) else None
    if not there or not stat.S_ISREG(there.st_mode):
        mask = os.umask(0o077)  # the only way to read it
        os.umask(mask)
        os.fchmod(descriptor, 0o666 & ~mask)
        return
    if (there.st_uid, there.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(PermissionError):  # only the superuser gives files away
            os.fchown(descriptor, there.st_uid, there.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(there.st_mode))


def sync_folder(folder: str | Path) -> None:
    """Puts the new name on the disk, where file systems offer that for folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
