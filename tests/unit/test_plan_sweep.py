"""Sweeps of meshes, comparisons of two, and what is said where nothing fits."""

import csv
import io
import itertools
import math

import pytest

from gptoss_jax.model.mesh import RULES, MeshError, MeshShape
from gptoss_jax.planner import compare, plan, plot, report, sweep
from gptoss_jax.planner.plan import PlanError
from tests.unit.test_planner import EIGHT, request


def _swept(on: str, batches: list[int], contexts: list[int], model: str = "gpt-oss-120b") -> list[plan.Plan]:
    return sweep.sweep(sweep.requests(request(model, on), batches, contexts))


def test_a_sweep_has_every_mesh_once():
    """Guards against a mesh that is left out, or counted twice: four axes, heads cut in two ways, experts too.

    Where data shards can share experts, they do so with both exchanges.
    """
    found = [
        (tuple(each.axes.values()), each.mesh_axes("heads"), each.mesh_axes("experts"), each.exchange_name)
        for each in sweep.meshes(8)
    ]
    assert len(set(found)) == len(found)
    sizes = [axes for axes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(axes) == 8]
    heads_ways = {axes: [("tensor",), ("expert", "tensor")][: 1 + (axes[1] > 1)] for axes in sizes}
    expert_ways = {axes: [("expert",), ("expert", "sequence")][: 1 + (axes[3] > 1)] for axes in sizes}
    expected = {
        (axes, *ways, "sum") for axes in sizes for ways in itertools.product(heads_ways[axes], expert_ways[axes])
    }
    shared = {(axes, ("tensor",), ("data",)) for axes in sizes if axes[0] > 1 and axes[1] == 1}
    assert set(found) == expected | {(*each, exchange) for each in shared for exchange in ("gather", "all_to_all")}


def test_the_front_is_what_no_other_beats():
    """Guards the Pareto front against a count by brute force, and the ranking."""
    found = _swept("h200x4", [1, 8, 64], [8192])
    speeds = [(each.tokens_per_second_per_chip, each.tokens_per_second_per_user) for each in found]
    assert speeds == sorted(speeds, key=lambda speed: -speed[0])
    front = sweep.pareto(found)
    for i, mine in enumerate(speeds):
        beaten = any(
            other[0] >= mine[0] and other[1] >= mine[1] and (other != mine or j < i)
            for j, other in enumerate(speeds)
            if j != i
        )
        assert (i in front) == (not beaten), found[i].request.mesh
    assert 3 <= len(front) < len(found)


def test_contexts_have_a_front_each():
    """Guards long contexts, all of which a shorter one beats."""
    found = _swept("h200x2", [2], [8192, 131072])
    assert {found[i].request.workload.context_tokens for i in sweep.pareto(found)} == {8192, 131072}


def test_the_csv_has_a_line_for_each_plan():
    """Guards --csv: what it says of a mesh is what the plan says."""
    found = _swept("v6e:2x2", [8, 64], [8192])
    rows = list(csv.DictReader(io.StringIO(sweep.to_csv(found))))
    assert len(rows) == len(found) > 3 and tuple(rows[0]) == sweep.COLUMNS
    for row, each in zip(rows, found, strict=True):
        assert row["mesh"] == str(each.request.mesh) and int(row["batch"]) == each.request.workload.slots
        assert float(row["tokens_per_second_per_chip"]) == round(each.tokens_per_second_per_chip, 2)
        assert float(row["total_gib"]) <= float(row["capacity_gib"]) == 31.25


def test_of_simulated_devices_the_least_that_is_sent_comes_first():
    """Guards a ranking without rates: no division by them, and no speed in the table."""
    found = _swept("cpu:4", [8], [256], "small")
    sent = [each.decode_work.sent_bytes for each in found]
    assert sent == sorted(sent) and sweep.pareto(found) == set()
    assert "None" not in sweep.to_csv(found)


@pytest.mark.parametrize("name", ["sweep.png", "sweep.svg"])
def test_a_sweep_is_drawn_to_the_same_bytes(tmp_path, name):
    """Guards the picture: whole, in the format of its name, with no date in it."""
    pytest.importorskip("matplotlib")
    found = _swept("h200x2", [1, 8], [8192], "gpt-oss-20b")
    drawn = []
    for copy in ("one", "other"):
        path = tmp_path / copy / name
        path.parent.mkdir()
        assert plot.write(path, found, "a title")
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith(b"\x89PNG") if name.endswith("png") else b"a title" in drawn[0] or b"<svg" in drawn[0]


# ---- what does not fit ----


def test_what_does_not_fit_names_what_would():
    """Guards the refusal: sizes on both sides, and meshes that really do fit, by the file that says one of them."""
    asked = request("gpt-oss-120b", "h100x8", "data=8", 64, 131072)
    with pytest.raises(PlanError) as caught:
        sweep.make_fitting(asked)
    said = str(caught.value)
    assert "mesh data=8 does not fit h100x8" in said and "of 79.60 GiB on each device" in said
    path = "configs/meshes/h100x8.json"
    assert f"{path} (" in said.partition("of this slice would do: ")[2]
    assert sweep.make_fitting(request("gpt-oss-120b", "h100x8", path, 64, 131072)).fits


