"""What a job keeps on disk: its rows' places and ids, its record, its lines, and the parts of several writers."""

import dataclasses
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from gptoss_jax.errors import GptossError
from gptoss_jax.jobs import outputs
from gptoss_jax.jobs import record as records
from gptoss_jax.jobs import store as stores
from gptoss_jax.jobs.inputs import Inputs
from gptoss_jax.jobs.journal import CHECKED, Journal, JournalError
from gptoss_jax.jobs.record import Record, RecordError
from gptoss_jax.jobs.rows import RowReader
from gptoss_jax.jobs.store import Layout, Merged, Store, remove_parts
from gptoss_jax.jobs.summary import Tally
from gptoss_jax.jobs.survey import Ids, Survey, survey
from tests import jobs
from tests.unit.test_rows import READING, batch_row

RECORD = Record(
    input={"files": ["in.jsonl"], "rows": 3, "sha256": "ab"},
    model={"weights": "12", "dtype": "bfloat16"},
    settings={"seed": 0, "date": None, "tools": [], "stop": []},
    output={"appended": True},
)
PARTS = dataclasses.replace(RECORD, output={"appended": False})


def _survey(tmp_path: Path, *files: list) -> tuple[Inputs, Survey]:
    names = [str(jobs.write_rows(tmp_path / f"in{i}.jsonl", documents)) for i, documents in enumerate(files)]
    inputs = Inputs(names)
    return inputs, survey(inputs, READING.fault_of)


def _layout(tmp_path: Path) -> Layout:
    return Layout(str(tmp_path / "out.jsonl"), str(tmp_path / "out.jsonl"))


def _line(row_id: str, **fields: object) -> bytes:
    return json.dumps({"id": row_id, "error": None, **fields}).encode()


# ---- the survey ----


def test_what_a_survey_finds(tmp_path):
    """Guards the report before any weights are read: forms, counts, blank lines, faults in order, with their places."""
    plain = [{"id": "a", "prompt": "x"}, "", "no JSON", {"id": "a", "prompt": "y"}, {"id": "b", "zzz": 1}]
    _, found = _survey(tmp_path, plain, [batch_row(custom_id="c"), batch_row(custom_id="a")])
    first, second = (str(tmp_path / f"in{i}.jsonl") for i in range(2))
    assert found.forms == {first: "plain", second: "openai"}
    assert (found.num_rows, found.blank_lines, found.num_faults) == (6, 1, 4)
    assert found.places.rows_of_files() == {first: 4, second: 2}
    assert [fault.where for fault in found.faults] == [f"{first}:3", f"{first}:4", f"{first}:5", f"{second}:2"]
    assert [str(fault) for fault in found.faults if "is that of" in fault.what] == [
        f"{first}:4: id is that of {first}:1, expected one that no other row has",
        f"{second}:2: custom_id is that of {first}:1, expected one that no other row has",
    ]


def test_each_line_of_output_finds_its_row_again(tmp_path):
    """Guards resuming over good rows, bad ones, doubled ids and rows without any."""
    documents = [*jobs.rows(20), "no JSON", jobs.rows(1)[0], {"prompt": "x"}, {"id": "", "prompt": "x"}]
    inputs, found = _survey(tmp_path, documents)
    reader = RowReader(found.forms)
    for ordinal, line in enumerate(inputs.lines()):
        row = found.checked(reader.read(ordinal, line))
        assert found.find(json.loads(row.refused("for a reason").error_line())) == ordinal
    assert found.num_faults == 3
    with pytest.raises(GptossError, match="answers the row 'other', which the input does not have"):
        found.find({"id": "other", "error": None})
    with pytest.raises(GptossError, match="answers the row 24, which"):
        found.find({"id": None, "error": {"row": 25}})


