"""The engine's part on the host: admission, pages, preemption, policy. No model runs: a fake one draws tokens."""

import collections
import itertools
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.request import EngineConfig, Request, RequestError
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.engine.scheduler import LOOKAHEAD, Scheduler
from tests.fake_runner import (
    BOTH,
    CONFIG,
    VOCAB,
    FakeRunner,
    all_pages_are_free,
    answer,
    check_answers,
    make_engine,
    next_token,
    prompt,
    run,
)
from tests.goldens.make import ROOT


@BOTH
def test_pages_are_taken_on_demand(one_batch):
    """Guards memory: eight requests that may grow to the context run at once in a pool that holds two such."""
    config = EngineConfig(slots=8, max_context_tokens=4096, pool_tokens=8192)
    runner = FakeRunner(config, one_batch=one_batch)
    engine = Engine(runner, CONFIG, config)
    for i in range(8):
        engine.submit(Request(prompt(4, i), ()))
    for _ in range(20):
        engine.tick()
    assert runner.dispatches[-1] == ("decode", list(range(8)))


def test_over_several_hosts_no_clock_decides(monkeypatch):
    """Guards hosts of different speed: one that decoded more steps than another would wait for it for ever."""
    steps = []
    for seconds in (1e-6, 1e3):
        clock = itertools.count(0, seconds)
        monkeypatch.setattr(time, "perf_counter", lambda clock=clock: next(clock))
        config = EngineConfig(slots=2, max_context_tokens=256)
        runner = FakeRunner(config, several_hosts=True)
        engine = Engine(runner, CONFIG, config)
        engine.submit(Request(prompt(4), (), 100))
        run(engine)
        steps.append(runner.steps)
    assert steps[0] == steps[1]
    assert max(steps[0]) > 1


@BOTH
def test_the_youngest_gives_way_when_pages_run_out(one_batch):
    """Guards a pool that runs dry: every answer is whole and right, and the oldest request never waits."""
    preempted = []

    class Watched(Scheduler):
        def preempt(self, running):
            chosen = super().preempt(running)
            assert chosen.request_id == max(sequence.request_id for sequence in running)
            preempted.append(chosen.request_id)
            return chosen

    config = EngineConfig(slots=4, max_context_tokens=384, prefill_widths=(16, 64), pool_tokens=384)
    engine = make_engine(config, scheduler=Watched(), one_batch=one_batch)
    seen = collections.defaultdict(list)
    for i in range(4):
        engine.submit(Request(prompt(20 + i), (), 300, ends_at=lambda token, i=i: seen[i].append(token) is not None))
    tokens = run(engine)
    assert preempted and 0 not in preempted
    assert [tokens[i] for i in range(4)] == [answer(prompt(20 + i), 300) for i in range(4)]
    assert [seen[i] for i in range(4)] == [tokens[i] for i in range(4)]  # each token came in one event
    assert all_pages_are_free(engine)


def test_what_can_never_fit_is_refused_at_once():
    """Guards a request that would wait for ever; without a limit of its own, the pool is its limit."""
    config = EngineConfig(slots=2, max_context_tokens=1024, pool_tokens=384)
    engine = make_engine(config)
    message = "410 tokens exceed a page pool of 384: shorten the request, or raise pool_tokens"
    with pytest.raises(RequestError, match=message):
        engine.submit(Request(prompt(400), (), 10))
    with pytest.raises(RequestError, match="385 tokens exceed a page pool of 384"):
        engine.submit(Request(prompt(384), ()))
    assert engine.is_idle
    unlimited = engine.submit(Request(prompt(380), ()))
    assert run(engine) == {unlimited: answer(prompt(380), 4)}


@BOTH
def test_answers_go_on_while_a_long_prompt_is_read(one_batch):
    """Guards flowing text: a prompt of 3,000 tokens is read in chunks, and between two of them the others draw."""
    config = EngineConfig(slots=3, max_context_tokens=4096, prefill_widths=(128,))
    engine = make_engine(config, one_batch=one_batch)
    others = {engine.submit(Request(prompt(5, i), (), 2000)) for i in range(2)}
    while len(engine._placement.decoding) < 2:
        engine.tick()
    long = engine.submit(Request(prompt(3000), (), 1))
    silent, chunks, events = 0, 0, engine.tick()
    while long not in (drew := {event.request_id for event in events}):
        assert drew in (set(), others)
        silent, chunks = (0, chunks) if drew else (silent + 1, chunks + 1)
        assert silent <= 1
        events = engine.tick()
    assert chunks == 3000 // 128


