"""The engine over a real model: requests of mixed lengths through three slots, against the reference."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
import gptoss_jax
from gptoss_jax.engine import programs, sampling
from gptoss_jax.engine.request import EngineConfig, NumericsError, Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model import layers, sharding, transformer
from pallas_kernels.choice import Hardware
from tests import reference
from tests.gate import TinyModel
from tests.goldens import make as golden

CONFIG = golden.two_layers_config()
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published checkpoint of two layers."""
    return TinyModel(CONFIG).write(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def model(folder):
    """It in float32, so that greedy tokens can be compared; with kernels under which both kinds of engine differ."""
    loaded = gptoss_jax.load(folder, dtype="float32", kernels="reference")
    for length in (1, 257, 513):  # compiles, for each power of two of a chunk
        loaded.logits([1] * length)
    return loaded


@pytest.fixture(scope="module")
def make_engine(model):
    """Engines of three slots, idle and as new, whose programs are compiled once for each value of `deterministic`."""
    compiled = {}

    def make(deterministic: bool = True):
        config = EngineConfig(slots=3, max_context_tokens=384, prefill_widths=(16, 64), deterministic=deterministic)
        engine = model.engine(config, compiled=compiled.get(config))
        compiled[config] = engine.runner.compiled
        return engine

    for deterministic in (True, False):
        make(deterministic)
    return make


def _prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(golden.token_ids(length, seed=1000 + length + seed).tolist())


def _answers(engine, requests) -> list[tuple[list[int], str]]:
    ids = [engine.submit(request) for request in requests]
    tokens, reasons = collections.defaultdict(list), {}
    for event in engine.run():
        assert len(event.token_ids) == len(event.logprobs)
        assert event.request_id not in reasons  # nothing comes after the end
        tokens[event.request_id] += event.token_ids
        if event.finish_reason:
            reasons[event.request_id] = event.finish_reason
    return [(tokens[i], reasons[i]) for i in ids]


def _greedy(tensors, prompt, answer) -> list[int]:
    """What the reference would have drawn at each place of `answer`."""
    return reference.forward(tensors, CONFIG, np.array([*prompt, *answer])).argmax(-1)[len(prompt) - 1 : -1].tolist()


LENGTHS = (5, 127, 128, 129, 300, 64, 1)
# What an engine does is the same slot by slot, as CPUs may need it, and with all slots in a batch.
BOTH = pytest.mark.parametrize("deterministic", [True, False], ids=["slot by slot", "batched"])


@BOTH
def test_more_requests_than_slots_of_mixed_lengths(make_engine, deterministic):
    """Guards admission, reuse of slots and pages, and rings: every answer is the reference's; nothing compiles."""
    engine = make_engine(deterministic)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: compiled.append(event) if "backend_compile" in event else None
    )
    requests = [Request(_prompt(n), (), 9 + i, GREEDY) for i, n in enumerate(LENGTHS)]
    answers = _answers(engine, requests)
    _streams(engine, [dataclasses.replace(r, ends_at=lambda token: token % 7 == 0) for r in _mixed_requests(9)])
    engine.cancel(engine.submit(Request(_prompt(100), (), 40, GREEDY)))
    before = engine.statistics.cached_prompt_tokens
    assert _answers(engine, [requests[4]] * 3) == [answers[4]] * 3
    assert engine.statistics.cached_prompt_tokens - before >= 2 * 256  # its prompt, read once for all
    assert compiled == []
    tensors = TinyModel(CONFIG).tensors
    for request, (tokens, reason) in zip(requests, answers, strict=True):
        assert (len(tokens), reason) == (request.max_new_tokens, "length")
        assert tokens == _greedy(tensors, request.token_ids, tokens)
    assert all(pool.num_free == pool.num_pages for pool in engine._placement._pools)


