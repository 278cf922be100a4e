"""What `generate` reports of its answers: times and rates, and the document that --json prints."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from gptoss_jax.cli.prompts import Prompt
from gptoss_jax.cli.sampling_flags import SAMPLING_FLAGS
from gptoss_jax.engine.request import Request
from gptoss_jax.grammar.verdict import verdict
from gptoss_jax.harmony import messages
from gptoss_jax.runtime.answers import Sample
from gptoss_jax.tools.rounds import Rounds

if TYPE_CHECKING:
    import gptoss_jax.runtime.language_model

Statistics = dict[str, float | int | None]


def measure(
    language_model: "gptoss_jax.runtime.language_model.LanguageModel",
    compile_seconds: float,
    prompt_tokens: int,
    samples: Sequence[Sample],
    *,
    cached_prompt_tokens: int,
    with_bandwidth: bool,
) -> Statistics:
    """Seconds, rates over all answers, and of a single one, if wanted, the share of what memory bandwidth allows."""
    tokens = [len(sample.answer.parsed.token_ids) for sample in samples]
    steps = sum(tokens) - len(tokens)
    first = min(sample.first_token_seconds for sample in samples)
    last = max(sample.last_token_seconds for sample in samples)
    seconds = last - first
    rate = steps / seconds if steps > 0 and seconds > 0 else None
    statistics: Statistics = {
        "prompt_tokens": prompt_tokens,
        "cached_prompt_tokens": cached_prompt_tokens,  # of all samples' prompts
        "answer_tokens": sum(tokens),
        "load_seconds": round(language_model.load_seconds, 3),
        "compile_seconds": round(compile_seconds, 3),
        "first_token_seconds": round(first, 3),
        "last_token_seconds": round(last, 3),
        "decode_tokens_per_second": rate and round(rate, 3),
    }
    if with_bandwidth and rate and len(samples) == 1:
        bytes_per_second = rate * language_model.decode_bytes(1, prompt_tokens + steps // 2)
        bandwidth = language_model.read_bandwidth(at_least=bytes_per_second)
        statistics["read_bandwidth_gb_per_second"] = round(bandwidth / 1e9, 2)
        statistics["share_of_bandwidth_limit"] = round(bytes_per_second / bandwidth, 4)
    return statistics


def one_after_another(samples: Sequence[Sample]) -> list[Sample]:
    """Answers of rounds with their times in a row, as if each one's first token came with the last of the one before.

    So what tools took, and the reading of what they gave, is in no rate.
    """
    moved, last = list(samples[:1]), samples[0].last_token_seconds
    for sample in samples[1:]:
        began, last = last, last + sample.last_token_seconds - sample.first_token_seconds
        moved.append(sample._replace(first_token_seconds=began, last_token_seconds=last))
    return moved


def statistics_line(statistics: dict[str, Any], *, at_length: bool) -> str:
    """Times and rates for people."""
    tokens, rate = statistics["answer_tokens"], statistics["decode_tokens_per_second"]
    if not at_length:
        speed = f", {rate:.1f} tokens/s after the first" if rate else ""
        return f"{tokens} token{'s' * (tokens != 1)} in {statistics['last_token_seconds']:.1f} s{speed}"
    line = f"first token after {statistics['first_token_seconds']:.2f} s; {tokens} tokens"
    if rate:
        line += f", {rate:.2f} tokens/s"
    if statistics["cached_prompt_tokens"]:
        line += f", {statistics['cached_prompt_tokens']} prompt tokens read once for several"
    if "share_of_bandwidth_limit" in statistics:
        line += (
            f", {100 * statistics['share_of_bandwidth_limit']:.1f} % of what "
            f"{statistics['read_bandwidth_gb_per_second']:.1f} GB/s of measured read bandwidth allow"
        )
    return line


def document(
    settings: Mapping[str, Any],
    prompt: Prompt,
    samples: Sequence[Sample],
    statistics: Statistics,
    turn: Rounds | None = None,
) -> dict[str, Any]:
    """What --json prints. `conversation` goes on from the first answer, and is what --messages takes back.

    Of answers in rounds the last is the answer, and `turn` has all of them with the calls between.
    """
    conversation = prompt.conversation_with(samples[0].answer) if turn is None else turn.messages
    return {
        "settings": settings,
        "prompt_token_ids": prompt.token_ids,
        "answers": [_answer(prompt, sample) for sample in (samples if turn is None else samples[-1:])],
        **({} if turn is None else turn.document()),
        "conversation": messages.to_json(conversation),
        "statistics": statistics,
    }


def _answer(prompt: Prompt, sample: Sample) -> dict[str, Any]:
    held = {"structured": verdict(prompt.form, sample.answer)} if prompt.form else {}
    return {**sample.answer.document(), **held}


def settings_document(
    options: flags.FlagValues, echoed: Sequence[str], prompt: Prompt, request: Request, *, deterministic: bool
) -> dict[str, Any]:
    """The flags named in `echoed`, those of prompt and sampling with the values that acted."""
    return {
        **{name: options[name].value for name in echoed},
        **prompt.settings_document(),
        **{name: options[name].value for name in SAMPLING_FLAGS},
        "stop_ids": list(request.stop_ids),
        "prompt": prompt.text,
        "deterministic": deterministic,
    }
