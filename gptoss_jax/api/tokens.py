"""Where each token of an answer stands, and its log probability as OpenAI's forms write it."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from gptoss_jax.api.asked import Asked
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.parsed import Part
from gptoss_jax.harmony.tokenizer import STARTOFTEXT, StreamDecoder, Tokenizer, load_tokenizer

_UNLIKELY = -9999.0  # OpenAI's; JSON has no infinity


class Place(NamedTuple):
    """Where the text of a token stands.

    Attributes:
        kind: of the message in whose content it is; "header" or "unparsed" where it is in none; None: a control token.
        message: index into `Answer.messages`; None: of no message.
        is_kept: some of it is in `Answer.messages`; of a stop string and what comes after it, nothing is.
    """

    kind: str | None
    message: int | None
    is_kept: bool


_CONTROL = Place(None, None, False)


def places(answer: Answer, tokenizer: Tokenizer) -> list[Place]:
    """The place of each of the answer's ids, which is where its last character is."""
    parts = answer.parsed.parts
    ends = list(itertools.accumulate(len(part.text) for part in parts))
    before = _content_before(parts)
    decoder, at, found = StreamDecoder(tokenizer), 0, []
    for token in answer.parsed.token_ids:
        if token >= STARTOFTEXT:
            at += len(decoder.flush())
            found.append(_CONTROL)
            continue
        length = len(decoder.feed(token))  # 0: the character that it begins or goes on with is still to come
        index = bisect_right(ends, at + max(length, 1) - 1)
        begins = before[index] + at - (ends[index] - len(parts[index].text))
        found.append(_place(answer, parts[index], begins))
        at += length
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


def _place(answer: Answer, part: Part, begins: int) -> Place:
    """The place of a token in a part; `begins`: characters of the message's content before it."""
    if part.kind != "content" or part.message is None:
        return Place(part.kind, part.message, True)
    message = answer.messages[part.message]
    return Place(message.kind, part.message, begins < len(message.content))


class Usage(NamedTuple):
    """Tokens read and written."""

    prompt: int
    answered: int  # of all answers, control tokens included
    reasoning: int  # of these, text of the chain of thought, without headers and ends of messages

    @property
    def total(self) -> int:
        """Read once, whatever the number of answers, and written."""
        return self.prompt + self.answered

    def document(self) -> dict[str, int]:
        """As OpenAI's chat and completions write it."""
        return {"prompt_tokens": self.prompt, "completion_tokens": self.answered, "total_tokens": self.total}


def usage(asked: Asked, answers: Sequence[Answer]) -> Usage:
    """What a request took. Plain text has no chain of thought."""
    read, tokenizer = () if asked.raw else answers, load_tokenizer(asked.vocab_path)
    return Usage(
        prompt=len(asked.token_ids),
        answered=sum(len(answer.parsed.token_ids) for answer in answers),
        reasoning=sum(place.kind == "reasoning" for answer in read for place in places(answer, tokenizer)),
    )


class Shown(NamedTuple):
    """A text that is shown, and the tokens it comes from: those at these kinds of places, of this message or of any."""

    text: str
    kinds: tuple[str, ...]
    message: int | None = None


def leftover(answer: Answer) -> Shown:
    """All text that is otherwise not shown, for where nothing else is."""
    return Shown(answer.unparsed_text, ("other", "cut_call", "unparsed") if answer.messages else ("header", "unparsed"))


def log_probabilities(asked: Asked, answer: Answer, shown: Shown) -> list[dict[str, Any]]:
    """The tokens of a text as OpenAI's chat writes them."""
    tokenizer = load_tokenizer(asked.vocab_path)
    return [
        {
            **_entry(answer.parsed.token_ids[step], answer.logprobs[step], tokenizer),
            "top_logprobs": [_entry(*likely, tokenizer) for likely in likeliest(answer, step)],
        }
        for step, place in enumerate(places(answer, tokenizer))
        if place.kind in shown.kinds and place.is_kept and shown.message in (None, place.message)
    ]


def likeliest(answer: Answer, step: int) -> Sequence[tuple[int, float]]:
    """The likeliest ids at a step with their log probabilities, if they were asked for."""
    return answer.top_logprobs[step] if answer.top_logprobs else ()


def finite(logprob: float) -> float:
    """A log probability that JSON can hold."""
    return max(_UNLIKELY, logprob)


def all_log_probabilities(asked: Asked, answer: Answer) -> dict[str, Any]:
    """Of all ids, as far as asked for: `logprobs`, and `top_logprobs`, pairs of the likeliest ids and theirs."""
    document: dict[str, Any] = {}
    if asked.options.logprobs:
        document["logprobs"] = [finite(logprob) for logprob in answer.logprobs]
    if asked.options.sampling.top_logprobs:
        document["top_logprobs"] = [
            [[token, finite(logprob)] for token, logprob in likely] for likely in answer.top_logprobs
        ]
    return document


def _entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}
