"""Meshes whose batch shards share experts, and tokens that are sent to theirs: an engine's answers are one device's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model.mesh import RULES, MeshShape
from tests.proofs.test_sharding import TOKENS, folder

__all__ = ["folder"]  # a fixture

OVER_DATA = {**RULES, "experts": ("data",)}
MESHES = {
    str(mesh): mesh
    for mesh in (
        MeshShape({"expert": 8}, RULES, "all_to_all"),
        MeshShape({"data": 2, "expert": 2, "tensor": 2}, RULES, "all_to_all"),
        MeshShape({"data": 8}, OVER_DATA, "gather"),
        MeshShape({"data": 8}, OVER_DATA, "all_to_all"),
        MeshShape({"data": 4, "tensor": 2}, OVER_DATA, "gather"),
    )
}
SIZES = EngineConfig(
    slots=8, max_context_tokens=128, prefill_widths=(16,), deterministic=False, prefix_snapshots=0
)  # more slots than prompts: some shards of the batch have none
PROMPTS = [tuple(TOKENS[n : n + length]) for n, length in ((0, 37), (40, 3), (90, 16))]


def _skewed(params):
    """The weights, but for routers that give every token the same expert, before others."""
    params = jax.tree.map(lambda x: x, params)
    for layer in params["layers"].values():
        bias = layer["moe"]["router"]["bias"]
        layer["moe"]["router"]["bias"] = bias + jnp.zeros_like(bias).at[5].set(100)
    return params


def _answers(model, params) -> list[list[tuple[int, float]]]:
    engine = model.engine(SIZES)
    found = []
    for weights in params:
        engine.runner._params = weights
        found += _drawn(engine, PROMPTS)
    return found


def _drawn(engine, prompts) -> list[list[tuple[int, float]]]:
    """Greedy tokens after each prompt, and their log probabilities."""
    ids = [engine.submit(Request(prompt, (), 4, SamplingParams(temperature=0.0))) for prompt in prompts]
    answers: dict[int, list[tuple[int, float]]] = {i: [] for i in ids}
    for event in engine.run():
        answers[event.request_id] += zip(event.token_ids, event.logprobs, strict=True)
    return [*answers.values()]


@pytest.fixture(scope="module")
def expected(folder):
    """Of one device: greedy tokens after each of PROMPTS and their log probabilities, evenly routed and skewed."""
    alone = gptoss_jax.load(folder, dtype="float32")
    return _answers(alone, [alone.params, _skewed(alone.params)])


@pytest.mark.parametrize("name", MESHES)
def test_answers_are_those_of_one_device(name, folder, expected):
    """Guards prefill in chunks and decoding of ragged prompts, slots without a request, all tokens at one expert."""
    model = gptoss_jax.load(folder, mesh=MESHES[name], dtype="float32")
    blocks = model.params["layers"][0]["moe"]["down"]["blocks"]
    cut = model.sharding.size("experts"), model.sharding.size("expert_hidden")
    assert {shard.data.shape for shard in blocks.addressable_shards} == {(8 // cut[0], 96, 8 // cut[1], 16)}
    found = _answers(model, [model.params, _skewed(model.params)])
    assert [[token for token, _ in answer] for answer in found] == [[t for t, _ in answer] for answer in expected]
    logprobs = [[logprob for answer in answers for _, logprob in answer] for answers in (found, expected)]
    np.testing.assert_allclose(*logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MESHES if name.startswith("data=8")])
def test_a_deterministic_engine_gives_the_same_bits_beside_any_other_batch_shard(name, folder):
    """Guards batch invariance where the tokens of all batch shards meet at the experts: alone, and on other shards."""
    sizes = dataclasses.replace(SIZES, deterministic=True)
    engine = gptoss_jax.load(folder, mesh=MESHES[name]).engine(sizes)
    together = _drawn(engine, PROMPTS)
    assert _drawn(engine, PROMPTS[::-1]) == together[::-1]
    assert _drawn(engine, PROMPTS[1:2]) == together[1:2]
