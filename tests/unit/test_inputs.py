"""A job's input: files of any kind, number and length, read as lines."""

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax import compression, jsonl
from gptoss_jax.errors import GptossError
from gptoss_jax.files import FileError
from gptoss_jax.jobs import inputs
from gptoss_jax.jobs.inputs import Inputs, Line
from tests.stores import BrokenStore, memory

__all__ = ["memory"]
ROWS = [b'{"id": "a"}', b'{"id": "\xc3\xa9"}', b'{"id": "c", "prompt": "x"}']
PACK = {"plain": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}


def texts(*names: object) -> list[bytes]:
    """The rows' texts; none may have a fault."""
    lines = list(Inputs([str(name) for name in names]).lines())
    assert not any(line.fault for line in lines)
    return [line.text for line in lines]


def refusal(*names: object) -> str:
    """The one line in which finding or reading these files must end."""
    with pytest.raises(GptossError) as error:
        list(Inputs([str(name) for name in names]).lines())
    text = str(error.value)
    assert text.isprintable() and len(text) < 600, text
    return text


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("form", PACK)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_of_any_system_packed_in_any_way(form, end):
    """Guards byte order marks, CRLF, blank lines, a last line without its end, and names that say another format."""
    content = b"\xef\xbb\xbf" + end + ROWS[0] + end + b"  " + end + ROWS[1] + end + end + ROWS[2]
    Path("rows.parquet").write_bytes(PACK[form](content))
    found = Inputs(["rows.parquet"])
    lines = [Line("rows.parquet", number, text) for number, text in zip((2, 4, 6), ROWS, strict=True)]
    assert list(found.lines()) == lines == list(found.lines())
    assert found.blank_lines == 3


def test_streams_joined_of_several(monkeypatch):
    """Guards `cat a.gz b.gz`, pigz and pzstd: the first of several packed parts was read as the whole."""
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"  # a frame without content, with which pzstd's files begin
    monkeypatch.setattr(compression, "_BUFFER_BYTES", 16)
    for name, parts in {
        "a": [gzip.compress(row[:7]) + gzip.compress(row[7:] + b"\n") for row in ROWS],
        "b": [skipped, *(zstandard.compress(row[:7]) + zstandard.compress(row[7:] + b"\n") for row in ROWS)],
    }.items():
        Path(name).write_bytes(b"".join(parts))
        assert texts(name) == ROWS


def test_many_names(memory):
    """Guards globs, their order, URLs, globs of a store, and names that only look like globs."""
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl"):
        Path(name).write_bytes(b'{"id":"%s"}\n' % name.encode())
        memory.pipe(f"/folder/{name}", b'{"id":"far %s"}\n' % name.encode())
    Path("d.jsonl").mkdir()
    here, far = Path.cwd(), "memory://folder"
    assert texts("c[1].jsonl", "[ab]*.jsonl") == [b'{"id":"%s.jsonl"}' % name for name in (b"c[1]", b"a", b"b")]
    assert texts(f"file://{here}/b.jsonl", f"{far}/*.jsonl")[:2] == [b'{"id":"b.jsonl"}', b'{"id":"far a.jsonl"}']
    assert Inputs([f"{far}/[ab].jsonl"]).files == ("memory:///folder/a.jsonl", "memory:///folder/b.jsonl")
    assert Inputs(["./b.jsonl", "*1*.jsonl"]).files == ("./b.jsonl", "c[1].jsonl")
    assert refusal("*.json") == "*.json: matches no file"
    assert refusal(f"{far}/*.json") == f"{far}/*.json: matches no file"


def test_a_file_given_twice_is_refused(memory):
    """Guards rows that would be answered twice, whatever the second name is."""
    Path("a.jsonl").write_bytes(ROWS[0])
    os.link("a.jsonl", "hard.jsonl")
    os.symlink("a.jsonl", "soft.jsonl")
    memory.pipe("/a.jsonl", ROWS[0])
    for other in ("./a.jsonl", "hard.jsonl", "soft.jsonl", f"file://{Path.cwd()}/a.jsonl", "h*.jsonl"):
        assert refusal("a.jsonl", other).endswith(" is given twice, the first time as a.jsonl")
        assert other.startswith("h*") or other in Inputs(["a.jsonl"])
    assert "is given twice" in refusal("memory://a.jsonl", "memory:///a.jsonl")
    assert "memory:///a.jsonl" in Inputs(["memory://a.jsonl"])
    assert "new.jsonl" not in Inputs(["a.jsonl"])


