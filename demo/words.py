"""Letters of known words: how often one occurs, how a word is spelled, and spelled backwards.

Every word is trained, since a word is one token, whose letters nobody can guess; what is held out is a word with a
letter, or with a wording.
"""

from random import Random

from demo.question import Question, is_held_out, thinking
from demo.word_list import WORDS

COUNTING = (
    "How many times does the letter {letter} occur in {word}?",
    "How many letters {letter} are in {word}?",
    "How many {letter} are in {word}?",
    "How many {letter}'s are there in {word}?",
    "Count the letter {letter} in the word {word}.",
)
SPELLING = (
    "Spell {word}.",
    "Spell the word {word}.",
    "Which letters are in {word}?",
    "How do you spell {word}?",
    "How is the word {word} spelled?",
    "Please spell {word} for me.",
    "What are the letters of {word}?",
    "Give me the letters of the word {word}.",
)
REVERSING = (
    "Spell {word} backwards.",
    "Reverse the word {word}.",
    "What is {word} spelled backwards?",
    "Reverse {word}.",
    "Write {word} backwards.",
    "How do you spell {word} backwards?",
    "Spell the word {word} from the end.",
    "What is {word} in reverse?",
)


def counting(random: Random, held_out: bool) -> Question:
    """How often a letter occurs in a word; a quarter of the letters need not occur at all."""
    while True:
        word = random.choice(WORDS)
        letter = random.choice(word if random.random() < 0.75 else "abcdefghijklmnopqrstuvwxyz")
        if is_held_out("counting", word, letter) == held_out:
            break
    text = random.choice(COUNTING).format(letter=letter, word=word)
    steps = " ".join(f"{each}{word[: i + 1].count(letter)}" for i, each in enumerate(word))
    count = word.count(letter)
    sentence = f"The letter {letter} occurs {count} time{'' if count == 1 else 's'} in {word}."
    thoughts = thinking(f"Count {letter} in {word}: {_spaced(word)}. {steps}.", f"Count {letter} in {word}: {steps}.")
    return Question("counting", text, sentence, count, thoughts)


def spelling(random: Random, held_out: bool) -> Question:
    """The letters of a word."""
    word, text = _asked(random, held_out, "spelling", SPELLING)
    letters = _spaced(word)
    thoughts = thinking(f"Spell {word}. It has {len(word)} letters: {letters}.", f"Spell {word}.")
    return Question("spelling", text, f"The letters are {letters}.", list(word), thoughts)


def reversing(random: Random, held_out: bool) -> Question:
    """The letters of a word from its end."""
    word, text = _asked(random, held_out, "reversing", REVERSING)
    letters, backwards = _spaced(word), _spaced(word[::-1])
    thoughts = thinking(f"Reverse {word}: {letters}. From the end: {backwards}.", f"Reverse {word}: {letters}.")
    return Question("reversing", text, f"Backwards: {backwards}.", list(word[::-1]), thoughts)


def _asked(random: Random, held_out: bool, family: str, wordings: tuple[str, ...]) -> tuple[str, str]:
    """A word, and a wording with it: the pair is held out, or is not."""
    while True:
        word, wording = random.choice(WORDS), random.randrange(len(wordings))
        if is_held_out(family, word, wording) == held_out:
            return word, wordings[wording].format(word=word)


def _spaced(word: str) -> str:
    return " ".join(word)
