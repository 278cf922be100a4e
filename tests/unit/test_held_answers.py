"""Answers held to a form in the engine: masks, forced ids, who waits for whom; on a fake runner and on a real model."""

import itertools
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss_jax
from gptoss_jax.engine import pace
from gptoss_jax.engine.constraint import Hold
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.held import ANY, Held, HeldSlots
from gptoss_jax.engine.request import EngineConfig, Request, RequestError
from gptoss_jax.engine.sampling_params import SamplingParams
from tests import reference
from tests.fake_runner import (
    CONFIG,
    VOCAB,
    FakeRunner,
    all_pages_are_free,
    answer,
    check_answers,
    make_engine,
    prompt,
    run,
)
from tests.gate import TinyModel
from tests.goldens import make as golden
from tests.ruled import END, RUN, Rule, allowed_ids, ruled_answer, states

TINY = golden.two_layers_config()
GREEDY = SamplingParams(temperature=0.0)
JOBS = st.lists(
    st.tuples(st.integers(1, 200), st.integers(1, 60), st.booleans(), st.sampled_from([None, None, 0, 3, 9])),
    min_size=1,
    max_size=8,
)


@given(JOBS, st.sampled_from([1, 2, 4]), st.sampled_from([384, 512, None]), st.booleans(), st.sampled_from([1, 2]))
@settings(max_examples=30)
def test_any_mix_of_held_answers_and_others_comes_out_right(jobs, slots, pool, one_batch, shards):
    """Guards all of it together: held or not, whoever is cancelled or preempted, each answer is its own."""
    slots, pool = slots * shards, pool and pool * shards
    config = EngineConfig(slots=slots, max_context_tokens=360, prefill_widths=(16, 64), pool_tokens=pool)
    engine = make_engine(config, num_shards=shards, one_batch=one_batch)
    cancelled, expected = {}, {}
    for i, (length, count, is_held, after) in enumerate(jobs):
        ids = prompt(length, i)
        engine.submit(Request(ids, (VOCAB - 1,), count, constraint=Rule() if is_held else None))
        whole = ruled_answer(ids, count) if is_held else answer(ids, count)
        expected[i] = whole[: whole.index(VOCAB - 1) + 1] if VOCAB - 1 in whole else whole
        if after is not None:
            cancelled[i] = after
    check_answers(engine, expected, cancelled)


def test_engines_that_hold_nobody_do_what_they_did():
    """Guards requests of before: no dispatch of theirs is another than `decode`; held ones change that for a while."""
    engine = make_engine(EngineConfig(slots=2, max_context_tokens=360))
    runner = engine.runner
    assert isinstance(runner, FakeRunner)
    engine.submit(Request(prompt(5), (), 20))
    run(engine)
    assert {kind for kind, _ in runner.dispatches} == {"prefill", "decode"}
    engine.submit(Request(prompt(5), (), 9, constraint=Rule()))
    run(engine)
    runner.dispatches.clear()
    engine.submit(Request(prompt(6), (), 20))
    run(engine)
    assert {kind for kind, _ in runner.dispatches} == {"prefill", "decode"}


def test_a_late_mask_stalls_nobody():
    """Guards the others: they draw to their ends while a mask is on its way; then the late answer is what it is."""
    late = threading.Event()
    engine = make_engine(EngineConfig(slots=3, max_context_tokens=360), one_batch=True)
    slow = engine.submit(Request(prompt(7), (), 30, constraint=Rule(late)))
    others = [engine.submit(Request(prompt(n), (), 40)) for n in (8, 9)]
    quick = engine.submit(Request(prompt(10), (), 40, constraint=Rule()))
    tokens: dict[int, list[int]] = {number: [] for number in (slow, *others, quick)}
    ended = set[int]()
    while not {*others, quick} <= ended:
        for event in engine.tick():
            tokens[event.request_id] += event.token_ids
            ended |= {event.request_id} if event.finish_reason else set()
    assert tokens[slow] == []
    late.set()
    assert run(engine)[slow] == ruled_answer(prompt(7), 30)
    assert [list(tokens[i]) for i in others] == [answer(prompt(n), 40) for n in (8, 9)]
    assert list(tokens[quick]) == ruled_answer(prompt(10), 40)


