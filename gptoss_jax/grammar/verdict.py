"""Whether a finished answer has the form that it was held to: what was cut, what the grammar could not say."""

import importlib
import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from gptoss_jax.grammar.compiled import CompiledForm
from gptoss_jax.grammar.forms import Body
from gptoss_jax.harmony.answer import Answer

# Python's `re`, which jsonschema asks, takes time that grows exponentially with some texts, and stops all threads.
_PATTERNS = re.compile('"(pattern|patternProperties)":')
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
            if _PATTERNS.search(body.text):
                yield Fault(
                    "unchecked", f"{body.where}: it has patterns, which are not run here, beside what is not enforced"
                )
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
    schema, jsonschema = json.loads(body.text), importlib.import_module("jsonschema")
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)(schema)
    try:
        error = next(validator.iter_errors(value), None)
    except (re.error, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        # The schema holds what jsonschema cannot take: a pattern that is none for Python, say.
        return Fault("unchecked", f"{body.where}: the answer could not be checked ({type(error).__name__})")
    if error is None:
        return None
    place = "".join(f"[{part!r}]" for part in error.absolute_path)
    return Fault("invalid", f"{body.where}: the answer{place} breaks {error.validator!r}")


def _whole(text: str) -> int:
    """A whole number of any length."""
    digits, value = text.removeprefix("-"), 0
    for begin in range(0, len(digits), _MOST_DIGITS):
        some = digits[begin : begin + _MOST_DIGITS]
        value = value * 10 ** len(some) + int(some)
    return -value if text.startswith("-") else value
