"""Files that are written whole or not at all, under the name that was asked for and no other."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from gptoss_jax.errors import GptossError

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
    """Puts a file at `path`, whole or not at all, whatever else writes it at the same time.

    It is on the disk when this returns. A file that is there keeps its permissions, a link stays and its target is
    replaced; pipes, terminals and devices are written to as they are.

    Raises:
        WriteError: it cannot be written; what was there before is still there.
    """
    check_can_write(path)
    target = _target(path)
    try:
        if _is_written_in_place(target):
            with open(target, "ab", buffering=0) as out:  # "wb" would empty what /dev/stdout has already
                out.write(content)
        else:
            replace(target, content)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from None


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
        OSError: as the file system raises it; what was there before is still there.
    """
    folder = os.path.dirname(os.path.abspath(target))
    descriptor, unfinished = tempfile.mkstemp(dir=folder, prefix=".unfinished-")
    try:
        with os.fdopen(descriptor, "wb") as out:
            _take_permissions(out.fileno(), target)
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
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


def sync_folder(folder: str) -> None:
    """Puts the new name on the disk, where file systems offer that for folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
