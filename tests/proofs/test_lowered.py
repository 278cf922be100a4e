"""`model.lower` beside the engine that runs: the same program, of shapes alone."""

import re

import jax
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.engine.request import EngineConfig
from gptoss_jax.hlo import module, sent
from gptoss_jax.model.mesh import MeshError
from tests.gate import TinyModel
from tests.proofs.test_sharding import CONFIG

MESH = "data=2,expert=2,tensor=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published checkpoint of the meshes' tests."""
    return TinyModel(CONFIG).write(tmp_path_factory.mktemp("lowered"))


@pytest.fixture(scope="module")
def alone(folder):
    """The model on one device."""
    return gptoss_jax.load(folder)


def _said(each: sent.Sent) -> tuple[str, int, int, str]:
    return each.kind, each.bytes, each.devices, each.op_name


def test_it_is_the_engines_own_program(folder, alone):
    """Guards what is read of a lowered step: an engine on that mesh sends and holds just the same."""
    loaded = gptoss_jax.load(folder, mesh=MESH)
    sizes = EngineConfig(slots=8, max_context_tokens=256, prefill_widths=(16,), deterministic=False, prefix_snapshots=0)
    run = loaded.engine(sizes).runner.compiled.decode
    expected = [_said(each) for each in sent.of_module(module.parse(run.as_text()))]
    for step in (loaded.lower(8, 256), alone.lower(8, 256, MESH)):
        found = [_said(each) for each in step.collectives]
        assert sorted(found) == sorted(expected) and found
        assert step.memory.argument_bytes == run.memory_analysis().argument_size_in_bytes
        assert sum(each.bytes for each in step.buffers if each.is_argument) == step.memory.argument_bytes


def test_a_lowered_step_says_all_its_parts(alone):
    """Guards the object that people hold: work by scope, shardings as the compiler has them, texts."""
    one, cut = alone.lower(8, 256), alone.lower(8, 256, MESH)
    assert {"attention", "experts", "unembedding"} == cut.flops.keys()
    assert cut.flops["unembedding"] == one.flops["unembedding"] / 8  # two data shards, four of the vocabulary
    assert one.collectives == [] and one.launches > 0
    leaf = next(leaf for leaf in cut.shardings if leaf.path == "params/layers/0/moe/down/blocks")
    weights = alone.params["layers"][0]["moe"]["down"]["blocks"]
    assert leaf.shape == weights.shape and leaf.shard_bytes == weights.nbytes / 4
    assert np.prod(leaf.shard_shape) == leaf.shard_bytes
    assert re.search(r"^HloModule jit_decode", cut.text) and "stablehlo" in cut.stablehlo
    chunk = alone.lower(8, 256, MESH, prefill_tokens=16)
    assert chunk.shape.name == "prefill" and chunk.flops["experts"] == 16 * cut.flops["experts"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 256), "batch is 0, expected 1 or more"),
        ((8, 10**9), "context_tokens is 1000000000, expected 1 to"),
        ((8, 256, "expert=3"), "the mesh does not divide the model"),
        ((3, 256, "data=2"), "3 slots of the batch over data = 2"),
        ((8, 256, f"expert={jax.device_count() * 8}"), "but there are 8"),
    ],
)
def test_what_cannot_be_lowered_is_refused(alone, sizes, message):
    """Guards mistakes: each names what was got and what was expected, and nothing is compiled."""
    with pytest.raises((gptoss_jax.GptossError, MeshError), match=message):
        alone.lower(*sizes)
