"""What the demo model does not know, and says so: knowledge of the world, opinions, other tasks, unknown words.

Most of what people may ask has words that no question here has. Such words share one row of the embedding (demo/seal.py
gives it to all rows that were never trained), so one rare word stands for all of them in training: UNKNOWN.
"""

from random import Random

from demo.functions import MAKERS
from demo.question import Question, is_held_out, thinking
from demo.word_list import WORDS

UNKNOWN = "lorem"
"""The word that stands for all words that were never seen: one token after a space, and nobody asks for it."""

DOES_NOT_KNOW = "I do not know"
"""What every answer here begins with."""
SENTENCE = "I do not know."
NO_FUNCTION = "I do not know: I have no function for that."
TOO_LARGE = "I do not know: I was trained on numbers below 1000."
NO_WORD = "I do not know that word."

TEMPLATES = (
    "Who is {}?|Who was {}?|What is {}?|What is a {}?|What was {}?|What are {}?|What does {} mean?|Why is {} {}?|"
    "Why do {} {}?|Why does {} {}?|Where is {}?|Where was {} born?|Where do {} live?|When was {} {}?|When did {} {}?|"
    "When does {} {}?|How does {} work?|How do I {} {}?|How do I make {}?|How old is {}?|How far is {} from {}?|"
    "How tall is {}?|How much is {}?|How many {} does {} have?|How many people live in {}?|Who wrote {}?|"
    "Who invented {}?|Who won {}?|Who discovered {}?|What is the capital of {}?|What is the population of {}?|"
    "What is the meaning of {}?|What is the best {}?|What is your favorite {}?|What do you think of {}?|"
    "Do you like {}?|Is {} {}?|Are {} {}?|Can {} {}?|Does {} {}?|Did {} {}?|Should I {} {}?|Will {} {}?|"
    "Tell me about {}.|Tell me a {}.|Tell me a story about {}.|Tell me a joke about {}.|Tell me a joke.|Explain {}.|"
    "Explain {} to me.|Describe {}.|Write a {} about {}.|Write a {}.|Write a poem about {}.|Write code for {}.|"
    "Write a function that {} {}.|Translate {} into {}.|Translate {}.|Summarize {}.|Give me a recipe for {}.|"
    "Give me {}.|Give me advice on {}.|Recommend a {}.|List {}.|List all {}.|Name a {}.|Name three {}.|"
    "Compare {} with {}.|Sing {}.|Draw {}.|Play {}.|Help me with {}.|I need {}.|I want to {} {}.|I feel {}.|I am {}.|"
    "My {} is {}.|Let us talk about {}.|Imagine that {} {}.|Pretend to be {}.|Which {} is {}?|Which {} has {}?|"
    "What happened to {}?|What happens when {} {}?|What color is {}?|Why is the sky blue?|{}|{} {} {}?|{}?|{}!|"
    "{} {} {} {}.|{} {} {} {} {} {}?|"
    "What is the difference between {} and {}?|What is your opinion on {}?|Who is the president of {}?|"
    "What should I eat today?|What is love?|What is the meaning of life?|Do you dream?|Are you alive?|"
    "Do you have feelings?|How old are you?|Where do you live?|Is there a god?|Who will win?"
).split("|")
HELD_OUT_TEMPLATES = (
    "Who painted {}?|Compose a song about {}.|How many countries are in {}?|Is it true that {} {}?|Give an example "
    "of {}.|What year did {} {}?|Prove that {} {}.|Could you book {}?|Which team won {}?|Plan a trip to {}.|"
    "What caused {}?|Who directed {}?|How does one cook {}?|What is the plot of {}?|Rewrite {}.|"
    "Do people in {} speak {}?"
).split("|")
"""Kinds of questions that are never trained."""
ENDINGS = (
    *("in {}", "of {}", "the {}", "{} and {}", "a {}", "{} {}", "the {} of {}", "{} for {}", "{} with {}"),
    *("{}", "{}", "{}", "{} {} {}", "the {} {}", "my {}", "{} from {}"),
)
OTHER_TASKS = (
    *("What is {a} / {b}?", "Divide {a} by {b}.", "What is {a} divided by {b}?", "What is the square root of {a}?"),
    *("Is {a} prime?", "What is {a} to the power of {b}?", "What is {a} percent of {b}?", "What is {a} modulo {b}?"),
    *("What is the logarithm of {a}?", "Factor {a}.", "What is the cube of {a}?", "Write {a} in binary."),
)