def test_ids_are_told_apart_by_all_of_their_bits():
    """Guards rows whose ids' digests begin alike: of 2^64 values some do, among a billion rows."""
    halves = itertools.product([0, 1, 2**63, 2**64 - 1], repeat=2)
    digests = [np.array(pair, np.uint64).tobytes() for pair in halves]
    ids = Ids(b"".join([*digests, digests[5], digests[0]]))
    assert ids.is_repeated.tolist() == [False] * 16 + [True, True]
    assert [ids.find(digest) for digest in digests] == list(range(16))
    assert (ids.first_with_id_of(16), ids.first_with_id_of(17)) == (5, 0)
    assert ids.find(np.array([7, 7], np.uint64).tobytes()) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [rows[0], rows[1] | {"token_ids": [9]}, *rows[2:]], "in0.jsonl:2 has changed while the job ran"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "in0.jsonl:1 has changed"),
        (lambda rows: ["", *rows], "in0.jsonl:2 has changed"),
        (lambda rows: [*rows, rows[0]], "in0.jsonl:6 has changed"),
        (lambda rows: rows[:-1], "the input had 5 rows when the job began, and 4 now"),
    ],
)
def test_an_input_that_changes_meanwhile_is_refused(change, message, tmp_path):
    """Guards answers to another question under a row's id: a changed row is not answered."""
    rows = jobs.rows(5)
    inputs, found = _survey(tmp_path, rows)
    assert len([*READING.tasks(inputs, found, np.ones(5, np.bool_))]) == 5
    jobs.write_rows(tmp_path / "in0.jsonl", change(rows))
    with pytest.raises(GptossError, match=message):
        list(READING.tasks(inputs, found, np.ones(5, np.bool_)))


# ---- the record ----


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"input": {"files": ["other"], "rows": 3, "sha256": "ab"}}, "input, files: ['in.jsonl'] then, ['other'] now"),
        ({"input": {"files": ["in.jsonl"], "rows": 4, "sha256": "cd"}}, "input, rows: 3 then, 4 now"),
        ({"model": {"weights": "34", "dtype": "bfloat16"}}, "model, weights: '12' then, '34' now"),
        ({"model": {"weights": "12", "dtype": "float32"}}, "model, dtype: 'bfloat16' then, 'float32' now"),
        ({"settings": {**RECORD.settings, "seed": 7}}, "settings, seed: 0 then, 7 now"),
        ({"settings": {**RECORD.settings, "date": "2026-01-01"}}, "settings, date: nothing then, '2026-01-01' now"),
        ({"settings": {**RECORD.settings, "tools": [{"name": "f"}]}}, "settings, tools: [] then, [{'name': 'f'}] now"),
        ({"settings": {**RECORD.settings, "new": 1}}, "settings, new: nothing then, 1 now"),
    ],
)
def test_another_job_is_refused_and_told_by_what_it_is_another(now, said, tmp_path):
    """Guards a mixture of two jobs' answers in one file: every kind of change is named, with both values."""
    with Store(_layout(tmp_path), None, RECORD) as store:
        store.append([_line("a")])
    with pytest.raises(RecordError) as caught:
        Store(_layout(tmp_path), None, dataclasses.replace(RECORD, **now))
    first, *differences = str(caught.value).split("\n")
    assert first.endswith("of another job than this one; --restart begins anew, another OUT keeps both")
    assert said in differences
    with Store(_layout(tmp_path), None, dataclasses.replace(RECORD, settings={**RECORD.settings, "stop": ()})) as store:
        assert [*store.lines()] == [_line("a")]


def test_a_record_comes_back(tmp_path):
    """Guards resuming: what was written is what is read; something else under the name is refused."""
    path = tmp_path / "out.job.json"
    assert records.read(path) is None
    records.create(path, RECORD)
    assert records.read(path) == RECORD
    assert os.listdir(tmp_path) == ["out.job.json"]
    for text in ("[]", '{"format": 1}', path.read_text().replace('"format": 1', '"format": 2')):
        path.write_text(text)
        with pytest.raises(RecordError, match="is no job's record of this version"):
            records.read(path)


