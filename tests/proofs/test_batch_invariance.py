"""Batch invariance: 64 mixed requests give the same bits alone, in batches of any size, in any order."""

import collections
import dataclasses

import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.engine.scheduler import Scheduler
from tests.unit.test_engine import GREEDY, _mixed_requests, _prompt, _streams, folder

__all__ = ["folder"]  # a fixture


@pytest.fixture(scope="module", params=["auto", "reference"])
def half(folder, request):
    """The model in bfloat16, as most people run it, with this machine's kernels and with XLA's sums alone."""
    return gptoss_jax.load(folder, kernels=request.param)


@pytest.fixture(scope="module")
def alone(half):
    """What each of 64 mixed requests draws with nothing beside it."""
    engine = half.engine(EngineConfig(slots=1, max_context_tokens=384, prefill_widths=(16, 64)))
    assert engine.runner.deterministic
    return [_streams(engine, [request])[0] for request in _mixed_requests(64)]


@pytest.mark.parametrize("slots", [3, 8, 9, 64])
def test_deterministic_requests_are_bitwise_the_same_in_any_batch_and_order(half, alone, slots):
    """Guards batch invariance: tokens and log probabilities of every bit, in batches of any size, in any order."""
    engine = half.engine(EngineConfig(slots=slots, max_context_tokens=384, prefill_widths=(16, 64), deterministic=True))
    requests = _mixed_requests(64)
    assert _streams(engine, requests) == alone
    order = np.random.default_rng(slots).permutation(64)
    assert _streams(engine, [requests[i] for i in order]) == [alone[i] for i in order]


def test_an_unrelated_long_prompt_changes_no_bit(half, alone):
    """Guards sequences that run while the prompt of another is read in chunks beside them."""
    engine = half.engine(EngineConfig(slots=2, max_context_tokens=4096, prefill_widths=(16, 64), deterministic=True))
    asked = engine.submit(_mixed_requests(3)[2])
    events = engine.tick() + engine.tick() + engine.tick() + engine.tick()
    engine.submit(Request(_prompt(3000), (), 5, SamplingParams()))
    events += list(engine.run())
    drawn = [pair for e in events if e.request_id == asked for pair in zip(e.token_ids, e.logprobs, strict=True)]
    assert drawn == [(token, logprob) for token, logprob, _ in alone[2]]


def test_fast_mode_gives_up_the_last_bits(half, alone, capsys):
    """Measures what `deterministic=False` gives up: log probabilities of the same tokens, alone and in a batch of 8."""
    engine = half.engine(EngineConfig(slots=8, max_context_tokens=384, prefill_widths=(16, 64), deterministic=False))
    differences, same = [], 0
    for ours, theirs in zip(_streams(engine, _mixed_requests(64)), alone, strict=True):
        same += [token for token, *_ in ours] == [token for token, *_ in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            if mine[0] != other[0]:
                break  # after another token everything may differ
            differences.append(abs(mine[1] - other[1]))
    with capsys.disabled():
        print(
            f"\nfast mode, batch of 8, {half.kernels.split('(')[0].strip()}: {same} of 64 answers the same, "
            f"logprobs off by up to {max(differences):.1e}"
        )
    assert len(differences) > 300
    assert max(differences) < 0.1
    assert same > 32


SMALL_POOL = EngineConfig(slots=4, max_context_tokens=384, prefill_widths=(16, 64), pool_tokens=384)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "batched"])
def test_a_preempted_request_goes_on_where_it_was(folder, deterministic, kernels):
    """Guards a pool that runs dry: every token and log probability is that of a run with memory for all, to the bit.

    A batched engine reads the answer so far as a prompt: what was streamed stays, and greedy tokens follow alike.
    """
    model = gptoss_jax.load(folder, dtype="float32", kernels=kernels)
    sampling_params = [SamplingParams(seed=i, top_logprobs=2, frequency_penalty=0.3) for i in range(4)]
    requests = [Request(_prompt(20 + i), (), 150, p) for i, p in enumerate(sampling_params)]
    if not deterministic:
        requests = [dataclasses.replace(request, sampling=GREEDY) for request in requests]
    config = dataclasses.replace(SMALL_POOL, deterministic=deterministic)
    expected = _streams(model.engine(dataclasses.replace(config, pool_tokens=None)), requests)
    preempted = []

    class Watched(Scheduler):
        def preempt(self, running):
            preempted.append(super().preempt(running).request_id)
            return super().preempt(running)

    engine = model.engine(config, scheduler=Watched())
    seen = collections.defaultdict(list)
    streams = _streams(engine, [dataclasses.replace(r, ends_at=seen[i].append) for i, r in enumerate(requests)])
    assert preempted and 0 not in preempted  # the oldest always goes on
    if deterministic:
        assert streams == expected
    tokens = [[token for token, *_ in stream] for stream in streams]
    assert tokens == [[token for token, *_ in stream] for stream in expected]
    assert [seen[i] for i in range(4)] == tokens  # each token came in one event
    assert all(pool.num_free == pool.num_pages for pool in engine._placement._pools)
