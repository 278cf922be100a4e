"""The planner's closed form: bytes of what is declared, operations of the cost model, mistakes in one line."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import presets, under_load
from benchmarks.presets import PRESETS, Preset
from gptoss_jax.engine import programs, runner
from gptoss_jax.engine.request import EngineConfig
from gptoss_jax.model import keys, kv_cache, mesh, sharding
from gptoss_jax.model.config import read_config
from gptoss_jax.model.mesh import MeshError
from gptoss_jax.model.transformer import declare
from gptoss_jax.planner import chips, collectives, memory, plan, report, work
from gptoss_jax.planner.chips import CHIPS, SliceError, parse_slice
from gptoss_jax.planner.plan import Costs, PlanError, Request, Workload
from tests.goldens.make import ROOT

MIB, GIB = 1 << 20, 1 << 30
H200, V6E, TPU7X = (CHIPS[name] for name in ("h200", "v6e", "tpu7x"))
EIGHT = "configs/meshes/h200x8.json"


def config(name: str, layers: int | None = None):
    """A config of this repository, or as many layers of it."""
    whole = read_config(ROOT / "configs" / f"{name}.json")
    return whole if layers is None else dataclasses.replace(whole, num_layers=layers)


def request(name: str, on: str, mesh_text: str = "", *sizes: int) -> Request:
    """What --mesh, --on, --batch, --context and --prefill ask for."""
    slots, context, prefill = (*sizes, *(1, 8192, 128)[len(sizes) :])
    return Request(config(name), name, mesh.read(mesh_text), parse_slice(on), Workload(slots, context, prefill))


# ---- memory ----


@pytest.mark.parametrize("mesh_text", ["", "data=2,expert=2,tensor=2", "expert=8", EIGHT, "data=2,tensor=2,sequence=2"])
@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b", "small"])
def test_weights_and_cache_are_those_that_are_declared(name, mesh_text):
    """Guards bytes of a device: a leaf forgotten, counted twice, or cut by another axis than its declaration's."""
    model, laid_out = config(name, 3), sharding.make(mesh_text)
    said = memory.memory(model, mesh.read(mesh_text), H200, Workload(8, 300, 128))
    found: dict[str, int] = dict.fromkeys(("experts", "attention", "embeddings", "others"), 0)
    for path, leaf in declare(model, laid_out).leaves.items():
        shape = laid_out.named(leaf.axes).shard_shape(leaf.shape)
        found[_part(path)] += math.prod(shape) * leaf.dtype.itemsize
    assert found == {name: getattr(said, name) for name in found}
    page_tokens = kv_cache.page_tokens(laid_out)
    sizes = {
        "slots": 8,
        "pages": 8 * kv_cache.num_pages(300, page_tokens),
        "max_context_tokens": 300,
        "dtype": jnp.dtype("bfloat16"),
        "page_tokens": page_tokens,
    }
    cache = jax.eval_shape(lambda: kv_cache.empty(model, **sizes))
    axes: Any = kv_cache.axes(model)
    arrays = zip([*cache.k, *cache.v], [*axes.k, *axes.v], strict=True)
    assert said.kv_cache == sum(2 * math.prod(laid_out.named(of).shard_shape(x.shape)) for x, of in arrays)


def _part(path: str) -> str:
    if "gate_up" in path or "down" in path:
        return "experts"
    if "embedding" in path:
        return "embeddings"
    return "attention" if "attention" in path and not path.endswith("norm") else "others"


def test_numbers_that_jax_modules_hold_are_theirs():
    """Guards copies of what lies in modules that import JAX: rings that the prefix cache keeps, steps of a dispatch."""
    assert work.DISPATCH_STEPS == programs.MAX_STEPS_PER_DISPATCH
    model = config("small")
    for slots, context, width, shards in itertools.product((1, 8, 40), (64, 256, 8192), (16, 128), (1, 4)):
        width = min(width, context)
        sizes = EngineConfig(slots=slots, max_context_tokens=context, prefill_widths=(width,))
        cut = mesh.read(f"sequence={shards}")
        said = memory.memory(model, cut, H200, Workload(slots, context, width)).snapshots
        ring = 2 * 2 * 2 * min(128, context) * model.num_kv_heads * model.head_dim
        assert said == runner.num_snapshots(sizes, 64 * shards) * ring