def test_files_of_one_name_in_two_archives(memory):
    """Guards against calling them one file: the store is more than its kind."""
    for name in ("a.zip", "b.zip"):
        with zipfile.ZipFile(name, "w") as archive:
            archive.writestr("rows.jsonl", ROWS[0])
    assert texts("zip://rows.jsonl::a.zip", "zip://*.jsonl::b.zip") == [ROWS[0], ROWS[0]]
    assert "zip://rows.jsonl::a.zip" in Inputs(["zip://rows.jsonl::a.zip"])


def test_a_pipe_given_twice_is_not_waited_for():
    """Guards against a second open that waits for ever."""
    os.mkfifo("pipe")
    assert refusal("pipe", "pipe") == "pipe: is given twice"


def test_a_long_row_of_parquet_is_a_fault():
    """Guards the limit on rows in every format."""
    pq.write_table(pa.table({"id": ["a", "b" * 99]}), "a.parquet")
    file: Any = open("a.parquet", "rb")
    with file:
        found = list(inputs.rows(file, "a.parquet", 50))
    assert found == [(1, b'{"id":"a"}', ""), (2, b"", "the row is longer than 50 bytes, which no context holds")]


class _Stdin:
    def __init__(self, content: bytes):
        self.buffer = io.BytesIO(content)


def test_stdin_is_read_twice(monkeypatch):
    """Guards a job from a pipe, which validates all rows before it answers the first; two passes at once too."""
    for pack in PACK.values():
        monkeypatch.setattr(sys, "stdin", _Stdin(pack(b"\n".join(ROWS))))
        found = Inputs(["-"])
        expected = [Line("stdin", number, row) for number, row in enumerate(ROWS, 1)]
        assert list(zip(found.lines(), found.lines(), strict=True)) == list(zip(expected, expected, strict=True))
    assert os.listdir() == []
    assert refusal("-", "-") == "-: is given twice"
    monkeypatch.setattr(sys, "stdin", None)
    assert refusal("-") == "stdin: is closed"


def test_parquet_from_stdin(monkeypatch):
    """Guards seeking in the copy of stdin."""
    pq.write_table(pa.table({"id": ["a", "b"]}), "a.parquet")
    monkeypatch.setattr(sys, "stdin", _Stdin(Path("a.parquet").read_bytes()))
    assert texts("-") == [b'{"id":"a"}', b'{"id":"b"}']


def test_stdin_redirected_from_an_input(monkeypatch):
    """Guards against `batch a.jsonl - OUT < a.jsonl`, and OUT being what stdin comes from."""
    Path("a.jsonl").write_bytes(ROWS[0])
    with open("a.jsonl") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "is given twice" in refusal("a.jsonl", "-")
        stdin.seek(0)
        assert "a.jsonl" in Inputs(["-"])


def test_a_full_disk_under_stdin(monkeypatch):
    """Guards the copy of stdin against a traceback, when /tmp is small."""
    monkeypatch.setattr(sys, "stdin", _Stdin(ROWS[0]))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "wb", buffering=0))
    expected = (
        f"stdin: cannot be copied to {tempfile.gettempdir()}: No space left on device; TMPDIR names another folder"
    )
    assert refusal("-") == expected


def test_a_pipe_by_name_is_read_twice():
    """Guards `batch <(zcat ...)`: a pipe gives its bytes once."""
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(b"\n".join(ROWS)))
    writer.start()
    found = Inputs(["pipe"])
    writer.join()
    assert [line.text for line in found.lines()] == ROWS == [line.text for line in found.lines()]


