"""The two streams of a command, where a terminal or a file is not what one would wish."""

import io
import json
import sys

import pytest

from gptoss_jax.cli import command, escapes
from gptoss_jax.cli.terminal import Screen


@pytest.fixture
def streams(monkeypatch):
    """Screens that write to memory, stdout in the encoding that is asked for."""

    def make(encoding: str = "utf-8") -> tuple[Screen, io.BytesIO, io.StringIO]:
        out, errors = io.BytesIO(), io.StringIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
        monkeypatch.setattr(sys, "stderr", errors)
        return Screen(), out, errors

    return make


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_loses_no_character_in_any_encoding(streams, encoding):
    """Guards --json on a terminal of another encoding: escapes rather than question marks."""
    screen, out, _ = streams(encoding)
    document = {"final": "naïve ✨ 🙂", "ids": [1, 2]}
    screen.document(document)
    assert json.loads(out.getvalue().decode(encoding)) == document
    assert ("✨" in out.getvalue().decode(encoding)) == (encoding == "utf-8")
    screen.answer("✨")
    assert out.getvalue().decode(encoding)[-1] == ("✨" if encoding == "utf-8" else "?")


def test_asides_are_written_as_they_are(streams):
    """Guards reasoning with code in it, and pipes: tabs, markup, emoji's names, control characters stay."""
    screen, out, errors = streams()
    screen.aside("if x:\n\treturn [bold] :smile:", "dim")
    screen.say("\x07bell\ttab\r\x1b[1m")
    assert errors.getvalue() == "if x:\n\treturn [bold] :smile:\n\x07bell\ttab\r\x1b[1m\n"
    assert out.getvalue() == b""


class _Tty(io.StringIO):
    """A terminal's stream that keeps what is written to it."""

    def isatty(self) -> bool:
        return True


def test_control_characters_are_shown_on_a_terminal(monkeypatch):
    """Guards titles, clipboards and screens: all of C0 but tab and newline, DEL, C1, bytes of names; letters stay."""
    everything = "".join(map(chr, range(0x100))) + "\udc9b \u200d\u200f 🙂\u202e"
    shown = escapes.visible(everything)
    controls = [chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))]
    assert not set(shown) & {*controls, "\udc9b"}
    assert all(f"\\u{ord(control):04x}" in shown for control in controls)
    assert shown.endswith("þÿ\\udc9b \u200d\u200f 🙂\u202e")
    assert json.loads(f'"{escapes.visible(chr(0x9B))}"') == "\x9b"  # a document stays one
    out, errors = _Tty(), _Tty()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)
    escapes.guard_terminals()
    for chunk in ("\x1b", "]0;", "title\x07"):  # a sequence in chunks
        print(chunk, end="")
    sys.stderr.writelines(["\x9b2J", "\r", "\tx\n"])
    assert out.getvalue() == "\\u001b]0;title\\u0007"
    assert errors.getvalue() == "\\u009b2J\\u000d\tx\n"
    assert escapes.raw_stream(sys.stdout) is out
    escapes.guard_terminals()  # once is enough
    assert escapes.raw_stream(sys.stdout) is out


def test_files_and_pipes_get_exact_text(monkeypatch):
    """Guards programs that read what a model wrote."""
    out, errors = io.StringIO(), _Tty()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)
    escapes.guard_terminals()
    print("\x1b]0;\x9b\r", end="")
    assert out.getvalue() == "\x1b]0;\x9b\r"
    assert sys.stdout is out


def test_a_quiet_screen_says_what_is_wrong_and_no_more(streams):
    """Guards --quiet: no notes; a cut answer is still said to be cut."""
    noisy, _, errors = streams()
    noisy.note("loaded")
    quiet = Screen(quiet=True)
    quiet.note("loaded again")
    quiet.say("cut")
    assert errors.getvalue() == "loaded\ncut\n"


def test_closed_streams_are_opened_or_refused(monkeypatch, capsys):
    """Guards `<&-` and `2>&-`, where Python has no stream at all, and `>&-`, where an answer would be lost."""
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stderr", None)
    command.open_streams("generate")
    assert sys.stdin.read() == ""
    print("nowhere", file=sys.stderr)
    sys.stdin.close()
    sys.stderr.close()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as ended:
        command.open_streams("generate")
    assert ended.value.code == 2
    assert "stdout is closed, expected a place for the answer" in capsys.readouterr().err