def test_experts_on_tpus_take_what_their_layout_takes():
    """Guards the padding of TPUs' layouts: a layer of the 20b, as docs/kernels.md says of what its arrays take."""
    one_layer = config("gpt-oss-20b", 1)
    sizes = [
        memory.memory(one_layer, mesh.read(""), chip, Workload(1, 128, 128)).experts / MIB for chip in (V6E, TPU7X)
    ]
    assert sizes == pytest.approx([426.7, 414.7], rel=5e-4)
    published = memory.memory(one_layer, mesh.read(""), H200, Workload(1, 128, 128)).experts / MIB
    assert published == pytest.approx(403.9, abs=0.05)


@pytest.mark.parametrize(("shards", "width"), [(1, 2880), (2, 2880), (4, 2944), (8, 3072)])
@pytest.mark.parametrize("model", presets.MODELS)
def test_padded_experts_are_counted(model, shards, width):
    """Guards tensor=4 and 8, where each device holds and reads as many whole blocks: zeros too."""
    found = plan.make(request(model, f"h200x{shards}", f"tensor={shards}", 8))
    numbers, of_one = config(model), 3 * width * 2880 // shards
    assert mesh.expert_width(numbers, shards) == width
    each = of_one // 2 + of_one // 32 + 2 * (2 * width // shards + 2880)
    assert found.memory.experts == numbers.num_layers * numbers.num_experts * each
    said = f"experts' width 2,880 padded with zeros to {width:,}, to come out even"
    assert (said in report.text(found).splitlines()) == (width > 2880)
    assert report.to_json(found)["padded"] == (said if width > 2880 else None)


