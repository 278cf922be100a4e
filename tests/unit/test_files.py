"""Files that others wrote: nothing waits for ever, nothing recurses, and every fault is one line of bounded length."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from gptoss_jax import errors, files
from gptoss_jax.checkpoints.safetensors_reader import open_file
from gptoss_jax.errors import Fault, GptossError, listed, one_line, short, shortened
from gptoss_jax.files import FileError, read_json
from gptoss_jax.harmony import json_values
from gptoss_jax.model import sharding
from gptoss_jax.model.config import read_config

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4792272488\n"
CONTENTS = {
    "empty": (b"", ", line 1, column 1: Expecting value; expected JSON"),
    "cut": (b'{"a": [1, 2', ", line 1, column 12: "),
    "brackets": (b"[" * 100_000, " is nested too deeply, at most 64 levels are taken"),
    "objects": (b'{"a":' * 100_000, " is nested too deeply, at most 64 levels are taken"),
    "a few brackets": (b"[" * 70 + b"]" * 70, ": the value is nested too deeply, at most 64 levels are taken"),
    "digits": (b"1" * 5000, ": a number of 5000 digits is out of range"),
    "large": (b'{"a": [1' + b"0" * 400 + b"]}", ": the file, 'a', [0] is a number out of range"),
    "infinity": (b'{"a": 1e999}', ": the file, 'a' is a number out of range"),
    "infinity in a word": (b'{"a": -Infinity}', ": the file, 'a' is a number out of range"),
    "NaN": (b'[{"b": NaN}]', ": the file, [0], 'b': NaN is no JSON"),
    "half a character": (rb'["\ud800"]', ": the file, [0] holds half a surrogate pair"),
    "half a key": (rb'{"\udc00": 1}', ": a key in the file holds half a surrogate pair"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 1}', ": the key 'a' stands twice in one object"),
    "a long key twice": (b'{"%s": 1, "%s": 1}' % (b"k" * 9000, b"k" * 9000), f": the key '{'k' * 59}... stands"),
    "no UTF-8": (b'["\xff"]', ": the file is not valid UTF-8 at byte 2"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), ": the file is UTF-16, expected UTF-8: convert it with `iconv -f UTF-16"),
    "zeros": (bytes(500), ": filled with zeros, as a crash or a broken download leaves it: fetch it again"),
    "a pointer": (LFS_POINTER, ": a Git LFS pointer in place of the file: run `git lfs pull`"),
    "a page": (b"\n<!DOCTYPE html><html>", ": a web page saved under this name: fetch the file again"),
    "gzip": (b"\x1f\x8b\x08\x00", ": packed with gzip: unpack it"),
}


def refusal(call: Callable[[], object]) -> str:
    """The one line of the error that a call must end in."""
    with pytest.raises(GptossError) as error:
        call()
    text = str(error.value)
    assert text.isprintable() and len(text) < 500, text
    return text


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_no_json_is_one_line(name, tmp_path):
    """Guards every JSON file alike: RecursionError, thousands of digits, and a whole file inside a decode error."""
    content, fault = CONTENTS[name]
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert refusal(lambda: read_json(path)).startswith(f"{path}{fault}")
    assert refusal(lambda: read_config(path)).startswith(f"{path}{fault}")
    assert refusal(lambda: sharding.make(path)).startswith(f"mesh file {path}{fault}")
    assert refusal(lambda: json_values.read_file(path, lambda value: value)).startswith(f"{path}{fault}")
    header = tmp_path / "a.safetensors"
    header.write_bytes(len(content).to_bytes(8, "little") + content)
    assert open_file(header).faults
    for found in map(str, open_file(header).faults):
        assert found.isprintable() and found.startswith(f"{header}: ") and len(found) < 500


def test_what_is_json_is_read(tmp_path):
    """Guards against a reader so strict that it refuses what is fine: a byte order mark, deep enough nesting."""
    value = {"a": [1, 2.5, None, True, "\u00e9\n"], "b": {}}
    for _ in range(files.MAX_DEPTH - 3):
        value = {"a": value}
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())
    assert read_json(tmp_path / "a.json") == value
    (tmp_path / "link.json").symlink_to("a.json")
    assert read_json(tmp_path / "link.json") == value


def _socket(path: Path):
    there = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(there)


def _large(path: Path):
    with open(path, "wb") as file:
        file.truncate(files.MAX_BYTES + 1)


PLACES = {
    "nothing": (lambda path: None, "no such file"),
    "a folder": (Path.mkdir, "a folder, expected a file"),
    "a pipe": (os.mkfifo, "a named pipe, expected a file"),
    "a socket": (_socket, "a socket, expected a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a device, expected a file"),
    "a link to nothing": (
        lambda path: path.symlink_to("../../blobs/0123"),
        "a link to ../../blobs/0123, which is not there: fetch it again",
    ),
    "a link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "too large": (_large, "33,554,433 bytes, expected JSON of at most 33,554,432"),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_not_waited_for(name, tmp_path):
    """Guards against a pipe or a device that is read for ever, and against a file that fills the memory."""
    make, fault = PLACES[name]
    path = tmp_path / "config.json"
    make(path)
    assert refusal(lambda: read_json(path)) == f"{path}: {fault}"
    assert refusal(lambda: read_config(path)).startswith(f"{path}: {fault}")
    assert refusal(lambda: sharding.make(path)).startswith(f"mesh file {path}: {fault}")
    if name != "too large":
        assert str(open_file(path).faults[0]) == f"{path}: {fault}"


MESHES = {
    '{"axes": {"tensor": 1%s}}' % ("0" * 300): "mesh axis tensor=1000",
    '{"axes": {"%s": 2}}' % ("x" * 9000): "unknown mesh axis 'xxx",
    '{"axes": {"tensor": true}}': "mesh axis tensor=True, expected a whole number",
    '{"axes": {"a\\nb": 1}}': r"unknown mesh axis 'a\nb'",
    '{"axes": {}, "rules": {"heads": [["tensor"]]}}': "mesh.json: expected {",
    '{"axes": {}, "rules": {"%s": []}}' % ("x" * 9000): "unknown logical axis 'xxx",
    '{"axes": {"tensor": 999999999, "expert": 999999999}}': "a mesh of 999999998000000001 devices",
}


@pytest.mark.parametrize("text", MESHES, ids=range(len(MESHES)))
def test_a_mesh_file_is_refused_in_one_line(text, tmp_path):
    """Guards against names of any length, numbers of any size, and lists where names belong."""
    (tmp_path / "mesh.json").write_text(text)
    assert MESHES[text] in refusal(lambda: sharding.make(tmp_path / "mesh.json"))


def test_a_mesh_of_many_digits_is_refused_in_one_line():
    """Guards int(), which refuses thousands of digits with an error of its own."""
    assert refusal(lambda: sharding.make("tensor=" + "1" * 5000)).startswith("mesh 'tensor=111")


# ---- errors ----


def test_few_faults_are_a_line_each_and_many_alike_share_one():
    """Guards against ten thousand lines that say the same, and against a count where three lines would say more."""
    few = [Fault(f"a: tensor{i}", f"shape [{i}, 2], expected [{i}, 3]") for i in range(errors.LISTED)]
    assert listed(few).splitlines() == [f"{fault.where}: {fault.what}" for fault in few]
    many = [Fault(f"a: tensor{i}", f"shape [{i}, 2], expected [{i:,}, 3]") for i in range(10_000)]
    other = Fault("b", "missing")
    assert listed([*many, other]).splitlines() == [
        "a: tensor0: shape [0, 2], expected [0, 3] (and 9,999 more like it)",
        "b: missing",
    ]
    hashes = [Fault("leaf", f"sha256 {i:064x}, expected {i + 1:064x}") for i in range(100)]
    assert len(listed(hashes).splitlines()) == 1


def test_faults_of_too_many_kinds_are_cut():
    """Guards the end of the list: names differ in more than numbers."""
    kinds = [Fault("file", "overlaps " + "x" * i) for i in range(500)]
    lines = listed(kinds).splitlines()
    assert len(lines) == errors.MAX_LINES + 1
    assert lines[-1] == f"and {500 - errors.MAX_LINES} more faults of other kinds"


def test_a_line_is_a_line():
    """Guards terminals and logs against names with line breaks, escapes, or megabytes."""
    assert one_line("a\nb\x1b[2J\u2028c\x85\ud800") == r"a\nb\x1b[2J\u2028c\x85\ud800"
    assert one_line("plain text, \u00e9") == "plain text, \u00e9"
    assert len(one_line("\n" * 10**6)) <= len(one_line("x" * 10**6)) == errors.MAX_LINE + 3
    assert str(Fault("a\nb", "c\rd")) == r"a\nb: c\rd"
    assert short("x" * 100) == f"'{'x' * 59}..." and short([1]) == "[1]"
    assert shortened("x" * 200) == "x" * 120 + "..." and shortened("name") == "name"


def test_the_fault_of_a_file_stands_beside_its_name():
    """Guards those who put the fault into a line of their own."""
    error = FileError("a", "b")
    assert (str(error), error.what) == ("a: b", "b")


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    """Guards the README's lines in another folder, and a user's own configs/ there, which comes first."""
    monkeypatch.chdir(tmp_path)
    assert files.of_configs("configs/meshes/expert4-tensor2.json").is_file()
    assert files.of_configs("configs/none.json") == Path("configs/none.json")
    assert files.of_configs("tiny.json") == Path("tiny.json")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.json").write_text("{}")
    assert files.of_configs("configs/tiny.json") == Path("configs/tiny.json")