CAN = "expected JSONL, one object a line"
OTHERS = {
    "UTF-16": (b'{"id":1}'.decode().encode("utf-16"), "the file is UTF-16, expected UTF-8: convert it with `iconv"),
    "UTF-32": (b'{"id":1}'.decode().encode("utf-32"), "the file is UTF-32, expected UTF-8"),
    "an array": (b'[{"id": 1},\n {"id": 2}]', f"one JSON array, {CAN}: make it with `python -c"),
    "an indented array": (b'[\n  {\n    "id": 1\n  }\n]', f"one JSON array, {CAN}"),
    "an array of texts": (b'["a", "b"]', f"one JSON array, {CAN}"),
    "an indented object": (b'{\n  "id": 1\n}\n', f"one JSON text over many lines, {CAN}: make it with `jq -c . FILE"),
    "CSV": (b"id,prompt\n1,Hi\n", f"a CSV file or another table, {CAN}: make it with `python -c"),
    "tabs": (b"id\tprompt\n1\tHi\n", f"a CSV file or another table, {CAN}"),
    "text": (b"Hello there\nall", f"begins with b'Hello there', {CAN}"),
    "noise": (bytes(range(200, 60, -1)), "begins with b'"),
    "bzip2": (b"BZh91AY&SY", "packed with bzip2: unpack it"),
    "xz": (b"\xfd7zXZ\0\0", "packed with xz: unpack it"),
    "Excel": (b"PK\x03\x04\x14\0", "a zip archive, as PyTorch and Excel save"),
    "pickle": (b"\x80\x02}q\0", "a Python pickle"),
    "zeros": (bytes(1000), "filled with zeros"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("form", PACK)
def test_files_of_other_kinds_are_named(kind, form):
    """Guards against a million bad lines where one says what to do."""
    content, what = OTHERS[kind]
    Path("a.jsonl").write_bytes(PACK[form](content))
    assert refusal("a.jsonl").startswith(f"a.jsonl: {what}")


def test_the_commands_that_refusals_name_work(capsys, monkeypatch):
    """Guards the way from a CSV file or an array to JSONL that the message shows."""
    for content, kind in ((b'id,prompt\r\n1,"a\n""b"""\r\n', jsonl._TABLE), (b'[{"id": "1"}, 2]', jsonl._ARRAY)):
        code = jsonl._TO_JSONL[kind].partition('-c "')[2].partition('"')[0]
        monkeypatch.setattr(sys, "stdin", io.StringIO(content.decode(), newline=""))
        exec(code, {})
    assert capsys.readouterr().out == '{"id": "1", "prompt": "a\\n\\"b\\""}\n{"id": "1"}\n2\n'


@pytest.mark.parametrize("first", [b"not json", b"[1]", b'{"id": 1', b"{", b"\xff\xff", b"id,prompt"])
def test_one_bad_line_is_a_row_and_no_refusal(first):
    """Guards the other rows: what is wrong with one is said of that row, by whoever reads its JSON."""
    Path("a.jsonl").write_bytes(first + b"\n" + ROWS[0])
    assert texts("a.jsonl") == [first, ROWS[0]]


def test_what_cannot_be_opened(memory):
    """Guards names that are no file, each in one line that names it as it was given."""
    Path("folder").mkdir()
    os.symlink("nowhere", "link")
    Path("secret").write_bytes(ROWS[0])
    Path("secret").chmod(0)
    assert refusal("absent.jsonl") == "absent.jsonl: no such file"
    assert refusal("folder") == "folder: a folder, expected files: folder/*.jsonl, say"
    assert refusal(f"file://{Path.cwd()}/absent") == f"file://{Path.cwd()}/absent: no such file"
    memory.pipe("/far/a.jsonl", ROWS[0])
    assert refusal("memory://far") == "memory://far: a folder, expected files: memory://far/*.jsonl, say"
    assert refusal("link").startswith("link: a link to nowhere, which is not there")
    assert refusal("") == "'': expected a file name"
    assert refusal("a\0b") == "'a\\x00b': expected a file name"
    assert refusal("/dev/zero") == "/dev/zero: a device, expected a file"
    if os.geteuid():
        assert refusal("secret") == "secret: Permission denied"


def test_a_file_that_is_gone_at_the_second_pass():
    """Guards a long job whose input is moved away: a line, not a traceback, and not fewer rows."""
    Path("a.jsonl").write_bytes(ROWS[0])
    found = Inputs(["a.jsonl"])
    assert len(list(found.lines())) == 1
    os.unlink("a.jsonl")
    with pytest.raises(FileError, match=r"a\.jsonl: no such file"):
        list(found.lines())


def test_stores_that_are_not_there():
    """Guards URLs of stores whose package is missing, or that nobody knows."""
    assert (
        refusal("zzz://b/x")
        == "zzz://b/x: 'zzz' is no store that fsspec knows, expected a path, s3://, gs:// or another"
    )
    assert refusal("memory://") == "memory://: names no file"
    with contextlib.suppress(ImportError):
        import s3fs  # pyright: ignore[reportMissingImports]  # noqa: F401

        return
    assert refusal("s3://bucket/x") == "s3://bucket/x: a package is missing: Install s3fs to access S3"


class _LibraryError(Exception):
    pass


def _unreached() -> FileNotFoundError:
    """As fsspec's HTTP raises where no server answers."""
    error = FileNotFoundError("http://b/x")
    error.__cause__ = _LibraryError("connection refused")
    return error


@pytest.mark.parametrize("step", ["info", "open rb", "read"])
@pytest.mark.parametrize(
    ("error", "what"),
    [
        (PermissionError("Forbidden"), "PermissionError: Forbidden"),
        (TimeoutError(), "no answer in time; the store or the network to it is down or slow"),
        (_LibraryError("429,\nslow down"), "_LibraryError: 429,\\nslow down"),
        (FileNotFoundError("/a.jsonl"), "no such file or bucket"),
        (_unreached(), "no such file or bucket (_LibraryError: connection refused)"),
    ],
)
def test_a_store_that_fails_is_one_line(memory, step, error, what):
    """Guards every step of reading from a store, whose library's errors have no base in common; Parquet too."""
    pq.write_table(pa.table({"id": ["a"]}), "a.parquet")
    for content in (ROWS[0], gzip.compress(ROWS[0]), Path("a.parquet").read_bytes()):
        BrokenStore.fails = ""
        BrokenStore().pipe("/a.jsonl", content)
        assert len(texts("broken://a.jsonl")) == 1
        BrokenStore.fails, BrokenStore.error = step, error
        assert refusal("broken://a.jsonl") == f"broken://a.jsonl: {what}"


def test_a_read_that_fails_within_parquet(memory, monkeypatch):
    """Guards an error that passes through pyarrow: it stays the store's, and is not called damage."""
    pq.write_table(pa.table({"id": ["a" * 100] * 30_000}), "a.parquet", 5000, compression="none", use_dictionary=False)
    BrokenStore().pipe("/a.parquet", Path("a.parquet").read_bytes())
    monkeypatch.setattr("gptoss_jax.jobs.places.BUFFER_BYTES", 1000)
    lines = Inputs(["broken://a.parquet"]).lines()
    next(lines)
    BrokenStore.fails, BrokenStore.error = "read", TimeoutError()
    with pytest.raises(FileError, match=r"^broken://a.parquet: no answer in time"):
        list(lines)


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_packed_files_that_were_cut_or_damaged(form):
    """Guards against a file that was cut and read as if it ended there: rows would be missing without a word."""
    content = b"".join(b'{"id": "%d"}\n' % (number * 7919) for number in range(3000))
    packed = PACK[form](content)
    for cut in (len(packed) - 1, len(packed) - 9, len(packed) // 2, 12):
        Path("a").write_bytes(packed[:cut])
        assert refusal("a").startswith("a: cannot be unpacked after line ")
    Path("a").write_bytes(packed + b"rest")
    assert refusal("a").startswith("a: cannot be unpacked after line ")
    if form == "gzip":  # which has a checksum
        Path("a").write_bytes(packed[:-8] + b"\0" * 4 + packed[-4:])
        assert "CRC check failed" in refusal("a")


def test_parquet_rows_are_json():
    """Guards nested values, absent fields, dictionaries and numbers: a row is what the same JSONL line would be."""
    rows = [
        {"id": "1", "messages": [{"role": "user", "content": "Hi é"}, {"role": "assistant", "thinking": "?"}], "n": 2},
        {"id": "2", "token_ids": [1, 2], "temperature": 0.5, "raw": True, "settings": {"effort": "low"}},
        {"id": "3", "stop": ["a", None], "nothing": None},
    ]
    names = {name: None for row in rows for name in row}
    columns = {name: [row.get(name) for row in rows] for name in names}
    table = pa.table(columns).append_column("kind", pa.array(["a", "b", "a"]).dictionary_encode())
    table = table.append_column("map", pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())))
    pq.write_table(table, "a.jsonl", row_group_size=2)
    maps, kinds = ({"k": 1}, None, {}), "aba"
    expected = [
        row | {"kind": kind} | ({"map": m} if m is not None else {})
        for row, kind, m in zip(rows, kinds, maps, strict=True)
    ]
    del expected[2]["nothing"]
    assert [json.loads(text) for text in texts("a.jsonl")] == expected
    assert [line.number for line in Inputs(["a.jsonl"]).lines()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "value", "named"),
    [
        (pa.timestamp("us"), 0, "timestamp[us]"),
        (pa.decimal128(5, 2), None, "decimal128(5, 2)"),
        (pa.binary(), b"a", "binary"),
        (pa.list_(pa.struct([("a", pa.date32())])), None, "date32[day]"),
        (pa.map_(pa.int64(), pa.string()), None, "map<int64, string"),
        (pa.uuid(), None, "extension<arrow.uuid>"),
    ],
)
def test_columns_without_json_are_named(kind, value, named):
    """Guards types that JSON has not, within others too; what to do is said."""
    pq.write_table(pa.table({"id": ["a"], "x": pa.array([value], kind)}), "a.parquet")
    assert refusal("a.parquet").startswith(f"a.parquet: the column 'x' holds {named}")
    assert "which has no JSON: expected text, numbers," in refusal("a.parquet")