# Arguments and temporaries in GiB as `python -m benchmarks.ahead_of_time models` printed them (docs/kernels.md).
COMPILED = (
    (("gpt-oss-20b", "h200x1", "", 1, 8192, 512), 1, 13.01),
    (("gpt-oss-20b", "h200x1", "", 1, 8192, 512), 512, 13.01 + 0.10),
    (("gpt-oss-20b", "h200x1", "", 1, 131072, 512), 1, 15.82),
    (("gpt-oss-120b", "h200x1", "", 1, 131072, 512), 1, 65.27),
    (("gpt-oss-120b", "h200x1", "", 1, 131072, 512), 512, 65.27 + 0.10),
    (("gpt-oss-120b", "h200x8", "expert=8", 64, 8192, 512), 1, 27.47 + 0.23),
    (("gpt-oss-120b", "h200x8", "expert=8", 8, 8192, 512), 512, 11.46 + 0.58),
    (("gpt-oss-20b", "b200x1", "", 1, 8192, 512), 1, 13.01 + 0.01),
    (("gpt-oss-20b", "b200x1", "", 1, 8192, 512), 512, 13.01 + 0.39),
    (("gpt-oss-20b", "v6e:1x1", "", 1, 131072, 512), 1, 16.38 + 1.15),
    (("gpt-oss-20b", "v6e:1x1", "", 1, 131072, 512), 512, 16.38 + 1.13),
    # of `ahead_of_time presets`: a key head on each device, which does not fill a TPU's lanes
    (("gpt-oss-20b", "h200x8", EIGHT, 16, 8192, 128), 128, 1.99 + 0.22),
    (("gpt-oss-20b", "v6e:2x4", "configs/meshes/v6e-8.json", 16, 8192, 128), 1, 2.06 + 0.95),
    (("gpt-oss-120b", "v6e:2x4", "configs/meshes/v6e-8.json", 16, 8192, 128), 1, 8.60 + 1.35),
    (("gpt-oss-120b", "v6e:2x4", "configs/meshes/v6e-8.json", 16, 8192, 128), 128, 8.60 + 1.58),
    (("gpt-oss-20b", "v6e:2x4", "configs/meshes/v6e-8.json", 16, 8192, 128), 128, 2.06 + 1.06),
    (("gpt-oss-20b", "tpu7x:2x2x1", "configs/meshes/tpu7x-8.json", 16, 8192, 128), 128, 2.03 + 1.12),
    (("gpt-oss-20b", "tpu7x:2x2x1", "configs/meshes/tpu7x-8.json", 16, 8192, 128), 1, 2.03 + 1.21),
    (("gpt-oss-120b", "tpu7x:2x2x1", "configs/meshes/tpu7x-8.json", 16, 8192, 128), 1, 8.39 + 1.67),
    (("gpt-oss-120b", "tpu7x:2x2x1", "configs/meshes/tpu7x-8.json", 16, 8192, 128), 128, 8.39 + 1.59),
    (("gpt-oss-20b", "v5e:4x4", "configs/meshes/v5e-16.json", 16, 8192, 128), 1, 1.87 + 0.50),
    (("gpt-oss-20b", "v5e:2x4", "configs/meshes/v5e-8.json", 16, 8192, 128), 1, 2.06 + 0.92),
    (("gpt-oss-20b", "v5e:2x4", "configs/meshes/v5e-8.json", 16, 8192, 128), 128, 2.06 + 1.08),
    (("gpt-oss-120b", "v5e:2x4", "configs/meshes/v5e-8.json", 16, 8192, 128), 1, 8.60 + 1.34),
    (("gpt-oss-120b", "v5e:2x4", "configs/meshes/v5e-8.json", 16, 8192, 128), 128, 8.60 + 1.53),
    (("gpt-oss-120b", "v5e:4x4", "configs/meshes/v5e-16.json", 16, 8192, 128), 1, 8.31 + 0.73),
    (("gpt-oss-120b", "v5e:4x4", "configs/meshes/v5e-16.json", 16, 8192, 128), 128, 8.31 + 0.75),
    (("gpt-oss-20b", "v5p:2x2x2", "configs/meshes/v5p-8.json", 16, 8192, 128), 1, 2.06 + 0.93),
    (("gpt-oss-120b", "h200x1", "configs/meshes/h200x1.json", 16, 8192, 128), 128, 65.37 + 0.32),
    (("gpt-oss-120b", "h200x2", "configs/meshes/h200x2.json", 16, 8192, 128), 128, 32.70 + 0.38),
    (("gpt-oss-20b", "h200x2", "configs/meshes/h200x2.json", 16, 8192, 128), 128, 7.95 + 0.26),
    (("gpt-oss-120b", "h200x4", "configs/meshes/h200x4.json", 16, 8192, 128), 1, 16.36 + 0.05),
    (("gpt-oss-120b", "h200x4", "configs/meshes/h200x4.json", 16, 8192, 128), 128, 16.36 + 0.29),
    (("gpt-oss-20b", "h200x8", "configs/meshes/h200x8.json", 16, 8192, 128), 1, 1.99 + 0.05),
    (("gpt-oss-20b", "h200x8", "configs/meshes/h200x8.json", 16, 8192, 128), 128, 1.99 + 0.22),
    (("gpt-oss-120b", "h200x8", "configs/meshes/h200x8.json", 16, 8192, 128), 1, 8.19 + 0.05),
    (("gpt-oss-120b", "h200x8", "configs/meshes/h200x8.json", 16, 8192, 128), 128, 8.19 + 0.25),
)


@pytest.mark.parametrize(("asked", "width", "compiled_gib"), COMPILED)
def test_memory_is_within_a_twentieth_of_the_compilers(asked, width, compiled_gib):
    """Guards the estimate of what a program takes, temporaries too, against the vendors' compilers' own count."""
    found = plan.make(request(*asked))
    assert found.memory.program_bytes(width) / GIB == pytest.approx(compiled_gib, rel=0.05)


@pytest.mark.parametrize("model", presets.MODELS)
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_fit(preset, model):
    """Guards configs/meshes: each cuts both models evenly, and 16 sequences of 8,192 tokens fit its slice."""
    found = presets.planned(model, preset)
    assert found.fits and found.memory.total < plan.CLOSE * found.capacity


def test_every_preset_of_a_slice_is_checked():
    """Guards the table of presets: a file that stands in no row of it is checked by nobody."""
    files = {path.stem for path in (ROOT / "configs" / "meshes").glob("*.json")}
    assert files - {preset.name for preset in PRESETS} == {
        "expert4-tensor2",
        "data2-expert2-tensor2",
        "expert2-tensor2-sequence2",
    }


