"""`python -m gptoss_jax.batch` as people run it, in processes of its own; most with a model that is not there."""

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gptoss_jax.jobs import outputs
from tests import jobs, processes, scripted
from tests.commands import test_startup as startup
from tests.unit.test_rows import BODIES, batch_row

ROWS = jobs.rows(12)
IDS = [row["id"] for row in ROWS]
SAMPLED = [row | {"temperature": 1.0, "n": 1 + i % 3, "top_logprobs": i % 2} for i, row in enumerate(ROWS)]
Run = Callable[..., processes.Done]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random weights that take prompts in words, and their compiled programs."""
    folder = tmp_path_factory.mktemp("batch")
    jobs.wordy(folder)
    return folder


@pytest.fixture
def run(folder, tmp_path) -> Run:
    """The command; texts that name no flag are files in the test's folder, where in.jsonl holds ROWS."""
    jobs.write_rows(tmp_path / "in.jsonl", ROWS)

    def run(*arguments: Any, **options: Any) -> processes.Done:
        named = [tmp_path / a if isinstance(a, str) and a.startswith(("in", "out")) else a for a in arguments]
        return jobs.run(folder / "published", *named, "--compilation-cache", folder / "programs", **options)

    return run


def _succeeded(done: processes.Done) -> processes.Done:
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return done


def _refused(done: processes.Done) -> str:
    """The one line of a command that did nothing."""
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1), done.stderr
    return lines[0]


# ---- forms ----


def test_all_forms_with_a_real_model(run, tmp_path):
    """Guards what people get: plain rows and OpenAI's, the form of each file named, what acted in each line."""
    plain = [
        {"id": "p", "prompt": "Hello", "logprobs": True, "n": 2, "temperature": 0.5, "max_new_tokens": 3},
        {"messages": [{"role": "user", "content": "Hello"}], "reasoning_effort": "high", "metadata": {"a": 1}},
    ]
    jobs.write_rows(tmp_path / "in1.jsonl", plain)
    jobs.write_rows(tmp_path / "in2.jsonl", [batch_row(url, custom_id=url) for url in BODIES])
    options = ("--max-new-tokens", "4", "--seed", "5", "--date", "2026-11-28")
    done = _succeeded(run("in1.jsonl", "in2.jsonl", "out.jsonl", *options, model=jobs.REAL))
    assert f"{tmp_path}/in1.jsonl: 2 rows in the plain form\n" in done.stderr
    assert f"{tmp_path}/in2.jsonl: 3 rows in OpenAI's Batch form\n" in done.stderr
    assert "5 of 5 rows, " in done.stderr
    lines = {line.get("custom_id") or line["id"]: line for line in jobs.read_rows(tmp_path / "out.jsonl")}
    assert set(lines) == {"p", "row-2", *BODIES}
    assert all(line["error"] is None for line in lines.values())
    first, second = lines["p"]["answers"]
    assert [len(answer["token_ids"]) for answer in (first, second)] == [3, 3]
    assert len(first["logprobs"]) == 3
    assert lines["p"]["settings"]["temperature"] == 0.5
    assert (lines["row-2"]["settings"]["reasoning_effort"], lines["row-2"]["settings"]["date"]) == (
        "high",
        "2026-11-28",
    )
    assert (lines["row-2"]["metadata"], lines["row-2"]["finish_reason"]) == ({"a": 1}, "length")
    for url in BODIES:
        response = lines[url]["response"]
        assert response["status_code"] == 200
        assert response["body"]["gptoss"]["settings"]["max_new_tokens"] == 4
    assert lines["/v1/chat/completions"]["response"]["body"]["object"] == "chat.completion"


def test_what_a_model_says_stands_in_the_line(folder, tmp_path):
    """Guards final, reasoning and status of an answer that is well formed; tool calls likewise."""
    jobs.write_rows(tmp_path / "in.jsonl", [{"prompt": "Why?"}])
    for name, expected in (("thinker", {"final": scripted.ANSWER}), ("caller", {"final": None})):
        scripted.write(tmp_path / name, name)
        out = tmp_path / f"{name}.jsonl"
        cache = ("--compilation-cache", folder / "programs")
        _succeeded(jobs.run(tmp_path / name, tmp_path / "in.jsonl", out, *cache, model=jobs.REAL))
        line = jobs.read_rows(out)[0]
        assert {key: line[key] for key in expected} == expected
        assert (line["parse_status"], line["finish_reason"], line["faults"]) == ("ok", "stop", [])
    assert line["tool_calls"] == [{"name": "get_weather", "arguments": scripted.CALL}]


