"""OpenAI's /v1/completions: text that goes on as it is, without harmony; control tokens are spelled out.

An answer's text ends before the stop string or the stop token that ended it. Log probabilities are those of the
tokens whose text is kept, offsets are counted in that text, and the likeliest include the token that was drawn.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gptoss_jax.api import asking, openai_fields
from gptoss_jax.api.asked import Asked, Options
from gptoss_jax.api.fields import known, only, token_ids, whole
from gptoss_jax.api.tokens import finite, likeliest, usage
from gptoss_jax.errors import GptossError, check_text, short
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.json_values import needed
from gptoss_jax.harmony.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MAX_LOGPROBS = 5  # OpenAI's
_ONLY = {
    **openai_fields.WHOLE,
    "echo": (False, "prompts are not given back (gptoss_jax.score gives their log probabilities)"),
    "suffix": ("", "the model fills no gaps"),
}
FIELDS = frozenset(
    (
        *("prompt", "model", "max_tokens", "n", "best_of", "logprobs"),
        *(*_ONLY, *openai_fields.SAMPLING, *openai_fields.HARMLESS),
    )
)


def ask(body: Mapping[str, Any], defaults: Options, vocab_path: str | None = None) -> Asked:
    """What a request asks; see `asked.Form`."""
    fields = known(body, FIELDS)
    only(fields, _ONLY)
    if fields.get("best_of", fields.get("n", 1)) != fields.get("n", 1):
        raise GptossError(f"best_of is {short(fields['best_of'])}, but all answers are given: expected that of n")
    own = openai_fields.sampling(fields) | {name: fields[name] for name in ("n",) if name in fields}
    own["max_new_tokens"] = fields.get("max_tokens", defaults.max_new_tokens or DEFAULT_MAX_TOKENS)
    if "logprobs" in fields:
        own |= {"logprobs": True, "top_logprobs": whole(fields["logprobs"], "logprobs", 0, _MAX_LOGPROBS)}
    asked = asking.plain_ids(
        _prompt_ids(needed(fields, "prompt", "the request"), vocab_path),
        own,
        defaults,
        raw=True,
        vocab_path=vocab_path,
        field_of={**openai_fields.FIELD_OF, "max_new_tokens": "max_tokens"},
    )
    return dataclasses.replace(asked, echo=openai_fields.model_echo(fields))


def _prompt_ids(prompt: object, vocab_path: str | None) -> Sequence[int]:
    if isinstance(prompt, list) and any(isinstance(part, str | list) for part in prompt):
        raise GptossError(f"prompt holds {len(prompt)} prompts, expected one: send a request for each")
    if not isinstance(prompt, str):
        return token_ids(prompt, "prompt")
    check_text(prompt, "prompt")
    return load_tokenizer(vocab_path).encode(prompt)


def response(asked: Asked, answers: Sequence[Answer], response_id: str, model: str) -> dict[str, Any]:
    """An object `text_completion`; see `asked.Form`. It holds no clock: `created` is 0."""
    tokenizer = load_tokenizer(asked.vocab_path)
    return {
        "id": f"cmpl-{response_id}",
        "object": "text_completion",
        "created": 0,
        "model": asked.echo.get("model", model),
        "choices": [choice(asked, answer, index, tokenizer) for index, answer in enumerate(answers)],
        "usage": usage(asked, answers).document(),
        "system_fingerprint": None,
        "gptoss": openai_fields.additions(asked, answers),
    }


def choice(asked: Asked, answer: Answer, index: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """One choice of a response, whole."""
    ids, text = _text(answer, tokenizer)
    return {
        "index": index,
        "text": text,
        "logprobs": _log_probabilities(answer, ids, len(text), tokenizer) if asked.options.logprobs else None,
        "finish_reason": answer.finish_reason,
    }


def _text(answer: Answer, tokenizer: Tokenizer) -> tuple[Sequence[int], str]:
    """The ids without a stop id, and their text before a stop string."""
    ids, text = answer.parsed.token_ids, answer.parsed.text
    if answer.stop_string is not None:
        return ids, text[: text.find(answer.stop_string)]
    return (ids[:-1], tokenizer.decode(ids[:-1])) if answer.finish_reason == "stop" else (ids, text)


class Prompt(NamedTuple):
    """A prompt of T tokens that is given back before the text that goes on from it (OpenAI's `echo`).

    Attributes:
        token_ids: all T.
        logprobs: of each but the first, which has none: T - 1, or none at all if they were not asked for.
        likeliest: of each but the first, the likeliest ids with their log probabilities.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float] = ()
    likeliest: Sequence[Sequence[tuple[int, float]]] = ()


def echoed(whole_choice: Mapping[str, Any], prompt: Prompt, tokenizer: Tokenizer) -> dict[str, Any]:
    """A choice with its prompt in front, of text and of log probabilities, whose offsets count from the prompt's."""
    text = tokenizer.decode(prompt.token_ids)
    after = whole_choice["logprobs"]
    if after is None:
        return {**whole_choice, "text": text + whole_choice["text"]}
    decoder, at, offsets = StreamDecoder(tokenizer), 0, list[int]()
    for token in prompt.token_ids:
        offsets.append(at)
        at += len(decoder.feed(token))
    pairs = zip(prompt.token_ids[1:], prompt.logprobs, prompt.likeliest, strict=True)
    likely = [{**dict(tops), token: logprob} for token, logprob, tops in pairs]
    before = {
        "tokens": [_spelled(token, tokenizer) for token in prompt.token_ids],
        "token_logprobs": [None, *map(finite, prompt.logprobs)],
        "top_logprobs": [None, *(_by_spelling(at_step, tokenizer) for at_step in likely)],
        "text_offset": offsets,
    }
    after = {**after, "text_offset": [len(text) + offset for offset in after["text_offset"]]}
    logprobs = {name: [*before[name], *after[name]] for name in before}
    return {**whole_choice, "text": text + whole_choice["text"], "logprobs": logprobs}


def _log_probabilities(answer: Answer, ids: Sequence[int], length: int, tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """The older form: lists side by side, of those ids that begin before `length` characters of text."""
    decoder, at = StreamDecoder(tokenizer), 0
    offsets: list[int] = []
    for token in ids:
        if at >= length:
            break
        offsets.append(at)
        at += len(decoder.feed(token))
    steps = range(len(offsets))
    likely = [{**dict(likeliest(answer, step)), ids[step]: answer.logprobs[step]} for step in steps]
    return {
        "tokens": [_spelled(ids[step], tokenizer) for step in steps],
        "token_logprobs": [finite(answer.logprobs[step]) for step in steps],
        "top_logprobs": [_by_spelling(at_step, tokenizer) for at_step in likely],
        "text_offset": offsets,
    }


def _by_spelling(logprobs: Mapping[int, float], tokenizer: Tokenizer) -> dict[str, float]:
    return {_spelled(token, tokenizer): finite(logprob) for token, logprob in logprobs.items()}


def _spelled(token: int, tokenizer: Tokenizer) -> str:
    r"""A token as OpenAI spells it, `bytes:\xf0\x9f` where it is no whole characters: each has its own name."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
