"""Where each token of an answer stands, and its log probability as OpenAI's forms write it."""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gptoss_jax.api.asked import Asked
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.parsed import Part
from gptoss_jax.harmony.tokenizer import STARTOFTEXT, StreamDecoder, Tokenizer, load_tokenizer

UNLIKELY = -9999.0  # OpenAI's; JSON has no infinity


class Place(NamedTuple):
    """Where a token begins.

    Attributes:
        kind: of the message in whose content it is; "header" or "unparsed" where it is in none; None: a control token.
        message: index into `Answer.messages`; None: of no message.
        is_kept: what it writes is in `Answer.messages`; tokens of a stop string, and those after it, are not.
    """

    kind: str | None
    message: int | None
    is_kept: bool


_CONTROL = Place(None, None, False)


def places(answer: Answer, tokenizer: Tokenizer) -> list[Place]:
    """The place of each of the answer's ids. Tokens of one character have the same."""
    parts = answer.parsed.parts
    ends = list(itertools.accumulate(len(part.text) for part in parts))
    before = _content_before(parts)
    decoder, at, found = StreamDecoder(tokenizer), 0, []
    for token in answer.parsed.token_ids:
        if token >= STARTOFTEXT:
            at += len(decoder.flush())
            found.append(_CONTROL)
            continue
        index = bisect_right(ends, at)
        part = parts[index]
        found.append(_place(answer, part, before[index] + at - (ends[index] - len(part.text))))
        at += len(decoder.feed(token))
    return found


def _content_before(parts: Sequence[Part]) -> list[int]:
    """For each part the characters of its message's content that other parts hold before it."""
    lengths: dict[int | None, int] = {}
    before = []
    for part in parts:
        before.append(lengths.get(part.message, 0))
        if part.kind == "content":
            lengths[part.message] = before[-1] + len(part.text)
    return before


def _place(answer: Answer, part: Part, at: int) -> Place:
    """The place of a token in a part; `at`: characters of the message's content before it."""
    if part.kind != "content" or part.message is None:
        return Place(part.kind, part.message, True)
    message = answer.messages[part.message]
    return Place(message.kind, part.message, at < len(message.content))


class Usage(NamedTuple):
    """Tokens read and written."""

    prompt: int
    answered: int  # of all answers, control tokens included
    reasoning: int  # of these, text of the chain of thought, without headers and ends of messages

    @property
    def total(self) -> int:
        """Read once, whatever the number of answers, and written."""
        return self.prompt + self.answered


def usage(asked: Asked, answers: Sequence[Answer]) -> Usage:
    """What a request took. Plain text has no chain of thought."""
    read, tokenizer = () if asked.raw else answers, load_tokenizer(asked.vocab_path)
    return Usage(
        prompt=len(asked.token_ids),
        answered=sum(len(answer.parsed.token_ids) for answer in answers),
        reasoning=sum(place.kind == "reasoning" for answer in read for place in places(answer, tokenizer)),
    )


def log_probabilities(answer: Answer, steps: Iterable[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The tokens at these steps as OpenAI's chat writes them."""
    return [
        {
            **_entry(answer.parsed.token_ids[step], answer.logprobs[step], tokenizer),
            "top_logprobs": [_entry(*likely, tokenizer) for likely in likeliest(answer, step)],
        }
        for step in steps
    ]


def likeliest(answer: Answer, step: int) -> Sequence[tuple[int, float]]:
    """The likeliest ids at a step with their log probabilities, if they were asked for."""
    return answer.top_logprobs[step] if answer.top_logprobs else ()


def _entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode(errors="replace"), "logprob": max(logprob, UNLIKELY), "bytes": list(data)}
