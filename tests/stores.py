"""Stores for tests of remote files: fsspec's file system in memory, and one whose every step can fail."""

import io
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem


class BrokenStore(MemoryFileSystem):
    """Files in memory; the step that `fails` names raises `error`, a library's own."""

    protocol = ("broken",)
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012  (as fsspec has it: one for all instances)
    pseudo_dirs = [""]  # noqa: RUF012
    fails = ""
    error: Exception = OSError()

    def _raise(self, step: str) -> None:
        if self.fails == step:
            raise self.error

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("broken://"))

    def info(self, path: str, **kwargs: Any) -> Any:
        self._raise("info")
        return super().info(path, **kwargs)

    def open(self, path: str, mode: str = "rb", *arguments: Any, **kwargs: Any) -> Any:
        self._raise(f"open {mode}")
        file = super().open(path, mode, *arguments, **kwargs)
        return _BrokenFile(file, self) if mode == "rb" else _BrokenUpload(file, self)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        self._raise("move")
        super().cp_file(path1, path2, **kwargs)


class _BrokenFile(io.BytesIO):
    def __init__(self, file: Any, store: BrokenStore):
        super().__init__(file.getvalue())
        self._store = store

    def read(self, size: int | None = -1) -> bytes:
        self._store._raise("read")
        return super().read(size)


class _BrokenUpload:
    def __init__(self, file: Any, store: BrokenStore):
        self._file, self._store = file, store

    def write(self, data: bytes) -> int:
        self._store._raise("write")
        return self._file.write(data)

    def close(self) -> None:
        self._store._raise("close")
        self._file.close()


@pytest.fixture
def memory() -> Iterator[Any]:
    """Empty stores behind memory:// and broken://, of which nothing fails yet; gives the first."""
    fsspec.register_implementation("broken", BrokenStore, clobber=True)
    for kind in (MemoryFileSystem, BrokenStore):
        kind.store.clear()
    BrokenStore.fails = ""
    yield fsspec.filesystem("memory")
    for kind in (MemoryFileSystem, BrokenStore):
        kind.store.clear()
    BrokenStore.fails = ""
