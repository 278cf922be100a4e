"""Models with an adapter beside the weights: the merged model's numbers, on any mesh, alone and in a batch."""

from pathlib import Path

import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.checkpoints import huggingface, peft
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model import adapters
from gptoss_jax.model.config import parse_config
from tests import reference
from tests.gate import TinyModel, assert_agrees
from tests.goldens import make as golden
from tests.lora import RANK, factors_of

# Divisible by the meshes below, and no two sizes alike.
SHAPE = golden.two_layers_config() | {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 16}
SHAPE |= {"num_local_experts": 8, "intermediate_size": 256}
CONFIG = parse_config(SHAPE)
ALPHA = 2.0 * RANK  # a scale that bfloat16 holds: the factors stay what they are
TOKENS = golden.token_ids(150, seed=41).tolist()
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The base."""
    return TinyModel(SHAPE).write(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """Of every matrix that can have one."""
    folder = tmp_path_factory.mktemp("adapters") / "all"
    peft.write(folder, CONFIG, factors_of(CONFIG), alpha=ALPHA)
    return folder


@pytest.fixture(scope="module")
def expected(published, adapter) -> np.ndarray:
    """Logits on one device."""
    return gptoss_jax.load(published, dtype="float32", adapter=adapter).logits(TOKENS)


def test_beside_equals_merged(expected, monkeypatch):
    """Guards every adapter: left out, transposed, of another expert or scaled twice; against float64 with W + b a."""
    tensors = dict(TinyModel(SHAPE).tensors)
    recipes, targets = huggingface.mxfp4_recipes(CONFIG), adapters.targets(CONFIG)
    experts = {}
    for path, (a, b) in factors_of(CONFIG).items():
        target, (a, b) = targets[path], (a.astype(np.float64), b.astype(np.float64) * ALPHA / RANK)
        name = recipes[target.weight].tensor
        if target.experts:
            scales = tensors[name.replace("_blocks", "_scales")]
            whole = [reference.mxfp4(*packed) for packed in zip(tensors[name], scales, strict=True)]
            experts[name] = np.stack(whole) + np.einsum("eor,eri->eoi", b, a)
        else:
            delta = np.tensordot(b, a, axes=1)
            tensors[name] = tensors[name].astype(np.float64) + delta.reshape(tensors[name].shape)
    base = reference.forward(tensors, SHAPE, TOKENS)
    monkeypatch.setattr(reference, "mxfp4", lambda matrix, scales: matrix)
    merged = reference.forward(tensors | experts, SHAPE, TOKENS)
    assert golden.divergence(merged, base).mean() > 1e-2
    assert_agrees(expected, merged, max_abs=5e-3, max_kl=1e-6)


@pytest.mark.parametrize("mesh", ["data=8", "tensor=8", "expert=8", "data=2,expert=2,tensor=2"])
def test_sharded_equals_unsharded(mesh, published, adapter, expected):
    """Guards the factors' axes: summed on each device of a mesh, cut where the matrix is cut, of these experts."""
    model = gptoss_jax.load(published, mesh=mesh, dtype="float32", adapter=adapter)
    assert model.mesh.size == 8 and "with an adapter of 15 matrices" in model.source
    assert np.abs(model.logits(TOKENS) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_batched_equals_alone(published, adapter, expected):
    """Guards an adapter against the tokens of others in the batch, and prefill and decoding against each other."""
    model = gptoss_jax.load(published, dtype="float32", adapter=adapter)
    prompts = [TOKENS[first : first + count] for first, count in ((0, 5), (7, 40), (20, 1), (3, 17), (50, 70))]
    streams = []
    for slots in (1, 4):
        engine = model.engine(EngineConfig(slots=slots, max_context_tokens=256, prefill_widths=(16, 64)))
        asked = [engine.submit(Request(tuple(prompt), (), 12, GREEDY)) for prompt in prompts]
        drawn: dict[object, list[int]] = {request: [] for request in asked}
        for event in engine.run():
            drawn[event.request_id] += event.token_ids
        streams.append([drawn[request] for request in asked])
    assert streams[0] == streams[1]
    for prompt, tokens in zip(prompts, streams[0], strict=True):
        logits = model.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        assert logits.argmax(axis=-1).tolist() == tokens


def test_eight_bit_weights_take_adapters(published, adapter, expected):
    """Guards --dense int8 with an adapter: beside the scaled product, not within it."""
    found = gptoss_jax.load(published, dtype="float32", dense="int8", adapter=adapter).logits(TOKENS)
    assert 0 < golden.divergence(expected, found).mean() < 1e-2