def test_a_row_whose_numbers_are_not_finite_ends_alone(folder, tmp_path):
    """Guards a night's work: that row has a line with its error, at once or later; the others have their answers."""
    scripted.write(tmp_path / "model", "thinker", spoilt=" sky")
    sky = scripted._ids(" sky")
    rows = [{"id": "good", "prompt": "Why?", "max_new_tokens": 3}, {"id": "at once", "token_ids": sky}]
    rows += [{"id": "later", "prompt": "Why?", "n": 2}, {"id": "also good", "prompt": "Why?", "max_new_tokens": 2}]
    jobs.write_rows(tmp_path / "in.jsonl", rows)
    cache = ("--compilation-cache", folder / "programs")
    done = jobs.run(tmp_path / "model", tmp_path / "in.jsonl", tmp_path / "out.jsonl", *cache, model=jobs.REAL)
    assert "2 errors" in _succeeded(done).stderr
    codes = {line["id"]: line["error"] and line["error"]["code"] for line in jobs.read_rows(tmp_path / "out.jsonl")}
    expected = {"good": None, "at once": "numerics_error", "later": "numerics_error", "also good": None}
    assert codes == expected


def test_inputs_and_outputs_of_all_kinds_give_the_same_results(run, tmp_path):
    """Guards files that are packed, columns, pipes and patterns: the same lines, in order, whatever holds them."""
    _succeeded(run("in.jsonl", "out.jsonl", "--keep-order"))
    expected = jobs.read_rows(tmp_path / "out.jsonl")
    assert [line["id"] for line in expected] == IDS
    content = (tmp_path / "in.jsonl").read_bytes()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("in.jsonl.zst", "in.parquet"):
        outputs.write(str(tmp_path / name), content.splitlines()) if name.endswith("zst") else _parquet(tmp_path / name)
    for name in ("in.jsonl.gz", "in.jsonl.zst", "in.parquet", "in.jsonl.g*", "-"):
        for out in ("out.jsonl.gz", "out.jsonl.zst", "out.parquet"):
            _succeeded(run(name, out, "--restart", stdin=content if name == "-" else b""))
            assert [json.loads(line) for line in outputs.read(str(tmp_path / out))] == _as_read(expected, out)


def _parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)


def _as_read(documents: list[dict], out: str) -> list[dict]:
    """Parquet has no difference between null and absent."""
    if not out.endswith(".parquet"):
        return documents
    return [_without_nulls(document) | {"settings": document["settings"]} for document in documents]


def _without_nulls(value: Any) -> Any:
    return {key: part for key, part in value.items() if part is not None}


# ---- what is wrong ----

BAD = [
    ROWS[0],
    "no JSON",
    {"id": "x", "prompt": "a", "stream": True},
    "",
    ROWS[0],
    {"id": "y", "token_ids": [1] * 5000},
]


def test_validate_lists_what_is_wrong_without_a_model(folder, tmp_path):
    """Guards people's time: every bad row with its file and line, no JAX imported, no weight read; 2 says there are."""
    jobs.write_rows(tmp_path / "in.jsonl", BAD)
    checkpoint = ("--checkpoint", folder / "published", "--validate")
    done = startup.run(tmp_path, jobs.BATCH, tmp_path / "in.jsonl", *checkpoint)
    assert done.packages.isdisjoint({"jax", "jaxlib", "flax", "orbax", "pyarrow", "zstandard"})
    assert done.returncode == 2
    faults = [line.removeprefix(f"{tmp_path}/") for line in done.stderr.splitlines()]
    assert [fault.partition(" ")[0] for fault in faults[2:-1]] == [
        "in.jsonl:2:",
        "in.jsonl:3:",
        "in.jsonl:5:",
        "in.jsonl:6:",
    ]
    assert faults[0] == "in.jsonl: 5 rows in the plain form"
    assert faults[1] == "1 blank line left out"
    assert faults[-1] == "4 bad rows"
    jobs.write_rows(tmp_path / "in.jsonl", ROWS)
    done = startup.run(tmp_path, jobs.BATCH, tmp_path / "in.jsonl", tmp_path / "out.jsonl", *checkpoint)
    assert (done.returncode, done.stderr) == (0, f"{tmp_path}/in.jsonl: 12 rows in the plain form\n")
    assert os.listdir(tmp_path).count("out.jsonl") == 0


