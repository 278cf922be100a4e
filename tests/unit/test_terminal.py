"""The two streams of a command, where a terminal or a file is not what one would wish."""

import io
import json
import os
import signal
import sys

import pytest

from gptoss_jax.cli import command
from gptoss_jax.cli.terminal import Screen, interrupted_late, interruptible


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
    """Guards reasoning with code in it: tabs, markup and emoji's names stay what the model wrote."""
    screen, out, errors = streams()
    screen.aside("if x:\n\treturn [bold] :smile:", "dim")
    screen.finish_line()
    assert errors.getvalue() == "if x:\n\treturn [bold] :smile:\n"
    assert out.getvalue() == b""


def test_progress_is_interrupted_where_it_reports(streams):
    """Guards loading and compiling: Ctrl-C is noted at once and raised where no callback of JAX's can swallow it."""
    screen, _, _ = streams()
    done = []
    with pytest.raises(KeyboardInterrupt), interrupted_late() as pressed, screen.progress("loading", pressed) as report:
        report(1, 3)
        os.kill(os.getpid(), signal.SIGINT)
        done.append("went on")
        report(2, 3)
        done.append("too far")
    assert done == ["went on"]
    with pytest.raises(KeyboardInterrupt), interrupted_late():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("between two bars")
    assert done[1:] == ["between two bars"]


def test_a_second_ctrl_c_interrupts_only_where_it_may():
    """Guards impatience in a command, and a session's engine, whose state a sudden end would lose."""
    with interruptible() as pressed:
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with interruptible(insisting=False) as pressed:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert pressed()


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