def test_presets_are_said_beside_what_compilers_say(monkeypatch):
    """Guards `benchmarks.ahead_of_time presets`: both models, both steps, how far off, and one that does not fit."""
    small = presets.planned("gpt-oss-20b", Preset("h200x8", "h200x8", "8 H200"))
    sums = [list(each) for each in small.decode_work.collectives if each.where != "sampling"]  # of prefill not these

    def fit(step, kernels):
        sizes = {"arguments_gib": 8.0, "temporaries_gib": 0.5, "of_gib": 141.0, "fits": True, "collectives": sums}
        return {**step._asdict(), **({"fits": False, "why": "too large"} if "120b" in step.model else sizes)}

    monkeypatch.setattr(presets, "fit", fit)
    reports, lines = zip(*presets.reports(["8 H200"], "auto"), strict=True)
    assert [(report["model"], report["width"]) for report in reports] == [
        (m, w) for m in presets.MODELS for w in (1, 128)
    ]
    assert [line.rpartition(", ")[2].partition(":")[0] for line in lines[:2]] == ["as planned", "NOT AS PLANNED"]
    said = small.memory.program_bytes(1) / GIB
    assert reports[0]["off"] == pytest.approx(said / 8.5 - 1, abs=1e-4) and "GiB compiled" in lines[0]
    assert reports[2]["off"] is None and lines[2].endswith("does not fit: too large")


# ---- work ----


def test_a_decoding_step_reads_what_the_cost_model_says():
    """Guards bytes of one device against `ModelConfig.decode_bytes`, which benchmarks measure speed by."""
    for name, slots in itertools.product(("gpt-oss-20b", "gpt-oss-120b"), (1, 16)):
        found = plan.make(request(name, "h200x1", "", slots, 4096)).decode_work
        model = config(name)
        routers = 2 * model.num_layers * model.num_experts * model.hidden_size
        embedded, drawing = 2 * slots * model.hidden_size, 17 * slots * model.vocab_size
        assert found.hbm_bytes == pytest.approx(
            model.decode_bytes(slots, 4096) + routers + embedded + drawing, rel=1e-9
        )


@pytest.mark.parametrize("tokens", [64, 128, 129, 1000])
def test_a_prompts_operations_are_the_cost_models(tokens):
    """Guards operations against `under_load.prefill_operations`: keys of windows that grow, then slide."""
    found = plan.make(request("gpt-oss-20b", "h200x1", "", 2, tokens, tokens)).prefill_work
    assert found.flops == under_load.prefill_operations(config("gpt-oss-20b"), 2, tokens)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("context", "width"), [(1, 1), (128, 128), (200, 100), (300, 1), (300, 7), (131, 130)])
def test_keys_are_counted_one_by_one(layer, context, width):
    """Guards the sums over a chunk's keys, in windows and without, against a count token by token."""
    model = config("gpt-oss-20b")
    window = model.sliding_window if layer == 0 else context
    assert keys.seen(model, layer, context, width) == sum(min(window, i + 1) for i in range(context - width, context))
    seen = {key for i in range(context - width, context) for key in range(max(0, i + 1 - window), i + 1)}
    assert keys.read(model, layer, context, width) == len(seen)


def test_devices_together_do_the_work_of_one():
    """Guards work per device: what eight do is what one does, but for routers, which each does for itself."""
    one = plan.make(request("gpt-oss-120b", "v5p:1x1x1", "", 8, 1024)).decode_work
    for mesh_text in (EIGHT, "data=2,expert=4", "expert=2,sequence=4"):
        each = plan.make(request("gpt-oss-120b", "v5p:2x2x2", mesh_text, 8, 1024)).decode_work
        assert one.flops <= 8 * each.flops
    model = config("gpt-oss-120b")
    routers = 2 * 8 * model.num_layers * model.num_experts * model.hidden_size
    assert 8 * plan.make(request("gpt-oss-120b", "v5p:2x2x2", EIGHT, 8, 1024)).decode_work.flops == pytest.approx(
        one.flops + 7 * routers
    )