def test_where_all_masks_are_late_the_engine_waits():
    """Guards the processor: no dispatch after dispatch in which nobody can take a step."""
    late = threading.Event()
    engine = make_engine(EngineConfig(slots=1, max_context_tokens=360))
    engine.submit(Request(prompt(7), (), 5, constraint=Rule(late)))
    threading.Timer(0.3, late.set).start()
    assert run(engine)[0] == ruled_answer(prompt(7), 5)
    assert isinstance(engine.runner, FakeRunner)
    assert len(engine.runner.dispatches) < 12


def test_an_answer_that_nobody_can_go_on_with_ends_there():
    """Guards limits of a grammar: the answer so far is given, its slot is free, the others never notice."""
    engine = make_engine(EngineConfig(slots=2, max_context_tokens=360))
    broken = engine.submit(Request(prompt(7), (), 30, constraint=Rule(faulty_after=4)))
    whole = engine.submit(Request(prompt(8), (), 30, constraint=Rule()))
    events = list(engine.run())
    reasons = {event.request_id: event.finish_reason for event in events if event.finish_reason}
    assert reasons == {broken: "constraint", whole: "length"}
    tokens = [token for event in events if event.request_id == broken for token in event.token_ids]
    assert tokens == ruled_answer(prompt(7), 30)[: len(tokens)]
    assert len(tokens) >= 4
    assert all_pages_are_free(engine)


def test_a_stop_in_the_middle_of_a_run_ends_the_answer():
    """Guards stop ids and stop strings: what was forced beyond them is nobody's."""
    whole = ruled_answer(prompt(7), 60)
    at = next(i for i in range(len(whole) - 2) if tuple(whole[i : i + 3]) == RUN)
    for stop_ids, ends_at in (((RUN[1],), None), ((), lambda token: token == RUN[1])):
        engine = make_engine(EngineConfig(slots=1, max_context_tokens=360))
        engine.submit(Request(prompt(7), stop_ids, 60, ends_at=ends_at, constraint=Rule()))
        assert run(engine)[0] == whole[: at + 2]
        engine.submit(Request(prompt(9), (), 10))
        assert run(engine)[1] == answer(prompt(9), 10)


def test_over_several_hosts_no_clock_decides_who_sits_out(monkeypatch):
    """Guards hosts of different speed: they wait for each mask, and take as many steps."""
    dispatches = []
    for seconds in (1e-6, 1e3):
        config = EngineConfig(slots=2, max_context_tokens=256)
        runner = FakeRunner(config, several_hosts=True)
        engine = Engine(runner, CONFIG, config)
        clock = itertools.count(0.0, seconds)
        monkeypatch.setattr(time, "perf_counter", lambda clock=clock: next(clock))
        engine.submit(Request(prompt(4), (), 40, constraint=Rule()))
        engine.submit(Request(prompt(5), (), 40))
        run(engine)
        dispatches.append((runner.steps, runner.dispatches))
    assert dispatches[0] == dispatches[1]


def test_what_cannot_be_held_is_refused_before_it_waits():
    """Guards requests: bans that may leave nothing, a vocabulary that is too small, ends that become stop ids."""
    engine = make_engine(EngineConfig(slots=1, max_context_tokens=360))
    for banned in (SamplingParams(banned_ids=(3,)), SamplingParams(logit_bias={3: -float("inf")})):
        with pytest.raises(
            RequestError, match=r"^ids are banned \(banned_ids, or logit_bias of -inf\) where the answer"
        ):
            engine.submit(Request(prompt(4), (), 4, banned, constraint=Rule()))
    larger = Rule()
    larger.num_ids = VOCAB + 1
    with pytest.raises(RequestError, match=r"^the form of the answer speaks of 513 ids, but the model has 512$"):
        engine.submit(Request(prompt(4), (), 4, constraint=larger))
    assert Request(prompt(4), (7, END), constraint=Rule()).stop_ids == (END, 7)


class _Known:
    """What is known already."""

    num_ids, end_ids = VOCAB, ()

    def __init__(self, hold: Hold):
        self.hold = hold

    def start(self):
        return self

    def advance(self, token_ids):
        return self.hold