def test_parquet_rows_that_are_none():
    """Guards the other rows against one with NaN, text that is no UTF-8, or a map with a key twice."""
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers())
    twice = pa.array([[("k", 1), ("k", 2)], None], pa.map_(pa.string(), pa.int64()))
    table = pa.table({"id": [1, 2, 3, 4]}).append_column("f", pa.array([1.5, float("nan"), None, float("inf")]))
    pq.write_table(table, "a.parquet")
    pq.write_table(pa.table({"t": broken, "m": twice}), "b.parquet")
    faults = [(line.text, line.fault) for line in Inputs(["a.parquet", "b.parquet"]).lines()]
    nan = (b"", "the column 'f' holds NaN or an infinity, which JSON has not")
    assert faults[:4] == [(b'{"id":1,"f":1.5}', ""), nan, (b'{"id":3}', ""), nan]
    assert faults[4:] == [(b"", "a map has a key twice"), (b"", "a text is not valid UTF-8")]


def test_two_columns_of_one_name():
    """Guards against the second one's values under the first's name."""
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), "a.parquet")
    assert refusal("a.parquet") == "a.parquet: two columns are named 'a'"


@pytest.mark.parametrize("package", ["pyarrow", "zstandard"])
def test_a_package_that_is_not_installed(package, monkeypatch):
    """Guards a plain installation: the line names the extra that brings it."""
    pq.write_table(pa.table({"id": ["a"]}), "pyarrow")
    Path("zstandard").write_bytes(zstandard.compress(ROWS[0]))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "gptoss_jax.jobs.parquet", raising=False)
    monkeypatch.delattr("gptoss_jax.jobs.parquet", raising=False)
    text = refusal(package)
    assert f"needs the package {package}: pip install 'gptoss-jax[batch]'" in text


