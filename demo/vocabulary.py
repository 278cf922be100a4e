"""Which rows of the vocabulary the demo model uses, and what a token is made of: digits by place, letters by place."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from demo import conversations
from demo.unknown import UNKNOWN
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.training.vocabulary import ALWAYS

_MOST_DIGITS, _MOST_LETTERS = 3, 10
_DIGITS = 0
_DIGIT_LENGTHS = _DIGITS + 10 * _MOST_DIGITS
_LETTERS = _DIGIT_LENGTHS + _MOST_DIGITS
_LETTER_LENGTHS = _LETTERS + 26 * _MOST_LETTERS
_SPACE = _LETTER_LENGTHS + _MOST_LETTERS
NUM_FEATURES = _SPACE + 1
"""Places of digits and of letters, numbers of them, and a space in front."""


def unknown_id() -> int:
    """The id of the word that stands for all that were never seen."""
    (token,) = load_tokenizer().encode(f" {UNKNOWN}")
    return token


def used_ids(path: str | Path) -> list[int]:
    """The ids that training with a compact vocabulary has rows for: those of the conversations in a file, and control
    tokens; sorted.

    Raises:
        OSError: the file cannot be read.
        GptossError: a line that is no conversation, or no unknown word in any of them.
    """
    ids: set[int] = set(ALWAYS)
    for document in _documents(Path(path)):
        ids.update(conversations.token_ids(document, drop_old_analysis=False))
    if unknown_id() not in ids:
        raise GptossError(f"{path}: no conversation has the word {UNKNOWN!r}, expected some: write more with demo.data")
    return sorted(ids)


def _documents(path: Path) -> Iterator[dict]:
    with open(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                raise GptossError(f"{path}: line {number} is no JSON; write it again with demo.data") from None


def features(ids: Iterable[int]) -> Float[np.ndarray, "U P"]:
    """1 where a token has a digit or letter at a place, for each of NUM_FEATURES places."""
    decode = load_tokenizer().decode
    ids = list(ids)
    found = np.zeros((len(ids), NUM_FEATURES), np.float32)
    for row, token in enumerate(ids):
        found[row, _features_of(decode([token]))] = 1
    return found


def _features_of(text: str) -> list[int]:
    if re.fullmatch(rf"\d{{1,{_MOST_DIGITS}}}", text):
        digits = [_DIGITS + 10 * place + int(digit) for place, digit in enumerate(reversed(text))]
        return [*digits, _DIGIT_LENGTHS + len(text) - 1]
    if re.fullmatch(rf" ?[a-z]{{1,{_MOST_LETTERS}}}", text):
        word = text.strip()
        letters = [_LETTERS + 26 * place + ord(letter) - ord("a") for place, letter in enumerate(word)]
        return [*letters, _LETTER_LENGTHS + len(word) - 1, *([_SPACE] if text != word else [])]
    return []


def unused(unembedding: np.ndarray) -> Bool[np.ndarray, "V"]:
    """Rows that were never trained: they are all equal, and no others are as many.

    Raises:
        GptossError: no row stands for half of the vocabulary.
    """
    as_bytes = np.ascontiguousarray(unembedding).view(np.dtype((np.void, unembedding[0].nbytes)))[:, 0]
    rows, counts = np.unique(as_bytes, return_counts=True)
    if 2 * counts.max() < len(unembedding):
        raise GptossError(
            f"{counts.max():,} rows of the unembedding are equal, expected most: was it made by demo.fresh?"
        )
    return as_bytes == rows[counts.argmax()]
