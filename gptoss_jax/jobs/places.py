"""Where a job's files are: on this machine, or in a store that fsspec reaches. What goes wrong there is one line."""

import contextlib
import dataclasses
import functools
import io
import os
import re
import secrets
from collections.abc import Iterator
from typing import Any

from gptoss_jax.errors import GptossError, short
from gptoss_jax.files import FileError

_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*::)*([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
BUFFER_BYTES = 1 << 18  # of a file that is read
_HERE = ("file://", "local://")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a file is, or may come to be.

    Attributes:
        name: what errors call it.
        store: fsspec's file system; None: this machine.
        path: the file within it.
    """

    name: str
    store: Any
    path: str

    def open(self) -> io.BufferedReader:
        """The file's bytes.

        Raises:
            FileError: it cannot be opened; of what is opened, each method raises it too.
        """
        with faults_of(self.name):
            opened = self.store.open(self.path, "rb") if self.store else open(self.path, "rb", buffering=0)
        return io.BufferedReader(_Guarded(opened, self.name), BUFFER_BYTES)

    def identity(self) -> object:
        """What is the same for all names of a file: links, hard links, relative paths, URLs."""
        if self.store:
            return type(self.store), repr(self.store.storage_options), self.path
        try:
            return identity(os.stat(self.path))
        except OSError:  # it is not there
            return os.path.realpath(self.path)


def identity(status: os.stat_result) -> tuple[int, int]:
    """What is the same for all names of a file on this machine."""
    return status.st_dev, status.st_ino


def is_local(name: str) -> bool:
    """Whether a name is a path on this machine, which file:// may begin."""
    return not _URL.match(name) or name.lower().startswith(_HERE)


def find(name: str) -> Place:
    """Where the file of this name is. Nothing is asked of a store yet.

    Raises:
        FileError: no store is known by such an address, its package is not installed, or no file is named.
    """
    if is_local(name):
        return Place(name, None, name.partition("://")[2] if name.lower().startswith(_HERE) else name)
    import fsspec

    found = _URL.match(name)
    scheme = found[1].lower() if found else ""
    if scheme not in {*fsspec.available_protocols(), *fsspec.registry}:  # known, and added by packages
        raise FileError(
            name, f"{short(scheme)} is no store that fsspec knows, expected a path, s3://, gs:// or another"
        )
    with faults_of(name):
        store, path = fsspec.url_to_fs(name)
    if not path.strip("/"):
        raise FileError(name, "names no file")
    return Place(name, store, path)


@contextlib.contextmanager
def faults_of(name: str) -> Iterator[None]:
    """Around calls of a store only: whatever it raises is one line.

    Raises:
        FileError: the call failed. Stores' libraries have errors of their own, without a common base.
    """
    try:
        yield
    except GptossError:
        raise
    except Exception as error:
        raise FileError(name, _what(error)) from None


def _what(error: Exception) -> str:
    """What an error of the system or of a store's library says, with its kind where the text alone may say nothing."""
    if isinstance(error, FileNotFoundError):
        cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
        return f"no such file or bucket{cause}"  # over HTTP this is also what stands for a server that is not reached
    if isinstance(error, TimeoutError):
        return "no answer in time; the store or the network to it is down or slow"
    if isinstance(error, ImportError):
        return f"a package is missing: {error}"
    return (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"


def check_can_upload(place: Place) -> None:
    """Asks by a try, with an empty file, whether `uploading` can put a file there.

    Raises:
        FileError: it cannot, and why.
    """
    label, trial = _label(place), _unfinished(place)
    if place.name.lower().startswith("http"):
        raise FileError(label, "nothing can be written over HTTP")
    with faults_of(label):
        if place.store.isdir(place.path):
            raise FileError(label, "it is a folder, expected a file name")
        place.store.open(trial, "wb").close()
        place.store.rm_file(trial)


@contextlib.contextmanager
def uploading(place: Place) -> Iterator[Any]:
    """A file to write to, which goes by another name in its store until it is whole: some stores show half a file.

    Raises:
        FileError: it cannot be written, the writing in the block too.
    """
    store, label, unfinished = place.store, _label(place), _unfinished(place)
    with faults_of(label):
        file = store.open(unfinished, "wb")
    try:
        yield _Guarded(file, label)
        with faults_of(label):
            file.close()
            store.mv(unfinished, place.path)
    except BaseException:
        for clean_up in (file.close, functools.partial(store.rm_file, unfinished)):
            with contextlib.suppress(Exception):  # what went wrong first is what is said
                clean_up()
        raise


def _label(place: Place) -> str:
    return f"cannot write {place.name}"


def _unfinished(place: Place) -> str:
    return f"{place.path}.unfinished-{secrets.token_hex(4)}"


class _Guarded(io.RawIOBase):
    """A file of any store whose faults are FileErrors. It reads all that it is asked for, up to the end."""

    def __init__(self, file: Any, name: str):
        self._file, self._name = file, name

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view, filled = memoryview(buffer).cast("B"), 0
        with faults_of(self._name):
            while filled < len(view) and (data := self._file.read(len(view) - filled)):
                view[filled : filled + len(data)] = data
                filled += len(data)
        return filled

    def write(self, data: Any) -> int:
        with faults_of(self._name):
            return self._file.write(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with faults_of(self._name):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        with faults_of(self._name):
            return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            super().close()
            with faults_of(self._name):
                self._file.close()
