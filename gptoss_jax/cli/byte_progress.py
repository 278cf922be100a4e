"""How far work on many bytes is: a bar where stderr is a terminal, else a line now and then."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gptoss_jax.cli.escapes import raw_stream, visible

LINE_SECONDS = 10  # between lines of progress


@contextmanager
def byte_progress(what: str, total_bytes: int, done_bytes: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows bytes, rate and remaining time on stderr while the block runs, which reports bytes as done.

    Args:
        what: is done.
        total_bytes: in all.
        done_bytes: of these, by an earlier run.
    """
    if not sys.stderr.isatty():
        lines = _Lines(what, total_bytes, done_bytes)
        yield lines.add
        lines.print()
        return
    from tqdm import tqdm  # here, since it is needed in a terminal only

    stderr = raw_stream(sys.stderr)
    with tqdm(desc=visible(what), total=total_bytes, initial=done_bytes, unit="B", unit_scale=True, file=stderr) as bar:

        def add(size_bytes: int) -> None:
            bar.update(size_bytes)

        yield add


class _Lines:
    """Bytes that are done, and a line about them every LINE_SECONDS."""

    def __init__(self, what: str, total_bytes: int, done_bytes: int):
        self._what, self._total_bytes, self._start_bytes = what, total_bytes, done_bytes
        self._done_bytes, self._started = done_bytes, time.monotonic()
        self._next_line = self._started + LINE_SECONDS

    def add(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            self.print()

    def print(self) -> None:
        elapsed = max(time.monotonic() - self._started, 1e-6)
        rate = (self._done_bytes - self._start_bytes) / elapsed
        remaining = self._total_bytes - self._done_bytes
        left = f", {duration(remaining / rate)} left" if rate and remaining > 0 else ""
        share = 100 * self._done_bytes / self._total_bytes if self._total_bytes else 100
        amount = f"{gigabytes(self._done_bytes)} of {gigabytes(self._total_bytes)} ({share:.0f} %)"
        print(f"{self._what}: {amount}, {rate / 1e6:,.0f} MB/s{left}", file=sys.stderr, flush=True)


def gigabytes(size_bytes: int | float) -> str:
    """A number of bytes for people: in GB, small ones in MB."""
    return f"{size_bytes / 1e9:.3f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.3f} MB"


def duration(seconds: int | float) -> str:
    """A time for people, rounded up to seconds."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