def test_compilations_are_counted():
    """Guards the test above: its listener does hear a compilation."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: compiled.append(event) if "backend_compile" in event else None
    )
    jax.jit(lambda x: x * 3).lower(jnp.zeros(3)).compile()
    assert compiled


def test_a_request_draws_the_same_tokens_in_company(make_engine):
    """Guards per-request seeds: the draws of a request do not depend on what runs beside it."""
    engine = make_engine()
    asked = Request(_prompt(50), (), 30, SamplingParams(temperature=1.0, seed=5))
    others = [Request(_prompt(n, seed=1), (), 20, SamplingParams(seed=n)) for n in (200, 3, 77)]
    ((alone, _),) = _answers(engine, [asked])
    in_company = _answers(engine, [others[0], asked, *others[1:]])[1][0]
    assert in_company == alone
    ((again, _),) = _answers(engine, [asked])
    assert again == alone
    ((other_seed, _),) = _answers(engine, [Request(asked.token_ids, (), 30, SamplingParams(seed=6))])
    assert other_seed != alone


MIXED = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_k=40, seed=2),
    SamplingParams(top_p=0.8, min_p=0.01, seed=3, top_logprobs=2),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, seed=4),
    SamplingParams(temperature=0.0, frequency_penalty=0.9, logit_bias={7: 2.0}, banned_ids=(1, 2)),
]


def _mixed_requests(count: int) -> list[Request]:
    """Requests of all lengths and options, some of them with the same seed."""
    lengths = (5, 50, 129, 300, 17, 64, 127, 1)
    return [Request(_prompt(lengths[i % 8], i), (), 12 + i % 5, MIXED[i % len(MIXED)]) for i in range(count)]


def _streams(engine, requests) -> list[list[tuple]]:
    """Of each request: every token with its log probabilities, bit by bit."""
    ids = [engine.submit(request) for request in requests]
    drawn = collections.defaultdict(list)
    for event in engine.run():
        tops = event.top_logprobs or [()] * len(event.token_ids)
        drawn[event.request_id] += zip(event.token_ids, event.logprobs, tops, strict=True)
    return [drawn[i] for i in ids]


def test_slots_run_one_by_one_only_where_bits_need_it(model):
    """Guards a CPU's batches: its kernels are batch invariant, so a step reads the weights once; XLA's sums are not."""
    kernels = {"reference": True} | ({"cpu": False} if cpu_kernels.why_not() is None else {})
    for name, one_by_one in kernels.items():
        chosen, _ = layers.choose_kernels(name, Hardware("cpu"))
        for mesh in ("", "data=2"):
            laid_out = sharding.make(mesh)
            declared = transformer.declare(model.config, laid_out, chosen)
            forms = programs.choose(declared, model.config, laid_out, deterministic=True)
            assert isinstance(forms.prefill, programs.SlotBySlotPrograms)
            assert isinstance(forms.decode, programs.SlotBySlotPrograms) == (one_by_one or mesh != "")
            fast = programs.choose(declared, model.config, laid_out, deterministic=False)
            assert isinstance(fast.prefill, programs.BatchedPrograms)
            assert isinstance(fast.decode, programs.BatchedPrograms)


def test_a_step_gives_back_all_that_it_changes(model):
    """Guards a new per-step field: one slot at a time, a step writes every array of the state back."""
    axes = jax.tree.leaves(programs.STATE_AXES, is_leaf=sharding.is_axes)
    assert len(axes) == len(programs.SlotState._fields) and all(names[0] == "batch" for names in axes)
    every = programs.SlotState(*(jnp.zeros((4, *(5,) * (len(names) - 1)), jnp.int32) for names in axes))
    one = jax.tree.map(lambda x: x[:1] + 7, every)
    changed = model.sharding.put_slot(every, one, jnp.array([2], jnp.int32), programs.STATE_AXES)
    for before, after in zip(every, changed, strict=True):
        assert (after[2] == 7).all() and (after[jnp.array([0, 1, 3])] == before[jnp.array([0, 1, 3])]).all()


@pytest.fixture(scope="module")
def draw():
    """One slot's draw, compiled, from logits [V], options, how often each id was drawn, and the token's position."""

    def one_slot(logits, options, drawn, position):
        options = jax.tree.map(lambda x: x[None], options)
        return sampling.sample(logits[None], options, drawn[None], position[None], 512).token[0]

    compiled = jax.jit(one_slot)
    compiled(np.zeros(512, np.float32), sampling.constants(GREEDY, (), 512, 512), np.zeros(512, np.int32), np.int32(0))
    return compiled


@BOTH
def test_every_token_is_the_one_that_its_request_draws(make_engine, model, draw, deterministic):
    """Guards the whole path of an option, in company: each token is drawn anew from the model's logits, alone.

    Seeds and positions, penalties on prompt and answer, and that nothing of a slot's request before it is left.
    """
    engine = make_engine(deterministic)
    strong = SamplingParams(temperature=0.0, repetition_penalty=100.0, frequency_penalty=0.4, presence_penalty=0.3)
    requests = [Request(_prompt(40 + i, i), (), 9, strong) for i in range(3)]
    requests += _mixed_requests(9)
    for request, (tokens, _) in zip(requests, _answers(engine, requests), strict=True):
        prompt = request.token_ids
        logits = model.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        options, drawn = sampling.constants(request.sampling, prompt, 512, 512), np.zeros(512, np.int32)
        for step, token in enumerate(tokens):
            assert draw(logits[step], options, drawn, np.int32(len(prompt) + step)) == token, (request.sampling, step)
            drawn[token] += 1


def test_a_dispatch_stays_short_when_requests_join(make_engine):
    """Guards flowing text: a dispatch takes a tenth of a second, whether a step runs the model once or three times."""
    engine = make_engine()
    engine.submit(Request(_prompt(5), (), 200, GREEDY))
    engine.tick()  # the prompt
    engine._seconds_per_forward = 0.01  # as if measured
    assert [len(event.token_ids) for event in engine.tick()] == [10]
    for i in range(2):
        engine.submit(Request(_prompt(5, i), (), 200, GREEDY))
    while len(engine._placement.decoding) < 3:
        engine.tick()  # the prompts
    for seconds, steps in ((0.01, 3), (0.001, 33)):
        engine._seconds_per_forward = seconds
        assert [len(event.token_ids) for event in engine.tick()] == [steps] * 3
    assert 0 < engine._seconds_per_forward < 1  # measured again


@BOTH
def test_top_logprobs_are_the_models(make_engine, model, deterministic):
    """Guards the reported alternatives, in prefill's token and in decoding's, beside a slot that asks for none."""
    engine = make_engine(deterministic)
    prompt = _prompt(30)
    engine.submit(Request(prompt, (), 9, SamplingParams(seed=3, top_logprobs=4, banned_ids=(5,))))
    engine.submit(Request(prompt, (), 9, SamplingParams(seed=4)))
    events = list(engine.run())
    assert all(event.top_logprobs == () for event in events if event.request_id == 1)
    tokens = [token for event in events if event.request_id == 0 for token in event.token_ids]
    tops = [top for event in events if event.request_id == 0 for top in event.top_logprobs]
    rows = golden.log_softmax(model.logits([*prompt, *tokens]))[len(prompt) - 1 : -1]
    assert len(tops) == len(tokens) == 9
    for top, row in zip(tops, rows, strict=True):
        assert [token for token, _ in top] == np.argsort(-row)[:4].tolist()
        np.testing.assert_allclose([logprob for _, logprob in top], np.sort(row)[::-1][:4], atol=1e-4)


@BOTH
def test_the_caller_may_end_an_answer(make_engine, deterministic):
    """Guards stop strings: the answer ends with the token that the caller names, and the slot serves the next one."""
    engine = make_engine(deterministic)
    ((free, _),) = _answers(engine, [Request(_prompt(20), (), 30, GREEDY)])
    for last in (0, 1, 17, 29):
        seen = []

        def ends_at(token, seen=seen, last=last):
            seen.append(token)
            return len(seen) == last + 1

        request = dataclasses.replace(Request(_prompt(20), (), 30, GREEDY), ends_at=ends_at)
        assert _answers(engine, [request]) == [(free[: last + 1], "stop")]
        assert seen == free[: last + 1]
        assert engine.is_idle
    assert _answers(engine, [Request(_prompt(20), (), 30, GREEDY)]) == [(free, "length")]


@BOTH
def test_stops_at_stop_ids_and_only_there(make_engine, deterministic):
    """Guards the stop: the stop id is the answer's last token, wherever in a dispatch it falls."""
    engine = make_engine(deterministic)
    ((free_running, _),) = _answers(engine, [Request(_prompt(20), (), 40, GREEDY)])
    for stop in {free_running[0], free_running[7], free_running[25]}:
        ((tokens, reason),) = _answers(engine, [Request(_prompt(20), (stop,), 40, GREEDY)])
        assert tokens == free_running[: free_running.index(stop) + 1]
        assert reason == "stop"


