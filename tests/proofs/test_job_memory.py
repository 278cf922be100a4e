"""A job's files: memory that does not grow with the number of rows, read and written, in every format."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FEW, MANY = 10_000, 1_000_000
MAY_GROW_BYTES = 24 << 20  # what is written as one row group of Parquet, and the index of all groups

WRITE = """
import sys
from gptoss_jax.jobs import outputs
from tests.memory import peak_bytes
name, count = sys.argv[1], int(sys.argv[2])
outputs.write(name, (b'{"id":"%07d","final":"%s"}' % (i, b"word " * 20) for i in range(count)))
print(peak_bytes())
"""
READ = """
import sys
from gptoss_jax.jobs.inputs import Inputs
from tests.memory import peak_bytes
name, count = sys.argv[1], int(sys.argv[2])
inputs = Inputs([name])
for _ in range(2):
    found = 0
    for number, line in enumerate(inputs.lines()):
        assert line.text.startswith(b'{"id":"%07d"' % number)
        found += 1
    assert found == count
print(peak_bytes())
"""


def _peak_bytes(script: str, *arguments: object) -> int:
    """The most memory that a process of its own has held."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return int(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)


@pytest.mark.parametrize("kind", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_million_rows_take_the_memory_of_ten_thousand(kind, tmp_path):
    """Guards jobs larger than memory: a list of all rows would be 200 MB here."""
    few, many = tmp_path / f"few-{kind}", tmp_path / f"many-{kind}"
    for script in (WRITE, READ):
        assert _peak_bytes(script, many, MANY) < _peak_bytes(script, few, FEW) + MAY_GROW_BYTES
