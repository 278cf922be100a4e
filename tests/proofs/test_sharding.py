"""Meshes: the same numbers on eight devices as on one, and refusals that name the way out."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model import sharding
from gptoss_jax.model.config import parse_config
from gptoss_jax.model.mesh import num_devices
from gptoss_jax.model.sharding import MeshError
from tests.gate import TinyModel
from tests.goldens import make as golden

# Divisible by the meshes below, and still no two sizes alike that an exchange of axes could hide behind.
CONFIG = golden.tiny_config() | {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "num_local_experts": 8,
    "intermediate_size": 256,
    "vocab_size": 512,
}
TOKENS = golden.token_ids(300, seed=5).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published checkpoint."""
    return TinyModel(CONFIG).write(tmp_path_factory.mktemp("shardable"))


@pytest.fixture(scope="module")
def expected(folder):
    """Logits on one device."""
    return gptoss_jax.load(folder, dtype="float32").logits(TOKENS)


MESHES = [
    "data=8",
    "expert=8",
    "tensor=8",
    "data=2,expert=2,tensor=2",
    "expert=4,tensor=2",
    "data=2,tensor=4",
    "sequence=8",
    "data=2,sequence=4",
    "expert=2,tensor=2,sequence=2",
]


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_equals_unsharded(mesh, folder, expected):
    """Guards collectives: a bias or sink counted once per device, heads in another order, experts of another device."""
    model = gptoss_jax.load(folder, mesh=mesh, dtype="float32")
    assert model.mesh.size == 8
    scale = np.abs(expected).max()
    assert np.abs(model.logits(TOKENS) - expected).max() <= 1e-5 * scale


FILES = sorted((golden.ROOT / "configs" / "meshes").glob("*.json"))
SAME = {path.read_text(): str(path) for path in FILES if num_devices(path) <= 8}  # one of those that say the same
PRESETS = sorted(SAME.values())
COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


@pytest.mark.parametrize("mesh", [*MESHES, *PRESETS])
def test_a_decoding_step_has_few_collectives(mesh, folder):
    """Guards the wires: one sum after attention and one after the experts, where they are cut, and no slices moved.

    Where positions are cut, each layer of full attention has a maximum and one sum of two arrays before.
    Beside the layers: the embedding's rows, and the sampler's reductions over the vocabulary and over slots.
    """
    model = gptoss_jax.load(folder, mesh=mesh)
    logical = ("heads", "experts", "expert_hidden", "positions")
    cut = {name: model.sharding.size(name) > 1 for name in logical}
    engine = model.engine(EngineConfig(slots=model.sharding.size("batch")))
    found = [
        (kind[1], "/layer_" in line)
        for line in engine.runner.compiled.decode.as_text().splitlines()
        if (kind := COLLECTIVE.search(line))
    ]
    in_layers = [kind for kind, is_in_layer in found if is_in_layer]
    expected = model.config.num_layers * (cut["heads"] + (cut["experts"] or cut["expert_hidden"]))
    expected += 2 * cut["positions"] * model.config.layer_types.count("full_attention")
    assert in_layers == ["all-reduce"] * expected
    assert {kind for kind, _ in found} <= {"all-reduce", "all-gather"}
    assert len(found) - len(in_layers) <= 20


def test_sharded_equals_unsharded_with_dense_int8(folder):
    """Guards scales: of whole rows of the inputs, wherever those are cut, and each with its own output."""
    one = gptoss_jax.load(folder, dtype="float32", dense="int8").logits(TOKENS)
    for mesh in MESHES:
        sharded = gptoss_jax.load(folder, mesh=mesh, dtype="float32", dense="int8").logits(TOKENS)
        assert np.abs(sharded - one).max() <= 1e-5 * np.abs(one).max()


def test_generation_on_a_mesh_equals_one_device(folder):
    """Guards the engine's own placement: slots on data shards, pages of a slot in its shard's pool."""
    alone = gptoss_jax.load(folder, dtype="float32")
    answers = []
    for mesh in (None, "data=2,expert=2,tensor=2"):
        model = gptoss_jax.load(folder, mesh=mesh, dtype="float32")
        events = model.generate(TOKENS[:150], max_new_tokens=20, temperature=0.0, stop_ids=())
        answers.append([token for event in events for token in event.token_ids])
    assert answers[0] == answers[1]
    logits = alone.logits(TOKENS[:150] + answers[0])
    assert logits.argmax(-1)[149:-1].tolist() == answers[0]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("mesh", ["data=2", "data=2,expert=2,tensor=2"])
