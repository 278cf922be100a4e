"""Numbers and words put in order, as post is: by their first digits or letters, and ties by those that follow.

A trial that picked the least of what was left at one glance was right on 6 %. Going through the digits, or the
alphabet, each step asks only which labels have this very one, and two or three that share it are put in order alone.
"""

import itertools
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from demo.question import Question, is_held_out, sign, thinking
from demo.word_list import WORDS

LABELS = "ABCDEF"
RANKS = ("first", "second", "third", "fourth", "fifth", "sixth")
DIGITS, LETTERS = "0123456789", "abcdefghijklmnopqrstuvwxyz"
MOST_NUMBERS, MOST_WORDS = 6, 5
ASCENDING = ("in ascending order", "from smallest to largest", "from low to high")
DESCENDING = ("in descending order", "from largest to smallest", "from high to low")


class _Item(NamedTuple):
    label: str
    key: str  # its digits or first letters, as many as the others have
    text: str


def sorting_numbers(random: Random, held_out: bool) -> Question:
    """Three to six numbers below 1000, no two alike."""
    while True:
        most = random.choices((999, 99), (3, 1))[0]
        numbers = random.sample(range(most + 1), random.randint(3, MOST_NUMBERS))
        if is_held_out("sorting_numbers", *sorted(numbers)) == held_out:
            break
    down = random.random() < 0.4
    listed = ", ".join(map(str, numbers))
    wordings = [f"Sort these numbers {random.choice(DESCENDING if down else ASCENDING)}: {listed}."]
    wordings += [f"Put {listed} in order {random.choice(DESCENDING[1:] if down else ASCENDING[1:])}."]
    wordings += [] if down else [f"Sort {listed}.", f"Sort these numbers: {listed}.", f"Sort the numbers {listed}."]
    return numbers_of(numbers, random.choice(wordings), down=down)


def numbers_of(numbers: Sequence[int], text: str, *, down: bool) -> Question:
    """Numbers that a given text asks to sort."""
    texts = list(map(str, numbers))
    width = max(map(len, texts))
    items = [_Item(label, each.zfill(width), each) for label, each in zip(LABELS, texts, strict=False)]
    return _question("sorting_numbers", text, items, down)


def sorting_words(random: Random, held_out: bool) -> Question:
    """Three to five known words, which differ in their first two letters."""
    while True:
        words = random.sample(WORDS, random.randint(3, MOST_WORDS))
        differ = len({word[:2] for word in words}) == len(words)
        if differ and is_held_out("sorting_words", *sorted(words)) == held_out:
            break
    items = [_Item(label, word[:2], word) for label, word in zip(LABELS, words, strict=False)]
    listed = ", ".join(words)
    wordings = (
        f"Sort these words: {listed}.",
        f"Put these words in alphabetical order: {listed}.",
        f"Sort alphabetically: {listed}.",
        f"Sort the words {listed}.",
    )
    return _question("sorting_words", random.choice(wordings), items, down=False)


def _question(family: str, text: str, items: Sequence[_Item], down: bool) -> Question:
    ordered = sorted(items, key=lambda item: item.key, reverse=down)
    texts = [item.text for item in ordered]
    sort = f"Sort, {'largest' if down else 'smallest'} first."
    ranked = ", ".join(f"{rank} {_beside(item, item.text)}" for rank, item in zip(RANKS, ordered, strict=False))
    medium = f"{sort} {' '.join(_beside(item, item.text) for item in items)}. {ranked}."
    # the label follows once more what is looked for: to write what followed before is what attention learns first
    listed = " ".join(f"{_beside(item, item.text)} {item.key[0]} {item.label}" for item in items)
    high = f"{sort} {listed}. {_passes(items, down)}. {ranked}. {', '.join(texts)}."
    values = list(map(int, texts)) if family == "sorting_numbers" else texts
    return Question(family, text, f"Sorted: {', '.join(texts)}.", values, thinking(high, medium))


def _passes(items: Sequence[_Item], down: bool) -> str:
    """Every digit or letter, with the labels of those that begin with it and their places in the order."""
    symbols = DIGITS if items[0].key[0] in DIGITS else LETTERS
    passes, placed = [], 0
    for symbol in reversed(symbols) if down else symbols:
        alike = [item for item in items if item.key[0] == symbol]
        if not alike:
            passes.append(symbol)
            continue
        ordered = sorted(alike, key=lambda item: item.key, reverse=down)
        places = " ".join(f"{RANKS[placed + number]} {item.label}" for number, item in enumerate(ordered))
        ties = f"{_ties(alike)}{'largest' if down else 'smallest'}: " if len(alike) > 1 else ""  # what the sign means
        passes.append(f"{symbol} {' '.join(item.label for item in alike)}: {ties}{places};")
        placed += len(alike)
    return " ".join(passes).rstrip(";")


def _ties(alike: Sequence[_Item]) -> str:
    """The digits or letters that follow, of all of those that begin alike, each beside the next with a sign.

    They go on up to where no two of the items are the same.
    """
    shown, length = "", 1
    while len({item.key[1:length] for item in alike}) < len(alike):
        shown += f"{_beside(alike[0], alike[0].key[length])} "
        for before, item in itertools.pairwise(alike):
            own = item.key[length]
            shown += f"{_beside(item, own)} {sign(before.key[length], own)} "
        length += 1
    return shown


def _beside(item: _Item, text: str) -> str:
    """A label and what it stands for: tokens of digits have no space before them, words and letters have one."""
    return item.label + text if text[0] in DIGITS else f"{item.label} {text}"
