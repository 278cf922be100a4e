"""JSON that must be just what is expected: read strictly from files, and looked at with errors that say where."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gptoss_jax import files
from gptoss_jax.errors import GptossError, short

MAX_FILE_BYTES = 64 * 2**20  # a hundred times what the longest context holds

Model = TypeVar("Model", bound=BaseModel)
Meaning = TypeVar("Meaning")


def read_file(path: str | Path, parse: Callable[[Any], Meaning]) -> Meaning:
    """What `parse` makes of the JSON in a file, which may be a pipe: `--messages <(...)`.

    Raises:
        OSError: the file cannot be read.
        GptossError: it holds no JSON, or none that `parse` takes; the error names the file.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise GptossError(f"{path}: the file is larger than {MAX_FILE_BYTES >> 20} MiB, which no context holds")
    value = files.parse_json(data, path)
    try:
        return parse(value)
    except GptossError as error:
        raise GptossError(f"{path}: {error}") from None


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