@BOTH
@pytest.mark.parametrize("smalls", [3, LOOKAHEAD + 30])
def test_what_fits_passes_what_does_not_but_not_for_ever(one_batch, smalls):
    """Guards both sides of admission: idle slots behind a request too large for now, and that request's own turn."""
    config = EngineConfig(slots=4, max_context_tokens=512, pool_tokens=704, prefix_snapshots=0)
    engine = make_engine(config, one_batch=one_batch)
    first, large = (engine.submit(Request(prompt(n), (), count)) for n, count in ((250, 200), (400, 20)))
    for i in range(smalls):
        engine.submit(Request(prompt(5, i), (), 1))
    ends = [event.request_id for event in engine.run() if event.finish_reason]
    assert ends.index(first) == min(smalls, LOOKAHEAD)
    assert ends.index(large) > ends.index(first)
    assert sorted(ends) == list(range(smalls + 2))


def test_what_waits_is_counted():
    """Guards callers that submit as answers end: `num_waiting` is what has no slot yet."""
    engine = make_engine(EngineConfig(slots=2))
    for i in range(5):
        engine.submit(Request(prompt(5, i), (), 20))
    assert engine.num_waiting == 5
    engine.tick()
    assert engine.num_waiting == 3


def test_another_policy_can_be_given():
    """Guards the joint: who goes first is one small class that a user replaces."""

    class ShortestFirst(Scheduler):
        def admit(self, waiting, fits):
            by_length = sorted(waiting, key=lambda sequence: len(sequence.request.token_ids))
            return next(filter(fits, by_length), None)

    ends = {}
    for name, scheduler in (("usual", None), ("shortest", ShortestFirst())):
        engine = make_engine(EngineConfig(), scheduler=scheduler)
        for n in (50, 5, 20):
            engine.submit(Request(prompt(n), (), 3))
        ends[name] = [event.request_id for event in engine.run() if event.finish_reason]
    assert ends == {"usual": [0, 1, 2], "shortest": [1, 2, 0]}


JOBS = st.lists(
    st.tuples(st.integers(1, 200), st.integers(1, 150), st.booleans(), st.sampled_from([None, 0, 1, 5, 30])),
    min_size=1,
    max_size=12,
)


POOLS = st.sampled_from([384, 512, None])