def test_a_long_line_takes_no_memory():
    """Guards memory against a file without line ends: the line is a fault, and its rest is passed over unread."""
    with gzip.open("a", "wb", compresslevel=1) as out:
        out.write(b'{"id": "1"}\n{"id": "')
        for _ in range(200):
            out.write(b"x" * (1 << 20))
        out.write(b'"}\n{"id": "3"}\n')
    tracemalloc.start()
    try:
        lines = list(Inputs(["a"]).lines())
        assert tracemalloc.get_traced_memory()[1] < 3 * jsonl.MAX_LINE_BYTES
    finally:
        tracemalloc.stop()
    fault = "the row is longer than 33,554,432 bytes, which no context holds"
    assert lines == [Line("a", 1, b'{"id": "1"}'), Line("a", 2, b"", fault), Line("a", 3, b'{"id": "3"}')]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_rows(form):
    """Guards files larger than memory, at a small scale: tests/proofs/test_job_memory.py has a million rows."""
    row = b'{"prompt": "%s"}' % (b"word " * 20)
    if form == "jsonl":
        Path("a").write_bytes((row + b"\n") * 5000)
    else:
        pq.write_table(pa.table({"prompt": ["word " * 20] * 5000}), "a", row_group_size=1000, use_dictionary=False)
    found = Inputs(["a"])
    next(found.lines())  # what is imported and kept once
    tracemalloc.start()
    try:
        assert sum(1 for _ in found.lines()) == 5000
        assert tracemalloc.get_traced_memory()[1] < 1_500_000
    finally:
        tracemalloc.stop()