def test_bad_rows_are_error_rows_or_stop_the_job(run, tmp_path):
    """Guards both ways: lines with errors beside the others' answers; or nothing at all, and exit code 2."""
    jobs.write_rows(tmp_path / "in.jsonl", BAD)
    done = run("in.jsonl", "out.jsonl", "--on-bad-row", "stop")
    assert done.returncode == 2
    assert "4 bad rows: nothing was done" in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == ["in.jsonl"]
    done = _succeeded(run("in.jsonl", "out.jsonl", "--keep-order"))
    assert "4 bad rows of 5: each gets a line with its error" in done.stderr
    lines = jobs.read_rows(tmp_path / "out.jsonl")
    assert [line["id"] for line in lines] == [IDS[0], None, "x", None, "y"]
    assert [line["error"] and line["error"]["row"] for line in lines] == [None, 2, 3, 4, 5]
    assert lines[2]["error"]["line"] == f"{tmp_path}/in.jsonl:3"


def test_a_row_that_the_page_pool_can_never_hold_is_an_error_row(run, tmp_path):
    """Guards a job with --pool-tokens: the others go on."""
    jobs.write_rows(tmp_path / "in.jsonl", [ROWS[0], {"id": "long", "token_ids": [1] * 600}, ROWS[1]])
    _succeeded(run("in.jsonl", "out.jsonl", "--pool-tokens", "512", "--keep-order"))
    lines = jobs.read_rows(tmp_path / "out.jsonl")
    assert [line["error"] and line["error"]["code"] for line in lines] == [None, "invalid_request", None]
    assert "exceed a page pool" in lines[1]["error"]["message"]


MISTAKES = {
    "no OUT": (("in.jsonl",), "expected IN and OUT"),
    "absent": (("in-absent.jsonl", "out.jsonl"), "no such file"),
    "the same": (("in.jsonl", "in.jsonl"), "is an input of this job too"),
    "a link": (("in.jsonl", "out-link.jsonl"), "is an input of this job too"),
    "a folder": (("in.jsonl", "out-folder"), "folder"),
    "empty": (("in-empty.jsonl", "out.jsonl"), "the input has no rows"),
    "today": (("in.jsonl", "out.jsonl", "--date", "today"), "--date is today, which is another day tomorrow"),
    "shard": (("in.jsonl", "out.jsonl", "--shard", "2/2"), "--shard is '2/2', expected I/N such as 0/8"),
    "slots": (("in.jsonl", "out.jsonl", "--slots", "0"), "--slots is 0, expected 1 to 65536"),
    "too many slots": (
        ("in.jsonl", "out.jsonl", "--slots", "1000000000"),
        "--slots is 1000000000, expected 1 to 65536",
    ),
    "too many answers": (("in.jsonl", "out.jsonl", "--n", "1025"), "--n is 1025, expected 1 to 1024"),
    "no token": (("in.jsonl", "out.jsonl", "--stop-ids=-1"), "199999, -1), expected ids from 0 to"),
    "banned": (
        ("in.jsonl", "out.jsonl", "--banned-ids", "300000"),
        "--banned-ids names id 300000, expected ids from 0",
    ),
    "context": (("in.jsonl", "out.jsonl", "--max-context-tokens", "100000000"), "the model has 131072 at most"),
    "in order, own file": (("in.jsonl", "out-own.jsonl", "--keep-order"), "is there already, and no job wrote it"),
    "both": (("in.jsonl", "out.jsonl", "--validate", "--merge"), "--merge"),
    "nothing to merge": (("in.jsonl", "out.jsonl", "--merge"), "no shard of a job with this OUT has begun"),
    "own file": (("in.jsonl", "out-own.jsonl"), "is there already, and no job wrote it"),
    "n": (("in.jsonl", "out.jsonl", "--n", "0"), "--n is 0, expected 1 to 1024"),
    "range": (("in.jsonl", "out.jsonl", "--top-p", "2"), "--top-p is 2.0, expected 0 to 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, run, tmp_path):
    """Guards people against tracebacks, and what lies there against the job."""
    (tmp_path / "out-link.jsonl").symlink_to("in.jsonl")
    (tmp_path / "out-folder").mkdir()
    (tmp_path / "in-empty.jsonl").write_text("\n")
    (tmp_path / "out-own.jsonl").write_text("mine\n")
    before = sorted(os.listdir(tmp_path))
    arguments, message = MISTAKES[name]
    assert message in _refused(run(*arguments, "--quiet"))
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "out-own.jsonl").read_text() == "mine\n"
    assert len(jobs.read_rows(tmp_path / "in.jsonl")) == 12


# ---- going on ----


class Limited(NamedTuple):
    """A fake model in a process whose files may have so many bytes."""

    size_bytes: int

    def __call__(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size_bytes, self.size_bytes))
        jobs.Fake()()