def test_logprobs_are_the_models(make_engine, model):
    """Guards log probabilities: they are the softmax's at temperature 1, of the token that was drawn."""
    engine = make_engine()
    prompt = _prompt(30)
    engine.submit(Request(prompt, (), 12, SamplingParams(temperature=2.0, seed=3)))
    events = list(engine.run())
    tokens = [token for event in events for token in event.token_ids]
    logprobs = [logprob for event in events for logprob in event.logprobs]
    rows = golden.log_softmax(model.logits([*prompt, *tokens]))[len(prompt) - 1 : -1]
    np.testing.assert_allclose(logprobs, rows[np.arange(len(tokens)), tokens], atol=1e-4)


def test_a_fault_names_request_and_step(make_engine, model):
    """Guards the error of a model that breaks in mid-answer: which request, at which step, and what came before."""
    engine = make_engine()
    engine.submit(Request((1, 2, 3), (), 20, GREEDY))
    engine.submit(Request((4, 5), (), 20, GREEDY))
    events = [*engine.tick(), *engine.tick(), *engine.tick()]  # a prompt, a token of its answer, the other prompt
    sound = model.params["norm"]
    try:
        model.params["norm"] = sound * np.nan
        with pytest.raises(NumericsError, match="request 0, step 2: logits are not finite; check the checkpoint"):
            events += list(engine.run())
    finally:
        model.params["norm"] = sound
    assert [(event.request_id, len(event.token_ids)) for event in events] == [(0, 1), (0, 1), (1, 1)]


