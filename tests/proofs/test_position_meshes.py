"""A mesh that cuts keys and values by position: an engine's answers and its devices' memory, on eight devices."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model import kv_cache, sharding
from gptoss_jax.model import mesh as meshes
from gptoss_jax.planner import memory
from gptoss_jax.planner.chips import CHIPS
from gptoss_jax.planner.memory import Workload
from tests.goldens import make as golden
from tests.proofs.test_sharding import folder

__all__ = ["folder"]  # a fixture

TOKENS = golden.token_ids(1100, seed=6).tolist()
PRODUCT = "configs/meshes/expert2-tensor2-sequence2.json"
MESHES = ("sequence=8", "data=2,sequence=4", PRODUCT)
SIZES = EngineConfig(slots=4, max_context_tokens=1024, prefill_widths=(192,), pool_tokens=4096, prefix_snapshots=0)
PROMPTS = [TOKENS[:n] for n in (700, 3, 65, 257, 128, 480)]  # ends of pages of 64 to 512 tokens, and between them


@pytest.fixture(scope="module")
def alone(folder):
    """The model on one device."""
    return gptoss_jax.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def answers(alone):
    """Ten greedy tokens after each of PROMPTS, and their log probabilities, on one device."""
    return _answers(alone.engine(SIZES))


def _answers(engine, prompts=PROMPTS) -> list[list[tuple[int, float]]]:
    ids = [engine.submit(Request(tuple(p), (), 10, SamplingParams(temperature=0.0))) for p in prompts]
    found: dict[int, list[tuple[int, float]]] = {i: [] for i in ids}
    for event in engine.run():
        found[event.request_id] += zip(event.token_ids, event.logprobs, strict=True)
    return list(found.values())


def _assert_alike(found, expected) -> None:
    assert [[token for token, _ in answer] for answer in found] == [[t for t, _ in answer] for answer in expected]
    logprobs = [[logprob for answer in answers for _, logprob in answer] for answers in (found, expected)]
    np.testing.assert_allclose(*logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", ["sequence=2", "sequence=4,data=2"])
def test_long_prompts_equal_one_device(mesh, folder, alone):
    """Guards several pages of each shard, in chunks that begin and end within them."""
    expected = alone.logits(TOKENS)
    found = gptoss_jax.load(folder, mesh=mesh, dtype="float32").logits(TOKENS)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_devices_of_experts_can_hold_positions(folder, alone, tmp_path):
    """Guards the rule in a file: any mesh axis that cuts neither slots nor heads can cut positions."""
    path = tmp_path / "mesh.json"
    path.write_text(json.dumps({"axes": {"expert": 4, "tensor": 2}, "rules": {"positions": ["expert"]}}))
    model = gptoss_jax.load(folder, mesh=path, dtype="float32")
    assert kv_cache.page_tokens(model.sharding) == 256
    expected = alone.logits(TOKENS[:300])
    assert np.abs(model.logits(TOKENS[:300]) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("mesh", "deterministic"), [*((mesh, False) for mesh in MESHES), (MESHES[1], True)])
def test_answers_are_those_of_one_device(mesh, deterministic, folder, answers):
    """Guards prefill and decoding of ragged prompts at once: pages of all shards, slots of data shards, both forms."""
    model = gptoss_jax.load(folder, mesh=mesh, dtype="float32")
    engine = model.engine(dataclasses.replace(SIZES, deterministic=deterministic))
    _assert_alike(_answers(engine), answers)
    assert all(pool.num_free == pool.num_pages for pool in engine._placement._pools)


def test_a_small_pool_and_shared_prompts(folder, alone):
    """Guards pages that are given back and found again, each of them on every shard: preemption, the prefix cache."""
    sizes = dataclasses.replace(SIZES, slots=3, prefill_widths=(64,), pool_tokens=1024, prefix_snapshots=None)
    prompts = [[*TOKENS[:400], i] for i in range(4)] + [TOKENS[5:300], TOKENS[9:500]]
    expected = _answers(alone.engine(SIZES), prompts)
    engine = gptoss_jax.load(folder, mesh="sequence=2,tensor=4", dtype="float32").engine(sizes)
    assert engine.runner.page_tokens == 128 and engine.runner.pages_per_shard == 8
    _assert_alike(_answers(engine, prompts), expected)
    assert engine.statistics.cached_prompt_tokens >= 3 * 384


@pytest.mark.parametrize("mesh", [*MESHES, "expert=2,tensor=2,sequence=2"])
def test_a_device_holds_what_the_plan_says(mesh, alone):
    """Guards memory: the keys of a context are cut by position, and rings are not."""
    config, laid_out, context, dtype = alone.config, sharding.make(mesh), 8192, jnp.dtype(jnp.bfloat16)
    slots = laid_out.size("batch")
    sizes = {
        "pages": slots * kv_cache.num_pages(context, kv_cache.page_tokens(laid_out)),
        "max_context_tokens": context,
    }
    cache = kv_cache.allocator(config, laid_out, slots=slots, dtype=dtype, **sizes)()
    held = sum(array.addressable_shards[0].data.nbytes for array in (*cache.k, *cache.v))
    assert held == memory.memory(config, meshes.read(mesh), CHIPS["cpu"], Workload(slots, context, 128)).kv_cache
    whole = config.cache_bytes(context) // laid_out.size("heads")
    rings = config.cache_bytes(128) // 2 // laid_out.size("heads")
    assert held - rings == (whole - rings) // laid_out.size("positions")


def test_generate_runs_on_such_a_mesh(folder, alone):
    """Guards the call that people make, whose answer is the likeliest token after each on one device."""
    prompt = TOKENS[:200]
    events = gptoss_jax.load(folder, mesh=PRODUCT, dtype="float32").generate(
        prompt, max_new_tokens=8, max_context_tokens=256, temperature=0.0, stop_ids=()
    )
    answer = [token for event in events for token in event.token_ids]
    assert alone.logits(prompt + answer).argmax(-1)[len(prompt) - 1 : -1].tolist() == answer