def test_slots_on_other_data_shards_do_not_mix(mesh, deterministic, folder):
    """Guards sums over the wrong mesh axis: slots with different prompts, which `logits` cannot show."""
    prompts = [tuple(TOKENS[n : 2 * n]) for n in (40, 70, 90, 11)]
    answers = []
    for where in (None, mesh):
        engine = gptoss_jax.load(folder, mesh=where, dtype="float32").engine(
            EngineConfig(slots=4, max_context_tokens=128, prefill_widths=(64,), deterministic=deterministic)
        )
        for prompt in prompts:
            engine.submit(Request(prompt, (), 8, SamplingParams(temperature=0.0)))
        answers.append([(event.request_id, event.token_ids) for event in engine.run()])
    assert _joined(answers[0]) == _joined(answers[1])


def _joined(events) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {}
    for request_id, tokens in events:
        answers.setdefault(request_id, []).extend(tokens)
    return answers


DRAWN = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0.7, top_k=40, seed=2),
    SamplingParams(top_p=0.8, min_p=0.01, seed=3, top_logprobs=2),
    SamplingParams(seed=4, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.5),
    SamplingParams(temperature=0.0, frequency_penalty=0.9, logit_bias={7: 2.0}, banned_ids=(1, 2), top_logprobs=3),
    SamplingParams(temperature=1.5, top_k=300, top_p=0.95, seed=5, logit_bias={500: 3.0}),
]


def test_a_vocabulary_over_devices_draws_what_one_device_draws(folder):
    """Guards sampling from logits that no device has whole: every option, reported log probabilities, the likeliest."""
    events = []
    for mesh in (None, "data=2,expert=2,tensor=2"):
        model = gptoss_jax.load(folder, mesh=mesh, dtype="float32")
        assert model.sharding.size("vocab") == (1 if mesh is None else 4)
        engine = model.engine(
            EngineConfig(slots=6, max_context_tokens=128, prefill_widths=(64,), deterministic=False, prefix_snapshots=0)
        )
        for i, params in enumerate(DRAWN):
            engine.submit(Request(tuple(TOKENS[9 * i : 9 * i + 20]), (), 12, params))
        events.append(list(engine.run()))
    one, cut = (_joined((event.request_id, event.token_ids) for event in side) for side in events)
    assert len({tuple(tokens) for tokens in one.values()}) == len(DRAWN)
    assert one == cut
    for asked in range(len(DRAWN)):
        reported = [[x for e in side if e.request_id == asked for x in e.logprobs] for side in events]
        np.testing.assert_allclose(*reported, rtol=1e-5, atol=1e-5)
        tops = [[x for e in side if e.request_id == asked for top in e.top_logprobs for x in top] for side in events]
        assert [token for token, _ in tops[0]] == [token for token, _ in tops[1]]
        assert bool(tops[0]) == bool(DRAWN[asked].top_logprobs)


def test_a_mesh_as_jax_makes_it(folder, expected):
    """Guards the public form: jax.make_mesh's axes are Explicit by default."""
    for mesh in (jax.make_mesh((1, 4, 2, 1), sharding.MESH_AXES), jax.make_mesh((2, 4), ("tensor", "expert"))):
        model = gptoss_jax.load(folder, mesh=mesh, dtype="float32")
        assert model.mesh.size == 8
        assert np.abs(model.logits(TOKENS) - expected).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(MeshError, match="unknown mesh axis 'model', expected data, expert, tensor, seq"):
        gptoss_jax.load(folder, mesh=jax.make_mesh((8,), ("model",)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"axes": {"data": 2}, "rules": {"vocab": ["data"]}}, "cut both batch and vocab by data: sums would mix"),
        ({"axes": {"data": 2}, "rules": {"pages": []}}, "cut pages and batch differently"),
        ({"axes": {"data": 2}, "rules": {"positions": ["data"]}}, "cut both batch and positions by data: sums would"),
        (
            {"axes": {"tensor": 2}, "rules": {"positions": ["tensor"]}},
            "cut both heads and positions by tensor: a mesh axis can cut one axis of the keys only",
        ),
        ({"axes": [1]}, "expected"),
        ({"axes": {}, "rules": {"heads": "expert"}}, "expected"),
        ({"axes": {"expert": True}}, "mesh axis expert=True, expected a whole number"),
        ({"axes": {}, "rules": {"head": []}}, "unknown logical axis 'head' in rules"),
    ],
)
def test_bad_mesh_files_are_refused(content, message, tmp_path):
    """Guards against rules that would mix slots, and against tracebacks."""
    (tmp_path / "mesh.json").write_text(json.dumps(content))
    with pytest.raises(MeshError, match=message):
        sharding.make(tmp_path / "mesh.json")


