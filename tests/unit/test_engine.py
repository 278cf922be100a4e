"""The engine: requests of mixed lengths through a few rows, against the reference and against running alone."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
import gptoss_jax
from gptoss_jax.engine import sampling
from gptoss_jax.engine.programs import SlotBySlotPrograms
from gptoss_jax.engine.request import EngineConfig, NumericsError, Request, RequestError
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.engine.scheduler import Scheduler
from tests import reference
from tests.gate import TinyModel
from tests.goldens import make as golden

CONFIG = golden.tiny_config() | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published checkpoint of two layers."""
    return TinyModel(CONFIG).write(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def model(folder):
    """It in float32, so that greedy tokens can be compared; with kernels under which both kinds of engine differ."""
    return gptoss_jax.load(folder, dtype="float32", kernels="reference")


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
# What an engine does is the same row by row, as on CPUs, and with all rows in a batch, as on accelerators.
BOTH = pytest.mark.parametrize("deterministic", [True, False], ids=["row by row", "batched"])


@BOTH
def test_more_requests_than_rows_of_mixed_lengths(model, deterministic):
    """Guards admission, reuse of rows and pages, and rings: every answer is the reference's; nothing compiles."""
    engine = model.engine(
        EngineConfig(slots=3, max_context_tokens=384, prefill_widths=(16, 64), deterministic=deterministic)
    )
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    requests = [Request(_prompt(n), (), 9 + i, GREEDY) for i, n in enumerate(LENGTHS)]
    answers = _answers(engine, requests)
    _streams(engine, [dataclasses.replace(r, ends_at=lambda token: token % 7 == 0) for r in _mixed_requests(9)])
    engine.cancel(engine.submit(Request(_prompt(100), (), 40, GREEDY)))
    assert compiled == []
    tensors = TinyModel(CONFIG).tensors
    for request, (tokens, reason) in zip(requests, answers, strict=True):
        assert (len(tokens), reason) == (request.max_new_tokens, "length")
        assert tokens == _greedy(tensors, request.token_ids, tokens)
    assert all(pool.num_free == pool.num_pages for pool in engine._pools)


def test_compilations_are_counted(model):
    """Guards the test above: its listener does hear a compilation."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    model.engine(EngineConfig(max_context_tokens=64, prefill_widths=(8,)))
    assert compiled


def test_a_row_draws_the_same_tokens_in_company(model):
    """Guards per-request seeds: the draws of a request do not depend on what runs beside it."""
    engine = model.engine(EngineConfig(slots=3, max_context_tokens=384, prefill_widths=(64,)))
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


def test_rows_run_alone_only_where_that_is_what_keeps_them_apart(model, folder):
    """Guards a CPU's batches: its kernels keep rows apart, so a step reads the weights once; XLA's sums do not."""

    def decodes_alone(engine) -> bool:
        return isinstance(engine.runner.forms.decode, SlotBySlotPrograms)

    alone = {
        kernels: decodes_alone(gptoss_jax.load(folder, kernels=kernels).engine(EngineConfig(slots=2)))
        for kernels in ("reference", *(["cpu"] if cpu_kernels.why_not() is None else []))
    }
    assert alone == {kernels: kernels == "reference" for kernels in alone}
    assert not decodes_alone(model.engine(EngineConfig(slots=2, deterministic=False)))
    sharded = gptoss_jax.load(folder, mesh="data=2").engine(EngineConfig(slots=2))
    assert decodes_alone(sharded)


@BOTH
def test_every_token_is_the_one_that_its_request_draws(model, deterministic):
    """Guards the whole path of an option, in company: each token is drawn anew from the model's logits, alone.

    Seeds and positions, penalties on prompt and answer, and that nothing of a row's request before it is left.
    """
    engine = model.engine(
        EngineConfig(slots=3, max_context_tokens=384, prefill_widths=(16, 64), deterministic=deterministic)
    )
    strong = SamplingParams(temperature=0.0, repetition_penalty=100.0, frequency_penalty=0.4, presence_penalty=0.3)
    requests = [Request(_prompt(40 + i, i), (), 9, strong) for i in range(3)]
    requests += _mixed_requests(9)
    for request, (tokens, _) in zip(requests, _answers(engine, requests), strict=True):
        prompt = request.token_ids
        logits = jnp.asarray(model.logits([*prompt, *tokens])[len(prompt) - 1 : -1])
        options = sampling.constants(request.sampling, prompt, 512, 512)
        options = jax.tree.map(lambda x: jnp.asarray(x)[None], options)
        drawn = jnp.zeros((1, 512), jnp.int32)
        for step, token in enumerate(tokens):
            at = jnp.array([len(prompt) + step], jnp.int32)
            draw = _draw(logits[step : step + 1], options, drawn, at)
            assert draw.token.tolist() == [token], (request.sampling, step)
            drawn = sampling.record(drawn, draw.token, jnp.array([True]))


_draw = jax.jit(functools.partial(sampling.sample, num_token_ids=512))


def test_a_dispatch_stays_short_when_rows_join(model):
    """Guards flowing text: a dispatch takes a tenth of a second, whether one row or nine take turns in each step."""
    engine = model.engine(EngineConfig(slots=9, max_context_tokens=256, prefill_widths=(64,), deterministic=True))
    engine.submit(Request(_prompt(5), (), 200, GREEDY))
    engine.tick()  # the prompt
    engine._seconds_per_forward = 0.01  # as if measured
    assert [len(event.token_ids) for event in engine.tick()] == [10]
    for i in range(8):
        engine.submit(Request(_prompt(5, i), (), 200, GREEDY))
    while any(sequence.num_unread for sequence in engine._running.values()) or engine._waiting:
        engine.tick()  # the prompts
    for seconds, steps in ((0.01, 1), (0.001, 11)):
        engine._seconds_per_forward = seconds
        assert [len(event.token_ids) for event in engine.tick()] == [steps] * 9
    assert 0 < engine._seconds_per_forward < 1  # measured again


@BOTH
def test_top_logprobs_are_the_models(model, deterministic):
    """Guards the reported alternatives, in prefill's token and in decoding's, beside a row that asks for none."""
    engine = model.engine(
        EngineConfig(slots=2, max_context_tokens=256, prefill_widths=(64,), deterministic=deterministic)
    )
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
def test_the_caller_may_end_an_answer(model, deterministic):
    """Guards stop strings: the answer ends with the token that the caller names, and the row serves the next one."""
    engine = model.engine(EngineConfig(max_context_tokens=256, prefill_widths=(64,), deterministic=deterministic))
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
def test_stops_at_stop_ids_and_only_there(model, deterministic):
    """Guards the stop: the stop id is the answer's last token, wherever in a dispatch it falls."""
    engine = model.engine(
        EngineConfig(slots=2, max_context_tokens=256, prefill_widths=(64,), deterministic=deterministic)
    )
    ((free_running, _),) = _answers(engine, [Request(_prompt(20), (), 40, GREEDY)])
    for stop in {free_running[0], free_running[7], free_running[25]}:
        ((tokens, reason),) = _answers(engine, [Request(_prompt(20), (stop,), 40, GREEDY)])
        assert tokens == free_running[: free_running.index(stop) + 1]
        assert reason == "stop"


def test_logprobs_are_the_models(model):
    """Guards log probabilities: they are the softmax's at temperature 1, of the token that was drawn."""
    engine = model.engine(EngineConfig(max_context_tokens=256, prefill_widths=(64,)))
    prompt = _prompt(30)
    engine.submit(Request(prompt, (), 12, SamplingParams(temperature=2.0, seed=3)))
    events = list(engine.run())
    tokens = [token for event in events for token in event.token_ids]
    logprobs = [logprob for event in events for logprob in event.logprobs]
    rows = golden.log_softmax(model.logits([*prompt, *tokens]))[len(prompt) - 1 : -1]
    np.testing.assert_allclose(logprobs, rows[np.arange(len(tokens)), tokens], atol=1e-4)


@BOTH
def test_a_small_pool_makes_requests_wait(model, deterministic):
    """Guards paging: with pages for one long request at a time, all are served, and rightly."""
    shape = {"max_context_tokens": 384, "prefill_widths": (64,), "pool_tokens": 384}
    engine = model.engine(EngineConfig(slots=2, deterministic=deterministic, **shape))
    requests = [Request(_prompt(n), (), 10, GREEDY) for n in (300, 290, 20)]
    tensors = TinyModel(CONFIG).tensors
    for request, (tokens, _) in zip(requests, _answers(engine, requests), strict=True):
        assert tokens == _greedy(tensors, request.token_ids, tokens)
    with pytest.raises(RequestError, match="exceed a page pool of 384: shorten the request, or raise pool_tokens"):
        model.engine(EngineConfig(max_context_tokens=1024, prefill_widths=(64,), pool_tokens=384)).submit(
            Request(_prompt(400), (), 10, GREEDY)
        )


def test_pages_are_taken_on_demand(model):
    """Guards memory: eight requests that may grow to the context run at once in a pool that holds two such."""
    config = EngineConfig(slots=8, max_context_tokens=4096, prefill_widths=(8,), pool_tokens=8192)
    engine = model.engine(config)
    ids = [engine.submit(Request(_prompt(4, i), (), None, GREEDY)) for i in range(8)]
    while len({sequence.request_id for sequence in engine._running.values() if sequence.tokens}) < 8:
        assert engine.tick()
    for request_id in ids:
        engine.cancel(request_id)
    assert engine.is_idle


SMALL_POOL = {"max_context_tokens": 384, "prefill_widths": (16, 64), "pool_tokens": 384}


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
    roomy = model.engine(EngineConfig(slots=4, deterministic=deterministic, **SMALL_POOL | {"pool_tokens": None}))
    expected = _streams(roomy, requests)
    preempted = []

    class Watched(Scheduler):
        def preempt(self, running):
            preempted.append(super().preempt(running).request_id)
            return super().preempt(running)

    engine = model.engine(EngineConfig(slots=4, deterministic=deterministic, **SMALL_POOL), scheduler=Watched())
    seen = collections.defaultdict(list)
    streams = _streams(engine, [dataclasses.replace(r, ends_at=seen[i].append) for i, r in enumerate(requests)])
    assert preempted and 0 not in preempted  # the oldest always goes on
    if deterministic:
        assert streams == expected
    tokens = [[token for token, *_ in stream] for stream in streams]
    assert tokens == [[token for token, *_ in stream] for stream in expected]
    assert [seen[i] for i in range(4)] == tokens  # each token was told once
    assert all(pool.num_free == pool.num_pages for pool in engine._pools)


@BOTH
def test_answers_go_on_while_a_long_prompt_is_read(model, deterministic):
    """Guards flowing text: a prompt of 3,000 tokens is read in chunks, and between two of them the others draw."""
    config = EngineConfig(slots=3, max_context_tokens=4096, prefill_widths=(128,), deterministic=deterministic)
    engine = model.engine(config)
    others = [engine.submit(Request(_prompt(5, i), (), 2000, GREEDY)) for i in range(2)]
    while len(engine._decoding) < 2:
        engine.tick()
    long = engine.submit(Request(_prompt(3000), (), 1, GREEDY))
    silent, chunks, events = 0, 0, engine.tick()
    while long not in (drew := {event.request_id for event in events}):
        assert drew in (set(), set(others))
        silent, chunks = (0, chunks) if drew else (silent + 1, chunks + 1)
        assert silent <= 1
        events = engine.tick()
    assert chunks == 3000 // 128


def test_another_policy_can_be_given(model):
    """Guards the joint: who goes first is one small class that a user replaces."""

    class ShortestFirst(Scheduler):
        def admit(self, waiting):
            return min(waiting, key=lambda sequence: len(sequence.request.token_ids))

    shape = EngineConfig(max_context_tokens=256, prefill_widths=(64,))
    ends = {}
    for name, scheduler in (("usual", None), ("shortest", ShortestFirst())):
        engine = model.engine(shape, scheduler=scheduler)
        for n in (50, 5, 20):
            engine.submit(Request(_prompt(n), (), 3, GREEDY))
        ends[name] = [event.request_id for event in engine.run() if event.finish_reason]
    assert ends == {"usual": [0, 1, 2], "shortest": [1, 2, 0]}


def test_a_fault_names_request_and_step(model):
    """Guards the error of a model that breaks in mid-answer: which request, at which step, and what came before."""
    engine = model.engine(EngineConfig(slots=2, max_context_tokens=64, prefill_widths=(8,)))
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


def test_logits_that_are_not_finite_raise(folder):
    """Guards against noise as an answer, and against a fault that leaves the engine busy for ever."""
    broken = gptoss_jax.load(folder, dtype="float32")
    sound = broken.params["norm"]
    broken.params["norm"] = sound * np.nan
    engine = broken.engine(EngineConfig(max_context_tokens=64, prefill_widths=(8,)))
    engine.submit(Request((1, 2, 3), (), 4, GREEDY))
    with pytest.raises(NumericsError, match="request 0, step 0: logits are not finite; check the checkpoint"):
        list(engine.run())
    assert engine.is_idle
    broken.params["norm"] = sound
    engine.submit(Request((1, 2, 3), (), 4, GREEDY))
    assert sum(len(event.token_ids) for event in engine.run()) == 4


def test_cancelled_requests_free_their_rows(model):
    """Guards abandoned streams: the row and its pages serve the next request, whose answer is its own."""
    engine = model.engine(EngineConfig(max_context_tokens=256, prefill_widths=(64,)))
    first, second = (engine.submit(Request(_prompt(n), (), 40, GREEDY)) for n in (100, 30))
    events = engine.run()
    next(events)
    engine.cancel(first)
    engine.cancel(second)
    assert engine.is_idle
    request = Request(_prompt(20), (), 10, GREEDY)
    ((tokens, _),) = _answers(engine, [request])
    assert tokens == _greedy(TinyModel(CONFIG).tensors, request.token_ids, tokens)


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
def test_requests_that_cannot_be_served_are_refused(request_, message, refusing):
    """Guards the message, and that a refused request leaves nothing behind."""
    with pytest.raises(RequestError, match=message):
        refusing.submit(request_)
    assert refusing.is_idle


@pytest.fixture(scope="module")
def refusing(model):
    """An engine of 64 tokens."""
    return model.engine(EngineConfig(max_context_tokens=64, prefill_widths=(8,)))


def test_context_beyond_the_models_is_refused(model):
    """Guards YaRN's range: an engine longer than the model's promise would answer nonsense without a word."""
    with pytest.raises(RequestError, match="max_context_tokens is 131073, the model has 131072 at most"):
        Request((1,), (), 4).check(model.config, EngineConfig(max_context_tokens=131_073))
    for name in ("slots", "max_context_tokens", "pool_tokens"):
        with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
            EngineConfig(**{name: 0})