def _sizes(run: Run, tmp_path: Path) -> tuple[int, bytes]:
    """Bytes of the record, and an uninterrupted run's output."""
    _succeeded(run("in.jsonl", "out-whole.jsonl"))
    return (tmp_path / "out-whole.jsonl.job.json").stat().st_size, (tmp_path / "out-whole.jsonl").read_bytes()


def test_a_file_that_can_grow_no_more_is_one_line(run, tmp_path):
    """Guards full disks, by a limit on files: whole lines stay, one line says why, the same command goes on later."""
    least, whole = _sizes(run, tmp_path)
    content = b""
    for size in range(least + 200, len(whole), 1500):
        done = run("in.jsonl", "out.jsonl", "--slots", "2", "--quiet", model=Limited(size))
        assert _refused(done) == f"batch: {tmp_path}/out.jsonl: File too large"
        content = (tmp_path / "out.jsonl").read_bytes()
        assert len(content) <= size
        assert all(json.loads(line) for line in content.splitlines())
        assert content.endswith(b"\n") or not content
    _succeeded(run("in.jsonl", "out.jsonl"))
    assert sorted((tmp_path / "out.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())
    assert (tmp_path / "out.jsonl").read_bytes().startswith(content)


def test_a_full_disk_is_one_line(run, tmp_path):
    """Guards a file system without room, where the system lets the test mount one."""
    disk = tmp_path / "out-disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)]
    mounted = subprocess.run(mounting, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        _, whole = _sizes(run, tmp_path)
        (disk / "filler").write_bytes(bytes(16 << 10))
        done = run("in.jsonl", "out-disk/out.jsonl", "--quiet", "--slots", "2")
        assert _refused(done) == f"batch: {disk}/out.jsonl: No space left on device"
        content = (disk / "out.jsonl").read_bytes()
        assert content.endswith(b"\n") or not content
        (disk / "filler").unlink()
        _succeeded(run("in.jsonl", "out-disk/out.jsonl"))
        assert (disk / "out.jsonl").read_bytes().startswith(content)
        assert sorted((disk / "out.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("order", [(), ("--keep-order",)])
def test_a_signal_ends_the_job_which_goes_on(number, code, order, run, tmp_path):
    """Guards Ctrl-C and a cluster's SIGTERM: the exit code, what is said, lines that stay, the same end."""
    rows = [row | {"max_new_tokens": 60} for row in jobs.rows(150)]
    jobs.write_rows(tmp_path / "in.jsonl", rows)
    journal = tmp_path / ("out.jsonl.parts/all.journal" if order else "out.jsonl")

    def interrupt(process: Any) -> None:
        while process.is_alive() and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
            time.sleep(0.005)
        os.kill(process.pid, number)

    done = run("in.jsonl", "out.jsonl", "--slots", "2", *order, meanwhile=interrupt)
    assert (done.returncode, done.stderr.splitlines()[-1 if order else -2]) == (
        code,
        "interrupted: the same command goes on",
    )
    before = journal.read_bytes()
    assert 3 < before.count(b"\n") < 150
    done = _succeeded(run("in.jsonl", "out.jsonl", "--slots", "2", *order))
    assert f"going on: {before.count(chr(10).encode())} of 150 rows are done" in done.stderr
    _succeeded(run("in.jsonl", "out-whole.jsonl", *order))
    lines, whole = ((tmp_path / name).read_bytes() for name in ("out.jsonl", "out-whole.jsonl"))
    assert lines == whole if order else sorted(lines.splitlines()) == sorted(whole.splitlines())
    assert order or lines.startswith(before)


def test_a_second_job_on_the_same_output_refuses(run, tmp_path):
    """Guards two terminals, or a cluster that starts a job twice."""
    jobs.write_rows(tmp_path / "in.jsonl", [row | {"max_new_tokens": 60} for row in jobs.rows(150)])
    second = []

    def beside(process: Any) -> None:
        while process.is_alive() and not (tmp_path / "out.jsonl").exists():
            time.sleep(0.005)
        second.append(run("in.jsonl", "out.jsonl", "--quiet"))
        assert process.is_alive()

    _succeeded(run("in.jsonl", "out.jsonl", "--slots", "1", meanwhile=beside))
    assert "another process is writing" in _refused(second[0])
    assert len({line["id"] for line in jobs.read_rows(tmp_path / "out.jsonl")}) == 150


def test_a_finished_job_says_so_and_another_refuses(run, tmp_path):
    """Guards what is there: nothing is computed or written twice, every difference is named, --restart begins anew."""
    (tmp_path / "tools.json").write_text(json.dumps([_tool("a")]))
    for order in ((), ("--keep-order",)):
        arguments = ("in.jsonl", f"out{len(order)}.jsonl", *order, "--tools", tmp_path / "tools.json")
        _succeeded(run(*arguments))
        before = (tmp_path / arguments[1]).read_bytes()
        _succeeded(run(*arguments))
        for flags, said in (
            (("--seed", "7"), "settings, seed: 0 then, 7 now"),
            (("--date", "2026-01-01"), "settings, date: nothing then, '2026-01-01' now"),
            (("--dtype", "float32"), "model, dtype: 'bfloat16' then, 'float32' now"),
            (("--max-context-tokens", "512"), "settings, max_context_tokens: 4096 then, 512 now"),
        ):
            done = run(*arguments, *flags)
            assert done.returncode == 2
            assert f"batch: {said}" in done.stderr.splitlines()
        (tmp_path / "tools.json").write_text(json.dumps([_tool("b")]))
        done = run(*arguments)
        assert (done.returncode, "settings, tools: " in done.stderr) == (2, True)
        (tmp_path / "tools.json").write_text(json.dumps([_tool("a")]))
        jobs.write_rows(tmp_path / "in.jsonl", ROWS[:-1])
        done = run(*arguments)
        assert (done.returncode, "input, rows: 12 then, 11 now" in done.stderr) == (2, True)
        assert (tmp_path / arguments[1]).read_bytes() == before
        _succeeded(run(*arguments, "--restart"))
        assert {line["id"] for line in jobs.read_rows(tmp_path / arguments[1])} == set(IDS[:-1])
        jobs.write_rows(tmp_path / "in.jsonl", ROWS)


def _tool(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


class Backwards(NamedTuple):
    """A fake model on a machine whose clock is set back an hour at every look."""

    def __call__(self) -> None:
        now = [2e9]

        def clock() -> float:
            now[0] -= 3600
            return now[0]

        time.time = clock
        jobs.Fake()()


def test_a_clock_that_goes_backwards_changes_nothing(run, tmp_path):
    """Guards results and progress against the time of day: clocks are set, and summer ends."""
    _, whole = _sizes(run, tmp_path)
    _succeeded(run("in.jsonl", "out.jsonl", model=Backwards()))
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert json.loads((tmp_path / "out.jsonl.summary.json").read_text())["run"]["wall_seconds"] > 0


# ---- shards, batches, order ----


def test_shards_at_the_same_time_and_their_merge(run, tmp_path):
    """Guards array jobs: each shard its rows, in any order of arrival; --merge joins what is whole, and only that."""
    _succeeded(run("in.jsonl", "out-whole.jsonl", "--keep-order"))
    others = []

    def beside(process: Any) -> None:
        others.append(run("in.jsonl", "out.jsonl", "--shard", "1/3"))

    _succeeded(run("in.jsonl", "out.jsonl", "--shard", "0/3", meanwhile=beside))
    _succeeded(others[0])
    message = _refused(run("in.jsonl", "out.jsonl", "--merge", "--quiet"))
    assert f"4 of 12 rows have no line yet, the first at {tmp_path}/in.jsonl:3" in message
    assert not (tmp_path / "out.jsonl").exists()
    _succeeded(run("in.jsonl", "out.jsonl", "--shard", "2/3"))
    _succeeded(run("in.jsonl", "out.jsonl", "--merge"))
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "out-whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.parts").exists()
    assert json.loads((tmp_path / "out.jsonl.summary.json").read_text())["complete"] is True
    assert "nothing is left to do" in _succeeded(run("in.jsonl", "out.jsonl", "--merge")).stderr
    assert "nothing is left to do" in _succeeded(run("in.jsonl", "out.jsonl", "--shard", "0/3")).stderr


def test_what_shards_left_is_done_without_them(run, tmp_path):
    """Guards a shard that never came: the job without --shard does the rest and joins all."""
    _succeeded(run("in.jsonl", "out-whole.jsonl", "--keep-order"))
    _succeeded(run("in.jsonl", "out.jsonl", "--shard", "0/2"))
    done = _succeeded(run("in.jsonl", "out.jsonl"))
    assert "going on: 6 of 12 rows are done" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "out-whole.jsonl").read_bytes()


def _lines(path: Path) -> dict[str, bytes]:
    return {json.loads(line)["id"]: line for line in path.read_bytes().splitlines()}


def test_a_rows_line_is_the_same_in_any_batch_order_and_shard(run, tmp_path):
    """Guards determinism with a real model: 1, 3 or 16 at once, shuffled, sharded, resumed: the same bytes per row."""
    jobs.write_rows(tmp_path / "in.jsonl", SAMPLED)
    shuffled = random.Random(0).sample(SAMPLED, len(SAMPLED))
    jobs.write_rows(tmp_path / "in-shuffled.jsonl", shuffled)
    _succeeded(run("in.jsonl", "out.jsonl", model=jobs.REAL))
    expected = _lines(tmp_path / "out.jsonl")
    assert len({line.partition(b'"token_ids"')[2] for line in expected.values()}) == len(ROWS)
    for slots in ("1", "3"):
        _succeeded(run("in.jsonl", f"out-{slots}.jsonl", "--slots", slots, model=jobs.REAL))
        assert _lines(tmp_path / f"out-{slots}.jsonl") == expected
    _succeeded(run("in-shuffled.jsonl", "out-shuffled.jsonl", model=jobs.REAL))
    assert _lines(tmp_path / "out-shuffled.jsonl") == expected
    for shard in ("0/2", "1/2"):
        _succeeded(run("in.jsonl", "out-sharded.jsonl", "--shard", shard, model=jobs.REAL))
    _succeeded(run("in.jsonl", "out-sharded.jsonl", "--merge"))
    assert _lines(tmp_path / "out-sharded.jsonl") == expected
    content = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(content[: len(content) // 2])
    _succeeded(run("in.jsonl", "out.jsonl", "--slots", "3", model=jobs.REAL))
    assert _lines(tmp_path / "out.jsonl") == expected


# ---- the summary ----


def test_the_summary_has_what_became_of_the_rows(run, tmp_path):
    """Guards programs that read it: counts, rates, the run, what the job was, and that it adds up after a resume."""
    jobs.write_rows(tmp_path / "in.jsonl", [*ROWS, "no JSON"])
    _succeeded(run("in.jsonl", "out.jsonl"))
    first = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    lines = jobs.read_rows(tmp_path / "out.jsonl")
    drawn = sum(len(line.get("token_ids", [])) for line in lines)
    assert (first["rows"], first["rows_of_input"], first["complete"]) == (13, 13, True)
    assert (first["rows_with_errors"], first["errors"]) == (1, {"invalid_request": 1})
    assert (first["answers"], first["finish_reasons"], first["truncation_rate"]) == (12, {"length": 12}, 1.0)
    assert sum(first["parse_statuses"].values()) == 12
    assert (first["prompt_tokens"], first["answer_tokens"]) == (24, drawn)
    assert first["run"]["rows"] == 13
    assert first["run"]["wall_seconds"] > 0
    assert first["run"]["answer_tokens_per_second"] > 0
    assert first["input"]["files"] == [str(tmp_path / "in.jsonl")]
    assert len(first["model"]["weights"]) == 64
    assert first["settings"]["seed"] == 0
    assert {"python", "jax", "gptoss-jax"} <= set(first["versions"])
    content = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(b"".join(content.splitlines(keepends=True)[:5]) + b'{"torn')
    _succeeded(run("in.jsonl", "out.jsonl"))
    second = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert second["run"]["rows"] == 8
    differ = {"run"}
    assert {key: second[key] for key in second if key not in differ} == {
        key: first[key] for key in first if key not in differ
    }
