"""The prefix cache over a real model: every bit of every answer is what it is without one."""

import dataclasses

import jax
import pytest

import gptoss_jax
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling_params import SamplingParams
from tests.unit.test_engine import _mixed_requests, _prompt, _streams, folder

__all__ = ["folder"]  # a fixture

CONFIG = EngineConfig(slots=4, max_context_tokens=640, prefill_widths=(16, 64), deterministic=True)
KERNELS = pytest.mark.parametrize("kernels", ["auto", "reference"])


def without(config: EngineConfig) -> EngineConfig:
    """The same without a prefix cache."""
    return dataclasses.replace(config, prefix_snapshots=0)


def few_beginnings(count: int) -> list[Request]:
    """Requests of all options, each after one of three beginnings, or after none."""
    beginnings = [_prompt(200, 7), _prompt(200, 7)[:130] + _prompt(70, 8), _prompt(330, 9), ()]
    return [
        dataclasses.replace(request, token_ids=beginnings[i % 4] + request.token_ids[:150])
        for i, request in enumerate(_mixed_requests(count))
    ]


@KERNELS
@pytest.mark.parametrize("mesh", [None, "data=2"])
def test_every_bit_is_what_it_is_without_it(folder, kernels, mesh):
    """Guards all of it: shared pages, restored rings, chunk boundaries, data shards; in any order, again and again."""
    model = gptoss_jax.load(folder, kernels=kernels, mesh=mesh)
    requests = few_beginnings(24)
    expected = _streams(model.engine(without(CONFIG)), requests)
    engine = model.engine(CONFIG)
    assert _streams(engine, requests) == expected
    first = engine.statistics.cached_prompt_tokens
    assert first > sum(len(request.token_ids) for request in requests) / 3
    assert _streams(engine, requests[::-1]) == expected[::-1]
    assert engine.statistics.cached_prompt_tokens > 2 * first


@KERNELS
def test_preempted_requests_hit_and_keep_their_bits(folder, kernels):
    """Guards a pool that runs dry: who gives way finds its prompt again, or what is left of it."""
    model = gptoss_jax.load(folder, kernels=kernels)
    config = dataclasses.replace(CONFIG, pool_tokens=640)
    sampling = [SamplingParams(seed=i, top_logprobs=2, frequency_penalty=0.3) for i in range(4)]
    requests = [Request((*_prompt(140), i), (), 150, options) for i, options in enumerate(sampling)]
    expected = _streams(model.engine(without(dataclasses.replace(config, pool_tokens=None))), requests)
    engine = model.engine(config)
    assert _streams(engine, requests) == expected
    assert engine.statistics.preemptions > 0
    assert engine.statistics.cached_prompt_tokens > 3 * 128  # more than the others' first reading
    assert all(pool.num_free == pool.num_pages for pool in engine._placement._pools)


def test_a_batched_engine_draws_the_same_greedy_tokens(folder):
    """Guards engines whose slots share their sums: rows that arrive together and later, greedy, in float32."""
    model = gptoss_jax.load(folder, dtype="float32", kernels="reference")
    config = dataclasses.replace(CONFIG, deterministic=False)
    requests = [dataclasses.replace(r, sampling=SamplingParams(temperature=0.0)) for r in few_beginnings(12)]
    expected, found = (_streams(model.engine(c), requests) for c in (without(config), config))
    assert [[token for token, *_ in stream] for stream in found] == [[t for t, *_ in stream] for stream in expected]


def test_generate_and_answers_find_what_they_read_before(folder):
    """Guards the engine that a model keeps: a second call reads what is new, and gives what a new model gives."""
    prompts = [[*_prompt(300), i] for i in range(3)]
    model = gptoss_jax.load(folder)

    def generate(model, ids):
        events = model.generate(ids, max_new_tokens=5, stop_ids=())
        return [pair for event in events for pair in zip(event.token_ids, event.logprobs, strict=True)]

    found = [generate(model, ids) for ids in prompts]
    assert _hits(model) == 2 * 256
    assert found == [generate(gptoss_jax.load(folder), ids) for ids in prompts]
    for answer in model.answers(prompts, max_new_tokens=3):
        assert answer.finish_reason == "length"
    assert _hits(model) == 2 * 256


def _hits(model) -> int:
    return model._engine.statistics.cached_prompt_tokens


def test_off_costs_nothing_and_on_changes_no_program(folder):
    """Guards the switch: off, no array and no program more; on, the model's own programs are the same to the letter."""
    model = gptoss_jax.load(folder)
    before, engines, num_arrays = {id(array) for array in jax.live_arrays()}, [], []
    for config in (without(CONFIG), CONFIG):
        engines.append(model.engine(config))
        num_arrays.append(sum(id(array) not in before for array in jax.live_arrays()))
    off, on = (engine.runner.compiled for engine in engines)
    assert (off.save_rings, off.restore_rings) == (None, None)
    assert _texts(off) == _texts(on)
    rings = model.config.num_layers // 2 * 2  # keys and values of each sliding-window layer
    assert num_arrays[1] == 2 * num_arrays[0] + rings


def _texts(compiled) -> dict[str, str]:
    programs = {"decode": compiled.decode, "admit": compiled.admit, **compiled.prefill}
    return {name: program.as_text() for name, program in programs.items()}