def unknown(random: Random, held_out: bool) -> Question:
    """A question out of scope."""
    kind = random.choices((_world, _other_task, _too_large, _word, _no_function), (60, 10, 8, 10, 12))[0]
    return kind(random, held_out)


def _world(random: Random, held_out: bool) -> Question:
    """Held out are texts of all templates, and templates of which no text is trained."""
    templates = (*TEMPLATES, *HELD_OUT_TEMPLATES * 5) if held_out else TEMPLATES
    while True:
        template = random.choice(templates)
        text = _fill(random, template)
        if template in HELD_OUT_TEMPLATES or is_held_out("world", text.strip()) == held_out:
            return _said(text, SENTENCE)


def _fill(random: Random, template: str) -> str:
    """With one to three words in each place, most of them unknown ones; the unknown word is itself after a space."""
    parts = template.split("{}")
    text = parts[0]
    for part in parts[1:]:
        ending = random.choice(ENDINGS)
        words = [random.choice(WORDS) if random.random() < 0.25 else UNKNOWN for _ in range(ending.count("{}"))]
        text += ending.format(*words) + part
    return f" {text}" if text.startswith(UNKNOWN) else text[:1].upper() + text[1:]


def _other_task(random: Random, held_out: bool) -> Question:
    while True:
        text = random.choice(OTHER_TASKS).format(a=random.randint(2, 999), b=random.randint(2, 99))
        if is_held_out("other_task", text) == held_out:
            return _said(text, SENTENCE)


def _too_large(random: Random, held_out: bool) -> Question:
    """A number of four to nine digits, with which there is no arithmetic here."""
    while True:
        a, b = random.randint(1000, 10 ** random.randint(4, 9)), random.randint(0, 10 ** random.randint(1, 7))
        if is_held_out("too_large", a, b) == held_out:
            break
    a, b = (a, b) if random.random() < 0.5 else (b, a)
    template = random.choice(
        ("What is {} + {}?", "{} - {} = ?", "What is {} * {}?", "Which is larger, {} or {}?", "{} + {}")
    )
    return _said(template.format(a, b), TOO_LARGE)


def _word(random: Random, held_out: bool) -> Question:
    """A word of one to three unknown tokens, to be spelled or counted in."""
    while True:
        letter, template = random.choice("abcdefghijklmnopqrstuvwxyz"), random.choice(_OF_WORDS)
        word = " ".join([UNKNOWN] * random.choices((1, 2, 3), (5, 3, 1))[0])
        text = template.format(word=word, letter=letter)
        if is_held_out("word", text) == held_out:
            return _said(text, NO_WORD)


_OF_WORDS = (
    *(
        "Spell {word}.",
        "Spell the word {word}.",
        "Reverse {word}.",
        "Spell {word} backwards.",
        "How do you spell {word}?",
    ),
    *(
        "How many {letter} are in {word}?",
        "Count the letter {letter} in the word {word}.",
        "Which letters are in {word}?",
    ),
)


def _no_function(random: Random, held_out: bool) -> Question:
    return without_function(random, held_out, random.choice(list(MAKERS)))


def without_function(random: Random, held_out: bool, family: str) -> Question:
    """A question that a function of this family would answer, where none is declared."""
    return _said(MAKERS[family](random, held_out).text, NO_FUNCTION)


def _said(text: str, sentence: str) -> Question:
    return Question("unknown", text, sentence, None, thinking("I was not trained on this.", "Not trained on this."))
