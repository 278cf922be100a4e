"""A job's output: results as one file in any format, here or in a store, whole or not at all."""

import errno
import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax import whole_files
from gptoss_jax.errors import GptossError
from gptoss_jax.jobs import outputs, parquet
from gptoss_jax.jobs.inputs import Inputs
from tests.stores import BrokenStore, memory

__all__ = ["memory"]
FORMATS = ("a", "a.jsonl", "a.JSON", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.gz", "a.parquet")
KINDS = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet")
STORES = ("", "memory://folder/", "broken://folder/")
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "reasoning_tokens": 2, "total_tokens": 12}
PLAIN = [
    {
        "id": "1",
        "final": "Hi é\n\u2028",
        "reasoning": "",
        "preambles": ["a"],
        "tool_calls": [{"name": "f", "arguments": {"x": [1, None]}}],
        "cut_calls": [],
        "unparsed_text": "?",
        "token_ids": [200006, 1],
        "parse_status": "ok",
        "faults": [],
        "finish_reason": "stop",
        "stop_string": "\n",
        "logprobs": [-0.1, -1.0e-300],
        "top_logprobs": [[[1, -0.5]]],
        "usage": USAGE,
        "settings": {"temperature": 0.1, "seed": 4294967295},
        "metadata": "mine",
        "answers": [{"final": "a"}],
        "remarks": ["b"],
    },
    {"id": "2", "error": {"code": "bad_row", "message": "no prompt", "line": "a.jsonl:2"}},
]
OPENAI = [
    {
        "id": "batch_req_1",
        "custom_id": "1",
        "response": {"status_code": 200, "request_id": "r", "body": {"choices": [{"index": 0}], "x": None}},
        "error": None,
    },
    {"id": "batch_req_2", "custom_id": "2", "response": None, "error": {"code": "c", "message": "m", "line": "l"}},
]
FORMS = {"plain": PLAIN, "openai": OPENAI}


def packed(rows: list[dict[str, Any]]) -> list[bytes]:
    """Rows as a job writes them."""
    return [json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() for row in rows]


def values(name: str) -> list[Any]:
    """What is read back."""
    return [json.loads(text) for text in outputs.read(name)]


def refusal(call: Any, *arguments: Any) -> str:
    """The one line of the error that a call must end in."""
    with pytest.raises(GptossError) as error:
        call(*arguments)
    text = str(error.value)
    assert text.isprintable() and len(text) < 500, text
    return text


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch, memory):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", FORMATS)
def test_results_come_back_from_every_format(name, store):
    """Guards each format and store: nothing lost, the same bytes for the same rows, nothing beside the file."""
    name = store + name
    for form, rows in FORMS.items():
        outputs.check(name)
        outputs.write(name, packed(rows))
        assert values(name) == rows, form
        first = _bytes(name)
        outputs.write(name, iter(packed(rows)))
        assert _bytes(name) == first
        assert len(_names(store)) == 1
    if not name.lower().endswith("parquet"):
        assert list(outputs.read(name)) == packed(OPENAI) == [line.text for line in Inputs([name]).lines()]


def _bytes(name: str) -> bytes:
    place = outputs.places.find(name)
    with place.open() as file:
        return file.read()


def _names(store: str) -> list[str]:
    """All files of a store, or of this folder."""
    return sorted(outputs.places.find(f"{store}x").store.find("/")) if store else sorted(os.listdir())


def test_formats_that_are_not_written():
    """Guards against JSONL under a name that says CSV, and a typing mistake found after a night."""
    for name in ("a.csv", "a.jsonl.bz2", "a.parquet.gz", "s3://b/a.xlsx", "a.tar.gz"):
        text = f"{name}: is written as .jsonl, .jsonl.gz, .jsonl.zst or .parquet only"
        assert refusal(outputs.format_of, name) == text
    assert refusal(outputs.check, "-") == "-: expected the name of a file, from which a job can go on"
    assert [outputs.format_of(name) for name in FORMATS] == ["", "", "", "", "gzip", "zstd", "gzip", "parquet"]


def test_gzip_holds_no_time(monkeypatch):
    """Guards against bytes that differ by the hour: a job that was resumed ends in the same file."""
    outputs.write("a.gz", [b"{}"])
    first = Path("a.gz").read_bytes()
    monkeypatch.setattr(time, "time", lambda: 1e9)
    outputs.write("a.gz", [b"{}"])
    assert Path("a.gz").read_bytes() == first
    assert gzip.decompress(first) == b"{}\n"