@pytest.mark.parametrize(
    ("host_seconds", "steps"), [(0.0, 1), (0.001, 2), (0.004, 8), (1.0, ANY)], ids=["none", "some", "more", "much"]
)
def test_dispatches_are_as_long_as_the_others_need(host_seconds, steps):
    """Guards both sides: others lose a twentieth at most, and held slots wait no longer than that takes."""
    found = pace.Pace(waits=False)
    found.host_seconds = host_seconds
    found.took(1, 0.01)
    found.took(4, 0.04)
    one_step = Held(_Known(Hold(np.ones(16, np.uint32))), ())
    both = found.hold(HeldSlots(2, VOCAB, 64), {0: one_step}, [0, 1], 0.01)
    alone = found.hold(HeldSlots(2, VOCAB, 64), {0: one_step}, [0], 0.01)
    assert both.steps == (steps if steps < ANY else 2000)
    assert alone.steps == 1


def test_what_a_dispatch_costs_by_itself_is_learned():
    """Guards the others where a dispatch costs more than a step; equal lengths say nothing, so one is longer."""
    found = pace.Pace(waits=False)
    one_step = Held(_Known(Hold(np.ones(16, np.uint32))), ())
    steps = 1
    for _ in range(12):
        found.took(steps, 0.015 + 0.01 * steps)
        steps = found.hold(HeldSlots(2, VOCAB, 64), {0: one_step}, [0, 1], 0.01).steps
    assert 30 <= steps <= 60
    assert abs(found.start_seconds - 0.015) < 1e-6


# ---- on a real model ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers in float32, so that greedy tokens can be compared."""
    folder = TinyModel(TINY).write(tmp_path_factory.mktemp("held"))
    return gptoss_jax.load(folder, dtype="float32", kernels="reference")


@pytest.fixture(scope="module", params=[True, False], ids=["slot by slot", "batched"])
def engine(request, model):
    """Three slots."""
    config = EngineConfig(3, 128, (16,), deterministic=request.param, prefix_snapshots=0)
    made = model.engine(config)
    assert made.runner.compiled.later == {}
    made.submit(Request((1, 2), (), 3, GREEDY))
    list(made.run())
    assert made.runner.compiled.later == {}  # nobody is held
    made.submit(Request((1, 2), (), 3, GREEDY, constraint=Rule()))
    list(made.run())
    assert list(made.runner.compiled.later) == ["decode-held"]
    return made


def test_steps_are_the_references_under_their_masks(engine):
    """Guards the program: forced ids, masks, pauses, unheld slots beside; log probabilities stay the model's own."""
    asked = [(n, is_held) for n in (5, 33, 1) for is_held in (True, False)]
    ids = [tuple(golden.token_ids(n, seed=n).tolist()) for n, _ in asked]
    requests = [
        Request(ids, (), 24, GREEDY, constraint=Rule() if is_held else None)
        for ids, (_, is_held) in zip(ids, asked, strict=True)
    ]
    numbers = [engine.submit(request) for request in requests]
    events = list(engine.run())
    tensors, ran = TinyModel(TINY).tensors, 0
    for number, request in zip(numbers, requests, strict=True):
        tokens = [token for event in events if event.request_id == number for token in event.token_ids]
        logprobs = [value for event in events if event.request_id == number for value in event.logprobs]
        logits = reference.forward(tensors, TINY, np.array([*request.token_ids, *tokens]))[-len(tokens) - 1 : -1]
        own = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        own -= logits.max(-1, keepdims=True)
        for step, (state, place) in zip(range(24), states(tokens), strict=False):
            allowed = list(allowed_ids(state, place)) if request.constraint else range(VOCAB)
            assert tokens[step] == allowed[int(logits[step, list(allowed)].argmax())]
            assert abs(logprobs[step] - own[step, tokens[step]]) < 1e-4
            ran += state == "run" and request.constraint is not None
    assert ran > 3


def test_engines_like_it_share_what_was_compiled_later(model, engine):
    """Guards a second engine over the same programs: the first held request of it compiles nothing."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: compiled.append(event) if "backend_compile" in event else None
    )
    other = model.engine(engine.engine_config, compiled=engine.runner.compiled)
    compiled.clear()  # a cache was made
    other.submit(Request((1, 2), (), 3, GREEDY, constraint=Rule()))
    list(other.run())
    assert compiled == []
