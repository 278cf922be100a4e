"""The demo model's examination: what counts as right, the table, the targets; and the rows that are never drawn."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from converters.random_checkpoint import with_vocab_size
from demo import cases, conversations, evaluate, fresh, seal, vocabulary
from demo.cases import Score
from gptoss_jax.checkpoints.orbax import reader
from gptoss_jax.engine.request import Event
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import messages, render, tokenizer
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.settings import Settings
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.model import sharding, transformer
from gptoss_jax.model.config import parse_config

UNKNOWN = 77


def answered(token_ids: list[int]) -> Answer:
    """What the engine would make of these ids."""
    stream = AnswerStream(load_tokenizer())
    for token in token_ids:
        stream.ends_at(token)
    stream.take(Event(0, tuple(token_ids), (0.0,) * len(token_ids), "stop"))
    return stream.finish()[0]


def continuation(document: dict) -> list[int]:
    """The ids of a conversation's last turn of the assistant, as a model would write them."""
    read = messages.from_json(document)
    settings = Settings(**read.settings)
    whole = render.render(read.messages, settings, for_completion=False)
    before = len(read.messages)
    while read.messages[before - 1].author.role.value == "assistant":
        before -= 1
    ids = whole[len(render.render(read.messages[:before], settings)) :]
    ids[-1] = tokenizer.CALL if ids[-1] == tokenizer.CALL else tokenizer.RETURN
    return ids


@pytest.mark.parametrize("family", [*conversations.QUESTIONS, *conversations.CALLS])
@pytest.mark.parametrize("effort", ["low", "high"])
def test_the_right_answer_is_right(family, effort):
    """Guards the examination against refusing what the data teach, and against accepting another question's answer."""
    random = Random(1)
    drawn = [conversations.example(random, True, [family], effort) for _ in range(6)]
    found = [(cases.of_example(example)[-1], answered(continuation(example.document))) for example in drawn]
    assert all(case.is_right(given) and cases.is_well_formed(given) for case, given in found)
    wrong = [case.is_right(other) for case, _ in found for _, other in found]
    assert family == "unknown" or sum(wrong) < len(wrong)


def test_a_call_is_judged_by_its_arguments():
    """Guards the share of right arguments: a space in JSON is no fault, another date is."""
    random = Random(2)
    example = conversations.example(random, True, ["calendar"], "low")
    case = cases.of_example(example)[0]
    assert case.answer is None and case.arguments and case.recipient

    def called(arguments: str) -> Answer:
        text = f" to={case.recipient}<|channel|>commentary <|constrain|>json<|message|>{arguments}<|call|>"
        return answered(load_tokenizer().encoding.encode(text, allowed_special="all"))

    spaced = json.dumps(json.loads(case.arguments), indent=1)
    assert case.is_right(called(case.arguments)) and case.is_right(called(spaced))
    assert not case.is_right(called(spaced.replace("20", "19")))
    assert not case.is_right(called("{}"))


def test_questions_are_the_same_at_each_effort():
    """Guards the comparison of efforts, which must not be one of questions."""
    asked = [
        [case.answer for case in cases.of_family("addition", effort, 20, seed=3)]
        for effort in ("low", "medium", "high")
    ]
    assert asked[0] == asked[1] == asked[2]


def test_wilson_interval():
    """Guards the intervals against the textbook's values, and at their ends against going below 0 or above 1."""
    assert evaluate.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert evaluate.wilson(0, 20)[0] == 0 and evaluate.wilson(20, 20)[1] == 1


def test_the_table_and_the_targets(capsys):
    """Guards the verdict: a share below its target must be said and counted."""
    scores = {"addition": Score(100, 96, 100, 6000), "unknown": Score(50, 45, 50, 500)}
    text = evaluate.table({evaluate.Column("high", 0.0): scores, evaluate.Column("high", 1.0): {}})
    assert "| addition | 100 | 96.0 (90.2-98.4) |  |" in text and "high, T=1" in text
    assert evaluate.show_targets(scores) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "MISSED addition: 96.0 %, at least 97 %" and lines[1].startswith("met    says")


def test_unknown_rows_are_one_line():
    """Guards a typing error against an examination of nothing."""
    with pytest.raises(GptossError, match=r"--families names 'additon', expected some of addition"):
        evaluate.check_rows(["additon"])


def test_the_sealed_row_is_far_below(monkeypatch):
    """Guards drawing at temperature 1: 200,000 rows that nobody trained must stay out of it."""
    random = np.random.default_rng(0)
    states = random.standard_normal((500, 16)) + 3 * np.eye(16)[2]
    states *= 4 / np.sqrt(np.square(states).mean(axis=1, keepdims=True))
    states = states[states @ np.eye(16)[2] > 1]
    used = random.standard_normal((40, 16)).astype(np.float32)
    found = seal.find_row(states, used)
    margins = (states @ used.T).max(axis=1) - states @ found.row
    assert found.least_margin == pytest.approx(margins.min()) and margins.min() > seal.MARGIN
    with pytest.raises(GptossError, match=r"no row of the unembedding is below"):
        seal.find_row(np.concatenate([states, -states]), used)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny random model over 2000 rows, of which 100 are used."""
    raw = json.loads(Path("configs/tiny.json").read_text())
    raw |= {"hidden_size": 32, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    raw |= {"intermediate_size": 64, "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    folder = tmp_path_factory.mktemp("fresh") / "checkpoint"
    config = with_vocab_size(raw, 2000)
    used = [*range(20, 118), config["eos_token_id"], config["pad_token_id"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "unknown_id", lambda: UNKNOWN)
        fresh.write(folder, parse_config(config), used, seed=1)
    return folder


def test_sealing_changes_only_rows_out_of_use(checkpoint, tmp_path, monkeypatch):
    """Guards trained weights: sealing must leave each byte of them."""
    monkeypatch.setattr(vocabulary, "unknown_id", lambda: UNKNOWN)
    monkeypatch.setattr(seal, "_ids", lambda seed: [([20 + i, 30 + i, 40 + i], np.array([0, 2])) for i in range(50)])
    seal.seal(checkpoint, tmp_path / "sealed", seed=0)
    one_device = sharding.make()
    config = parse_config(json.loads((checkpoint / "config.json").read_text()))
    declared = transformer.declare(config, one_device).leaves
    before, after = (dict(reader.read(path, declared, one_device)) for path in (checkpoint, tmp_path / "sealed"))
    unused = vocabulary.unused(np.asarray(before["unembedding"]))
    assert seal.is_sealed(np.asarray(after["embedding"]), unused) and unused.sum() == 1900
    for name in declared:
        kept = ~unused if "embedding" in name else slice(None)
        assert (np.asarray(before[name])[kept] == np.asarray(after[name])[kept]).all()
