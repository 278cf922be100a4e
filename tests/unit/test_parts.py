"""What jobs on many machines need of the parts that work alone too: journals that grow, rows that arrive in groups."""

import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from gptoss_jax.engine.request import EngineConfig
from gptoss_jax.errors import GptossError
from gptoss_jax.files import FileError
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.jobs import record as records
from gptoss_jax.jobs.inputs import Inputs, Line
from gptoss_jax.jobs.journal import CHECKED, Journal
from gptoss_jax.jobs.record import Record, RecordError
from gptoss_jax.jobs.rows import RowReader
from gptoss_jax.jobs.store import Layout, PartsReader, Store, parts, take_over
from gptoss_jax.jobs.survey import survey
from gptoss_jax.jobs.work import Task, Worker
from gptoss_jax.model import mesh

APPENDED, IN_PARTS = (Record({"rows": 3}, {}, {}, {"appended": is_so}) for is_so in (True, False))
LINES = [b'{"id":"%d"}' % i for i in range(3)]


@pytest.fixture
def layout(tmp_path):
    """Of a job that has not begun."""
    return Layout(str(tmp_path / "out.jsonl"), str(tmp_path / "out.jsonl"))


@pytest.fixture
def found(tmp_path):
    """A survey of three rows."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": str(i), "prompt": "?"}) + "\n" for i in range(3)))
    return survey(Inputs([str(tmp_path / "in.jsonl")]))


def done(layout, part, record, found) -> list[bool]:
    """Which rows a writer takes for finished."""
    with Store(layout, part, record) as store:
        return store.done(found, lambda document: None).tolist()


def test_lines_of_all_writers_are_read_as_they_come(layout):
    """Guards the progress of a job, and what a worker answers again: a line missed, or taken for two."""
    layout.parts.mkdir()
    reader = PartsReader(layout)
    assert list(reader.new_lines()) == []
    with Journal(layout.part("b"), CHECKED) as first, Journal(layout.part("a"), CHECKED) as second:
        first.append(LINES[:2])
        assert list(reader.new_lines()) == LINES[:2]
        second.append(LINES[:1])
        whole = CHECKED.pack(LINES[2]) + b"\n"
        with open(layout.part("b"), "ab") as torn:
            torn.write(whole[:20])
            torn.flush()
            assert list(reader.new_lines()) == LINES[:1]
            torn.write(whole[20:])
    assert list(reader.new_lines()) == LINES[2:]
    assert list(reader.new_lines()) == []


def test_a_job_that_began_by_appending_goes_on_in_parts(layout, found, monkeypatch):
    """Guards rows that one machine has answered, wherever the change to many is cut off."""
    with Store(layout, None, APPENDED) as store:
        store.append(LINES[:2])
    with monkeypatch.context() as cut:
        cut.setattr(records, "write", lambda *arguments: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            take_over(layout, "all", IN_PARTS)
    assert done(layout, None, APPENDED, found) == [True, True, False]
    with Store(layout, None, APPENDED) as store:
        store.append(LINES[2:])
    take_over(layout, "all", IN_PARTS)
    take_over(layout, "all", IN_PARTS)
    assert done(layout, "all", IN_PARTS, found) == [True] * 3
    assert records.read(layout.record) == IN_PARTS
    assert list(PartsReader(layout).new_lines()) == LINES


def test_another_job_is_not_taken_over(layout):
    """Guards output that other settings have made."""
    with Store(layout, None, APPENDED) as store:
        store.append(LINES)
    with pytest.raises(RecordError, match="rows: 3 then, 4 now"):
        take_over(layout, "all", Record({"rows": 4}, {}, {}, {"appended": False}))
    assert records.read(layout.record) == APPENDED
    assert parts(layout) == []


def test_refused_rows_are_put_before_a_worker_waits():
    """Guards a group of bad rows only: nothing is under way then, and its end would never come."""
    engine: Any = SimpleNamespace(engine_config=EngineConfig(slots=1))
    written = []
    worker = Worker(engine, load_tokenizer(), "model", lambda lines: written.extend(lines))

    def tasks():
        yield Task(RowReader().read(0, Line("in.jsonl", 1, b"no JSON")), None)
        yield None
        assert len(written) == 1

    worker.run(tasks(), lambda: False)
    assert len(written) == 1


def test_what_only_this_process_can_read_is_no_input_for_others(tmp_path, monkeypatch):
    """Guards workers that would wait for another process's stdin, or find it empty."""
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt":"?"}\n')
    Inputs([str(tmp_path / "in.jsonl")]).check_others_can_read()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt":"?"}\n')))
    with pytest.raises(FileError, match="stdin: cannot be read by other processes, expected a file"):
        Inputs(["-", str(tmp_path / "in.jsonl")]).check_others_can_read()


def test_devices_of_a_mesh_are_counted_without_any(tmp_path):
    """Guards what a worker asks a cluster for, whose accelerators this machine need not have."""
    (tmp_path / "mesh.json").write_text('{"axes": {"expert": 4, "tensor": 2}}')
    assert [mesh.num_devices(text) for text in ("", "data=2,expert=16", tmp_path / "mesh.json")] == [1, 32, 8]
    with pytest.raises(GptossError, match="unknown mesh axis 'experts'"):
        mesh.num_devices("experts=4")
