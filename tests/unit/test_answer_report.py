"""What `generate` reports of its answers."""

from types import SimpleNamespace

import pytest

from gptoss_jax.cli import answer_report
from gptoss_jax.runtime.answers import Sample
from gptoss_jax.runtime.language_model import LanguageModel


class _Model(LanguageModel):
    """One that reads 1,000 bytes for each step, in a memory of 80,000 bytes a second."""

    load_seconds = 1.5

    def __init__(self):
        self.asked: list[float] = []

    def decode_bytes(self, slots: int, context_tokens: int) -> int:
        return 1000

    def read_bandwidth(self, at_least: float = 0.0) -> float:
        self.asked.append(at_least)
        return 80_000.0


def _sample(tokens: int, first: float, last: float) -> Sample:
    answer = SimpleNamespace(parsed=SimpleNamespace(token_ids=range(tokens)))
    return Sample(answer, [], first, last)  # pyright: ignore[reportArgumentType]


def test_the_share_of_the_limit_follows_from_bytes_and_time():
    """Guards the arithmetic: 20 steps in half a second read 40,000 of the 80,000 bytes that a second allows."""
    model = _Model()
    statistics = answer_report.measure(
        model, 2.5, 7, [_sample(21, 1.0, 1.5)], cached_prompt_tokens=0, with_bandwidth=True
    )
    assert statistics["decode_tokens_per_second"] == 40.0
    assert statistics["share_of_bandwidth_limit"] == 0.5
    assert (statistics["load_seconds"], statistics["compile_seconds"]) == (1.5, 2.5)
    assert model.asked == [40_000.0]
    line = answer_report.statistics_line(statistics, at_length=True)
    assert line.startswith("first token after 1.00 s; 21 tokens, 40.00 tokens/s, 50.0 % of what 0.0 GB/s of measured ")
    assert (
        answer_report.statistics_line(statistics, at_length=False)
        == "21 tokens in 1.5 s, 40.0 tokens/s after the first"
    )


@pytest.mark.parametrize("samples", [[(5, 1.0, 2.0), (5, 1.0, 2.0)], [(1, 1.0, 1.0)], [(0, 0.0, 0.0)]])
def test_the_memory_is_measured_only_where_its_share_is_reported(samples):
    """Guards the end of a run: no benchmark for several answers, which share their reads, nor for a single token."""
    model, several = _Model(), [_sample(*sample) for sample in samples]
    answer_report.measure(model, 2.5, 7, [_sample(21, 1.0, 1.5)], cached_prompt_tokens=0, with_bandwidth=False)
    statistics = answer_report.measure(model, 2.5, 7, several, cached_prompt_tokens=0, with_bandwidth=True)
    assert model.asked == []
    assert "share_of_bandwidth_limit" not in statistics
    assert "GB/s" not in answer_report.statistics_line(statistics, at_length=True)
    tokens = len(several[0].answer.parsed.token_ids)
    plain = {1: "1 token in 1.0 s", 0: "0 tokens in 0.0 s", 5: "10 tokens in 2.0 s, 8.0 tokens/s after the first"}
    assert answer_report.statistics_line(statistics, at_length=False) == plain[tokens]
