"""The engine: requests of mixed lengths through a few rows, against the reference and against running alone."""

import collections

import jax
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.engine import EngineConfig, NumericsError, Request, RequestError
from gptoss_jax.sampling import SamplingParams
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
    """It in float32, so that greedy tokens can be compared with the reference's."""
    return gptoss_jax.load(folder, dtype="float32")


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


def test_more_requests_than_rows_of_mixed_lengths(model):
    """Guards admission, reuse of rows and pages, and rings: every answer is the reference's; nothing compiles."""
    engine = model.engine(EngineConfig(rows=3, max_context_tokens=384, prefill_widths=(16, 64)))
    free = [list(pages) for pages in engine._free_pages]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    requests = [Request(_prompt(n), (), 9 + i, GREEDY) for i, n in enumerate(LENGTHS)]
    answers = _answers(engine, requests)
    assert compiled == []
    tensors = TinyModel(CONFIG).tensors
    for request, (tokens, reason) in zip(requests, answers, strict=True):
        assert (len(tokens), reason) == (request.max_new_tokens, "length")
        assert tokens == _greedy(tensors, request.token_ids, tokens)
    assert [sorted(pages) for pages in engine._free_pages] == [sorted(pages) for pages in free]


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
    engine = model.engine(EngineConfig(rows=3, max_context_tokens=384, prefill_widths=(64,)))
    asked = Request(_prompt(50), (), 30, SamplingParams(temperature=1.0, seed=5))
    others = [Request(_prompt(n, seed=1), (), 20, SamplingParams(seed=n)) for n in (200, 3, 77)]
    ((alone, _),) = _answers(engine, [asked])
    in_company = _answers(engine, [others[0], asked, *others[1:]])[1][0]
    assert in_company == alone
    ((again, _),) = _answers(engine, [asked])
    assert again == alone
    ((other_seed, _),) = _answers(engine, [Request(asked.token_ids, (), 30, SamplingParams(seed=6))])
    assert other_seed != alone


def test_stops_at_stop_ids_and_only_there(model):
    """Guards the stop: the stop id is the answer's last token, wherever in a dispatch it falls."""
    engine = model.engine(EngineConfig(max_context_tokens=256, prefill_widths=(64,)))
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


def test_a_small_pool_makes_requests_wait(model):
    """Guards paging: with pages for one long request at a time, all are served, and rightly."""
    engine = model.engine(EngineConfig(rows=2, max_context_tokens=384, prefill_widths=(64,), pool_tokens=384))
    requests = [Request(_prompt(n), (), 10, GREEDY) for n in (300, 290, 20)]
    tensors = TinyModel(CONFIG).tensors
    for request, (tokens, _) in zip(requests, _answers(engine, requests), strict=True):
        assert tokens == _greedy(tensors, request.token_ids, tokens)
    with pytest.raises(RequestError, match="exceed a page pool of 384: shorten the request, or raise pool_tokens"):
        model.engine(EngineConfig(max_context_tokens=1024, prefill_widths=(64,), pool_tokens=384)).submit(
            Request(_prompt(400), (), 10, GREEDY)
        )


def test_logits_that_are_not_finite_raise(folder):
    """Guards against noise as an answer, and against a fault that leaves the engine busy for ever."""
    broken = gptoss_jax.load(folder, dtype="float32")
    sound = broken.params["norm"]
    broken.params["norm"] = sound * np.nan
    engine = broken.engine(EngineConfig(max_context_tokens=64, prefill_widths=(8,)))
    engine.submit(Request((1, 2, 3), (), 4, GREEDY))
    with pytest.raises(NumericsError, match="request 0: logits are not finite behind its last token; check the check"):
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
    for name in ("rows", "max_context_tokens", "pool_tokens"):
        with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
            EngineConfig(**{name: 0})
