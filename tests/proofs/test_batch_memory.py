"""Memory of whole jobs: it does not follow the number of rows, but for a few numbers that each row leaves."""

from pathlib import Path

import pytest

from tests import jobs

COUNTS = (100, 20_000, 100_000)
MANY, MAY_GROW_BYTES = 1_000_000, 300 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model's files."""
    folder = tmp_path_factory.mktemp("memory")
    jobs.wordy(folder)
    return folder


def _peak_bytes(folder: Path, count: int, *flags: str) -> int:
    """The most memory that a whole job of so many rows has held, from its first look at them to its summary."""
    with open(folder / "in.jsonl", "w") as file:
        for i in range(count):
            file.write(f'{{"id": "row-{i}", "token_ids": [{i % 1000 + 1}], "max_new_tokens": 5}}\n')
    report = folder / "peak"
    arguments = (folder / "in.jsonl", folder / "out.jsonl", "--restart", *flags)
    done = jobs.run(folder / "published", *arguments, model=jobs.Instant(str(report)), timeout_seconds=900)
    assert done.returncode == 0, done.stderr
    assert (folder / "out.jsonl").read_bytes().count(b"\n") == count
    return int(report.read_text())


@pytest.mark.parametrize("flags", [(), ("--keep-order",)])
def test_a_million_rows_take_little_more_memory_than_a_hundred(flags, folder):
    """Guards jobs larger than memory. A million takes minutes; what 80,000 rows add is taken eleven times over."""
    few, some, more = (_peak_bytes(folder, count, *flags) for count in COUNTS)
    bytes_per_row = max(0, more - some) / (COUNTS[2] - COUNTS[1])
    assert more - few + bytes_per_row * (MANY - COUNTS[2]) < MAY_GROW_BYTES
    assert bytes_per_row < 200
