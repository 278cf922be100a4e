"""Compiled programs on disk. One that was damaged, exchanged or cut short is not there: it is compiled again.

JAX's own cache hands XLA whatever lies under a program's name. So a file begins with a hash here, of the name and of
all that follows, and is written whole.
"""

import contextlib
import hashlib
from pathlib import Path

import jax
from jax._src import compilation_cache as jax_cache  # which has no public name for what it reads and writes through
from jax._src.compilation_cache_interface import CacheInterface

from gptoss_jax.whole_files import write_whole

HASH_BYTES = hashlib.sha256().digest_size


class ProgramCache(CacheInterface):
    """The programs in a folder, by the names that JAX gives them."""

    def __init__(self, folder: str):
        self._path = Path(folder)

    def get(self, key: str) -> bytes | None:  # pyright: ignore[reportIncompatibleMethodOverride]  (JAX says no type)
        """The program of this name, if it lies there as it was put there."""
        with contextlib.suppress(OSError):
            kept = self._file(key).read_bytes()
            if kept[:HASH_BYTES] == _hash(key, kept[HASH_BYTES:]):
                return kept[HASH_BYTES:]
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program, in place of any other of this name; where the disk is full it is not kept."""
        with contextlib.suppress(OSError):
            write_whole(self._file(key), _hash(key, value) + value)

    def _file(self, key: str) -> Path:
        return self._path / f"{key}-cache"


def use(folder: Path) -> None:
    """Has JAX keep its programs in `folder`, from now on and in this whole process."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax_cache.get_file_cache = _open
    jax_cache.reset_cache()  # one that is in use already


def _open(path: str) -> tuple[CacheInterface, str]:
    return ProgramCache(path), path


def _hash(key: str, program: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + program).digest()