def test_parquet_has_one_schema_whatever_the_rows_hold():
    """Guards against columns of type null, which other files of the same job have as text (Ray's PR 60572)."""
    for rows, form in ((PLAIN, parquet.PLAIN), (OPENAI, parquet.OPENAI)):
        schemas = []
        for count in (1, 2):
            outputs.write("a.parquet", packed(rows[-count:]))
            schemas.append(pq.read_schema("a.parquet"))
        assert schemas[0] == schemas[1]
        assert schemas[0].names == list(form)
        assert "null" not in str(schemas[0])
    outputs.write("a.parquet", [])
    assert pq.read_schema("a.parquet").names == list(parquet.PLAIN)
    assert values("a.parquet") == []
    schema = pq.read_schema("a.parquet")
    assert schema.field("token_ids").type == pa.list_(pa.int32())
    assert schema.field("logprobs").type == pa.list_(pa.float64())
    assert schema.field("usage").type == pa.struct([(key, pa.int64()) for key in USAGE])
    assert schema.field("tool_calls").type == pa.string()


@pytest.mark.parametrize(
    "row",
    [{"id": "1", "new": 1}, {"id": "1", "usage": {"new": 1}}, {"id": "", "custom_id": "", "response": {"new": 1}}],
)
def test_a_key_without_a_column_is_a_bug(row):
    """Guards against values that Arrow passes over without a word; the error keeps its traceback."""
    with pytest.raises(ValueError, match=r"\['new'\], which have no column") as error:
        outputs.write("a.parquet", packed([row]))
    assert not isinstance(error.value, GptossError)
    assert os.listdir() == []


def test_parquet_is_written_in_groups(monkeypatch):
    """Guards memory: rows are held no longer than a group of them takes, by number and by size."""
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 3)
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 200)
    rows = [{"id": str(i), "final": "x" * (300 if i == 4 else 1)} for i in range(8)]
    outputs.write("a.parquet", packed(rows))
    read = pq.ParquetFile("a.parquet")
    assert [read.metadata.row_group(i).num_rows for i in range(read.num_row_groups)] == [3, 2, 3]
    read.close()
    assert values("a.parquet") == rows


def test_anothers_parquet_is_no_result():
    """Guards --merge and checks against a file that is not of a job."""
    for column, value in (("x", 1), ("usage", {"x": 1}), ("settings", "no JSON")):
        pq.write_table(pa.table({"id": ["1"], column: [value]}), "a.parquet")
        assert "row 1 is no result of a job" in refusal(values, "a.parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_results_are_one_line(kind):
    """Guards checks of a finished file that was cut."""
    outputs.write(kind, packed(PLAIN) * 50)
    whole = Path(kind).read_bytes()
    Path(kind).write_bytes(whole[:-6])
    if kind == "a.jsonl":
        assert len(list(outputs.read(kind))) == 100  # the last one is no JSON, which its reader says
    else:
        assert refusal(values, kind).startswith(f"{kind}: ")


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=5)


@given(TEXTS)
def test_every_text_survives(texts):
    """Guards line separators, control characters, NUL, astral characters and empty texts, in every format."""
    rows = packed([{"id": text, "preambles": [text, ""], "metadata": {text: [text]}} for text in texts])
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            outputs.write(f"{folder}/{kind}", rows)
            assert list(outputs.read(f"{folder}/{kind}")) == rows
            assert len(list(Inputs([f"{folder}/{kind}"]).lines())) == len(rows)


class _Stop(BaseException):
    """As Ctrl-C, at any row."""


def _stopping() -> Iterator[bytes]:
    for _ in range(3_000):
        yield packed(PLAIN)[0]
    raise _Stop


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_stops_while_rows_come_leaves_nothing(kind, store):
    """Guards the old file, and the folder, against an error of the job or Ctrl-C after thousands of rows."""
    outputs.write(store + kind, packed(PLAIN))
    with pytest.raises(_Stop):
        outputs.write(store + kind, _stopping())
    assert values(store + kind) == PLAIN
    assert len(_names(store)) == 1


def _fault_of_ours() -> Iterator[bytes]:
    yield packed(PLAIN)[0]
    raise OSError(errno.EIO, "of the journal")


@pytest.mark.parametrize("store", STORES)
def test_a_fault_of_the_rows_is_not_the_files(store):
    """Guards against `cannot write OUT` where it is the journal that cannot be read."""
    with pytest.raises(OSError, match="of the journal") as error:
        outputs.write(f"{store}a.jsonl", _fault_of_ours())
    assert not isinstance(error.value, GptossError)
    assert _names(store) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_finds_no_room(kind):
    """Guards a full disk in the middle: one line, the old file as it was, nothing beside it."""
    outputs.write(kind, packed(PLAIN))
    noise = [b'{"id":"%s"}' % os.urandom(5000).hex().encode() for _ in range(300)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        assert refusal(outputs.write, kind, noise * 2) == f"cannot write {kind}: File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert values(kind) == PLAIN
    assert os.listdir() == [kind]


def test_a_device_that_is_full():
    """Guards streams to /dev/stdout and pipes, which are written to as they are."""
    assert refusal(outputs.write, "/dev/full", packed(PLAIN)) == "cannot write /dev/full: No space left on device"
    outputs.write("/dev/null", packed(PLAIN))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["open wb", "write", "close", "move"])
