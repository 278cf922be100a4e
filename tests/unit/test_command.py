"""What every command line does alike."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from gptoss_jax.cli import command

ROOT = Path(__file__).parents[2]


def test_json_keeps_numbers_together_and_changes_nothing():
    """Guards the regular expression that joins lists: strings that look like lists stay as they are."""
    document = {
        "ids": [1, 2, 3],
        "logprobs": [-0.5, -1e-07, 12.25],
        "pairs": [[1, -0.5], [2, -3.0]],
        "empty": [],
        "mixed": [None, 1],
        "text": ["[\n 1,\n 2\n]", "[ 1, 2 ]", "é"],
    }
    text = command.to_json(document)
    assert json.loads(text) == document
    lines = [line.strip() for line in text.splitlines()]
    assert '"ids": [1, 2, 3],' in lines
    assert '"logprobs": [-0.5, -1e-07, 12.25],' in lines
    assert "[1, -0.5]," in lines
    assert '"é"' in lines


def test_help_names_values_meanings_and_defaults():
    """Guards what absl writes into help texts, and defaults that are 0."""
    values = flags.FlagValues()
    flags.DEFINE_string("save", None, "FILE: Where to.", flag_values=values)
    flags.DEFINE_enum("effort", "low", ["low", "high"], "How hard: very.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "the seed: any", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "TEXT: Where.", flag_values=values)
    flags.DEFINE_bool("two_words", False, "Both: yes.", flag_values=values)
    text = command.help_text(values, {"First": ["save", "effort"], "Second": ["seed", "stop", "two_words"]})
    assert text.splitlines() == [
        "First:",
        "  --save FILE",
        "      Where to.",
        "  --effort low|high",
        "      How hard: very. [low]",
        "",
        "Second:",
        "  --seed INT",
        "      the seed: any [0]",
        "  --stop TEXT",
        "      Where.",
        "  --[no]two-words",
        "      Both: yes.",
    ]


def _command_that_raises(error: str) -> subprocess.CompletedProcess:
    """A command, in a process of its own, that comes to no good end."""
    code = (
        "from gptoss_jax.cli import command\nfrom gptoss_jax.errors import GptossError\n"
        f"def main(arguments): raise {error}\ncommand.run(main, 'test')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "error", ["ValueError('a bug')", "KeyError('a bug')", "UnicodeDecodeError('utf-8', b'', 0, 1, 'a bug')"]
)
def test_a_bug_keeps_its_traceback(error):
    """Guards whoever has to find a fault of ours: it is not taken for bad input, by scripts neither."""
    done = _command_that_raises(error)
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stderr
    assert error.partition("(")[0] in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("error", ["GptossError('first\\nsecond')", "OSError('first\\nsecond')"])
def test_what_people_can_mend_is_a_line_each(error):
    """Guards the reader's eyes: a line for each problem, exit code 2, no traceback."""
    done = _command_that_raises(error)
    assert (done.returncode, done.stderr) == (2, "test: first\ntest: second\n")


def test_ctrl_c_at_the_very_end_does_not_change_the_exit_code():
    """Guards a hand that insists: the answer has been printed, and leaving Python takes a moment."""
    code = (
        "import atexit, os, signal, sys\nfrom gptoss_jax.cli import command\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "command.run(lambda arguments: sys.exit(130), 'test')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")
