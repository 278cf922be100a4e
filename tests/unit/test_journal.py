"""Lines appended to a file: what a crash, a full disk or a second writer may leave of them."""

import errno
import io
import json
import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from gptoss_jax.jobs import journal
from gptoss_jax.jobs.journal import CHECKED, PLAIN, Journal, JournalError
from tests.goldens.make import ROOT

LINES = [json.dumps({"id": str(i), "text": "é✓\u2028"[:i]}, ensure_ascii=False).encode() for i in range(4)]
BOTH = pytest.mark.parametrize("framing", [PLAIN, CHECKED], ids=["plain", "checked"])


def _write(path, framing, lines=LINES) -> bytes:
    with Journal(path, framing) as opened:
        for line in lines:
            opened.append([line])
    return path.read_bytes()


def _read(path, framing) -> list[bytes]:
    return [entry.line for entry in journal.entries(path, framing)]


def _repair(path, framing) -> list[bytes]:
    with Journal(path, framing) as opened:
        return [entry.line for entry in opened.repaired()]


@BOTH
def test_lines_come_back(framing, tmp_path):
    """Guards the plain case, in groups: their bytes, and where each begins."""
    with Journal(tmp_path / "j", framing) as opened:
        assert opened.is_empty
        opened.append(LINES[:1])
        opened.append([])
        opened.append(LINES[1:])
        assert not opened.is_empty
        content = (tmp_path / "j").read_bytes()
        for offset, line in journal.entries(tmp_path / "j", framing):
            assert content[offset:].startswith(framing.pack(line) + b"\n")
    assert _read(tmp_path / "j", framing) == LINES
    if framing is PLAIN:
        assert content == b"".join(line + b"\n" for line in LINES)


@BOTH
def test_a_file_that_was_cut_anywhere_is_repaired(framing, tmp_path):
    """Guards a crash in the middle of a write: whole lines stay, a torn one goes, the next has its place."""
    path = tmp_path / "j"
    content = _write(path, framing)
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        assert _read(path, framing) == LINES[:whole]
        assert path.stat().st_size == length  # reading changes nothing
        with Journal(path, framing) as opened:
            assert [entry.line for entry in opened.repaired()] == LINES[:whole]
            assert path.read_bytes() == content[: content.rfind(b"\n", 0, length) + 1]
            opened.append(LINES[whole:])
        assert path.read_bytes() == content


@BOTH
@pytest.mark.parametrize(
    "tail", [b"\0" * 5000, b"\0" * 5000 + b"\n", b"\n\n", b"x\ny\nz", b"[" * 100_000 + b"\n", b'{"a": 1}']
)
def test_what_no_job_wrote_at_the_end_is_cut_off(framing, tail, tmp_path):
    """Guards file systems that fill the end of a file with zeros or with another's bytes when the power fails."""
    content = _write(tmp_path / "j", framing)
    (tmp_path / "j").write_bytes(content + tail)
    assert _repair(tmp_path / "j", framing) == LINES
    assert (tmp_path / "j").read_bytes() == content


@BOTH
def test_damage_in_the_middle_is_refused(framing, tmp_path):
    """Guards lines behind it, which would be cut off: nothing is changed, and the line is named."""
    content = _write(tmp_path / "j", framing)
    at = content.index(b"\n") + 1
    for damaged in (content[:at] + b"\0" + content[at + 1 :], content[:at] + b"\n" + content[at:]):
        (tmp_path / "j").write_bytes(damaged)
        with pytest.raises(JournalError, match=r"j, line 2 is no line that a job wrote, .*: remove it, and the same"):
            _repair(tmp_path / "j", framing)
        assert (tmp_path / "j").read_bytes() == damaged


def test_any_changed_byte_of_a_checked_line_is_seen(tmp_path):
    """Guards answers on bad disks: length and checksum, down to the spelling of both."""
    content = _write(tmp_path / "j", CHECKED, LINES[:1])
    for at in range(len(content) - 1):
        for other in (content[at] ^ 1, content[at] ^ 32):
            (tmp_path / "j").write_bytes(content[:at] + bytes([other]) + content[at + 1 :])
            assert _read(tmp_path / "j", CHECKED) == []


OPEN = """
import sys
from gptoss_jax.jobs.journal import PLAIN, Journal, JournalError
try:
    Journal(sys.argv[1], PLAIN)
except JournalError as error:
    print(error)
"""


