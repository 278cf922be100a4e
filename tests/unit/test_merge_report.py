"""The report of a merge: what it is measured on, what it says, and when it speaks against the export."""

import json
import re

import pytest

from converters import merge_report
from converters.merge_report import BFLOAT16, EXPORTED, MAX_TOKENS, ROW_TOKENS, Report
from gptoss_jax.checkpoints.export import ExportError
from gptoss_jax.checkpoints.merging import Loss
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.runtime.merge_loss import Divergence
from gptoss_jax.training.jsonl import DataError
from tests import finetunes

GONE = Loss(weights=640, packed=640, delta_power=0.04, base_power=4.0, error_power=0.04)
THERE = Loss(weights=64, changed=48, delta_power=1.0, base_power=4.0, kept_power=0.9, error_power=0.25)


def report(from_adapter: float, from_base: float, exported: str = EXPORTED) -> Report:
    """Of a merge that is so far from both."""
    divergences = {"base": Divergence(0.5, 0.0, 0.25), BFLOAT16: Divergence(0.1, 0.4, 0.875)}
    divergences[exported] = Divergence(from_adapter, from_base, 0.5)
    losses = {"layers/0/moe/down": GONE, "layers/0/attention/q": THERE}
    return Report("some format", losses, divergences, exported, 1234, "ab" * 32)


def test_refused_where_it_is_nearer_to_the_base():
    """Guards the rule at its border: as far from both is not lost, and an empty adapter loses nothing."""
    assert report(0.31, 0.3).is_lost and not report(0.3, 0.3).is_lost and not report(0.0, 0.0).is_lost
    line = report(0.31, 0.0003).refusal()
    assert "KL(adapter || merged) 0.31, KL(base || merged) 0.0003 nats a token; 1 of 2 matrices lost more" in line
    assert "\n" not in line and "--format bf16" in line and "--keep-adapter" in line and "--accept-loss" in line
    assert "--format" not in report(2, 1, BFLOAT16).refusal()


def test_the_table_says_what_is_lost():
    """Guards the columns: shares of weights, of codes and of scales, and the mark of a matrix that is as it was."""
    lines = report(0.31, 0.3).text().splitlines()
    assert re.fullmatch(r"layers/0/moe/down +0\.1 +0\.0% +1 +0\.0% +0\.0% +0\.0%  lost in rounding", lines[1])
    assert re.fullmatch(r"layers/0/attention/q +0\.5 +90\.0% +0\.5 +75\.0% +- +-", lines[2])
    assert lines[4].startswith("on 1,234 tokens ")
    assert re.fullmatch(r"base +0\.5 +0 +25\.0%", lines[5]) and re.fullmatch(
        r"merged, MXFP4 +0\.31 +0\.3 +50\.0%", lines[7]
    )


def test_the_document_has_the_same():
    """Guards merge_report.json: every number of the table, and whether a loss was accepted."""
    found = json.loads(report(0.31, 0.3).document(accepted=True))
    assert found["nearer_the_base"] and found["loss_accepted"] and found["exported"] == EXPORTED
    assert found["divergences"][EXPORTED] == {"from_adapter": 0.31, "from_base": 0.3, "agrees": 0.5}
    assert found["matrices"]["layers/0/moe/down"]["error"] == 1 and found["matrices"]["layers/0/moe/down"]["kept"] == 0
    assert found["matrices"]["layers/0/attention/q"]["delta"] == 0.5


def test_a_text_is_cut_into_rows(tmp_path):
    """Guards what is measured on: the beginning of a long text, all of a short one, and one's own in place of ours."""
    rows, measured = merge_report._tokens(None)
    assert load_tokenizer().decode(rows[0]) == merge_report.TEXT and all(measured[0])
    (tmp_path / "long.txt").write_text("one two three " * 1000)
    rows, measured = merge_report._tokens(tmp_path / "long.txt")
    assert [len(row) for row in rows] == [len(row) for row in measured] == [ROW_TOKENS] * (MAX_TOKENS // ROW_TOKENS)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(GptossError, match="holds no text"):
        merge_report._tokens(tmp_path / "empty.txt")


def test_conversations_are_measured_where_the_assistant_speaks(tmp_path):
    """Guards against means over prompts, which an adapter was not trained on, and predictions that are off by one."""
    rows, measured = merge_report._tokens(finetunes.chats(tmp_path / "chats.jsonl", count=40))
    assert 2 < len(rows) < 40 and sum(map(len, rows)) <= MAX_TOKENS
    tokenizer = load_tokenizer()
    for i, (row, compared) in enumerate(zip(rows[:-1], measured[:-1], strict=True)):
        assert len(row) == len(compared) and not compared[-1]
        predicted = [token for token, is_compared in zip(row[1:], compared[:-1], strict=True) if is_compared]
        said = tokenizer.decode(predicted)
        assert f"{i} plus {i % 7}." in said and said.endswith(f"{i + i % 7}<|return|>") and "What is" not in said
    finetunes.write_lines(tmp_path / "none.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises((DataError, ExportError)) as caught:
        merge_report._tokens(tmp_path / "none.jsonl")
    assert "none.jsonl" in str(caught.value)
