"""Answers one prompt.

    python -m gptoss_jax.generate --checkpoint DIR --prompt "Why is the sky blue?"

Text goes to stdout as it comes, statistics to stderr. With --json one JSON document goes to stdout instead.
Exit codes: 0 the answer is complete or reached --max-new-tokens (stderr says which), 2 bad input, 130 interrupted.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from absl import flags

from gptoss_jax import command, engine, harmony, runtime, tokenizer
from gptoss_jax.config import ModelConfig
from gptoss_jax.engine import Event
from gptoss_jax.runtime import LanguageModel
from gptoss_jax.sampling import SamplingParams


def define_flags() -> None:
    """This command's flags, the shared ones among them."""
    flags.DEFINE_string("prompt", None, "What the user says; rendered as a harmony conversation.")
    flags.DEFINE_string("token_ids", None, "The prompt as token ids in place of text: 1,2,3.")
    efforts = list(harmony.REASONING_EFFORTS)
    flags.DEFINE_enum("reasoning_effort", "medium", efforts, "How long the model is asked to think.")
    flags.DEFINE_integer("max_new_tokens", 256, "Length of the answer at most.")
    flags.DEFINE_integer("max_context_tokens", 4096, "Prompt and answer at most; memory follows it.")
    flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token each time.")
    flags.DEFINE_integer("seed", 0, "Same seed, prompt and settings: same tokens.")
    flags.DEFINE_bool("json", False, "Print one JSON document: settings, ids, logprobs, text, statistics.")
    flags.DEFINE_string("vocab", None, "Vocabulary file in place of the packaged o200k_base.tiktoken.")
    runtime.define_flags()
    flags.adopt_module_key_flags(runtime)


class Answer(NamedTuple):
    """A finished answer and how long it took."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    first_token_seconds: float
    decode_seconds: float  # from the first token to the last


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    options = flags.FLAGS
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]  (a text stream)
    if arguments:
        raise ValueError(f"unexpected argument {arguments[0]!r}: the prompt goes behind --prompt, in quotes")
    words = tokenizer.load_tokenizer(options.vocab)
    sampling = SamplingParams(options.temperature, options.seed)
    prompt = prompt_ids(options)
    config = runtime.config_from_flags(options)
    request = build_request(options, config, prompt, sampling)
    language_model = runtime.load_from_flags(options)
    _say(f"loaded {language_model.source} in {language_model.load_seconds:.1f} s; {language_model.kernels}")
    if language_model.weights_are_random:
        _say("these weights are RANDOM: the text is noise, not an answer")
    rows = language_model.sharding.size("rows")
    runner = language_model.engine(engine.EngineConfig(rows=rows, max_context_tokens=options.max_context_tokens))
    runner.submit(request)
    _say(f"compiled in {runner.compile_seconds:.1f} s; prompt of {len(prompt)} tokens")
    answer = stream(runner.run(), tokenizer.StreamDecoder(words), echo=not options.json)
    statistics = measure(language_model, runner, len(prompt), answer)
    if options.json:
        print(json.dumps(document(options, prompt, answer, words.decode(answer.token_ids), statistics), indent=2))
    report(answer, statistics)


def build_request(
    options: flags.FlagValues, config: ModelConfig, prompt: list[int], sampling: SamplingParams
) -> engine.Request:
    """What the engine is asked, checked against the model before its weights are read.

    Raises:
        RequestError: the model cannot serve it.
    """
    request = engine.Request(tuple(prompt), config.stop_ids, options.max_new_tokens, sampling)
    request.check(config, engine.EngineConfig(max_context_tokens=options.max_context_tokens))
    return request


def prompt_ids(options: flags.FlagValues) -> list[int]:
    """The prompt that the flags name.

    Raises:
        ValueError: not exactly one of --prompt and --token-ids, or ids that are no numbers.
    """
    if (options.prompt is None) == (options.token_ids is None):
        raise ValueError("expected one of --prompt TEXT and --token-ids 1,2,3")
    if options.prompt is not None:
        if any("\ud800" <= letter <= "\udfff" for letter in options.prompt):
            raise ValueError("--prompt is not valid UTF-8")
        return harmony.render_prompt(
            options.prompt, reasoning_effort=options.reasoning_effort, vocab_path=options.vocab
        )
    try:
        return [int(part) for part in options.token_ids.split(",")]
    except ValueError:
        raise ValueError(f"--token-ids is {options.token_ids!r}, expected whole numbers such as 1,2,3") from None


def stream(events: Iterator[Event], decoder: tokenizer.StreamDecoder, *, echo: bool) -> Answer:
    """Takes one request's events in, printing its text as it comes if `echo`."""
    ids, logprobs, reason = [], [], ""
    began, first, last = time.perf_counter(), 0.0, 0.0
    for event in events:
        last = time.perf_counter()
        first = first or last
        ids += event.token_ids
        logprobs += event.logprobs
        reason = event.finish_reason or reason
        if echo:
            _print_text(event, decoder)
    if echo:
        print(decoder.flush(), flush=True)
    return Answer(ids, logprobs, reason, first - began, last - first)


