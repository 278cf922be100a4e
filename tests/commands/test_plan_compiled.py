"""`--show`, `--nofast`, `--dump` and `--profile` as people run them: what is printed, written, and refused."""

import gzip
import json
import re
import shlex

import pytest

from tests import processes
from tests.goldens.make import ROOT

PLAN = "gptoss_jax.plan"
SMALL = "configs/small.json --on cpu:8 --mesh data=2,expert=2,tensor=2 --batch 8 --context 256 --prefill 16 --layers 2"


def _plan(line: str, *more: object) -> processes.Done:
    return processes.run(PLAN, *shlex.split(line), *more)


def test_all_that_is_shown_of_a_program():
    """Guards --show: where sums come from, what devices hold, what is alive, work by scope, predicted times."""
    done = _plan(f"{SMALL} --show collectives,sharding,memory,flops,timeline")
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout
    assert text.startswith("small on cpu:8, the first 2 layers only: compiled by XLA for 8 simulated CPU devices")
    sources = {"experts": "experts.py:N > model/exchange.py:N", "attention": "attention.py:N > model/layers.py:N"}
    for part, source in sources.items():
        line = rf"all-reduce .* 0-1 +{part} +psum +every step; model/{source}\n"
        assert re.search(line.replace("N", r"\d+"), text), part
    assert re.search(r"params/layers/\*/moe/down/blocks x 2 .* axis 0 by expert=2, axis 2 by tensor=2\n", text)
    assert "CPU 0,4" in text and "┌" in text
    assert re.search(r"^params/embedding +bf16\[\d+,\d+\]", text, re.MULTILINE)
    assert re.search(r"^\(temporary\) ", text, re.MULTILINE)
    assert re.search(r"experts +\d+\.\d+ GFLOP", text)
    assert "PREDICTED, not measured: no times" in text
    assert max(map(len, text.splitlines())) <= 160


def test_a_compiled_plan_is_compared_with_the_closed_form():
    """Guards --nofast: both programs, each figure of both sides, and that sums and arguments come out the same."""
    done = _plan(f"{SMALL} --nofast --json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["layers"] == 2 and document["plan"]["basis"].startswith("closed form")
    for step in ("decode", "prefill"):
        figures = {each["name"]: each for each in document[step]["figures"]}
        for name in ("arguments", "sums of the model", "their bytes"):
            assert figures[name]["compiled"] == figures[name]["closed_form"] > 0, (step, name)
        assert figures["operations"]["ratio"] == pytest.approx(1, rel=0.01)
        assert document[step]["only_compiled"] == document[step]["only_closed_form"] == []


def test_a_comparison_is_a_table():
    """Guards --nofast as people read it: the plan, then both sides of each figure of one program, and its work."""
    text = _plan(f"{SMALL} --nofast --step decode").stdout
    assert "closed form of the model's numbers" in text
    assert text.count("collectives: the same on both sides") == 1
    assert re.search(r"^  operations +\d+\.\d+ GFLOP +\d+\.\d+ GFLOP +1\.000$", text, re.MULTILINE)
    assert re.search(r"^  experts +\d+\.\d+ GFLOP", text, re.MULTILINE)


def test_what_is_compiled_for_absent_chips_is_said(tmp_path):
    """Guards honesty: where a slice's compiler is missing, XLA for CPUs stands in; times are the chip's roofline."""
    line = SMALL.replace("cpu:8", "h200x8").replace("data=2,expert=2,tensor=2", "expert=4,tensor=2")
    done = _plan(f"{line} --show timeline --json --dump", tmp_path / "dump")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert "simulated CPU devices (no compile-only wheels for gpu here" in document["basis"]
    found = document["decode"]["timeline"]
    assert found["measured"] is False and "H200" in found["basis"]
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in found["rows"])) and found["seconds"] > 0
    names = {path.name for path in (tmp_path / "dump").iterdir()}
    assert names == {
        f"decode.{kind}" for kind in ("stablehlo.mlir", "compiled.hlo.txt", "compiled.hlo.pb", "buffer_assignment.pb")
    }
    assert "ENTRY" in (tmp_path / "dump" / "decode.compiled.hlo.txt").read_text()
    assert "stablehlo" in (tmp_path / "dump" / "decode.stablehlo.mlir").read_text()


