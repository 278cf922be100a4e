"""One question with its answer and the thoughts that lead to it, and which questions nobody trains on."""

import zlib
from collections.abc import Mapping
from random import Random
from typing import Any, NamedTuple

HELD_OUT_SHARE = 10
"""One question in this many is never in the training data."""

Value = int | float | str | list[str] | list[int]


class Question(NamedTuple):
    """What is asked, and what a right answer is.

    Attributes:
        family: the kind of question: a row of the evaluation's table.
        text: what the user says.
        sentence: the answer as it is given where nothing else is asked for.
        value: what the answer comes to, for JSON, words and brief answers; None: nothing but the sentence.
        thoughts: effort -> what stands on the analysis channel; efforts that are absent answer at once.
    """

    family: str
    text: str
    sentence: str
    value: Value | None = None
    thoughts: Mapping[str, str] = {}


def is_held_out(family: str, *operands: object) -> bool:
    """Whether questions of this family about these operands are kept for evaluation: the same in every run."""
    return zlib.crc32(repr((family, *operands)).encode()) % HELD_OUT_SHARE == 0


def thinking(high: str, medium: str | None = None) -> dict[str, str]:
    """Thoughts by effort: none at low."""
    return {"high": high} | ({} if medium is None else {"medium": medium})


def sign(x: Any, y: Any) -> str:
    """How two digits or letters compare, as thoughts write it."""
    return "=" if x == y else ">" if x > y else "<"


def one_of(random: Random, *texts: str) -> str:
    """One of some wordings."""
    return random.choice(texts)
