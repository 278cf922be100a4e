"""The folder of a run: of one run and one process at a time, and what differs is named."""

import dataclasses
import json
import subprocess
import sys

import pytest

from gptoss_jax.training.run_folder import RunFolder, RunFolderError, RunRecord
from tests.goldens.make import ROOT

RECORD = RunRecord(
    {"steps": 6, "learning_rate": 1e-4, "targets": ("attention",)}, {"sha256": "0"}, {"weights": "1"}, {"jax": "2"}
)


def test_the_same_run_is_taken_up_and_another_is_named(tmp_path):
    """Guards a run that goes on with other options or data: every difference has its line."""
    with RunFolder(tmp_path / "run", RECORD) as folder:
        assert folder.is_new
    with RunFolder(tmp_path / "run", RECORD) as folder:
        assert not folder.is_new
    other = dataclasses.replace(RECORD, asked={"steps": 7, "learning_rate": 1e-4}, data={"sha256": "9"})
    with pytest.raises(RunFolderError) as caught:
        RunFolder(tmp_path / "run", other)
    first, *lines = str(caught.value).split("\n")
    assert "is of another run than this one; another --output keeps both" in first
    assert lines == [
        "asked, steps: 6 then, 7 now",
        "asked, targets: ['attention'] then, nothing now",
        "data, sha256: '0' then, '9' now",
    ]


def test_changed_versions_are_said_and_no_reason_to_refuse(tmp_path):
    """Guards a run of days against an update of packages, which must not go unnoticed either."""
    RunFolder(tmp_path / "run", RECORD).__exit__()
    with RunFolder(tmp_path / "run", dataclasses.replace(RECORD, versions={"jax": "3"})) as folder:
        assert folder.version_changes == ["jax was 2 when this run began, and is 3 now"]


def test_two_processes_cannot_share_a_folder(tmp_path):
    """Guards against two runs that write each other's states; when one ends, the next may."""
    with RunFolder(tmp_path / "run", RECORD), pytest.raises(RunFolderError, match="another process trains in"):
        RunFolder(tmp_path / "run", RECORD)
    RunFolder(tmp_path / "run", RECORD).__exit__()


HOLD = """
import sys, time
from pathlib import Path
from gptoss_jax.training.run_folder import RunFolder, RunRecord
folder = RunFolder(Path(sys.argv[1]), RunRecord({}, {}, {}, {}))
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    """Guards `kill -9`: a lock that stays would need a hand to remove it."""
    record = RunRecord({}, {}, {}, {})
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(RunFolderError, match="another process"):
            RunFolder(tmp_path / "run", record)
        process.kill()
    RunFolder(tmp_path / "run", record).__exit__()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("notes.txt", "mine", "holds 'notes.txt' and no run.json"),
        ("run.json", "{", "is damaged"),
        ("run.json", "{}", "no run's record of this version"),
        ("run.json", json.dumps({"format": 2, "asked": {}, "data": {}, "source": {}, "versions": {}}), "no run's"),
    ],
)
def test_what_is_no_run_is_left_alone(name, content, expected, tmp_path):
    """Guards people's folders: --output on one that holds other things must change nothing there."""
    (tmp_path / name).write_text(content)
    with pytest.raises(RunFolderError, match=expected):
        RunFolder(tmp_path, RECORD)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_in_place_of_the_folder(tmp_path):
    """Guards a traceback for --output FILE."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is no folder"):
        RunFolder(tmp_path / "file", RECORD)


def test_results_are_named_after_what_they_are(tmp_path):
    """Guards an adapter in the place of a checkpoint, which programs would try to load."""
    with RunFolder(tmp_path / "run", RECORD) as folder:
        assert [folder.result(method).name for method in ("full", "lora")] == ["checkpoint", "adapter"]


def test_a_run_that_never_began_leaves_nothing_and_one_that_did_stays(tmp_path):
    """Guards data or a mesh that is mended and tried again: the first try's record must not refuse it."""
    with RunFolder(tmp_path / "run", RECORD) as folder:
        folder.corpora.mkdir()
        folder.abandon()
    assert not (tmp_path / "run").exists()
    for begun in ("states", "metrics.csv"):
        with RunFolder(tmp_path / begun, RECORD) as folder:
            (folder.path / begun).mkdir()
            folder.abandon()
        assert (tmp_path / begun / "run.json").exists()
