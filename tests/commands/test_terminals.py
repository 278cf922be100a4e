"""What people see in a real terminal: of any width, without colours, with a model that would like to take it over."""

import json
import os
import subprocess
import sys

import pytest

from tests import processes, scripted, terminals
from tests.gate import TinyModel
from tests.goldens import make as golden

ESCAPES = b"\x1b]", b"\x9b", b"\x07", b"\x08"
SHOWN = scripted.CONTROL_ANSWER
for control in "\x1b\x07\x9b\r":
    SHOWN = SHOWN.replace(control, f"\\u{ord(control):04x}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models that say what their scripts hold, and a home for caches."""
    folder = tmp_path_factory.mktemp("terminals")
    for name in ("thinker", "attacker", "attacking_caller"):
        scripted.write(folder / name, name)
    return folder


def _generate(folder, model, *arguments, **options):
    checkpoint = ("--checkpoint", folder / model)
    return terminals.run(folder, "gptoss_jax.generate", *checkpoint, *arguments, **options)


@pytest.mark.parametrize("how", [(), ("--show-reasoning",), ("--raw",), ("--json",), ("--n", "2")])
def test_an_answers_control_characters_are_shown(folder, how):
    """Guards titles, clipboards and screens against what a model writes, in every form it is printed in."""
    with _generate(folder, "attacker", "Why?", *how) as terminal:
        assert terminal.ended() == 0
        assert not any(escape in terminal.bytes for escape in ESCAPES)
        written = terminal.bytes.decode()
        assert (SHOWN if how != ("--json",) else SHOWN.replace("\\u000d", "\\r")) in written
        assert how != ("--show-reasoning",) or "\\u0008" in written


def test_a_calls_control_characters_are_shown(folder):
    """Guards what a chat says of a call, and the JSON that a program would read."""
    for how in (("Why?",), ("--chat",)):
        with _generate(folder, "attacking_caller", *how) as terminal:
            if "--chat" in how:
                terminal.wait_for("\n>")
                terminal.say("Why?\r", "/result answers it\n>")
                terminal.type("/quit\r")
            assert terminal.ended() == 0
            assert b"\x1b]" not in terminal.bytes
            assert b"\x07" not in terminal.bytes
            assert "\\u001b]52;c;aGk\\u0007ris" in terminal.text.replace("\n", "")


def test_a_pipe_gets_the_answer_exactly(folder):
    """Guards programs: what a terminal shows escaped goes through a pipe as the model wrote it."""
    environment = {"XDG_CACHE_HOME": str(folder / "home")}
    asked = ("gptoss_jax.generate", "--checkpoint", folder / "attacker", "Why?", "--show-reasoning")
    done = processes.run(*asked, environment=environment)
    # A file's text is read with universal newlines, which takes \r for \n.
    assert done.stdout == scripted.CONTROL_ANSWER.replace("\r", "\n") + "\n"
    assert f"[reasoning]\n{scripted.CONTROL_REASONING}\n" in done.stderr


NAMES = "\x1b]0;owned\x07\x9b2J\r"


@pytest.mark.parametrize("module", ["gptoss_jax.generate", "gptoss_jax.score", "converters.convert"])
def test_names_of_files_and_tensors_are_shown(folder, module):
    """Guards errors and reports: the name of a folder, of a tensor, of a kind of model, in every command."""
    model = folder / f"model{NAMES}"
    if not model.exists():
        TinyModel(golden.tiny_config()).write(model)
        config = json.loads((model / "published" / "config.json").read_text())
        (model / "published" / "config.json").write_text(json.dumps(config | {"model_type": f"a{NAMES}"}))
    given = (model / "published", folder / "dst") if "convert" in module else ("--checkpoint", model / "published", "x")
    with terminals.run(folder, module, *given) as terminal:
        assert terminal.ended() == 2
        assert not any(escape in terminal.bytes for escape in ESCAPES)
        assert "Traceback" not in terminal.text


@pytest.mark.parametrize(("columns", "environment"), [(30, {}), (30, {"NO_COLOR": "1"}), (80, {"TERM": "dumb"})])
def test_a_prompt_and_a_chat_in_any_terminal(folder, columns, environment):
    """Guards narrow windows and plain terminals: nothing of a bar is left, no codes where none serve."""
    for how in (("Why?",), ("--chat",)):
        with _generate(folder, "thinker", *how, columns=columns, **environment) as terminal:
            if "--chat" in how:
                terminal.wait_for("\n>")
                terminal.say("Why?\r", "**blue**")
                terminal.say("/help\r", "/exit do\n>")
                terminal.type("\x04")
            assert terminal.ended() == 0
        assert "**blue**" in terminal.text.split()
        assert "━" not in terminal.text
        if "TERM" in environment:
            assert b"\x1b" not in terminal.bytes
        if "NO_COLOR" in environment:
            assert b"\x1b[3" not in terminal.bytes


def test_results_at_a_terminal_go_where_stdout_goes(folder, tmp_path):
    """Guards `score ... > file` in a terminal, whose progress bar took what was printed to stderr."""
    out = tmp_path / "out"
    given = ("--checkpoint", folder / "thinker", "--lines", "One line.\nAnother line.")
    with terminals.run(folder, "gptoss_jax.score", *given, stdout=out) as terminal:
        assert terminal.ended() == 0
        assert "perplexity" not in terminal.text
    assert [line.split()[0] for line in out.read_text().splitlines()] == ["2", "2", "all:"]
    with terminals.run(folder, "gptoss_jax.score", *given) as terminal:
        assert terminal.ended() == 0
        assert terminal.text.count("perplexity") == 3
        assert "━" not in terminal.text


def test_ctrl_c_while_compiling_is_heard_and_a_second_ends_at_once(folder):
    """Guards the longest wait, in a terminal: a line at the first, the cursor back and no traceback at the second."""
    with _generate(folder, "thinker", "Why?", XDG_CACHE_HOME=str(folder / "cold")) as terminal:
        terminal.wait_for("compiling")
        terminal.type("\x03")
        terminal.wait_for("stopping (Ctrl-C again ends at once)")
        terminal.type("\x03")
        assert terminal.ended() == 130
        assert "Traceback" not in terminal.text
        assert terminal.bytes.rindex(b"\x1b[?25h") > terminal.bytes.rindex(b"\x1b[?25l")


@pytest.mark.parametrize("unbuffered", [None, "1"])
def test_a_full_disk_under_stdout_is_one_line_and_saves_the_answer(folder, tmp_path, unbuffered):
    """Guards `> file` on a full disk: said by name, the conversation kept; help that nobody can read, too."""
    environment = {"XDG_CACHE_HOME": str(folder / "home"), "PYTHONUNBUFFERED": unbuffered}
    asked = ("--checkpoint", folder / "thinker", "Why?", "--save", tmp_path / "chat.json")
    for arguments, last in ((asked, "generate: stdout: No space left on device"), (("--help",), None)):
        command = [sys.executable, "-m", "gptoss_jax.generate", *map(str, arguments)]
        everything = {k: v for k, v in (os.environ | environment).items() if v is not None}
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                command, cwd=golden.ROOT, env=everything, stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        assert last in (None, done.stderr.splitlines()[-1])
    assert json.loads((tmp_path / "chat.json").read_text())[1]["role"] == "user"


def test_a_reader_that_leaves_during_help_is_no_traceback():
    """Guards `--help | head -1`."""
    command = f"{sys.executable} -u -m gptoss_jax.generate --help | head -1"
    done = subprocess.run(command, shell=True, cwd=golden.ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("Answers a prompt, or talks with you.\n", "")
