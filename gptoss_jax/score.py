r"""How likely a model finds a text: log probabilities of tokens, perplexity.

    python -m gptoss_jax.score --checkpoint DIR "The sky is blue."
    python -m gptoss_jax.score --checkpoint DIR --file book.txt --stride 1024
    python -m gptoss_jax.score --checkpoint DIR --file sentences.txt --lines
    python -m gptoss_jax.score --checkpoint DIR --file book.txt --json

Plain text, not a conversation: it is scored as it stands, by the same forward
that generates. The first token has nothing before it and is not scored. A text
longer than the context goes through in windows: each token is scored once, and
has at least --max-context-tokens minus --stride tokens before it.

Prints one line a text: tokens scored, total and mean log probability (natural
logarithm), perplexity; behind several texts a line for all of them. --tokens
prints a line a token, --json one document with ids, logprobs and settings.
Exit codes: 0 scored, 2 bad input, 130 interrupted, 141 stdout's reader left.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from gptoss_jax.cli import command
from gptoss_jax.cli import options as request_flags
from gptoss_jax.cli.terminal import Screen, interrupted_late, load_model
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import messages, tokenizer
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.runtime import language_model as runtime
from gptoss_jax.runtime.language_model import LanguageModel, Scores

TEXTS = ("text", "file", "token_ids")
SECTIONS = {
    "What is scored (text on stdin where none of these is given)": (*TEXTS, "lines"),
    "How": ("max_context_tokens", "stride", "top_logprobs"),
    "What is shown": ("tokens", "json"),
    "Model and machine": runtime.FLAGS,
}
_APART = (("tokens", "json"), ("token_ids", "lines"))
_TOGETHER = (("top_logprobs", "json"),)


def define_flags() -> None:
    """This command's flags, the shared ones among them."""
    flags.DEFINE_string("text", None, "TEXT: The text; the same as giving it without a flag.")
    flags.DEFINE_string("file", None, "FILE: A text file; - is stdin.")
    flags.DEFINE_bool("lines", False, "Each line is a text of its own; empty lines are left out.")
    flags.DEFINE_string("token_ids", None, "IDS: Token ids in place of text: 1,2,3.")
    flags.DEFINE_integer("max_context_tokens", 4096, "N: Tokens in a window at most; memory follows it.")
    flags.DEFINE_integer("stride", None, "N: Tokens by which a window is behind the last; left out: half a window.")
    flags.DEFINE_integer(
        "top_logprobs", 0, "N: Report this many of the likeliest tokens at each place, up to 20 (--json)."
    )
    flags.DEFINE_bool("tokens", False, "Print a line for each token: place, id, log probability, text.")
    flags.DEFINE_bool("json", False, "Print one JSON document.")
    runtime.define_flags()


class Windows(NamedTuple):
    """How long texts are cut.

    Attributes:
        size: tokens of a window.
        stride: tokens by which a window is behind the one before.
    """

    size: int
    stride: int

    def over(self, length: int) -> Iterator[tuple[int, int, int]]:
        """First token, end, and first token to score of each window over `length` tokens: every token but 0, once."""
        scored = 1
        for first in range(0, length, self.stride):
            end = min(first + self.size, length)
            yield first, end, scored
            if end == length:
                return
            scored = end


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    options = flags.FLAGS
    screen, words = Screen(), tokenizer.load_tokenizer(options.vocab)
    request_flags.refuse_together(options, *_APART)
    request_flags.refuse_without(options, *_TOGETHER)
    windows = windows_from_flags(options)
    texts = read_texts(options, arguments, words)
    config = runtime.config_from_flags(options)
    for ids in texts:  # before the weights are read
        runtime.check_named(ids, config)
    scores = []
    with interrupted_late() as pressed:
        language_model = load_model(screen, options, pressed, if_random="the probabilities are of noise")
        with screen.progress("scoring", pressed) as report:
            for i, ids in enumerate(texts):
                scores.append(score(language_model, ids, windows, options.top_logprobs))
                if not options.json:
                    show(screen, words, ids, scores[-1], with_tokens=options.tokens)
                    screen.check_reader()
                report(i + 1, len(texts))
    if options.json:
        screen.document(document(options, words, texts, scores))
    elif len(texts) > 1:
        screen.answer(f"all: {summary_line(np.concatenate([found.logprobs for found in scores]))}\n")
    screen.check_reader()


