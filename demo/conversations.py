"""Whole conversations of the demo's families: their shapes, their weights, and the form of `--messages`.

A conversation is a JSON object with "messages", "reasoning_effort", and where they are asked for "tools" and
"response_format"; those with a date in the system message are in harmony's own form, which can say it.
"""

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

from demo import arithmetic, facts, functions, greetings, instructions, sorting, unknown, words
from demo.question import Question, is_held_out
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import messages as harmony_messages
from gptoss_jax.harmony import render
from gptoss_jax.harmony.settings import REASONING_EFFORTS, Settings

Maker = Callable[[Random, bool], Question]
QUESTIONS: Mapping[str, tuple[Maker, float]] = {
    "addition": (arithmetic.addition, 13),
    "subtraction": (arithmetic.subtraction, 11),
    "comparison": (arithmetic.comparison, 5),
    "product_by_digit": (arithmetic.product_by_digit, 8),
    "product_two_digits": (arithmetic.product_two_digits, 13),
    "counting": (words.counting, 9),
    "spelling": (words.spelling, 6),
    "reversing": (words.reversing, 7),
    "sorting_numbers": (sorting.sorting_numbers, 14),
    "sorting_words": (sorting.sorting_words, 8),
    "fact": (facts.fact, 6),
    "greeting": (greetings.greeting, 1.5),
    "unknown": (unknown.unknown, 8),
}
"""Family of questions -> what makes one, and its weight."""
CALLS: Mapping[str, float] = {"calendar": 6, "conversion": 5, "lookup": 3}
"""Family of questions that a function answers -> its weight."""
SHAPES: Mapping[str, float] = {
    "plain": 62,
    "instructed": 14,
    "json": 8,
    "needless function": 5,
    "later turn": 11,
}
"""What a question stands in -> weight, in percent."""

EFFORTS = (12, 38, 50)  # weights of low, medium and high where thoughts help: at low effort sums are guesses
MOST_TOKENS = 288  # of a conversation, which a packed row must hold
MORE = 4  # times as often as else are families drawn that are asked for
DATED = 0.1  # the share of conversations with a date in the system message, as `--chat` has it


class Example(NamedTuple):
    """A conversation, and what it is an example of.

    Attributes:
        family: of its last question.
        shape: one of SHAPES; "call" where functions are called.
        effort: the reasoning effort.
        document: the conversation, in the form of `--messages`.
    """

    family: str
    shape: str
    effort: str
    document: dict[str, Any]


def example(
    random: Random,
    held_out: bool,
    families: Sequence[str] = (),
    effort: str | None = None,
    more: Sequence[str] = (),
) -> Example:
    """A conversation of at most MOST_TOKENS tokens.

    Args:
        random: draws everything.
        held_out: whether its questions are those that are kept for evaluation.
        families: of its last question; empty: all, by their weights.
        effort: the reasoning effort; None: drawn.
        more: families with MORE times their weight.
    """
    weights = {name: weight for name, (_, weight) in QUESTIONS.items()} | dict(CALLS)
    weights |= {name: MORE * weights[name] for name in more}
    families = families or list(weights)
    while True:
        family = random.choices(families, [weights[name] for name in families])[0]
        acting = effort or _effort(random, family)
        if family in CALLS:
            shape, document = "call", _called(random, held_out, family, acting)
        else:
            shape = random.choices(list(SHAPES), list(SHAPES.values()))[0]
            document = _SHAPED[shape](random, held_out, family, acting)
        if random.random() < DATED:
            document = dated(document, _date(random))
        if fits(document):
            return Example(family, shape, acting, document)


def shaped(random: Random, held_out: bool, family: str, shape: str, effort: str) -> Example:
    """A conversation of a given family, shape and effort, without a date."""
    while True:
        document = _SHAPED[shape](random, held_out, family, effort)
        if fits(document):
            return Example(family, shape, effort, document)