def test_data_shards_that_share_experts_read_them_once():
    """Guards attention data-parallel beside experts expert-parallel: operations of one device, experts of an eighth."""
    alone = plan.make(request("gpt-oss-120b", "v5p:1x1x1", "", 64, 1024))
    shape = mesh.MeshShape({"data": 8}, {**mesh.RULES, "experts": ("data",)})
    shared = plan.make(request("gpt-oss-120b", "v5p:2x2x2", "", 64, 1024)._replace(mesh=shape))
    assert 8 * shared.decode_work.flops == pytest.approx(alone.decode_work.flops)
    assert 8 * shared.memory.experts == alone.memory.experts and shared.memory.attention == alone.memory.attention
    assert 8 * shared.memory.kv_cache == alone.memory.kv_cache
    assert alone.decode_work.weight_bytes / 8 < shared.decode_work.weight_bytes < alone.decode_work.weight_bytes / 3


def test_a_ragged_exchange_sends_what_tokens_fill():
    """Guards what a chip sends: four of 128 experts are on 3.34 of 8 devices, on average."""
    model = config("gpt-oss-120b")
    assert 8 * collectives.hit(model, 8) == pytest.approx(3.3425, abs=1e-3)
    assert collectives.hit(model, 1) == 1 and collectives.hit(model, 128) == pytest.approx(4 / 128)
    shape = mesh.MeshShape({"data": 8}, {**mesh.RULES, "experts": ("data",)}, "all_to_all")
    sent = {
        chip: sum(e.sent_bytes for e in collectives.decode_step(model, shape, CHIPS[chip], Workload(64, 1024, 128)))
        for chip in ("cpu", "h200")
    }
    assert sent["h200"] < 0.45 * sent["cpu"]


# ---- rooflines ----


def test_a_step_takes_what_its_slowest_part_takes():
    """Guards the prediction: rates of the table, half a chip's for each of its two devices, sums sent in a ring."""
    found = plan.make(request("gpt-oss-120b", "tpu7x:2x2x1", EIGHT, 8))
    decode = found.decode
    assert decode is not None and decode.overhead == 0 and decode.bound == "memory"
    assert decode.memory == decode.work.hbm_bytes / (7380e9 / 2)
    assert decode.compute == decode.work.flops / (2307e12 / 2)
    assert decode.interconnect == pytest.approx(
        sum(2 * 7 / 8 * each.total_bytes for each in decode.work.always) / (1200e9 / 2 / 2)
    )
    assert found.tokens_per_second_per_user == 1 / (decode.memory + decode.interconnect)
    assert found.tokens_per_second_per_chip == found.tokens_per_second_per_user * 8 / 4


def test_tpus_read_padded_keys():
    """Guards decoding's roofline on TPUs: of one key head of 64 numbers rows of 128 lanes are read, of two no more."""
    drawn = 17 * 8 * config("gpt-oss-120b").vocab_size / 8
    for mesh_text, times in ((EIGHT, 2), ("data=2,tensor=4", 1)):
        gpu, tpu = (plan.make(request("gpt-oss-120b", on, mesh_text, 8)).decode_work for on in ("h200x8", "v5p:2x2x2"))
        assert tpu.kv_bytes - drawn == times * (gpu.kv_bytes - drawn) > 0


def test_tpus_copy_what_they_are_given():
    """Guards copies in the roofline: of the embedding, and where rows are padded of keys, which go back again."""
    for on, mesh_text, padded in (("v5p:2x2x2", EIGHT, True), ("v5p:2x2x2", "data=2,tensor=4", False)):
        found = plan.make(request("gpt-oss-120b", on, mesh_text, 8))
        held, prefill = found.memory, found.prefill_work
        keys = held.kv_cache + held.padded_keys if padded else 0
        assert prefill.copy_bytes == 2 * (held.embedding_copy + keys) > 0
        assert found.decode_work.copy_bytes == prefill.copy_bytes / 64
        assert prefill.hbm_bytes == prefill.weight_bytes + prefill.kv_bytes + prefill.copy_bytes
    assert plan.make(request("gpt-oss-120b", "h200x8", EIGHT, 8)).prefill_work.copy_bytes == 0
    v7 = plan.make(request("gpt-oss-120b", "tpu7x:2x2x1", EIGHT, 8))
    retiled = v7.decode_work.copy_bytes * 64 - v7.prefill_work.copy_bytes
    assert retiled == 2 * v7.memory.retiled_weights > 0


