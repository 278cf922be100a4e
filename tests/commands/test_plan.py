"""The planner as people run it: without JAX and at once, in text, JSON, CSV and pictures; mistakes in one line."""

import csv
import json
import shlex

import pytest

from tests import processes
from tests.commands import test_startup
from tests.goldens.make import ROOT

PLAN = "gptoss_jax.plan"
PLAN_CPU_SECONDS = 2.0  # what a plan takes at most


def _plan(line: str, *more: object) -> processes.Done:
    return processes.run(PLAN, *shlex.split(line), *more)


@pytest.mark.parametrize(
    "line", ["120b --on h200x8 --mesh expert=8 --batch 64", "120b --on tpu7x:2x2x1 --sweep --batch 1,8,64,512"]
)
def test_a_plan_comes_at_once_and_without_jax(tmp_path, line):
    """Guards the promise: no JAX imported, below 2 s, a whole sweep too."""
    done = test_startup.run(tmp_path, PLAN, *shlex.split(line))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.packages.isdisjoint({"jax", "jaxlib", "flax", "orbax", "numpy", "matplotlib"})
    assert done.cpu_seconds < PLAN_CPU_SECONDS


def test_a_plan_says_all_its_parts():
    """Guards the text: memory, work, collectives, roofline, what is assumed; --json the same in bytes."""
    line = "gpt-oss-120b --on v6e:2x4 --mesh configs/meshes/v6e-8.json --batch 8 --context 131072"
    done = _plan(line)
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("each device holds", "each device does", "collectives of a step", "roofline of TPU v6e", "assumed: "):
        assert part in done.stdout
    document = json.loads(_plan(f"{line} --json").stdout)
    assert document["mesh"]["axes"] == {"expert": 8} and document["fits"] is True
    assert f"{document['tokens_per_second_per_user']:,.1f}" in done.stdout


def test_models_are_found_by_name_file_and_folder(tmp_path):
    """Guards the first argument: short and whole names, a config.json, a checkpoint's folder."""
    (tmp_path / "config.json").write_bytes((ROOT / "configs" / "gpt-oss-20b.json").read_bytes())
    said = [
        _plan(f"{model} --on h200x1 --json").stdout
        for model in ("20b", "gpt-oss-20b", "configs/gpt-oss-20b.json", tmp_path, tmp_path / "config.json")
    ]
    totals = [json.loads(text)["memory"]["total"] for text in said]
    assert len(set(totals)) == 1


def test_a_sweep_writes_its_table_and_its_picture(tmp_path):
    """Guards --csv and --plot, and that the table says how many it leaves out."""
    pytest.importorskip("matplotlib")
    files = ("--csv", tmp_path / "sweep.csv", "--plot", tmp_path / "sweep.svg")
    done = _plan("20b --on h100x4 --sweep --batch 1,8,64 --context 8192,65536 --rows 3", *files)
    assert (done.returncode, done.stderr) == (0, "")
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert f"{len(rows)} of " in done.stdout and "more: --csv has all" in done.stdout
    assert {row["context"] for row in rows} == {"8192", "65536"}
    assert (tmp_path / "sweep.svg").read_text().startswith("<?xml")
    document = json.loads(_plan("20b --on h100x4 --sweep --batch 1,8,64 --context 8192,65536 --json").stdout)
    assert [str(row["mesh"]) for row in document] == [row["mesh"] for row in rows]


def test_two_meshes_are_compared():
    """Guards --compare A B, and --mesh A --compare B, which are the same."""
    line = "120b --on h200x8 --batch 64"
    one = _plan(f"{line} --compare expert=8 data=2,expert=4")
    other = _plan(f"{line} --mesh expert=8 --compare data=2,expert=4")
    assert one == other and one.returncode == 0
    assert "experts / 8 -> / 4" in one.stdout
    document = json.loads(_plan(f"{line} --compare expert=8 data=2,expert=4 --json").stdout)
    assert {"a", "b", "figures"} == document.keys()


MISTAKES = {
    "no model": ("--on h200x1", "no model, expected one of gpt-oss-20b, gpt-oss-120b, a config.json or a folder"),
    "another model": ("llama --on h200x1", "model 'llama', expected one of gpt-oss-20b, gpt-oss-120b"),
    "no chips": ("20b", "--on is missing, expected the chips, for example h200x8"),
    "other chips": ("20b --on a100x8", "slice 'a100x8', expected for example h200x8"),
    "a shape": ("20b --on v6e-8", "slice 'v6e-8', expected for example"),
    "a mesh": ("20b --on h200x8 --mesh expert:8", "mesh 'expert:8', expected for example data=1,expert=4,tensor=2"),
    "another size": (
        "20b --on h200x8 --mesh expert=4",
        "the mesh is expert=4, of 4 devices, and h200x8 has 8; of this",
    ),
    "uneven": ("20b --on h200x16 --mesh tensor=16", "the mesh does not divide the model: 8 key/value heads over"),
    "too large": ("120b --on v5e:1x1", "mesh one device does not fit v5e:1x1: "),
    "no number": ("20b --on h200x1 --batch many", "--batch is 'many', expected a whole number"),
    "several": ("20b --on h200x1 --batch 1,8", "--batch is 1,8: several have an effect with --sweep only"),
    "csv alone": ("20b --on h200x1 --csv x.csv", "--csv has an effect with --sweep only: give both"),
    "both": ("20b --on h200x1 --sweep --mesh expert=1", "--sweep and --mesh: leave one of them out"),
    "a picture": ("20b --on h200x1 --sweep --plot x.pdf", "--plot is x.pdf, expected a file that ends in .png or .svg"),
    "no speed": ("20b --on cpu:1 --sweep --plot x.png", "--plot: nothing to draw, no rates"),
    "nothing to compare": ("20b --on h200x1 --compare expert=1", "has nothing to compare with"),
    "two models": ("20b 120b --on h200x1", "unexpected argument '120b': one model at a time"),
    "a cost": ("20b --on h200x1 --launch-us=-1", "--launch-us is -1.0, expected microseconds, from 0"),
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(line, message):
    """Guards bad input: one line, exit code 2, nothing on stdout."""
    done = _plan(line)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("plan: ") and message in done.stderr