def test_a_second_writer_is_refused(tmp_path):
    """Guards two jobs on one file, in one process and in two; the lock ends with the first."""
    path = tmp_path / "j"
    command = [sys.executable, "-c", OPEN, path]
    with Journal(path, PLAIN) as opened:
        with pytest.raises(JournalError, match=r"another process is writing .*j: wait for its end, or stop it"):
            Journal(path, PLAIN)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == f"another process is writing {path}: wait for its end, or stop it\n"
        opened.append(LINES)
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""
    assert _repair(path, PLAIN) == LINES


@BOTH
@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("most", [1, 7, 1 << 20])
def test_a_write_that_fails_leaves_the_file_as_it_was(framing, call, most, tmp_path, monkeypatch):
    """Guards a full disk: the first bytes of a group are taken back, the error names the file, and writing goes on."""
    path, write, room = tmp_path / "j", os.write, [100]

    def full(descriptor, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(descriptor, bytes(data[: min(most, room[0])]))
        room[0] -= count
        return count

    def broken(descriptor, fsync=os.fsync):
        monkeypatch.setattr(os, "fsync", fsync)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Journal(path, framing) as opened:
        opened.append(LINES[:1])
        before = path.read_bytes()
        monkeypatch.setattr(os, call, full if call == "write" else broken)
        with pytest.raises(OSError, match=rf"\[Errno {errno.ENOSPC if call == 'write' else errno.EIO}\].*{path}"):
            opened.append([LINES[3] * 20])
        monkeypatch.undo()
        assert path.read_bytes() == before
        opened.append(LINES[1:])
    assert _read(path, framing) == LINES


@BOTH
def test_short_writes_are_gone_on_with(framing, tmp_path, monkeypatch):
    """Guards a system call that takes fewer bytes than it was given."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
    _write(tmp_path / "j", framing)
    monkeypatch.undo()
    assert _read(tmp_path / "j", framing) == LINES


@BOTH
def test_a_line_is_on_the_disk_when_append_returns(framing, tmp_path, monkeypatch):
    """Guards power: every group is synced after it is written and before it counts; a new file's name too."""
    calls, fsync, write = [], os.fsync, os.write
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "write", lambda fd, data: (calls.append(bytes(data)), write(fd, data))[1])
    with Journal(tmp_path / "j", framing) as opened:
        opened.append(LINES[:2])
        assert calls == [str(tmp_path), b"".join(framing.pack(line) + b"\n" for line in LINES[:2]), str(tmp_path / "j")]


class _Growing(io.BytesIO):
    """A file whose second line was half there when a reader came to its end."""

    def __iter__(self) -> Any:
        return iter([LINES[0] + b"\n", LINES[1][:5], LINES[1][5:] + b"\n", LINES[2] + b"\n"])


def test_the_rest_of_half_a_line_is_no_line(monkeypatch):
    """Guards a reader beside a writer: it stops at half a line, whose rest, there by now, would be damage to it."""
    monkeypatch.setattr(journal, "open", lambda path, mode: _Growing(), raising=False)
    assert _read("j", PLAIN) == LINES[:1]


def test_a_journal_is_read_while_it_is_written(tmp_path, monkeypatch):
    """Guards a driver that looks at a worker's lines: it sees a beginning of them, whole, whenever it looks."""
    write, wanted = os.write, [b"%d " % i + b"x" * 1500 for i in range(200)]
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:400])))
    with Journal(tmp_path / "j", CHECKED) as opened:
        writer = threading.Thread(target=lambda: [opened.append([line]) for line in wanted])
        writer.start()
        counts = []
        while writer.is_alive():
            found = _read(tmp_path / "j", CHECKED)
            assert found == wanted[: len(found)]
            counts.append(len(found))
        writer.join()
    assert _read(tmp_path / "j", CHECKED) == wanted
    assert counts == sorted(counts)


def test_clear_takes_all_lines_away(tmp_path):
    """Guards --restart."""
    with Journal(tmp_path / "j", PLAIN) as opened:
        opened.append(LINES)
        opened.clear()
        assert opened.is_empty
        opened.append(LINES[:1])
    assert _read(tmp_path / "j", PLAIN) == LINES[:1]