def test_costs_that_somebody_measured_are_added():
    """Guards --launch-us and --collective-us: what a data sheet does not have, times how often it happens."""
    asked = request("gpt-oss-20b", "h200x2", "configs/meshes/h200x2.json", 1)
    decode = plan.make(asked._replace(costs=Costs(2e-6, 10e-6))).decode
    assert decode is not None and decode.work.launches == 16 * 24 + 19 + 24 * 2 + 1 + 6
    assert decode.overhead == pytest.approx(decode.work.launches * 2e-6 + (24 * 2 + 1 + 6) * 10e-6)
    assert decode.bound == "latency"


@pytest.mark.parametrize(("slots", "said"), [(16, False), (48, True)])
def test_a_share_beyond_what_commands_take_is_named(slots, said):
    """Guards runs that fit by the plan alone: of a GPU JAX has no more than its fraction, whatever the card holds."""
    found = plan.make(request("gpt-oss-120b", "h100x1", "configs/meshes/h100x1.json", slots))
    assert found.fits and ("XLA_CLIENT_MEM_FRACTION=0." in report.verdict(found)) == said


def test_of_simulated_devices_no_speed_is_said():
    """Guards against a figure that nobody published."""
    found = plan.make(request("small", "cpu:8", "data=2,expert=2,tensor=2", 8, 256))
    assert found.decode is None and found.prefill is None and found.tokens_per_second_per_user == 0 and found.fits


# ---- what is asked for ----


@pytest.mark.parametrize(
    ("text", "chips_and_devices"),
    [("h200x8", (8, 8)), ("v6e:2x4", (8, 8)), ("tpu7x:2x2x1", (4, 8)), ("v5p:2x2x2", (8, 8)), ("cpu:8", (8, 8))],
)
def test_slices(text, chips_and_devices):
    """Guards names of slices, and that a TPU7x is two devices."""
    found = parse_slice(text)
    assert (found.chips, found.devices) == chips_and_devices


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h200",
        "h200:8",
        "h200x0",
        "v6e",
        "v6e-8",
        "v6e:8",
        "v6e:2x2x2",
        "v5p:2x4",
        "a100x8",
        "cpu",
        "v6ex8",
        "h200x9999999",
    ],
)
def test_other_slices_are_refused_with_an_example(text):
    """Guards against a slice that is read as another: the forms of TPUs and GPUs differ."""
    with pytest.raises(SliceError, match="slice"):
        parse_slice(text)


def test_every_chip_has_its_source():
    """Guards the table: no rate without where it is published, none of them out of the world's order of magnitude."""
    for chip in CHIPS.values():
        assert chip.source
        if chip.flops is not None:
            assert 1e14 < chip.flops < 1e16 and 5e11 < (chip.hbm_bytes or 0) < 1e13
            assert 1e11 <= (chip.link_bytes or 0) < (chip.hbm_bytes or 0)
            assert 8 * GIB < chip.memory_bytes < 200 * GIB
    assert {chip.platform for chip in chips.CHIPS.values()} == {"gpu", "tpu", "cpu"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("gpt-oss-20b", "h200x1", "", 0), "--batch is 0, expected 1 to"),
        (("gpt-oss-20b", "h200x1", "", 1, 131073), "--context is 131073, expected 1 to 131072, which the model has"),
        (("gpt-oss-20b", "h200x1", "", 1, 64, 128), "--prefill is 128, expected 1 to --context, 64"),
        (("gpt-oss-20b", "h200x8", "expert=4"), "the mesh is expert=4, of 4 devices, and h200x8 has 8"),
        (("gpt-oss-20b", "h200x8", ""), "the mesh is one device, and h200x8 has 8"),
    ],
)
def test_what_cannot_be_planned_is_refused(asked, message):
    """Guards mistakes in sizes: one line that says what was expected."""
    with pytest.raises(PlanError, match=message):
        plan.make(request(*asked))


def test_a_mesh_that_does_not_come_out_even_is_refused():
    """Guards heads and experts: the sizes that would come out even are named, as where the model is loaded."""
    with pytest.raises(MeshError, match=r"8 key/value heads over tensor = 3 \(even: 1, 2, 4, 8\)"):
        plan.make(request("gpt-oss-120b", "h200x3", "tensor=3"))
    both = {**mesh.RULES, "expert_hidden": ("expert",)}
    with pytest.raises(MeshError, match="rules cut both experts and expert_hidden by expert"):
        mesh.MeshShape({"expert": 2}, both)