def windows_from_flags(options: flags.FlagValues) -> Windows:
    """How long texts are cut.

    Raises:
        GptossError: sizes that leave tokens out, or nothing to score.
    """
    size = options.max_context_tokens
    stride = max(1, size // 2) if options.stride is None else options.stride
    if size < 2:
        raise GptossError(f"--max-context-tokens is {size}, expected at least 2")
    if not 1 <= stride < size:
        raise GptossError(f"--stride is {stride}, expected 1 to {size - 1}, below --max-context-tokens")
    SamplingParams(top_logprobs=options.top_logprobs)  # refuses what cannot be
    return Windows(size, stride)


def read_texts(options: flags.FlagValues, arguments: Sequence[str], words: Tokenizer) -> list[list[int]]:
    """Token ids of each text to score.

    Raises:
        GptossError: no text or more than one source; text that is no UTF-8; a text too short to score.
    """
    source, value = request_flags.only_source(options, arguments, "text", TEXTS) or ("file", "-")
    if source == "token_ids":
        return [_checked(list(request_flags.ids("token_ids", value.split(","))), "--token-ids")]
    if value == "-" and sys.stdin.isatty():
        raise GptossError("no text: give one in quotes, or --file, --token-ids, or stdin")
    text = request_flags.read_text(value) if source == "file" else value
    messages.check_text(text, "the text")
    if not options.lines:
        return [_checked(words.encode(text), "the text")]
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise GptossError("the text holds no line that is not empty")
    return [_checked(words.encode(line), f"line {number}") for number, line in lines]


def _checked(ids: list[int], what: str) -> list[int]:
    if len(ids) < 2:
        raise GptossError(f"{what} is {len(ids)} token long, expected at least 2: the first has none before it")
    return ids


def score(language_model: LanguageModel, ids: list[int], windows: Windows, top_logprobs: int) -> Scores:
    """Of every token but the first, in as few windows as hold them."""
    parts = []
    for first, end, scored in windows.over(len(ids)):
        found = language_model.score(ids[first:end], top_logprobs=top_logprobs)
        parts.append([part[scored - first - 1 :] for part in found])
    return Scores(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def show(screen: Screen, words: Tokenizer, ids: list[int], scores: Scores, *, with_tokens: bool) -> None:
    """One text's result on stdout."""
    if with_tokens:
        for place, (token, logprob) in enumerate(zip(ids[1:], scores.logprobs.tolist(), strict=True), 1):
            screen.answer(f"{place:>7} {token:>7} {logprob:>10.4f}  {words.decode([token])!r}\n")
    screen.answer(summary_line(scores.logprobs) + "\n")


def summary(logprobs: np.ndarray) -> dict[str, float | int]:
    """Tokens, sum, mean and perplexity, summed in float64."""
    total = float(np.sum(logprobs, dtype=np.float64))
    mean = total / logprobs.size
    perplexity = math.exp(-mean) if mean > -700 else math.inf
    return {"tokens_scored": logprobs.size, "total_logprob": total, "mean_logprob": mean, "perplexity": perplexity}


def summary_line(logprobs: np.ndarray) -> str:
    """`summary` in words."""
    found = summary(logprobs)
    return (
        f"{found['tokens_scored']} tokens, log probability {found['total_logprob']:.4f}, "
        f"{found['mean_logprob']:.4f} a token, perplexity {found['perplexity']:.6g}"
    )


def document(
    options: flags.FlagValues, words: Tokenizer, texts: Sequence[list[int]], scores: Sequence[Scores]
) -> dict[str, Any]:
    """What --json prints. Lists start with the first token, which has no log probability: null."""
    rows = [
        {
            **summary(found.logprobs),
            "token_ids": ids,
            "tokens": [words.decode([token]) for token in ids],
            "logprobs": [None, *found.logprobs.tolist()],
            "top_logprobs": [[], *_pairs(found)] if options.top_logprobs else [],
        }
        for ids, found in zip(texts, scores, strict=True)
    ]
    return {
        "settings": {name: options[name].value for names in SECTIONS.values() for name in names},
        **summary(np.concatenate([found.logprobs for found in scores])),
        "texts": rows,
    }


def _pairs(scores: Scores) -> list[list[tuple[int, float]]]:
    """The likeliest ids of each place, with their log probabilities."""
    both = zip(scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True)
    return [list(zip(ids, logprobs, strict=True)) for ids, logprobs in both]


def cli() -> None:
    """The console script."""
    define_flags()
    command.run(main, "score", SECTIONS)


if __name__ == "__main__":
    cli()
