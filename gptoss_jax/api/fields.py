"""A request's fields: which are known, what type they have, and how complaints name them."""

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gptoss_jax.engine.sampling_params import whole_numbers
from gptoss_jax.errors import GptossError, short
from gptoss_jax.files import check_value


def known(body: object, names: Collection[str]) -> dict[str, Any]:
    """The fields of a request that say something: null counts as absent.

    Raises:
        GptossError: no object, a field that is not among `names`, or what passes as JSON and breaks later.
    """
    if not isinstance(body, dict):
        raise GptossError(f"the request is {short(body)}, expected an object")
    check_value(body, "the request")
    fields = {name: value for name, value in body.items() if value is not None}
    for name in fields:
        if name not in names:
            raise GptossError(f"unknown field {short(name)}{_hint(name, names)}")
    return fields


def _hint(name: str, names: Collection[str]) -> str:
    meant = difflib.get_close_matches(name, names, n=1)
    return f": did you mean {meant[0]!r}?" if meant else f", expected some of {', '.join(sorted(names))}"


@contextmanager
def naming(field_of: Mapping[str, str]) -> Iterator[None]:
    """Has complaints name the client's fields rather than ours.

    `field_of`: our name -> the client's, where they differ. What stands in quotes is a value, and stays.
    """
    try:
        yield
    except GptossError as error:
        words = re.compile(rf"'[^']*'|\"[^\"]*\"|\b(?:{'|'.join(field_of)})\b")
        error.args = (words.sub(lambda found: field_of.get(found[0], found[0]), str(error)),)
        raise


def only(fields: Mapping[str, Any], taken: Mapping[str, tuple[object, str]]) -> None:
    """Refuses values that nothing here acts on.

    Args:
        fields: the request's.
        taken: field -> the one value that it may have, and why.

    Raises:
        GptossError: a field has another value.
    """
    for name, (value, reason) in taken.items():
        if fields.get(name, value) != value:
            expected = json.dumps(value)
            raise GptossError(f"{name} is {short(fields[name])}, but {reason}: expected {expected}, or leave it out")


def boolean(value: object, name: str) -> bool:
    """Raises GptossError for what is neither true nor false."""
    if not isinstance(value, bool):
        raise GptossError(f"{name} is {short(value)}, expected true or false")
    return value


def whole(value: object, name: str, low: int | None = None, high: int | None = None) -> int:
    """Raises GptossError for what is no whole number, or outside of `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise GptossError(f"{name} is {short(value)}, expected a whole number")
    if (low is not None and value < low) or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise GptossError(f"{name} is {short(value)}, expected {expected}")
    return value


def number(value: object, name: str) -> float:
    """Raises GptossError for what is no number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GptossError(f"{name} is {short(value)}, expected a number")
    return float(value)


def token_ids(value: object, name: str) -> tuple[int, ...]:
    """Raises GptossError for what is no list of whole numbers. Whether the ids exist is the engine's to say."""
    if not isinstance(value, list) or any(isinstance(token, bool) for token in value):
        raise GptossError(f"{name} is {short(value)}, expected a list of whole numbers")
    return whole_numbers(name, value)


def texts(value: object, name: str) -> tuple[str, ...]:
    """One text, or a list of them; raises GptossError for anything else, and for a text without characters."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise GptossError(f"{name} is {short(value)}, expected text or a list of texts")
    if "" in found:
        raise GptossError(f"{name} holds an empty text, expected at least one character")
    return tuple(found)


def an_object(value: object, name: str) -> dict[str, Any]:
    """Raises GptossError for what is no JSON object."""
    if not isinstance(value, dict):
        raise GptossError(f"{name} is {short(value)}, expected an object")
    return value