def test_weights_lie_where_the_table_says(folder):
    """Guards the restore: each device holds its part of the experts and no more."""
    model = gptoss_jax.load(folder, mesh="expert=4,tensor=2")
    blocks = model.params["layers"][0]["moe"]["down"]["blocks"]
    assert blocks.shape == (8, 96, 8, 16)
    assert {shard.data.shape for shard in blocks.addressable_shards} == {(2, 96, 4, 16)}
    q = model.params["layers"][0]["attention"]["q"]["weight"]
    assert {shard.data.shape for shard in q.addressable_shards} == {(12, 16, 96)}


def test_rules_from_a_file(folder, expected, tmp_path):
    """Guards the file form: a researcher's own rule reaches the weights and leaves the numbers alone."""
    path = tmp_path / "mesh.json"
    path.write_text(json.dumps({"axes": {"expert": 4, "tensor": 2}, "rules": {"heads": ["expert", "tensor"]}}))
    model = gptoss_jax.load(folder, mesh=path, dtype="float32")
    q = model.params["layers"][0]["attention"]["q"]["weight"]
    assert {shard.data.shape for shard in q.addressable_shards} == {(3, 16, 96)}
    assert np.abs(model.logits(TOKENS) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor=16", "16 devices, but there are 8; .* CPU: XLA_FLAGS=--xla_force_host_platform_device_count=16"),
        ("tensors=2", "unknown mesh axis 'tensors', expected data, expert, tensor, seq"),
        ("tensor=two", "mesh 'tensor=two', expected for example data=1,expert=4,tensor=2"),
        ("tensor=0", "mesh axis tensor=0, expected a whole number from 1 to 999999999"),
        ("no-such.json", "mesh file no-such.json"),
    ],
)
def test_bad_meshes_are_refused(mesh, message):
    """Guards the message: a typo in a mesh must say what would be right."""
    with pytest.raises(MeshError, match=message):
        sharding.make(mesh)


def test_uneven_cuts_name_the_legal_sizes():
    """Guards MXFP4 blocks: 90 blocks do not go into 4, and a cut scale block would be silently wrong."""
    config = parse_config(json.loads((golden.ROOT / "configs" / "gpt-oss-20b.json").read_text()))
    with pytest.raises(MeshError, match=r"90 MXFP4 blocks of 32 .* over tensor = 4 \(even: 1, 2, 3, 5, 6, 9, 10"):
        sharding.make("tensor=4").check(config, pads=False)
    with pytest.raises(MeshError, match=r"3 MXFP4 blocks of 32 in an expert's width over tensor = 8 \(even: 1, 2, 3\)"):
        sharding.make("tensor=8").check(dataclasses.replace(config, intermediate_size=96))
    with pytest.raises(MeshError, match=r"3 slots of the batch over data = 2"):
        sharding.make("data=2").check(config, slots=3)
    with pytest.raises(MeshError, match=r"2048 pages of 64 tokens in the context over sequence = 3 \(even: 1, 2, 4, 8"):
        sharding.make("sequence=3").check(config)


def test_one_mesh_axis_cannot_cut_two_axes_of_an_array():
    """Guards rules from files: JAX's own message for this names neither the rule nor the array."""
    rules = {**sharding.RULES, "expert_hidden": ("expert",)}
    clash = sharding.Sharding(
        jax.make_mesh((1, 8, 1, 1), sharding.MESH_AXES, axis_types=(sharding.AxisType.Auto,) * 4), rules
    )
    with pytest.raises(MeshError, match="a mesh axis can cut one of them only"):
        clash.spec(("experts", "expert_hidden"))