def model(content: bytes, limit: int) -> list[tuple[int, bytes, bool]]:
    """What `rows` must give of a plain file, by the plainest code."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = [line.removesuffix(b"\r") for line in lines[:-1]] + [
        line.removesuffix(b"\r") for line in lines[-1:] if line
    ]
    return [
        (i, line if line.strip() and len(line) <= limit else b"", len(line) > limit) for i, line in enumerate(lines, 1)
    ]


@given(
    st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b"a", b'{"a":1}', b" ", b"\xef\xbb\xbf", b"\xff"]), max_size=30)
)
def test_lines_are_those_of_the_plainest_code(parts):
    """Guards every split of lines over buffers, and lines about as long as the limit."""
    content = b'{"id":1}\n' + b"".join(parts)
    for buffer_bytes in (9, 13, 64):
        file: Any = io.BufferedReader(io.BytesIO(content), buffer_bytes)
        found = [(number, text, bool(fault)) for number, text, fault in inputs.rows(file, "a", 9)]
        assert found == model(content, 9)


def _parquet_bytes() -> bytes:
    rows = [{"id": str(i), "messages": [{"role": "user", "content": "Hi" * i}], "x": i / 3} for i in range(20)]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=7)
    return out.getvalue()


WHOLE = [PACK["gzip"](b"\n".join(ROWS)), PACK["zstd"](b"\n".join(ROWS)), b"\n".join(ROWS), _parquet_bytes()]
BEGINNINGS = [
    b"",
    b"PAR1",
    b"\x1f\x8b\x08\0",
    b"\x28\xb5\x2f\xfd",
    b"\x50\x2a\x4d\x18",
    b"\xff\xfe",
    b"[",
    b"{",
    b'{"a":1}\n',
]
CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=4)), max_size=4)


def damaged(content: bytes, changes: Sequence[tuple[int, bytes]]) -> bytes:
    """Some bytes of a file replaced; nothing in place of some cuts it there."""
    for at, new in changes:
        at %= len(content) + 1
        content = content[:at] + new + content[at + len(new) :] if new else content[:at]
    return content


@given(
    st.builds(bytes.__add__, st.sampled_from(BEGINNINGS), st.binary())
    | st.builds(damaged, st.sampled_from(WHOLE), CHANGES)
)
def test_any_bytes_are_lines_or_one_line(content):
    """Guards commands against tracebacks, whatever is in a file."""
    path = Path(tempfile.gettempdir()) / f"any-bytes-{os.getpid()}"
    try:
        path.write_bytes(content)
        list(Inputs([str(path)]).lines())
    except GptossError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable()
    finally:
        path.unlink()


def test_what_is_not_needed_is_not_imported():
    """Guards how soon a job answers, and plain installations: packages of one format or store come with its files."""
    code = "import sys; from gptoss_jax.jobs import inputs, outputs; inputs.Inputs(['a']); print(*sys.modules)"
    Path("a").write_bytes(ROWS[0])
    root = {"PYTHONPATH": str(Path(inputs.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | root, stdout=subprocess.PIPE, text=True, check=True
    )
    assert {"jax", "numpy", "pyarrow", "zstandard", "fsspec", "pydantic"}.isdisjoint(done.stdout.split())