@given(JOBS, st.sampled_from([1, 2, 4]), POOLS, st.booleans(), st.sampled_from([1, 2]), st.sampled_from([64, 128]))
@settings(max_examples=80)
def test_any_jobs_with_any_cancels_come_out_right(jobs, slots, pool, one_batch, shards, page_tokens):
    """Guards all of it together: whoever is cancelled, preempted or stopped, the others' answers are their own."""
    slots, pool = slots * shards, pool and pool * shards
    config = EngineConfig(slots=slots, max_context_tokens=360, prefill_widths=(16, 64), pool_tokens=pool)
    engine = make_engine(config, num_shards=shards, one_batch=one_batch, page_tokens=page_tokens)
    cancelled, expected = {}, {}
    for i, (length, count, stops, after) in enumerate(jobs):
        whole = answer(prompt(length, i), count)
        stop = whole[count // 2] if stops else VOCAB - 1
        engine.submit(Request(prompt(length, i), (stop,), count))
        expected[i] = whole[: whole.index(stop) + 1] if stop in whole else whole
        if after is not None:
            cancelled[i] = after
    check_answers(engine, expected, cancelled)


def test_the_fake_draws_from_what_it_reads():
    """Guards the tests above: a fake that ignored its cache would pass them all."""
    assert next_token([1, 2, 3]) != next_token([1, 2, 4])
    assert answer((1, 2), 3) == [next_token((1, 2)), *answer((1, 2, next_token((1, 2))), 2)]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), (), 4), "the prompt has no tokens, expected at least one"),
        (Request((1, 512), (), 4), "token id 512 at position 1 is outside the vocabulary, expected 0 to 511"),
        (Request((-1,), (), 4), "token id -1 at position 0 is outside the vocabulary"),
        (Request((1,) * 60, (), 10), "a prompt of 60 tokens and an answer of up to 10 exceed the context of 64 tokens"),
        (Request((1,) * 64, ()), "a prompt of 64 tokens and an answer of up to 1 exceed the context of 64 tokens"),
        (Request((1,), (), 0), "max_new_tokens is 0, expected at least 1"),
        (Request((1,), tuple(range(9)), 4), "9 stop ids, expected at most 8"),
        (Request((1,), (2**40,), 4), "expected ids from 0 to 511"),
        (Request((1,), (), 4, SamplingParams(logit_bias={512: 1.0})), "logit_bias names id 512, expected ids from 0"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(request_, message):
    """Guards the message, and that a refused request leaves nothing behind."""
    engine = make_engine(EngineConfig(max_context_tokens=64, prefill_widths=(8,)))
    with pytest.raises(RequestError, match=message):
        engine.submit(request_)
    assert engine.is_idle


def test_context_beyond_the_models_is_refused():
    """Guards YaRN's range: an engine longer than the model's promise would answer nonsense without a word."""
    with pytest.raises(RequestError, match="max_context_tokens is 131073, the model has 131072 at most"):
        Request((1,), (), 4).check(CONFIG, EngineConfig(max_context_tokens=131_073))
    zeros: list[dict[str, Any]] = [{"slots": 0}, {"max_context_tokens": 0}, {"pool_tokens": 0}]
    for zero in zeros:
        with pytest.raises(ValueError, match=f"{next(iter(zero))} is 0, expected at least 1"):
            EngineConfig(**zero)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("Request((1, 2.5), ())", "an id in token_ids is 2.5, expected a whole number"),
        ("Request((1, '2'), ())", "an id in token_ids is '2', expected a whole number"),
        ("Request((1,), (None,))", "an id in stop_ids is None, expected a whole number"),
        ("Request((1,), (), 1.5)", "max_new_tokens is 1.5, expected a whole number"),
        ("Request((numpy.float32(1),), ())", "an id in token_ids is np.float32(1.0), expected a whole number"),
        ("Request(None, ())", "token_ids is None, expected a list of whole numbers"),
        ("Request('12', ())", "token_ids is '12', expected a list of whole numbers"),
        ("Request((1,), 2)", "stop_ids is 2, expected a list of whole numbers"),
        ("Request((1,), (), sampling={'seed': 1})", "sampling is {'seed': 1}, expected SamplingParams"),
        ("Request((1,), (), ends_at=3)", "ends_at is 3, expected a function of a token id, or None"),
        ("Request((1,), (), constraint='json')", "constraint is 'json', expected a Constraint, or None"),
        ("EngineConfig(slots=1.5)", "slots is 1.5, expected a whole number"),
        ("EngineConfig(slots=None)", "slots is None, expected a whole number"),
        ("EngineConfig(max_context_tokens='4096')", "max_context_tokens is '4096', expected a whole number"),
        ("EngineConfig(prefill_widths=128)", "prefill_widths is 128, expected a list of whole numbers"),
        ("EngineConfig(deterministic='no')", "deterministic is 'no', expected True, False or None"),
        ("SamplingParams(logit_bias=None)", "logit_bias is None, expected a mapping from ids to numbers"),
        ("SamplingParams(banned_ids=None)", "banned_ids is None, expected a list of whole numbers"),
        ("SamplingParams(temperature='1')", "temperature is '1', expected a number"),
        ("SamplingParams(top_p=None)", "top_p is None, expected a number"),
        ("SamplingParams(logit_bias={3: '1'})", "logit_bias of id 3 is '1', expected a number"),
    ],
)
def test_wrong_types_are_refused_where_a_request_is_made(wrong, message):
    """Guards the others: a request of wrong types that reaches the engine's loop stops it for everybody.

    In a process of its own, since this one's type checks come first.
    """
    code = f"import numpy; from gptoss_jax import EngineConfig, Request, SamplingParams; {wrong}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    kind = "engine.request.RequestError" if wrong.startswith("Request") else "errors.GptossError"
    assert done.stderr.splitlines()[-1] == f"gptoss_jax.{kind}: {message}"
