"""Numbers and words put in order, by picks: each is written digit by digit among those that are left.

A trial that sorted at one glance was right on 67 to 77 %: a pick's first digit is the least of the first digits that
are left, its second the least among those that share the first, which is an easy question each time. Labels say which
are left.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from demo.question import Question, is_held_out, thinking
from demo.word_list import WORDS

LABELS = "ABCDEF"
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
    texts = [str(number) for number in numbers]
    width = max(map(len, texts))
    items = [_Item(label, text.zfill(width), text) for label, text in zip(LABELS[: len(texts)], texts, strict=True)]
    down = random.random() < 0.3
    listed = ", ".join(texts)
    wordings = [f"Sort these numbers {random.choice(DESCENDING if down else ASCENDING)}: {listed}."]
    wordings += [f"Put {listed} in order {random.choice(DESCENDING[1:] if down else ASCENDING[1:])}."]
    wordings += [] if down else [f"Sort {listed}.", f"Sort these numbers: {listed}.", f"Sort the numbers {listed}."]
    return _question("sorting_numbers", random.choice(wordings), items, down)


def sorting_words(random: Random, held_out: bool) -> Question:
    """Three to five known words, which differ in their first two letters."""
    while True:
        words = random.sample(WORDS, random.randint(3, MOST_WORDS))
        differ = len({word[:2] for word in words}) == len(words)
        if differ and is_held_out("sorting_words", *sorted(words)) == held_out:
            break
    items = [_Item(label, word[:2], word) for label, word in zip(LABELS[: len(words)], words, strict=True)]
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
    listed = " ".join(f"{item.label} {_spaced(item.key)}" for item in items)
    medium = f"{sort} {' '.join(f'{item.label} {item.text}' for item in items)}. {_labels(ordered)}."
    values = list(map(int, texts)) if family == "sorting_numbers" else texts
    sentence = f"Sorted: {', '.join(texts)}."
    return Question(family, text, sentence, values, thinking(f"{sort} {listed}. {_picks(items, ordered)}.", medium))


def _picks(items: Sequence[_Item], ordered: Sequence[_Item]) -> str:
    """For each place: the labels that are left, the digits of the one that comes next, and its label."""
    picks, left = [], list(items)
    for item in ordered[:-1]:
        picks.append(f"left {_labels(left)}: {_spaced(item.key)} {item.label}")
        left.remove(item)
    return "; ".join([*picks, f"left {_labels(left)}"])


def _labels(items: Sequence[_Item]) -> str:
    return " ".join(item.label for item in items)


def _spaced(key: str) -> str:
    return " ".join(key)
