"""Batch jobs that are killed: at every single write, and at random moments with a real model."""

import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import jobs, processes

NUM_ROWS, NUM_KILLS = 12, 20
OUTPUTS = {
    "appended": ("out.jsonl",),
    "ordered": ("out.jsonl", "--keep-order"),
    "packed": ("out.jsonl.gz",),
    "parquet": ("out.parquet",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and its compiled programs."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs.wordy(folder)
    return folder


def _run(folder: Path, place: Path, out: tuple[str, ...], **options) -> processes.Done:
    arguments = ("--slots", "2", "--quiet", "--compilation-cache", folder / "programs")
    return jobs.run(folder / "published", place / "in.jsonl", place / "out" / out[0], *out[1:], *arguments, **options)


def _place(tmp_path: Path, name: str, documents) -> Path:
    """A folder with the input and an empty one for the output."""
    shutil.rmtree(tmp_path / name, ignore_errors=True)
    (tmp_path / name / "out").mkdir(parents=True)
    jobs.write_rows(tmp_path / name / "in.jsonl", documents)
    return tmp_path / name


def _lines(path: Path) -> list[bytes]:
    """Lines in an order of their own; of a file that is written as a whole, its bytes."""
    content = path.read_bytes()
    return sorted(content.splitlines()) if path.suffix == ".jsonl" else [content]


def _written(place: Path) -> dict[Path, bytes]:
    """What stands in the files that lines are appended to, up to the last whole line."""
    found = [*place.glob("out/out.jsonl"), *place.glob("out/*.parts/*.journal")]
    return {path: path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1] for path in found}


def _assert_untouched(before: dict[Path, bytes]) -> None:
    for path, content in before.items():
        if path.exists():  # a journal is gone when the output is there
            assert path.read_bytes().startswith(content), path


def _assert_nothing_else(place: Path, out: str) -> None:
    """What a crash leaves beside the output has a name that begins with a dot."""
    names = [name for name in sorted(os.listdir(place / "out")) if not name.startswith(".")]
    assert names == sorted([out, f"{out}.job.json", f"{out}.summary.json"])


@pytest.mark.parametrize("half_way", [False, True], ids=["before", "half way"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_job_that_dies_at_any_write_goes_on(kind, half_way, folder, tmp_path):
    """Guards every state that the files of a job can be in: none loses a row, has one twice, or stops the job."""
    out = OUTPUTS[kind]
    documents = [*jobs.rows(NUM_ROWS), "no JSON", {"id": "bad", "prompt": "x", "unknown": 1}]
    whole = _place(tmp_path, "whole", documents)
    assert _run(folder, whole, out).returncode == 0
    expected = _lines(whole / "out" / out[0])
    num_deaths = 0
    for at in itertools.count(1):
        place = _place(tmp_path, "whole", documents)  # the same name, which the lines' errors give
        died = _run(folder, place, out, model=jobs.Fake(jobs.Dying(str(place / "out"), at, half_way)))
        before = _written(place)
        if kind != "appended" and (place / "out" / out[0]).exists():
            assert _lines(place / "out" / out[0]) == expected
        done = _run(folder, place, out)
        assert done.returncode == 0, (at, done.stderr)
        assert _lines(place / "out" / out[0]) == expected, at
        _assert_untouched(before)
        _assert_nothing_else(place, out[0])
        if died.returncode == 0:
            break
        assert died.returncode == -signal.SIGKILL, died.stderr
        num_deaths += 1
    assert num_deaths > 6  # the record, its lines, the summary


def _killing(seconds: float) -> Callable[[Any], None]:
    def kill(process: Any) -> None:
        process.join(seconds)
        process.kill()

    return kill


@pytest.mark.parametrize(
    ("kind", "model"), [("appended", jobs.REAL), ("ordered", jobs.FAKE)], ids=["appended", "ordered"]
)
def test_a_job_that_is_killed_twenty_times_ends_as_one_that_is_not(kind, model, folder, tmp_path):
    """Guards `kill -9` at any moment of a run, with a real model too: the same lines in the end, each id once."""
    rows = [
        row | {"max_new_tokens": 4 + i % 9, "temperature": 1.0, "n": 1 + i % 2} for i, row in enumerate(jobs.rows(60))
    ]
    whole = _place(tmp_path, "whole", rows)
    out = OUTPUTS[kind]
    _run(folder, whole, out, model=model)  # compiles
    whole = _place(tmp_path, "whole", rows)
    began = time.monotonic()
    assert _run(folder, whole, out, model=model).returncode == 0
    seconds = time.monotonic() - began
    expected = _lines(whole / "out" / out[0])
    moments, num_killed, num_finished, before = random.Random(13), 0, 0, {}
    place = _place(tmp_path, "whole", rows)
    while num_killed < NUM_KILLS or not num_finished:
        kill = _killing(moments.uniform(0, seconds)) if num_killed < NUM_KILLS else None
        done = _run(folder, place, out, model=model, meanwhile=kill)
        _assert_untouched(before)
        before = _written(place)
        if done.returncode == -signal.SIGKILL:
            num_killed += 1
            continue
        assert done.returncode == 0, done.stderr
        num_finished += 1
        assert _lines(place / "out" / out[0]) == expected
        ids = [row["id"] for row in jobs.read_rows(place / "out" / out[0])]
        assert sorted(ids) == sorted(row["id"] for row in rows)
        _assert_nothing_else(place, out[0])
        place, before = _place(tmp_path, "whole", rows), {}