def test_logits_that_are_not_finite_raise(make_engine, model):
    """Guards against noise as an answer, and against a fault that leaves the engine busy for ever."""
    engine, sound = make_engine(), model.params["norm"]
    try:
        model.params["norm"] = sound * np.nan
        engine.submit(Request((1, 2, 3), (), 4, GREEDY))
        with pytest.raises(NumericsError, match="request 0, step 0: logits are not finite; check the checkpoint"):
            list(engine.run())
        assert engine.is_idle
    finally:
        model.params["norm"] = sound
    engine.submit(Request((1, 2, 3), (), 4, GREEDY))
    assert sum(len(event.token_ids) for event in engine.run()) == 4


def test_cancelled_requests_free_their_slots(make_engine):
    """Guards abandoned streams: the slot and its pages serve the next request, whose answer is its own."""
    engine = make_engine()
    first, second = (engine.submit(Request(_prompt(n), (), 40, GREEDY)) for n in (100, 30))
    events = engine.run()
    next(events)
    engine.cancel(first)
    engine.cancel(second)
    assert engine.is_idle
    request = Request(_prompt(20), (), 10, GREEDY)
    ((tokens, _),) = _answers(engine, [request])
    assert tokens == _greedy(TinyModel(CONFIG).tensors, request.token_ids, tokens)
