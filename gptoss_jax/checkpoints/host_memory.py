"""Memory that a host's weights are read into: devices on a CPU take it as it is, and reading it is fast.

JAX takes a NumPy array for a CPU's device without a copy if it is aligned to a cache line, which NumPy's own are not.
Pages of 2 MiB, where the system gives any, cost fewer address translations than pages of 4 KiB: docs/lab_notes.md has
what that is worth.
"""

import contextlib
import mmap
import os

import numpy as np

HUGE_PAGE_BYTES = 2 << 20


def empty(num_bytes: int) -> np.ndarray:
    """uint8 [num_bytes], not set, at the start of a huge page; its memory is given back as soon as nobody holds it.

    Only whole huge pages are asked for, so that no more than `num_bytes` and one small page become resident.
    """
    # Python's default, shared memory, belongs to a file system, which has pages of its own.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapping = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, private)  # untouched, the slack costs addresses only
    start = -np.frombuffer(mapping, np.uint8).ctypes.data % HUGE_PAGE_BYTES
    whole = num_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if whole and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: advice that cannot be taken
            mapping.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return np.frombuffer(mapping, np.uint8, num_bytes, start)


def read_into(buffer: np.ndarray, descriptor: int, offset: int = 0) -> int:
    """Fills a uint8 `buffer` from `offset` of an open file, and gives the bytes read: fewer where the file ends."""
    if hasattr(os, "posix_fadvise"):  # a longer read-ahead: twice the speed where the file is not in memory yet
        os.posix_fadvise(descriptor, offset, buffer.nbytes, os.POSIX_FADV_SEQUENTIAL)
    left = buffer.data
    while left and (count := os.preadv(descriptor, [left], offset + buffer.nbytes - left.nbytes)):
        left = left[count:]
    return buffer.nbytes - left.nbytes
