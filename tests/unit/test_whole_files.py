"""Files that are written whole or not at all."""

import errno
import os
import stat
import threading

import pytest

from gptoss_jax import whole_files
from gptoss_jax.whole_files import WriteError, check_can_write, write_whole


def _names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_whole_and_nothing_beside_it(tmp_path):
    """Guards the plain case, twice over: content, no leftovers, what the umask says of a new file."""
    before = os.umask(0o027)
    try:
        for content in (b"first", b"second"):
            write_whole(tmp_path / "chat.json", content)
            assert (tmp_path / "chat.json").read_bytes() == content
    finally:
        os.umask(before)
    assert _names(tmp_path) == ["chat.json"]
    assert stat.S_IMODE((tmp_path / "chat.json").stat().st_mode) == 0o640


def test_files_of_similar_names_are_left_alone(tmp_path):
    """Guards NAME.partial, which was written through: a user's own file, or a link to one."""
    (tmp_path / "treasure").write_text("mine")
    (tmp_path / "chat.json.partial").symlink_to(tmp_path / "treasure")
    write_whole(tmp_path / "chat.json", b"new")
    assert (tmp_path / "treasure").read_text() == "mine"
    assert (tmp_path / "chat.json.partial").is_symlink()
    assert _names(tmp_path) == ["chat.json", "chat.json.partial", "treasure"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    """Guards links in a project's folder, also to what is not there yet, and the permissions of what is there."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "chat.json").write_text("old")
    (tmp_path / "kept" / "chat.json").chmod(0o604)
    for name in ("chat.json", "new.json"):
        (tmp_path / name).symlink_to(f"kept/{name}")
        write_whole(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "kept" / name).read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "kept" / "chat.json").stat().st_mode) == 0o604
    assert _names(tmp_path / "kept") == ["chat.json", "new.json"]


def test_pipes_and_devices_are_written_to_as_they_are(tmp_path):
    """Guards /dev/null, which a rename would replace for everyone, /dev/stdout and `--save >(program)`."""
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_whole(tmp_path / "pipe", b"content")
    reader.join()
    assert read == [b"content"]
    write_whole("/dev/null", b"content")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    before = os.dup(1)
    try:
        with open(tmp_path / "out", "w") as out:
            os.dup2(out.fileno(), 1)
            os.write(1, b"answer\n")
            write_whole("/dev/stdout", b"content")
    finally:
        os.dup2(before, 1)
        os.close(before)
    assert (tmp_path / "out").read_bytes() == b"answer\ncontent"


def test_a_cache_is_written_in_place_of_anything(tmp_path):
    """Guards caches against links and pipes that lie where a file of theirs should: neither followed nor waited for."""
    (tmp_path / "treasure").write_text("mine")
    (tmp_path / "link").symlink_to("treasure")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        whole_files.replace(tmp_path / name, b"content")
        assert stat.S_ISREG((tmp_path / name).lstat().st_mode)
        assert not (tmp_path / name).stat().st_mode & stat.S_IXUSR  # a link's permissions say nothing
        assert (tmp_path / name).read_bytes() == b"content"
    assert (tmp_path / "treasure").read_text() == "mine"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_when_writing_fails(tmp_path, monkeypatch, step, error):
    """Guards a saved conversation against a disk that fills up, and Ctrl-C, while the next is written over it."""
    path = tmp_path / "chat.json"
    write_whole(path, b"first")

    def fail(*_) -> None:
        raise error

    monkeypatch.setattr(whole_files.os, step, fail)
    with pytest.raises((WriteError, KeyboardInterrupt)) as raised:
        write_whole(path, b"second")
    if isinstance(error, OSError):
        assert str(raised.value) == f"cannot write {path}: No space left on device"
    assert path.read_bytes() == b"first"
    assert _names(tmp_path) == ["chat.json"]


PLACES = {
    "absent/chat.json": "there is no folder {}/absent",
    "away.json": "there is no folder /absent",
    "folder": "it is a folder, expected a file name",
    "new/": "it is a folder, expected a file name",
    "file/chat.json": "Not a directory",
    "circle": "Too many levels of symbolic links",
    "x" * 300: "File name too long",
    "a\0b": "expected a file name",
}


@pytest.mark.parametrize("name", PLACES)
def test_places_that_cannot_be_written_are_refused_beforehand(name, tmp_path):
    """Guards a long answer against being lost for want of a folder: one line, which names what was typed."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "away.json").symlink_to("/absent/chat.json")
    for act in (check_can_write, lambda path: write_whole(path, b"content")):
        with pytest.raises(WriteError) as refused:
            act(f"{tmp_path}/{name}")
        assert str(refused.value).endswith(": " + PLACES[name].format(tmp_path))
        assert str(refused.value).startswith(("cannot write ", f"cannot write {tmp_path}/{name}")["\0" not in name])
        assert "\n" not in str(refused.value)
    with pytest.raises(WriteError, match="cannot write '': expected a file name"):
        check_can_write("")


def test_what_may_not_be_written_to_is_refused_beforehand(tmp_path, monkeypatch):
    """Guards files and folders that their owner has closed; a superuser's own rights would hide it."""
    (tmp_path / "chat.json").write_text("old")
    for closed, name, reason in (
        (tmp_path / "chat.json", "chat.json", "it may not be written to"),
        (tmp_path, "new.json", f"no file can be made in the folder {tmp_path}"),
    ):
        monkeypatch.setattr(whole_files.os, "access", lambda path, mode, closed=closed: str(path) != str(closed))
        with pytest.raises(WriteError) as refused:
            check_can_write(tmp_path / name)
        assert str(refused.value) == f"cannot write {tmp_path / name}: {reason}"