def test_meshes_that_fill_a_tpus_tiles_are_named_first():
    """Guards the ranking on TPUs: two key heads a device, and positions cut, read half of what one head's rows take."""
    with pytest.raises(PlanError, match=r"of this slice would do: expert=4,sequence=2, .*\(13\.03 GiB\)"):
        sweep.make_fitting(request("gpt-oss-120b", "v6e:2x4", "expert=8", 8, 131072))


def test_where_no_mesh_fits_a_smaller_batch_is_named():
    """Guards the way out where the batch is what is too large, and that there is none where the weights are."""
    with pytest.raises(
        PlanError, match=r"no mesh of h200x1 holds 512 sequences of 131,072 tokens; one device holds (\d+)"
    ) as caught:
        sweep.make_fitting(request("gpt-oss-120b", "h200x1", "", 512, 131072))
    largest = int(str(caught.value).rpartition("holds ")[2])
    assert sweep.make_fitting(request("gpt-oss-120b", "h200x1", "", largest, 131072)).fits
    assert not plan.make(request("gpt-oss-120b", "h200x1", "", 2 * largest, 131072)).fits
    with pytest.raises(PlanError, match="no mesh of v5e:1x1 holds even one sequence of 8,192 tokens"):
        sweep.make_fitting(request("gpt-oss-120b", "v5e:1x1"))


def test_a_mesh_that_does_not_come_out_even_names_what_would():
    """Guards the refusal of tensor=16, which splits a key/value head: the sizes that do not, and whole meshes."""
    with pytest.raises(
        MeshError, match=r"over tensor = 16 \(even: 1, 2, 4, 8\); of this slice would do: expert=8,sequence=2"
    ):
        sweep.make_fitting(request("gpt-oss-120b", "v5e:4x4", "tensor=16"))


# ---- two side by side ----


def test_a_comparison_says_what_differs_and_why():
    """Guards --compare: every figure that differs, with the axes that are cut otherwise; what is alike in one line."""
    a = plan.make(request("gpt-oss-120b", "h200x8", "expert=8", 64))
    b = plan.make(request("gpt-oss-120b", "h200x8", EIGHT, 64))
    lines = {line[:26].strip(): line for line in compare.text(a, b).splitlines()}
    assert "heads / 1 -> / 8" in lines["keys and values"] and "0.12" in lines["keys and values"]
    assert "heads / 1 -> / 8" in lines["attention"]
    assert "experts" not in lines and "experts" in compare.text(a, b).splitlines()[-1]
    assert compare.text(a, a).count("\n") == 5


def test_an_exchange_is_named_where_figures_follow_from_it():
    """Guards --compare of two exchanges on the same axes: what is sent differs by them alone."""
    shapes = [MeshShape({"data": 8}, {**RULES, "experts": ("data",)}, name) for name in ("gather", "all_to_all")]
    a, b = (plan.make(request("gpt-oss-20b", "h200x8", "", 64)._replace(mesh=shape)) for shape in shapes)
    lines = {line[:26].strip(): line for line in compare.text(a, b).splitlines()}
    for name in ("decoding: sent to others", "decoding: interconnect"):
        assert lines[name].endswith("exchange gather -> all_to_all")
    assert "experts" not in lines and "keys and values" not in lines


def test_a_plan_as_json_has_what_the_text_has():
    """Guards --json: total, capacity, collectives, times; and that its parts add up."""
    found = plan.make(request("gpt-oss-120b", "h200x8", EIGHT, 64))
    document = report.to_json(found)
    parts = {name: size for name, size in document["memory"].items() if name not in ("total", "capacity")}
    assert sum(parts.values()) == document["memory"]["total"] < document["memory"]["capacity"]
    seconds = document["decode"]["seconds"]
    assert (
        seconds["total"] == max(seconds["compute"], seconds["memory"]) + seconds["interconnect"] + seconds["overhead"]
    )
    assert document["tokens_per_second_per_user"] == 1 / seconds["total"]
    assert len(document["decode"]["collectives"]) == len(found.decode_work.collectives)


@pytest.mark.parametrize("on", ["h200x8", "v5p:2x2x2", "cpu:8"])
def test_a_plan_is_read_on_a_terminal(on):
    """Guards the text: within 120 columns, the mesh and each part named that takes memory, no number that is none."""
    found = plan.make(request("gpt-oss-20b", on, "data=2,expert=4", 8))
    said = report.text(found)
    assert max(map(len, said.splitlines())) <= 120
    assert "mesh data=2,expert=4; batch 8, context 8,192" in said and "None" not in said and "nan" not in said
    parts = {name: getattr(found.memory, part) for part, (name, _) in report.PARTS.items()}
    assert all((f"  {name} " in said) == bool(size) for name, size in parts.items())
