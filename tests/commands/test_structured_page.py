"""The examples of docs/structured.md, run as the page has them, on the model in the package."""

import json
import re

from tests import processes
from tests.goldens.make import ROOT

PAGE = (ROOT / "docs" / "structured.md").read_text()
COMMANDS = dict(re.findall(r"^    \$ python -m gptoss_jax\.generate (.*)\n    (.*)$", PAGE, re.MULTILINE))
HELD, BAD = (
    next(line for line in COMMANDS if f"--response-format {name}" in line) for name in ("form.json", "bad.json")
)


def found_in(text: str, pattern: str) -> tuple[str, ...]:
    """What the groups of a pattern are in a text, which has it."""
    found = re.search(pattern, text)
    assert found, pattern
    return found.groups()


def arguments(line: str, folder) -> list[str]:
    """Of a command on the page, its file being in `folder`."""
    file, question = found_in(line, r'^--response-format (\S+) "(.*?)"(?: 2>.*)?$')
    return ["--response-format", str(folder / file), question]


def test_the_first_example_answers_as_printed(tmp_path):
    """Guards the page: the form as it stands there, the answer, and what --json says beside it."""
    (block,) = found_in(PAGE, r"With `form.json`\n\n((?:    .*\n)+)")
    (tmp_path / "form.json").write_text(block)
    done = processes.run("gptoss_jax.generate", *arguments(HELD, tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["answers"]
    (says,) = found_in(PAGE, r"`--json` has beside the answer\n\n    (.*)\n")
    assert (found["final"], found["structured"]) == (COMMANDS[HELD], json.loads(says))


def test_what_cannot_be_held_is_refused_as_printed(tmp_path):
    """Guards the page: the refusal names the keyword, as it stands there."""
    schema = {"type": "array", "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "bad", "schema": schema}}
    (tmp_path / "bad.json").write_text(json.dumps(form))
    done = processes.run("gptoss_jax.generate", *arguments(BAD, tmp_path))
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (2, "", COMMANDS[BAD])
