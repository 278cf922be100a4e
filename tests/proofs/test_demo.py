"""The demo model, end to end, on text that means something: however it is run, it answers the same, and rightly."""

from typing import Any

import pytest

import gptoss_jax
from demo import cases, conversations, vocabulary
from demo.compact import CompactModel
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.harmony.answer import AnswerStream
from gptoss_jax.harmony.settings import Settings
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.runtime import demo_model, loading
from gptoss_jax.runtime.answers import collect
from gptoss_jax.runtime.language_model import LanguageModel
from tests.unit.test_demo_evaluate import UNKNOWN, checkpoint

__all__ = ["checkpoint"]  # a fixture

QUESTIONS = (
    "What is 417 + 258?",
    "How many r are in strawberry?",
    "Sort these numbers: 317, 101, 747, 75.",
    "What is MXFP4?",
    "Who painted the Mona Lisa?",
    "What is 47 * 36?",
)
LIMITS: dict[str, Any] = {"max_new_tokens": 256, "max_context_tokens": 512}
GREEDY = SamplingParams(temperature=0.0)
HIGH = Settings(reasoning_effort="high")


@pytest.fixture(scope="module")
def folder():
    """The packaged model's checkpoint."""
    if not demo_model.ARCHIVE.is_file():
        pytest.skip(f"no demo model is packed yet: {demo_model.ARCHIVE} (demo/make.sh makes it)")
    return demo_model.folder()


@pytest.fixture(scope="module")
def model(folder) -> LanguageModel:
    """It, as users run it."""
    return gptoss_jax.load(folder)


@pytest.fixture(scope="module")
def texts(model) -> list[str]:
    """All that it says to QUESTIONS, control tokens spelled out."""
    return said(model)


def said(model: LanguageModel, slots: int = 4) -> list[str]:
    """All that a model says to QUESTIONS at high effort, greedy."""
    answers = model.answers(QUESTIONS, settings=HIGH, sampling=GREEDY, slots=slots, **LIMITS)
    return [answer.parsed.text for answer in answers]


def test_it_answers(model):
    """Guards the first thing that a newcomer sees."""
    settings = (Settings(), HIGH)  # medium, too, must be right
    finals = [next(model.answers([QUESTIONS[0]], settings=each, sampling=GREEDY, **LIMITS)).final for each in settings]
    assert finals == ["417 + 258 = 675."] * 2


def test_batched_is_alone(model, texts):
    """Guards a batch against mixing what two people ask, on real text."""
    alone = [next(model.answers([text], settings=HIGH, sampling=GREEDY, slots=1, **LIMITS)) for text in QUESTIONS]
    assert [answer.parsed.text for answer in alone] == texts


def test_streamed_is_whole(model, texts):
    """Guards people who watch an answer come: what they see must be what is kept."""
    shown = dict.fromkeys(range(len(QUESTIONS)), "")
    tokenizer, streams, requests = load_tokenizer(), [], []
    for text in QUESTIONS:
        streams.append(AnswerStream(tokenizer))
        document = {"messages": [{"role": "user", "content": text}], "reasoning_effort": "high"}
        ids = prompt_of(document)
        requests.append(Request(ids, model.config.stop_ids, LIMITS["max_new_tokens"], GREEDY, streams[-1].ends_at))
    engine = model.engine(EngineConfig(slots=4, max_context_tokens=LIMITS["max_context_tokens"]))
    for number, sample in enumerate(collect(engine, requests, streams)):
        shown[number] += "".join(delta.text for delta in sample.deltas if delta.is_answer)
        assert shown[number] == sample.answer.final and sample.answer.parsed.text == texts[number]


def prompt_of(document: dict) -> tuple[int, ...]:
    """The ids of a conversation, with the header that the assistant goes on from."""
    tokenizer = load_tokenizer()
    header = tokenizer.encoding.encode("<|start|>assistant", allowed_special="all")
    return (*conversations.token_ids(document), *header)


@pytest.mark.parametrize("mesh", ["configs/meshes/data2-expert2-tensor2.json", "expert=4,tensor=2"])
def test_sharded_is_not(folder, texts, mesh):
    """Guards the README's sharded example on eight devices: in float32 greedy text is the same."""
    one, eight = (loading.load(folder, mesh=each, dtype="float32") for each in (None, mesh))
    assert said(one) == said(eight)


def test_int8_answers_alike(folder, texts):
    """Guards `--dense int8`: it is rounded, and on text that means something most answers must stay."""
    rounded = said(loading.load(folder, dense="int8"))
    assert sum(one == other for one, other in zip(rounded, texts, strict=True)) >= len(texts) - 2


@pytest.mark.parametrize(
    ("family", "least"),
    [
        *(("addition", 0.9), ("subtraction", 0.9), ("comparison", 0.9), ("product_by_digit", 0.9), ("counting", 0.85)),
        *(("spelling", 0.85), ("reversing", 0.85), ("product_two_digits", 0.7), ("sorting_numbers", 0.7)),
        *(("sorting_words", 0.7), ("unknown", 0.8), ("fact", 0.8), ("calendar", 0.8), ("conversion", 0.8)),
    ],
)
def test_it_is_right_on_questions_that_it_never_saw(compact, family, least):
    """Guards skill against a packed model that lost it; `python -m demo.evaluate --check` holds the true targets."""
    asked = [case for case in cases.of_family(family, "high", 40) if case.row == family]
    answers = compact.answers([case.token_ids for case in asked], GREEDY, slots=20, **LIMITS)
    right = [case.is_right(given) for case, given in zip(asked, answers, strict=True)]
    assert sum(right) >= least * len(right)


@pytest.fixture(scope="module")
def compact(folder, tmp_path_factory) -> CompactModel:
    """It, over the rows that it uses."""
    return CompactModel(folder, tmp_path_factory.mktemp("demo") / "compact")


def test_rows_out_of_use_are_never_drawn(model):
    """Guards sampling at a high temperature against 198,000 rows that nobody trained."""
    sampling = SamplingParams(temperature=1.5, seed=3)
    unused = vocabulary.unused(model.params["unembedding"])
    for answer in model.answers(QUESTIONS, settings=HIGH, sampling=sampling, slots=4, **LIMITS):
        assert not unused[list(answer.parsed.token_ids)].any()


def test_a_compact_model_gives_the_same_answers(checkpoint, tmp_path, monkeypatch):
    """Guards the table of results: it is made without the rows that are never drawn, and must hold with them."""
    monkeypatch.setattr(vocabulary, "unknown_id", lambda: UNKNOWN)
    compact = CompactModel(checkpoint, tmp_path / "compact", dtype="float32")
    assert len(compact.ids) == 100 == compact.model.config.vocab_size
    prompts = [[20, 33, 40], [117, 21], [20, 500, 40]]  # 500 was never trained: the unknown word stands for it
    whole, length = loading.load(checkpoint, dtype="float32"), dict[str, Any](LIMITS, max_new_tokens=12)
    wanted = [answer.parsed.token_ids for answer in whole.answers(prompts, sampling=GREEDY, slots=2, **length)]
    assert [given.parsed.token_ids for given in compact.answers(prompts, GREEDY, slots=2, **length)] == wanted