def test_a_store_that_fails_is_one_line(kind, step):
    """Guards every step of an upload: the old file stays whole under its name, and no half file beside it."""
    name = f"broken://folder/{kind}"
    outputs.write(name, packed(PLAIN))
    BrokenStore.fails, BrokenStore.error = step, PermissionError("Forbidden")
    assert refusal(outputs.write, name, packed(PLAIN) * 2) == f"cannot write {name}: PermissionError: Forbidden"
    BrokenStore.fails = ""
    assert values(name) == PLAIN
    assert _names("broken://folder/") == [f"/folder/{kind}"]


def test_what_cannot_be_written_is_said_before_the_work(monkeypatch):
    """Guards a night's work: folders, stores and rights are asked before it, and the try leaves nothing."""
    os.mkdir("folder")
    text = f"there is no folder {os.getcwd()}/absent"
    assert refusal(outputs.check, "absent/a.jsonl") == f"cannot write absent/a.jsonl: {text}"
    assert refusal(outputs.check, "folder") == "cannot write folder: it is a folder, expected a file name"
    assert "is no store that fsspec knows" in refusal(outputs.check, "zzz://b/x")
    outputs.write("memory://folder/a.jsonl", [])
    text = "cannot write memory://folder: it is a folder, expected a file name"
    assert refusal(outputs.check, "memory://folder") == text
    BrokenStore.fails, BrokenStore.error = "open wb", FileNotFoundError("bucket")
    assert refusal(outputs.check, "broken://b/x") == "cannot write broken://b/x: no such file or bucket"
    BrokenStore.fails = ""
    outputs.check("broken://b/x")
    assert _names("broken://") == []
    for package, name in (("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.delitem(sys.modules, "gptoss_jax.jobs.parquet")
            patch.delattr("gptoss_jax.jobs.parquet")
            assert "pip install 'gptoss-jax[batch]'" in refusal(outputs.check, name)


def test_an_output_that_is_an_input():
    """Guards the input against being replaced, by whatever name."""
    outputs.write("a.jsonl", packed(PLAIN))
    outputs.write("memory://a.jsonl", packed(PLAIN))
    os.link("a.jsonl", "hard.jsonl")
    os.symlink("a.jsonl", "soft.jsonl")
    read = Inputs(["a.jsonl", "memory://a.jsonl"])
    for name in (
        "a.jsonl",
        "./a.jsonl",
        "hard.jsonl",
        "soft.jsonl",
        f"file://{os.getcwd()}/a.jsonl",
        "memory:///a.jsonl",
    ):
        text = f"{name}: is an input of this job too: give the output another name"
        assert refusal(outputs.check, name, read) == text
    outputs.check("b.jsonl", read)


WRITER = """
import sys
from gptoss_jax.jobs import outputs
for turn in range(10**6):
    outputs.write(sys.argv[1], (b'{"id":"%d"}' % turn for _ in range(20_000)))
    print(turn, flush=True)
"""


@pytest.mark.parametrize("kind", ["a.jsonl", "a.jsonl.gz"])
def test_a_kill_leaves_a_whole_file(kind):
    """Guards the file against `kill -9` at any moment of a write over it."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, kind], stdout=subprocess.PIPE, env=_environment())
    try:
        assert writer.stdout
        writer.stdout.readline()
        time.sleep(int.from_bytes(os.urandom(1)) / 1000)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    rows = list(outputs.read(kind))
    assert len(rows) == 20_000 and len(set(rows)) == 1


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(whole_files.__file__).parents[1])}


def test_the_names_of_unfinished_files_say_so():
    """Guards people who find one after a kill, and the README's advice to delete them."""
    seen = []

    def rows() -> Iterator[bytes]:
        seen.extend([*os.listdir(), *_names("memory://")])
        yield b"{}"

    outputs.write("a.jsonl", rows())
    outputs.write("memory://a.jsonl", rows())
    assert re.fullmatch(r"\.unfinished-\w+ \S+ /a\.jsonl\.unfinished-\w+", " ".join(seen)), seen


@pytest.mark.parametrize("kind", KINDS[1:])
def test_no_changed_byte_goes_unseen(kind):
    """Guards results against a disk that returns other bytes: each format carries checksums, and they are read."""
    rows = packed([{"id": str(number), "final": f"{number * 7919:x}"} for number in range(20)])
    outputs.write(kind, rows)
    whole = Path(kind).read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8 if kind == "a.parquet" else 0  # Parquet has none of its own
    unseen = []
    for at in range(4, len(whole) - footer, len(whole) // 150 + 1):
        Path(kind).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            unseen += [at] if list(outputs.read(kind)) != rows else []
        except GptossError:
            pass
    assert unseen == []