def test_of_two_that_create_a_record_the_second_has_to_agree(tmp_path):
    """Guards shards that begin at once, with other settings."""
    records.create(tmp_path / "r", RECORD)
    records.create(tmp_path / "r", RECORD)
    with pytest.raises(
        RecordError, match="appends its lines to OUT, and --keep-order and --shard write them elsewhere"
    ):
        records.create(tmp_path / "r", PARTS)
    assert records.read(tmp_path / "r") == RECORD
    assert os.listdir(tmp_path) == ["r"]


# ---- the store ----


def test_what_no_job_wrote_is_left_alone(tmp_path):
    """Guards a user's own file under the name of the output, --restart or not."""
    (tmp_path / "out.jsonl").write_text("mine\n")
    for restart, (part, record) in itertools.product([False, True], [(None, RECORD), ("all", PARTS)]):
        with pytest.raises(RecordError, match="is there already, and no job wrote it: name another OUT, or remove it"):
            Store(_layout(tmp_path), part, record, restart=restart)
        assert (tmp_path / "out.jsonl").read_text() == "mine\n"


def test_restart_begins_anew(tmp_path):
    """Guards --restart: lines, parts and record of the job before are gone, however its lines were kept."""
    layout = _layout(tmp_path)
    before = [(None, RECORD), ("all", PARTS), ("shard-0-of-2", PARTS), ("all", PARTS), (None, RECORD)]
    for (_, old), (part, new) in itertools.pairwise(before):
        changed = dataclasses.replace(new, settings={**old.settings, "seed": int(str(old.settings["seed"])) + 1})
        with Store(layout, part, changed, restart=True) as store:
            assert [*store.lines()] == []
            store.append([_line("a")])
        assert records.read(layout.record) == changed
        assert layout.parts.exists() == (part is not None)
        assert [path.stem for path in stores.parts(layout)] == ([part] if part else [])
        before[before.index((part, new))] = (part, changed)


def test_restart_waits_for_no_other_writer(tmp_path):
    """Guards a shard that still runs: its journal is not removed under it."""
    layout = _layout(tmp_path)
    with Store(layout, "shard-0-of-2", PARTS) as store:
        store.append([_line("a")])
        with pytest.raises(JournalError, match="another process is writing"):
            Store(layout, "shard-1-of-2", PARTS, restart=True)
        assert len([*store.lines()]) == 1


def test_a_job_is_finished_when_its_output_is_made_of_parts(tmp_path):
    """Guards a job whose lines are appended, which was thought finished after a crash."""
    layout = _layout(tmp_path)
    with Store(layout, None, RECORD) as store:
        store.append([_line("a")])
    assert not layout.is_finished
    with Store(layout, "all", PARTS, restart=True) as store:
        assert not layout.is_finished
        outputs.write(layout.out, [_line("a")])
        assert not layout.is_finished
        remove_parts(layout)
    assert layout.is_finished
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "out.jsonl.job.json"]


def test_parts_vanish_at_once(tmp_path, monkeypatch):
    """Guards a crash while they are removed: rows of those that are gone would be answered again."""
    layout = _layout(tmp_path)
    for part in ("shard-0-of-2", "shard-1-of-2"):
        with Store(layout, part, PARTS) as store:
            store.append([_line(part)])
    outputs.write(layout.out, [_line("a")])
    monkeypatch.setattr(stores.shutil, "rmtree", lambda folder, ignore_errors=False: None)
    remove_parts(layout)
    assert layout.is_finished
    assert layout.joined.exists()
    monkeypatch.undo()
    remove_parts(layout)
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "out.jsonl.job.json"]


def test_done_tells_which_rows_have_a_line(tmp_path):
    """Guards resuming: each line counts once; what answers no row, or one twice, is no output of this job."""
    _, found = _survey(tmp_path, jobs.rows(4))
    ids = [row["id"] for row in jobs.rows(4)]
    noted = []
    with Store(_layout(tmp_path), None, RECORD) as store:
        store.append([_line(ids[2]), _line(ids[0])])
        assert store.done(found, noted.append).tolist() == [True, False, True, False]
        assert [document["id"] for document in noted] == [ids[2], ids[0]]
        store.append([_line(ids[2])])
        with pytest.raises(JournalError, match=r"out.jsonl, line 3: the row .*in0.jsonl:3 has a line already"):
            store.done(found, noted.append)
    with Store(_layout(tmp_path), None, RECORD, restart=True) as store:
        store.append([_line("another")])
        with pytest.raises(JournalError, match=r"out.jsonl, line 1: it answers the row 'another', which the input"):
            store.done(found, noted.append)


