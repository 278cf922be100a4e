"""JSON that must be just what is expected: read strictly from files, and looked at with errors that say where."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.text_files import decoded

MAX_FILE_BYTES = 64 * 2**20  # a hundred times what the longest context holds
MAX_DEPTH = 64  # openai-harmony takes no more than 128, each message adding some

MAX_DIGITS = 400  # the largest float has 309

Model = TypeVar("Model", bound=BaseModel)
Meaning = TypeVar("Meaning")


def read_file(path: str | Path, parse: Callable[[Any], Meaning]) -> Meaning:
    """What `parse` makes of the JSON in a file.

    Raises:
        OSError: the file cannot be read.
        GptossError: it holds no JSON, or none that `parse` takes; the error names the file.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    try:
        if len(data) > MAX_FILE_BYTES:
            raise GptossError(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB, which no context holds")
        text = decoded(data, "the file")
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant, parse_int=_integer)
    except GptossError as error:
        raise GptossError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        raise GptossError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; expected JSON") from None
    except RecursionError:
        raise GptossError(f"{path} is nested too deeply, at most {MAX_DEPTH} levels are taken") from None
    try:
        check_value(value, "the file")
        return parse(value)
    except GptossError as error:
        raise GptossError(f"{path}: {error}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise GptossError(f"the key {short(_first_repeated(keys))} stands twice in one object")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise GptossError(f"a number of {len(digits)} digits is out of range")
    return int(digits)


def _first_repeated(keys: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(key for key in keys if key in seen or seen.add(key))


def _no_constant(name: str) -> NoReturn:
    raise GptossError(f"{name} is no JSON")


def check_value(value: object, where: str, depth: int = 0) -> None:
    """Refuses what passes as JSON and breaks later.

    Raises:
        GptossError: half characters, infinities, deep nesting.
    """
    if depth > MAX_DEPTH:
        raise GptossError(f"the value is nested too deeply, at most {MAX_DEPTH} levels are taken")
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise GptossError(f"{where} holds half a surrogate pair, which is no text")
    elif isinstance(value, int | float):
        if abs(value) > sys.float_info.max:  # Python reads 1e999 as infinity, which the library does not take
            raise GptossError(f"{where} is a number out of range")
    elif isinstance(value, dict):
        for key, part in value.items():
            check_value(key, f"a key in {where}", depth)
            check_value(part, f"{where}, {short(key)}", depth + 1)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            check_value(part, f"{where}, [{index}]", depth + 1)


def known_fields(value: object, known: Sequence[str], where: str) -> dict[str, Any]:
    """The keys of an object, without those whose value says nothing: null, an empty list, of others an empty object.

    Raises:
        GptossError: `value` is no object, or has keys that are not `known`.
    """
    if not isinstance(value, dict):
        raise GptossError(f"{where} is {short(value)}, expected an object with some of {', '.join(known)}")
    says_nothing = (None, []), (None, [], {})  # of a known key an empty object may say something
    fields = {key: part for key, part in value.items() if part not in says_nothing[key not in known]}
    unknown = [key for key in fields if key not in known]
    if unknown:
        raise GptossError(
            f"{where} has {', '.join(map(short, unknown[:10]))}, expected only {', '.join(known)}: put what it says in "
            "one of these, or take it out if it does not matter"
        )
    return fields


def needed(fields: Mapping[str, Any], key: str, where: str) -> Any:
    """The value of a key that has to be there.

    Raises:
        GptossError: it is not.
    """
    if key not in fields:
        raise GptossError(f"{where} has no {key!r}, or an empty one")
    return fields[key]


def nonempty_list(value: object, where: str) -> list[Any]:
    """`value`, which has to be a list with something in it.

    Raises:
        GptossError: it is not.
    """
    if not isinstance(value, list) or not value:
        raise GptossError(f"{where}: got {short(value)}, expected a list that is not empty")
    return value


def string(value: object, where: str) -> str:
    """`value`, which has to be text.

    Raises:
        GptossError: it is not.
    """
    if not isinstance(value, str):
        raise GptossError(f"{where} is {short(value)}, expected text")
    return value


def json_text(value: object) -> str:
    """Text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def short(value: object, characters: int = 60) -> str:
    """A value for an error message: its beginning."""
    text = repr(value)
    return text if len(text) <= characters else f"{text[:characters]}..."


def model_of(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """One of openai-harmony's own types.

    Raises:
        GptossError: the fields are not what it takes; its first complaint in one line.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise GptossError(f"{where}, {place[:60]}: {fault['msg']}") from None