def _print_text(event: Event, decoder: tokenizer.StreamDecoder) -> None:
    print("".join(map(decoder.feed, event.token_ids)), end="", flush=True)


def measure(
    language_model: LanguageModel, runner: engine.Engine, prompt_tokens: int, answer: Answer
) -> dict[str, float | None]:
    """Seconds, rates, and the share of what memory bandwidth allows by the cost model."""
    steps = len(answer.token_ids) - 1
    rate = steps / answer.decode_seconds if steps > 0 else None
    statistics = {
        "load_seconds": round(language_model.load_seconds, 3),
        "compile_seconds": round(runner.compile_seconds, 3),
        "first_token_seconds": round(answer.first_token_seconds, 3),
        "decode_tokens_per_second": rate and round(rate, 3),
    }
    if rate:
        devices = language_model.mesh.devices.flat
        memories = 1 if devices[0].platform == "cpu" else len(devices)  # a CPU's devices share one
        bandwidth = runtime.read_bandwidth(devices[0]) * memories
        step_bytes = language_model.config.decode_bytes(
            1, prompt_tokens + steps // 2, language_model.policy.cache.itemsize
        )
        statistics["read_bandwidth_gb_per_second"] = round(bandwidth / 1e9, 2)
        statistics["share_of_bandwidth_limit"] = round(rate * step_bytes / bandwidth, 4)
    return statistics


def document(
    options: flags.FlagValues, prompt: list[int], answer: Answer, text: str, statistics: dict[str, float | None]
) -> dict[str, Any]:
    """What --json prints."""
    echoed = ("checkpoint", "mesh", "dtype", "kernels", "prompt", "reasoning_effort", "temperature", "seed")
    return {
        "settings": {name: options[name].value for name in (*echoed, "max_new_tokens", "max_context_tokens")},
        "prompt_token_ids": prompt,
        "token_ids": answer.token_ids,
        "logprobs": answer.logprobs,
        "text": text,
        "finish_reason": answer.finish_reason,
        "statistics": statistics,
    }


def report(answer: Answer, statistics: dict[str, Any]) -> None:
    """One line of statistics; and one more if the answer was cut."""
    rate = statistics["decode_tokens_per_second"]
    line = f"first token after {answer.first_token_seconds:.2f} s; {len(answer.token_ids)} tokens"
    if rate:
        line += (
            f", {rate:.2f} tokens/s, {100 * statistics['share_of_bandwidth_limit']:.1f} % of what "
            f"{statistics['read_bandwidth_gb_per_second']:.1f} GB/s of measured read bandwidth allow"
        )
    _say(line)
    if answer.finish_reason == "length":
        _say(f"the answer was cut at {len(answer.token_ids)} tokens (--max-new-tokens)")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def cli() -> None:
    """The console script."""
    define_flags()
    command.run(main, "generate")


if __name__ == "__main__":
    cli()