@pytest.mark.parametrize("fields", [{"error": 5}, {"error": {"row": 1}}, {"usage": 5, "finish_reason": "stop"}])
def test_a_line_that_somebody_has_edited_is_named(fields, tmp_path):
    """Guards resuming against a traceback: such a line answers a row, but cannot be counted."""
    _, found = _survey(tmp_path, jobs.rows(1))
    with Store(_layout(tmp_path), None, RECORD) as store:
        store.append([json.dumps({"id": jobs.rows(1)[0]["id"], "error": None} | fields).encode()])
        with pytest.raises(JournalError, match=r"out.jsonl, line 1: .* is no line of a job's output"):
            store.done(found, Tally().add)


def test_an_id_of_half_a_character_answers_no_row(tmp_path):
    """Guards the same against an id that no row can have."""
    _, found = _survey(tmp_path, jobs.rows(1))
    with Store(_layout(tmp_path), None, RECORD) as store:
        store.append([b'{"id": "\\ud800", "error": null}'])
        with pytest.raises(JournalError, match=r"line 1: it answers the row '.ud800', which the input does not have"):
            store.done(found, Tally().add)


# ---- several writers ----


def test_parts_are_joined_in_the_order_of_the_input(tmp_path):
    """Guards --merge: each row's first line, whoever wrote it, in whatever order; missing rows are named."""
    documents = jobs.rows(6)
    _, found = _survey(tmp_path, documents)
    ids, layout = [row["id"] for row in documents], _layout(tmp_path)
    with Store(layout, "shard-1-of-2", PARTS) as store:
        store.append([_line(ids[5]), _line(ids[1])])
    with Store(layout, "shard-0-of-2", PARTS) as store:
        store.append([_line(ids[i]) for i in (4, 0, 2)])
        assert store.done(found, lambda document: None).tolist() == [True, True, True, False, True, True]
    merged = Merged(layout, found)
    assert (merged.missing.tolist(), merged.num_repeated) == ([3], 0)
    with Store(layout, "all", PARTS) as store:
        store.append([_line(ids[3]), _line(ids[0])])
    merged = Merged(layout, found)
    assert (merged.missing.size, merged.num_repeated) == (0, 1)
    assert [json.loads(line)["id"] for line in merged.lines()] == ids


def test_more_parts_than_a_process_may_open(tmp_path, monkeypatch):
    """Guards a job of a thousand shards, whose rows alternate between them."""
    monkeypatch.setattr(stores, "MAX_OPEN_FILES", 3)
    documents = jobs.rows(30)
    _, found = _survey(tmp_path, documents)
    layout = _layout(tmp_path)
    layout.parts.mkdir()
    for part in range(10):
        with Journal(layout.part(str(part)), CHECKED) as opened:
            opened.append([_line(row["id"]) for row in documents[part::10]])
    assert [json.loads(line)["id"] for line in Merged(layout, found).lines()] == [row["id"] for row in documents]


def test_a_part_that_changes_under_a_merge_is_seen(tmp_path):
    """Guards lines that are read by their offsets."""
    documents = jobs.rows(2)
    _, found = _survey(tmp_path, documents)
    layout = _layout(tmp_path)
    layout.parts.mkdir()
    with Journal(layout.part("all"), CHECKED) as opened:
        opened.append([_line(row["id"]) for row in documents])
    merged = Merged(layout, found)
    layout.part("all").write_bytes(b"x" + layout.part("all").read_bytes())
    with pytest.raises(JournalError, match="has changed: the same command reads it again"):
        list(merged.lines())
