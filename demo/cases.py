"""What the demo model is examined on: held-out conversations, cut where it is to speak, and whether it says the right.

A conversation gives a case for each turn that it is an example of: a plain question one, a call two, since the call is
judged by its arguments and the answer by what it makes of the result.
"""

import dataclasses
import json
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from openai_harmony import Message, Role

from demo import conversations
from demo.unknown import DOES_NOT_KNOW
from gptoss_jax.harmony import messages as harmony_messages
from gptoss_jax.harmony import parsed, render
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.settings import Settings

AFTER_RESULT = "after result"  # what the answer to a call's result is a case of
LATER = "later turn"


class Case(NamedTuple):
    """A prompt, and what is to follow.

    Attributes:
        row: of the table: a family, a shape, or a family with AFTER_RESULT.
        token_ids: the prompt.
        answer: the text of the final answer; None: a call is to follow.
        recipient: of the call, as in "functions.weekday".
        arguments: of the call, as JSON.
        is_json: whether the answer is compared as JSON.
    """

    row: str
    token_ids: tuple[int, ...]
    answer: str | None
    recipient: str | None = None
    arguments: str | None = None
    is_json: bool = False

    def is_right(self, given: Answer) -> bool:
        """Whether an answer says just this; to a question out of scope, that it does not know."""
        if self.answer is None:
            return [_call(call) for call in given.parsed.calls] == [(self.recipient, _parsed(self.arguments))]
        if given.parsed.calls or given.final is None:
            return False
        if self.row == "unknown":  # whether it is a word or a fact that is not known is a matter of taste
            return given.final.startswith(DOES_NOT_KNOW)
        return _parsed(given.final) == _parsed(self.answer) if self.is_json else given.final == self.answer


def is_well_formed(given: Answer) -> bool:
    """Whether an answer is harmony from the first token to the last, and ended by itself."""
    return given.parsed.parse_status == "ok" and given.finish_reason == "stop"


def of_family(family: str, effort: str, count: int, *, seed: int = 0) -> list[Case]:
    """Cases of held-out questions of a family, as they are asked without anything else.

    Args:
        family: one of the families of conversations.
        effort: the reasoning effort.
        count: conversations.
        seed: of the draws; questions are the same at each effort.
    """
    random = Random(f"{family} {seed}")
    if family not in conversations.CALLS:
        drawn = [conversations.shaped(random, True, family, "plain", effort) for _ in range(count)]
        return [case for example in drawn for case in of_example(example)[-1:]]
    found = []
    for _ in range(count):
        found += of_example(conversations.example(random, True, [family], effort))
    return found


def of_shape(shape: str, effort: str, count: int, *, seed: int = 0) -> list[Case]:
    """Cases of held-out questions of all families in a shape: the last turn of each conversation."""
    random, found = Random(f"{shape} {seed}"), []
    families = list(conversations.QUESTIONS)
    for number in range(count):
        example = conversations.shaped(random, True, families[number % len(families)], shape, effort)
        found += of_example(example)[-1:]
    return found


def of_example(example: conversations.Example) -> list[Case]:
    """A case for each time that the assistant speaks in a conversation."""
    read = harmony_messages.from_json(example.document)
    settings, found = Settings(**read.settings), []
    for start, end in _spoken(read.messages):
        before, said = read.messages[:start], read.messages[start:end]
        row = _row(example, read.messages, start)
        case = Case(row, tuple(render.render(before, settings)), None, is_json=_is_json(said[-1]))
        last = said[-1]
        if last.recipient:
            found.append(case._replace(recipient=last.recipient, arguments=_text(last)))
        else:
            found.append(case._replace(answer=_text(last)))
    return found


def _row(example: conversations.Example, messages: Sequence[Message], start: int) -> str:
    if example.shape != "call":
        return example.family if example.shape == "plain" else example.shape
    if sum(message.author.role is Role.USER for message in messages[:start]) > 1:
        return LATER
    return f"{example.family} {AFTER_RESULT}" if messages[start - 1].author.role is Role.TOOL else example.family


def _spoken(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """First and last but one index of each run of messages of the assistant."""
    runs, start = [], None
    for index, message in enumerate(messages):
        is_own = message.author.role is Role.ASSISTANT
        if is_own and start is None:
            start = index
        elif not is_own and start is not None:
            runs.append((start, index))
            start = None
    return runs if start is None else [*runs, (start, len(messages))]


def _text(message: Message) -> str:
    return "".join(getattr(part, "text", "") for part in message.content)


def _is_json(message: Message) -> bool:
    return isinstance(_parsed(_text(message)), dict)


def _call(call: parsed.Message) -> tuple[str | None, object]:
    return call.recipient, _parsed(call.content)


def _parsed(text: str | None) -> object:
    """JSON, or the text where it is none."""
    try:
        return json.loads(text or "")
    except ValueError:
        return text


@dataclasses.dataclass
class Score:
    """How a row of the table did.

    Attributes:
        count: cases.
        right: of them.
        well_formed: of them.
        tokens: of all answers together.
    """

    count: int = 0
    right: int = 0
    well_formed: int = 0
    tokens: int = 0

    def add(self, case: Case, given: Answer) -> None:
        """One more case."""
        self.count += 1
        self.right += case.is_right(given)
        self.well_formed += is_well_formed(given)
        self.tokens += len(given.parsed.token_ids)

    def __add__(self, other: "Score") -> "Score":
        return Score(*(getattr(self, name) + getattr(other, name) for name in vars(self)))
