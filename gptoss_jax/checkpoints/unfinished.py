"""A folder that is written part by part: beside its place until it is whole, then moved there in one step.

What is begun lies in `DST.partial`. A run that fails removes it; one that is killed leaves it, and the next run starts
anew, since what it would go on with nobody vouches for.
"""

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

import numpy as np

from gptoss_jax.checkpoints.orbax.manifest import partial_folder
from gptoss_jax.errors import GptossError
from gptoss_jax.whole_files import sync_folder

_MARK = "unfinished-export"  # the lock; by it a later run knows that the folder is ours to remove
_FILES = "files"


class UnfinishedError(GptossError):
    """A folder that cannot be written, and why, in one line."""


def check_can_write(dst: Path) -> None:
    """Refuses before long work what lies in the way of a folder at `dst`.

    Raises:
        UnfinishedError: `dst` exists, cannot be made, or `DST.partial` is something else.
    """
    dst, partial = Path(os.path.abspath(dst)), partial_folder(dst)
    if os.path.lexists(dst):
        raise UnfinishedError(f"{dst}: exists; remove it or name another folder")
    above = next(parent for parent in dst.parents if os.path.lexists(parent))
    if not above.is_dir():
        raise UnfinishedError(f"{dst}: cannot be made in {above}, which is no folder")
    ours = partial.is_dir() and not partial.is_symlink() and ((partial / _MARK).is_file() or not os.listdir(partial))
    if os.path.lexists(partial) and not ours:
        raise UnfinishedError(f"{partial}: in the way, and not of an export: remove it or name another folder")


class UnfinishedFolder:
    """Files of a folder to be, written in any order. A context: what is not finished in it is removed at its end.

    Attributes:
        dst: where the folder will be.
        path: where its files lie until then.
    """

    def __init__(self, dst: Path):
        """Starts the folder, anew if it was begun before.

        Raises:
            UnfinishedError: as `check_can_write`, or another process is writing it.
            OSError: as the file system raises it.
        """
        check_can_write(dst)
        self.dst, self._partial = Path(os.path.abspath(dst)), partial_folder(dst)
        self.path = self._partial / _FILES
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._partial / _MARK, os.O_RDWR | os.O_CREAT, 0o666)
        self._open: dict[str, int] = {}
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UnfinishedError(f"{self._partial}: another process is writing it") from None
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir()

    def __enter__(self) -> "UnfinishedFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._close_files()
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.rmtree(self._partial, ignore_errors=True)  # the mark after what it vouches for
        os.close(self._lock)

    def reserve(self, name: str, size_bytes: int) -> None:
        """A file of this size, its contents to come; refuses what does not fit on the disk where it can be known.

        A name with a slash lies in a folder inside.

        Raises:
            OSError: as the file system raises it.
        """
        (self.path / name).parent.mkdir(exist_ok=True)
        self._open[name] = descriptor = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.truncate(descriptor, size_bytes)
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
        except (AttributeError, OSError) as error:  # systems and file systems without it write all the same
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise

    def write(self, name: str, content: bytes | np.ndarray, offset: int) -> None:
        """Writes into a file that was reserved."""
        left = memoryview(content).cast("B") if isinstance(content, bytes) else content.reshape(-1).view(np.uint8).data
        while left:
            count = os.pwrite(self._open[name], left, offset)
            left, offset = left[count:], offset + count

    def add(self, name: str, content: bytes) -> None:
        """Writes a whole file."""
        self.reserve(name, len(content))
        self.write(name, content, 0)

    def finish(self) -> Path:
        """Puts all files on the disk, and the folder in its place.

        Raises:
            UnfinishedError: something else has been put there meanwhile.
        """
        for descriptor in self._open.values():
            os.fsync(descriptor)
        for folder in {(self.path / name).parent for name in self._open} | {self.path}:
            sync_folder(folder)
        self._close_files()
        if os.path.lexists(self.dst):
            raise UnfinishedError(f"{self.dst}: exists; remove it or name another folder")
        os.rename(self.path, self.dst)
        sync_folder(self.dst.parent)
        return self.dst

    def _close_files(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
