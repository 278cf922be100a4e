"""What is said of a command line that cannot be read, and of a file."""

import errno
import json
import subprocess
import sys

import pytest

from gptoss_jax.cli import mistakes
from gptoss_jax.whole_files import WriteError
from tests.goldens.make import ROOT

# What is typed to `generate` -> what it says.
TYPED = {
    "--temprature 1": "unknown flag --temprature: did you mean --temperature?",
    "--show_reasonin": "unknown flag --show-reasonin: did you mean --show-reasoning?",
    "-p Hello": "unknown flag -p: did you mean --prompt?",
    "-m folder": "unknown flag -m: did you mean --checkpoint?",
    "--model folder": "unknown flag --model: did you mean --checkpoint?",
    "--max-tokens 5": "unknown flag --max-tokens: did you mean --max-new-tokens?",
    "--max_length=5": "unknown flag --max-length: did you mean --max-new-tokens?",
    "--temp=1": "unknown flag --temp: did you mean --temperature?",
    "-q": "unknown flag -q: did you mean --quiet?",
    "--verbose": "unknown flag --verbose: did you mean --stats?",
    "--effort low": "unknown flag --effort: did you mean --reasoning-effort?",
    "--zzz": "unknown flag --zzz",
    "--helpful": "unknown flag --helpful: did you mean --help?",  # not --helpfull, which is absl's
    "--versoin": "unknown flag --versoin: did you mean --version?",
    "--nodeterministic=true": "--nodeterministic takes no value",
    "--no-show-reasoning=1": "--noshow-reasoning takes no value",
    "--json=maybe": "--json is 'maybe', expected true or false",
    "--n=x": "--n is 'x', expected an integer",
    "--n=": "--n is '', expected an integer",
    "--max-new-tokens=1.5": "--max-new-tokens is '1.5', expected an integer",
    "--max-new-tokens": "--max-new-tokens has no value, expected one after it",
    "--temperature=hot": "--temperature is 'hot', expected a number",
    "--reasoning-effort=extreme": "--reasoning-effort is 'extreme', expected one of low, medium, high",
    "--flagfile=absent": "--flagfile: absent: No such file or directory",
    "--n=" + "9" * 5000: f"--n is '{'9' * 59}..., expected an integer",
}
SAY_ALL = """
import contextlib, io, json, sys
from gptoss_jax import generate
from gptoss_jax.cli import command
generate.define_flags()
said = []
for line in json.load(sys.stdin):
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), contextlib.suppress(SystemExit):
        command._parse(["generate", *line.split()], "generate")
    said.append(stream.getvalue())
print(json.dumps(said))
"""


def test_a_flag_that_cannot_be_read_is_one_line_in_the_words_of_who_typed_it():
    """Guards absl's messages, which lose dashes, leak tuples, and end in a traceback; and names of other programs."""
    asked = json.dumps([*TYPED, "--no-deterministic Hello"])
    done = subprocess.run([sys.executable, "-c", SAY_ALL], cwd=ROOT, input=asked, capture_output=True, text=True)
    *said, accepted = json.loads(done.stdout)
    expected = [f"generate: {line} (--help lists the flags)\n" for line in TYPED.values()]
    assert said == expected
    assert accepted == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"), "a.json: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("a library's own"), "a library's own"),
        (WriteError("cannot write a.json: it is a folder"), "cannot write a.json: it is a folder"),
    ],
)
def test_a_files_error_names_the_file_and_no_number(error, line):
    """Guards `[Errno 2]`."""
    assert mistakes.of_file(error) == line
