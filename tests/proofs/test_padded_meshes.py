"""Experts that a mesh does not cut into whole MXFP4 blocks: padded with zeros, on eight devices the same as on one."""

import jax
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.checkpoints import peft
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model import mesh as meshes
from gptoss_jax.model.config import parse_config
from gptoss_jax.planner import memory
from gptoss_jax.planner.chips import CHIPS
from gptoss_jax.planner.memory import Workload
from tests.gate import TinyModel
from tests.lora import RANK, factors_of
from tests.proofs.test_sharding import CONFIG, TOKENS
from tests.unit.test_damaged_checkpoints import convert

NARROW = CONFIG | {"intermediate_size": 288}  # nine blocks: of tensor=4 three each, of tensor=8 two, the last of zeros
WIDTHS = {"tensor=8": 512, "data=2,tensor=4": 384, "expert=2,tensor=4": 384, "tensor=4,sequence=2": 384}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published checkpoint."""
    return TinyModel(NARROW).write(tmp_path_factory.mktemp("narrow"))


@pytest.fixture(scope="module")
def alone(folder):
    """The model on one device."""
    return gptoss_jax.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def expected(alone):
    """Its logits."""
    return alone.logits(TOKENS)


def _assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("mesh", WIDTHS)
def test_padded_equals_unsharded(mesh, folder, expected):
    """Guards blocks, scales and biases that end at different places, and the plan: zeros are counted as they lie."""
    model = gptoss_jax.load(folder, mesh=mesh, dtype="float32")
    _assert_close(model.logits(TOKENS), expected)
    down = model.params["layers"][0]["moe"]["down"]["blocks"]
    assert down.shape == (8, 96, WIDTHS[mesh] // 32, 16) and not np.asarray(down)[:, :, 9:].any()
    layers = [layer["moe"][name] for layer in model.params["layers"].values() for name in ("gate_up", "down")]
    held = sum(array.addressable_shards[-1].data.nbytes for array in jax.tree.leaves(layers))
    workload = Workload(model.sharding.size("batch"), 256, 16)
    assert held == memory.memory(model.config, meshes.read(mesh), CHIPS["cpu"], workload).experts


def test_a_converted_checkpoint_is_padded_as_it_is_read(folder, expected, tmp_path):
    """Guards the other reader, which restores each device's part, and the portable kernel."""
    convert(folder, tmp_path / "converted")
    model = gptoss_jax.load(tmp_path / "converted", mesh="tensor=8", dtype="float32", kernels="reference")
    _assert_close(model.logits(TOKENS), expected)


def test_adapters_are_padded_too(folder, tmp_path):
    """Guards factors of the experts, which would be cut at other columns than the matrices beside them."""
    config = parse_config(NARROW)
    peft.write(tmp_path / "adapter", config, factors_of(config, ["experts"]), alpha=2.0 * RANK)
    one, eight = (
        gptoss_jax.load(folder, mesh=mesh, dtype="float32", adapter=tmp_path / "adapter").logits(TOKENS[:100])
        for mesh in (None, "tensor=8")
    )
    _assert_close(eight, one)


def test_tokens_that_all_take_the_same_experts(tmp_path, monkeypatch):
    """Guards imbalance: a device of experts that gets every token, and one that gets none, while all are padded."""
    make = TinyModel(NARROW)
    folder = make.write(tmp_path)
    one = gptoss_jax.load(folder, dtype="float32")
    eight = gptoss_jax.load(folder, mesh="expert=2,tensor=4", dtype="float32")
    for model in (one, eight):
        for layer in model.params["layers"].values():
            bias = layer["moe"]["router"]["bias"]
            added = np.where(np.arange(bias.size) < 4, 100, 0).astype(bias.dtype)
            layer["moe"]["router"]["bias"] = jax.device_put(np.asarray(bias) + added, bias.sharding)
    _assert_close(eight.logits(TOKENS[:150]), one.logits(TOKENS[:150]))


def test_greedy_answers_are_those_of_one_device(folder, alone):
    """Guards decoding: ragged prompts in one batch, each token the likeliest on one device."""
    sizes = EngineConfig(slots=3, max_context_tokens=256, prefill_widths=(64,), deterministic=False, prefix_snapshots=0)
    engine = gptoss_jax.load(folder, mesh="tensor=8", dtype="float32").engine(sizes)
    prompts = [TOKENS[:150], TOKENS[7:10], TOKENS[20:85]]
    answers = {engine.submit(Request(tuple(p), (), 8, SamplingParams(temperature=0.0))): [] for p in prompts}
    for event in engine.run():
        answers[event.request_id] += event.token_ids
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        assert alone.logits(prompt + answer).argmax(-1)[len(prompt) - 1 : -1].tolist() == answer