def check_known(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuses a flag's names that are not known.

    Raises:
        GptossError: names the first of them, and those that are.
    """
    if unknown_names := [name for name in names if name not in known]:
        raise GptossError(f"{flag} names {unknown_names[0]!r}, expected some of {', '.join(known)}")


def question(random: Random, held_out: bool, family: str) -> Question:
    """A question of a family."""
    return QUESTIONS[family][0](random, held_out)


def _effort(random: Random, family: str) -> str:
    even = family in CALLS or family in ("fact", "greeting", "unknown")
    return random.choices(REASONING_EFFORTS, (1, 1, 1) if even else EFFORTS)[0]


# ---- shapes ----


def _plain(random: Random, held_out: bool, family: str, effort: str) -> dict[str, Any]:
    return _document(effort, _turn(question(random, held_out, family), effort))


def _instructed(random: Random, held_out: bool, family: str, effort: str) -> dict[str, Any]:
    asked = question(random, held_out, family)
    wanted = instructions.instructed(random, asked)
    developer = {"role": "developer", "content": wanted.instructions}
    return _document(effort, [developer, *_turn(asked, effort, wanted.answer)])


def _json(random: Random, held_out: bool, family: str, effort: str) -> dict[str, Any]:
    asked = question(random, held_out, family)
    wanted = instructions.asked_json(random, asked)
    return _document(effort, _turn(asked, effort, wanted.answer), response_format=wanted.response_format)


def _needless_function(random: Random, held_out: bool, family: str, effort: str) -> dict[str, Any]:
    """A declared function that does not answer the question."""
    needed, declared_family = random.sample(list(CALLS), 2)
    declared = functions.MAKERS[declared_family](random, held_out)
    asked = question(random, held_out, family)
    if asked.sentence == unknown.NO_FUNCTION:  # which the declared one might answer
        asked = unknown.without_function(random, held_out, needed)
    return _document(effort, _turn(asked, effort), tools=[declared.tool])


def _later_turn(random: Random, held_out: bool, family: str, effort: str) -> dict[str, Any]:
    """Another question before; a sum may go on from the result."""
    if family in ("addition", "subtraction") and random.random() < 0.7:
        return _going_on(random, held_out, effort)
    first = question(random, held_out, random.choice([name for name in QUESTIONS if name != "unknown"]))
    return _document(effort, [*_turn(first, effort), *_turn(question(random, held_out, family), effort)])


def _going_on(random: Random, held_out: bool, effort: str) -> dict[str, Any]:
    """A number that an answer gave, and what is then to be done with it."""
    while True:
        first = question(random, held_out, random.choice(("addition", "subtraction")))
        value, other = first.value, random.randint(2, 300)
        assert isinstance(value, int)
        key = "addition" if random.random() < 0.5 else "subtraction"
        low, high = sorted((value, other))
        if value < 1000 and is_held_out(key, low, high) == held_out and (key == "addition" or other <= value):
            break
    if key == "addition":
        wordings = ("Add {} to that.", "And if you add {}?", "Plus {}?", "Now add {}.")
        then = arithmetic.sum_of(value, other, random.choice(wordings).format(other))
    else:
        wordings = ("Subtract {} from that.", "And minus {}?", "Now subtract {}.")
        then = arithmetic.difference_of(value, other, random.choice(wordings).format(other))
    return _document(effort, [*_turn(first, effort), *_turn(then, effort)])


_SHAPED = {
    "plain": _plain,
    "instructed": _instructed,
    "json": _json,
    "needless function": _needless_function,
    "later turn": _later_turn,
}


def _called(random: Random, held_out: bool, family: str, effort: str) -> dict[str, Any]:
    """A call, its result and the answer; then perhaps the answer once more, or a call of the same function."""
    call = functions.MAKERS[family](random, held_out)
    tools = [call.tool]
    if random.random() < 0.15:
        tools = _with_another(random, held_out, call)
    turns = _call_turn(call, effort)
    after = random.random()
    if after < 0.15:
        wording = random.choice(("Say that again.", "What was the result again?", "Please repeat that.", "Once more?"))
        turns += [{"role": "user", "content": wording}, {"role": "assistant", "content": call.sentence}]
    elif after < 0.3 and isinstance(days := call.result.get("days"), int):
        others = [other for other in range(2, 100) if is_held_out("addition", *sorted((days, other))) == held_out]
        other = random.choice(others)
        turns += _turn(arithmetic.sum_of(days, other, f"Add {other} to that."), effort)
    return _document(effort, turns, tools=tools)


def _with_another(random: Random, held_out: bool, call: functions.Call) -> list[dict[str, Any]]:
    """The function, and one of another family beside it."""
    family = random.choice([name for name in CALLS if name != call.family])
    tools = [call.tool, functions.MAKERS[family](random, held_out).tool]
    random.shuffle(tools)
    return tools


def _turn(asked: Question, effort: str, answer: str | None = None) -> list[dict[str, Any]]:
    reasoning = {"reasoning": asked.thoughts[effort]} if effort in asked.thoughts else {}
    said = {"role": "assistant", **reasoning, "content": asked.sentence if answer is None else answer}
    return [{"role": "user", "content": asked.text}, said]


def _call_turn(call: functions.Call, effort: str) -> list[dict[str, Any]]:
    reasoning = {"reasoning": call.thoughts[effort]} if effort in call.thoughts else {}
    calls = [{"function": {"name": call.name, "arguments": call.written_arguments}}]
    return [
        {"role": "user", "content": call.text},
        {"role": "assistant", **reasoning, "tool_calls": calls},
        {"role": "tool", "name": call.name, "content": functions.compact(call.result)},
        {"role": "assistant", "content": call.sentence},
    ]


def _document(effort: str, messages: Sequence[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    return {"messages": list(messages), "reasoning_effort": effort, **settings}


# ---- as ids ----


def dated(document: Mapping[str, Any], date: str) -> dict[str, Any]:
    """The same conversation in harmony's own form, with a date in its system message."""
    read = harmony_messages.from_json(document)
    settings = dataclasses.replace(Settings(), **read.settings, current_date=date)
    whole = render.with_opening(read.messages, settings)
    return {"messages": [_short(message) for message in harmony_messages.to_json(whole)]}


def _short(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what is absent."""
    return {key: value for key, value in message.items() if value is not None}


def token_ids(document: Mapping[str, Any], *, drop_old_analysis: bool = True) -> list[int]:
    """The conversation as the model reads it; or with the thoughts of earlier turns, which training has at these."""
    read = harmony_messages.from_json(document)
    settings = Settings(**read.settings)
    return render.render(read.messages, settings, for_completion=False, drop_old_analysis=drop_old_analysis)


def fits(document: Mapping[str, Any]) -> bool:
    """Whether no turn of the conversation has more than MOST_TOKENS tokens; a token has a character at least."""
    plain = sum(len(str(part)) for message in document["messages"] for part in message.values())
    if plain < MOST_TOKENS / 2 and document.keys() == {"messages", "reasoning_effort"}:
        return True
    return len(token_ids(document, drop_old_analysis=False)) <= MOST_TOKENS


def _date(random: Random) -> str:
    return str(datetime.date(2024, 1, 1) + datetime.timedelta(random.randrange(2557)))
