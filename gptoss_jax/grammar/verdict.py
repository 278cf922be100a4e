"""Whether a finished answer has the form that it was held to: what was cut, what the grammar could not say."""

import importlib
import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from gptoss_jax.grammar.compiled import CompiledForm
from gptoss_jax.grammar.forms import Body
from gptoss_jax.harmony.answer import Answer

# Whose time grows exponentially with some texts, and is not counted: Python's `re` stops all threads beside.
_NOT_RUN = re.compile('"(pattern|patternProperties|unevaluatedItems|unevaluatedProperties)":')
_MOST_STEPS = 30_000  # keywords looked at in an answer, some tenths of a second, in which no other answer is sent
_MOST_DIGITS = 4000  # Python refuses to read longer whole numbers
_ENDS = {
    "length": "the answer was cut at its limit of tokens",
    "cancelled": "the answer was interrupted",
    "error": "the model's logits were not finite",
    "constraint": "the grammar met a limit of its own, so that nobody could say what may follow",
}


class Fault(NamedTuple):
    """Why an answer does not have its form, or may not."""

    status: Literal["cut", "invalid", "unchecked"]
    text: str


def verdict(held: CompiledForm, answer: Answer) -> dict[str, Any]:
    """What a response says of the form.

    Returns:
        `status`: "valid"; "cut", the answer ended before it was whole; "invalid", a schema that could not be enforced
        to the letter is not fulfilled; "unchecked", nobody can say whether it is. `fault`: why it is not valid, or
        None. `remarks`: what was not enforced to the letter, and therefore checked.
    """
    cut = _cut(answer)
    fault = Fault("cut", cut) if cut else next(_faults(held, answer), None)
    status, text = fault or ("valid", None)
    return {"status": status, "fault": text, "remarks": list(held.remarks)}


def _cut(answer: Answer) -> str | None:
    if answer.finish_reason != "stop":
        return _ENDS.get(answer.finish_reason, answer.finish_reason)
    if answer.stop_string is not None:
        return f"the answer ended before the stop string {answer.stop_string!r}"
    last = answer.parsed.messages[-1] if answer.parsed.messages else None
    if last is None or last.is_cut or last.kind not in ("final", "call"):
        return "the answer ended at a stop id before it was whole"
    return None


def _faults(held: CompiledForm, answer: Answer) -> Iterator[Fault]:
    """Of what is not enforced to the letter; the rest cannot be otherwise."""
    bodies = {f"functions.{name}": body for name, body in held.form.calls}
    for message in answer.messages:
        body = held.form.final if message.kind == "final" else bodies.get(message.recipient or "")
        if isinstance(body, Body) and body in held.to_check:
            if found := _NOT_RUN.search(body.text):
                what = f"{body.where}: it has {found[1]!r}, which is not run here, beside what is not enforced"
                yield Fault("unchecked", what)
            elif fault := check_json(body, message.content):
                yield fault


def check_json(body: Body, text: str) -> Fault | None:
    """What jsonschema finds first in a text that should be as the schema has it; `format` is not looked at.

    With some patterns it takes for ever: who does not trust the schema looks for them before.
    """
    try:
        value = json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        return Fault("invalid", f"{body.where}: no JSON ({error})")
    try:
        error = next(_validator(json.loads(body.text), text).iter_errors(value), None)
    except Exception as error:  # the schema is a client's: jsonschema meets types, numbers, references that are none
        return Fault("unchecked", f"{body.where}: the answer could not be checked ({type(error).__name__})")
    if error is None:
        return None
    place = "".join(f"[{part!r}]" for part in error.absolute_path)
    return Fault("invalid", f"{body.where}: the answer{place} breaks {error.validator!r}")


class TooMuchWork(Exception):
    """A schema whose check takes longer than an answer is worth: references that double at each step, for one."""


def _validator(schema: Any, text: str) -> Any:
    """jsonschema's, which fetches no reference, as it would by itself, and raises TooMuchWork after so many steps."""
    jsonschema, referencing, attrs = map(importlib.import_module, ("jsonschema", "referencing", "attrs"))
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    left = [_MOST_STEPS]

    def counted(name: str, keyword: Any) -> Any:
        def check(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
            left[0] -= _steps(name, value, instance) + len(text) // 20_000  # faults are written with what is at fault
            if left[0] < 0:
                raise TooMuchWork
            return keyword(validator, value, instance, schema)

        return check

    keywords = {name: counted(name, keyword) for name, keyword in kind.VALIDATORS.items()}
    counting = jsonschema.validators.extend(kind, keywords)
    counting.evolve = attrs.evolve  # its own takes a class that does not count where a schema within has a $schema
    return counting(schema, registry=referencing.Registry())


def _steps(name: str, value: Any, instance: Any) -> int:
    """How much a keyword costs beside what it asks of others: it may compare each with each, or go through a list."""
    if name == "uniqueItems":
        return 1 + (len(instance) ** 2 // 20 if isinstance(instance, list) else 0)
    lists = [value] if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return 1 + sum(len(each) for each in lists if isinstance(each, list)) // 10


def _whole(text: str) -> int:
    """A whole number of any length."""
    digits, value = text.removeprefix("-"), 0
    for begin in range(0, len(digits), _MOST_DIGITS):
        some = digits[begin : begin + _MOST_DIGITS]
        value = value * 10 ** len(some) + int(some)
    return -value if text.startswith("-") else value
