"""Scores the texts that the flags of `gptoss_jax.score` give: reads them, and prints their log probabilities."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from gptoss_jax.cli import flag_values, hosts, interrupts, model_flags
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.errors import GptossError, check_text
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.runtime.scoring import Scores, Windows, check_named, score_in_windows, summary


def score(options: flags.FlagValues, source: tuple[str, str], echoed: Sequence[str]) -> None:
    """Scores the texts, and prints the results.

    Args:
        options: all flags of `gptoss_jax.score`.
        source: the flag that gives the text, and its value.
        echoed: names of the flags that --json repeats.

    Raises:
        GptossError: flags, texts or weights that are not what they should be.
        BrokenPipeError: nobody reads stdout any more.
    """
    windows = windows_from_flags(options)
    screen, scores = Screen(quiet=options.quiet), []
    model_flags.default_to_demo_model(options, screen)
    config = model_flags.config(options)
    tokenizer = load_tokenizer(options.vocab)
    texts = read_texts(options, source, tokenizer)
    for token_ids in texts:  # before the weights are read
        check_named(token_ids, config)
    language_model = model_flags.load(options, screen, if_random="the probabilities are of noise")
    hosts.check_same("the text", texts)
    score_window = functools.partial(language_model.score, top_logprobs=options.top_logprobs)
    with interrupts.stopping(screen.say) as pressed, screen.progress("scoring", pressed) as report:
        for i, token_ids in enumerate(texts):
            scores.append(score_in_windows(score_window, token_ids, windows))
            if not options.json:
                show(screen, tokenizer, token_ids, scores[-1], with_tokens=options.tokens)
                screen.check_reader()
            report(i + 1, len(texts))
    if options.json:
        settings = {name: options[name].value for name in echoed}
        screen.document(document(settings, tokenizer, texts, scores, with_top=options.top_logprobs > 0))
    elif len(texts) > 1:
        screen.answer(f"all: {summary_line(np.concatenate([found.logprobs for found in scores]))}\n")
    screen.check_reader()


def windows_from_flags(options: flags.FlagValues) -> Windows:
    """How long texts are cut.

    Raises:
        GptossError: sizes that leave tokens out, or nothing to score; too many alternatives.
    """
    with flag_values.naming_flags({"stride": "stride"}):
        SamplingParams(top_logprobs=options.top_logprobs)  # refuses what cannot be
        return Windows.of(options.max_context_tokens, options.stride)


def read_texts(options: flags.FlagValues, source: tuple[str, str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each text to score.

    Raises:
        GptossError: no text; text that is no UTF-8; a text too short to score.
    """
    flag, value = source
    if flag == "token_ids":
        return [_long_enough(list(flag_values.token_ids("token_ids", value.split(","))), "--token-ids")]
    if value == "-" and sys.stdin.isatty():
        raise GptossError("no text: give one in quotes, or --file, --token-ids, or stdin")
    text = flag_values.read_text(value) if flag == "file" else value
    check_text(text, "the text")
    if not options.lines:
        return [_long_enough(tokenizer.encode(text), "the text")]
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise GptossError("the text holds no line that is not empty")
    return [_long_enough(tokenizer.encode(line), f"line {number}") for number, line in lines]


def _long_enough(token_ids: list[int], what: str) -> list[int]:
    if len(token_ids) < 2:
        raise GptossError(f"{what} is {len(token_ids)} token long, expected at least 2: the first has none before it")
    return token_ids


def show(screen: Screen, tokenizer: Tokenizer, token_ids: list[int], scores: Scores, *, with_tokens: bool) -> None:
    """One text's result on stdout."""
    if with_tokens:
        for place, (token, logprob) in enumerate(zip(token_ids[1:], scores.logprobs.tolist(), strict=True), 1):
            screen.answer(f"{place:>7} {token:>7} {logprob:>10.4f}  {tokenizer.decode([token])!r}\n")
    screen.answer(summary_line(scores.logprobs) + "\n")


def summary_line(logprobs: np.ndarray) -> str:
    """`runtime.scoring.summary` for people."""
    found = summary(logprobs)
    return (
        f"{found.tokens_scored} tokens, log probability {found.total_logprob:.4f}, "
        f"{found.mean_logprob:.4f} a token, perplexity {found.perplexity:.6g}"
    )


def document(
    settings: dict[str, Any],
    tokenizer: Tokenizer,
    texts: Sequence[list[int]],
    scores: Sequence[Scores],
    *,
    with_top: bool,
) -> dict[str, Any]:
    """What --json prints. Lists start with the first token, which has no log probability: null."""
    documents = [
        {
            **summary(found.logprobs)._asdict(),
            "token_ids": token_ids,
            "tokens": [tokenizer.decode([token]) for token in token_ids],
            "logprobs": [None, *found.logprobs.tolist()],
            "top_logprobs": [[], *_pairs(found)] if with_top else [],
        }
        for token_ids, found in zip(texts, scores, strict=True)
    ]
    together = summary(np.concatenate([found.logprobs for found in scores]))
    return {"settings": settings, **together._asdict(), "texts": documents}


def _pairs(scores: Scores) -> list[list[tuple[int, float]]]:
    """The likeliest ids of each place, with their log probabilities."""
    both = zip(scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True)
    return [list(zip(ids, logprobs, strict=True)) for ids, logprobs in both]