def test_the_programs_text_is_shown():
    """Guards --show hlo, and --step: of a prefill chunk the whole program."""
    done = _plan(f"{SMALL} --show hlo --step prefill")
    assert done.returncode == 0 and "HloModule jit_prefill" in done.stdout and "ENTRY" in done.stdout


MISTAKES = {
    "a section": (
        f"{SMALL} --show colectives",
        "--show is 'colectives', expected some of collectives, sharding, memory",
    ),
    "both": (f"{SMALL} --fast --show memory", "--fast and --show: leave one of them out"),
    "a sweep": ("20b --on cpu:1 --sweep --show memory", "--sweep and --show: leave one of them out"),
    "a comparison": (
        "20b --on cpu:1 --compare expert=1 data=1 --nofast",
        "--compare and --nofast: leave one of them out",
    ),
    "layers alone": ("20b --on cpu:1 --layers 2", "--layers has an effect with --show, --dump or --nofast only"),
    "no layers": (SMALL.replace("--layers 2", "--layers 0") + " --show memory", "--layers is 0, expected 1 to "),
    "text in JSON": (f"{SMALL} --show hlo --json", "--show hlo and --json: leave one of them out"),
    "uneven": (
        SMALL.replace("--batch 8", "--batch 3") + " --show memory",
        "the mesh does not divide the model: 3 slots",
    ),
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(line, message):
    """Guards bad input: one line, exit code 2, before a compiler runs."""
    done = _plan(line)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("plan: ") and message in done.stderr


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    """Guards --dump and --profile: a file in the folder's place is one line, before anything is compiled or read."""
    (tmp_path / "taken").write_text("")
    done = _plan(f"{SMALL} --dump", tmp_path / "taken")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "taken" in done.stderr
    done = processes.run("gptoss_jax.generate", "--profile", tmp_path / "taken", "Hello")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "expected the name of a folder for the trace" in done.stderr
    assert (tmp_path / "taken").read_text() == ""


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_a_trace_is_written(tmp_path, command):
    """Guards --profile: files that XProf and Perfetto open, with the operations of the decoding program in them."""
    trace = tmp_path / "trace"
    lines = '{"id": "a", "prompt": "Hello", "max_new_tokens": 3}\n'
    (tmp_path / "in.jsonl").write_text(lines)
    what = {"generate": ["--max-new-tokens", "3", "Hello"], "batch": [tmp_path / "in.jsonl", tmp_path / "out.jsonl"]}
    from gptoss_jax.runtime import demo_model

    done = processes.run(
        f"gptoss_jax.{command}", *what[command], "--checkpoint", demo_model.folder(), "--profile", trace
    )
    assert done.returncode == 0, done.stderr
    assert f"a trace is in {trace}" in done.stderr
    (events,) = trace.glob("plugins/profile/*/perfetto_trace.json.gz")
    names = {str(event.get("args")) for event in json.loads(gzip.decompress(events.read_bytes()))["traceEvents"]}
    assert any("jit_decode" in name for name in names)
    assert [path.stat().st_size > 1000 for path in trace.glob("plugins/profile/*/*.xplane.pb")] == [True]


def test_the_page_shows_what_the_command_takes():
    """Guards docs/sharding.md: its table of --show has every section."""
    from gptoss_jax.cli import plan_asked
    from gptoss_jax.planner import show

    assert tuple(show.SECTIONS) == plan_asked.SECTIONS
    page = (ROOT / "docs" / "sharding.md").read_text()
    assert [name for name in show.SECTIONS if f"| `{name}` |" not in page] == []
