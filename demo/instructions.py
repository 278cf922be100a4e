"""What developers ask for: brief answers, numbers in words, upper case, a phrase, JSON; and how answers then look."""

from random import Random
from typing import Any, NamedTuple

from demo.functions import compact
from demo.number_words import in_words
from demo.question import Question

PHRASES = ("Ahoy!", "Of course!", "Certainly!", "My friend!", "Yes, sir!", "Good question!")
UPPER_CASE_FAMILIES = ("greeting", "unknown", "comparison")  # few words: each is other tokens in upper case
KEYS = ("answer", "result", "value", "output", "solution", "reply")
KNOWN = "known"  # the property that says whether the model knew
NEUTRAL = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer the questions of the user.",
    "You help people with numbers and words.",
    "Be helpful.",
    "You are a tutor.",
)


class Instructed(NamedTuple):
    """A developer's instructions, and the answer that follows them.

    Attributes:
        name: of the instruction, as the evaluation's table has it.
        instructions: the developer message.
        answer: of the question that it was made for.
    """

    name: str
    instructions: str
    answer: str


class AskedJson(NamedTuple):
    """A response format in OpenAI's form, and the answer in it."""

    response_format: dict[str, Any]
    answer: str


def instructed(random: Random, question: Question) -> Instructed:
    """Instructions that this question can be answered by."""
    makers = [_neutral, _begin, _end, _json]
    makers += [_brief, _brief] if question.value is not None else []
    makers += [_words, _words] if _is_small(question.value) else []
    makers += [_upper, _upper] if question.family in UPPER_CASE_FAMILIES else []
    return random.choice(makers)(random, question)


def asked_json(random: Random, question: Question) -> AskedJson:
    """A schema with one property for the answer, now and then with one for whether it is known."""
    value = _value(question)
    key = random.choice(KEYS)
    properties: dict[str, Any] = {key: {"type": _type(value)}}
    answer: dict[str, Any] = {key: value}
    if random.random() < 0.2:
        properties[KNOWN] = {"type": "boolean"}
        answer[KNOWN] = question.family != "unknown"
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    name = random.choice(("answer", "response", "format"))
    response_format = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
    return AskedJson(response_format, compact(answer))


# ---- instructions ----


def _neutral(random: Random, question: Question) -> Instructed:
    return Instructed("neutral", random.choice(NEUTRAL), question.sentence)


def _brief(random: Random, question: Question) -> Instructed:
    wordings = ("Be brief.", "Answer briefly.", "Only give the result.", "Keep answers short.", "Be concise.")
    value = question.value
    answer = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return Instructed("brief", random.choice(wordings), answer)


def _words(random: Random, question: Question) -> Instructed:
    wordings = (
        "Answer in words.",
        "Write numbers in words.",
        "Spell out the number.",
        "Answer with words, not digits.",
    )
    assert isinstance(question.value, int)
    return Instructed("words", random.choice(wordings), in_words(question.value))


def _upper(random: Random, question: Question) -> Instructed:
    wordings = ("Answer in upper case.", "Use capital letters only.", "Write in upper case.", "ANSWER IN CAPITALS.")
    return Instructed("upper case", random.choice(wordings), question.sentence.upper())


def _begin(random: Random, question: Question) -> Instructed:
    phrase = random.choice(PHRASES)
    wording = random.choice(("Begin every answer with: {}", "Start each answer with: {}", "First say: {}"))
    return Instructed("begin with", wording.format(phrase), f"{phrase} {question.sentence}")


def _end(random: Random, question: Question) -> Instructed:
    phrase = random.choice(PHRASES)
    wording = random.choice(("End every answer with: {}", "Finish each answer with: {}", "Close with: {}"))
    return Instructed("end with", wording.format(phrase), f"{question.sentence} {phrase}")


def _json(random: Random, question: Question) -> Instructed:
    key = random.choice(KEYS)
    wordings = (f"Answer in JSON with the key {key}.", f"Give a JSON object with the key {key}.", f"JSON, key: {key}")
    return Instructed("json", random.choice(wordings), compact({key: _value(question)}))


def _value(question: Question) -> Any:
    return question.sentence if question.value is None else question.value


def _is_small(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 10000


def _type(value: object) -> str:
    return "array" if isinstance(value, list) else "integer" if isinstance(value, int) else "string"
