"""A row of a job: one line of its input, read and checked, and the line of output that answers it.

Rows are in OpenAI's Batch form (https://platform.openai.com/docs/api-reference/batch) or in our own plain one. A file
holds rows of one form, that of its first row.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from gptoss_jax.api import forms
from gptoss_jax.api.asked import Asked, Form, Options, TurnForm
from gptoss_jax.api.tool_turn import ToolTurn
from gptoss_jax.engine.request import NOT_HELD
from gptoss_jax.errors import GptossError, short
from gptoss_jax.files import FileError, parse_json
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.jobs.inputs import Line

FormName = Literal["openai", "plain"]
FORM_NAMES: Mapping[FormName, str] = {"openai": "OpenAI's Batch form", "plain": "the plain form"}
_ENVELOPE = ("custom_id", "method", "url", "body")
ID_KEYS: Mapping[FormName, str] = {"openai": "custom_id", "plain": "id"}
MAX_ID_CHARACTERS = 512

_BAD_REQUEST, NOT_FINITE, TOOLS_FAILED = "invalid_request", "numerics_error", "tools_failed"
_FAULTS = {
    "error": (NOT_FINITE, "the model's logits were not finite"),
    "constraint": ("structured_output_error", NOT_HELD),
}


class RowError(GptossError):
    """A row that cannot be answered; the others can."""


@dataclass(frozen=True)
class Row:
    """One row of the input.

    Attributes:
        ordinal: its number among all rows, from 0.
        where: file and line, for people.
        form: how it is written.
        id: its custom_id or id; None where it has none that can be used.
        body: the request; empty where there is a fault.
        api: the form of the request.
        fault: why it cannot be answered; "" if it can, as far as can be seen without reading the request.
    """

    ordinal: int
    where: str
    form: FormName
    id: str | None
    body: Mapping[str, Any]
    api: Form
    fault: str = ""

    def refused(self, fault: str, *, keeps_id: bool = True) -> "Row":
        """The same row, which cannot be answered."""
        return replace(self, fault=fault, body={}, id=self.id if keeps_id else None)

    def ask(self, defaults: Options, vocab_path: str | None) -> Asked:
        """What it asks; where it has no seed of its own, that is a function of the job's seed and of its id.

        Raises:
            GptossError: something that cannot be.
        """
        seed = int.from_bytes(self._digest(f"seed {defaults.sampling.seed}")[:4], "little")
        seeded = replace(defaults, sampling=replace(defaults.sampling, seed=seed))
        return self.api.ask(self.body, seeded, vocab_path)

    @property
    def response_id(self) -> str:
        """Its response's own part of its id."""
        return self._digest("response").hex()[:24]

    def answered(self, asked: Asked, answers: Sequence[Answer], model: str) -> bytes:
        """The line of output with its answers."""
        return self._answered(answers, self.api.response(asked, answers, self.response_id, model))

    def answered_turn(self, turn: ToolTurn, model: str) -> bytes:
        """As `answered`, of a row whose calls were carried out."""
        assert isinstance(self.api, TurnForm)
        return self._answered([turn.rounds.answer], self.api.response_of_turn(turn, self.response_id, model))

    def _answered(self, answers: Sequence[Answer], response: Mapping[str, Any]) -> bytes:
        reasons = [_FAULTS[answer.finish_reason] for answer in answers if answer.finish_reason in _FAULTS]
        faulty, error = bool(reasons), self._error(*reasons[0]) if reasons else None
        if self.form == "plain":
            return _line({"id": self.id, **response, "error": error})
        name = self.response_id
        found = {"status_code": 500 if faulty else 200, "request_id": f"req_{name}", "body": response}
        return _line({"id": f"batch_req_{name}", "custom_id": self.id, "response": found, "error": error})

    def error_line(self, code: str = _BAD_REQUEST, message: str | None = None) -> bytes:
        """The line of output that says its fault, or another."""
        error = self._error(code, self.fault if message is None else message)
        if self.form == "plain":
            return _line({"id": self.id, "error": error})
        return _line({"id": f"batch_req_{self.response_id}", "custom_id": self.id, "response": None, "error": error})

    def _error(self, code: str, message: str) -> dict[str, Any]:
        return {"code": code, "message": message, "line": self.where, "row": self.ordinal + 1}

    def _digest(self, purpose: str) -> bytes:
        name = str(self.ordinal) if self.id is None else self.id
        return hashlib.blake2b(name.encode(), digest_size=16, key=purpose.encode()).digest()


def place_of(file: str, number: int) -> str:
    """What people call a row's place."""
    return f"{file}:{number}"


def id_digest(row_id: str) -> bytes:
    """16 bytes that stand for an id."""
    return hashlib.blake2b(row_id.encode(errors="surrogatepass"), digest_size=16).digest()  # edited output has any


def answers_whom(document: Mapping[str, Any]) -> str | int:
    """Which row a line of output answers: its id, or the ordinal of one that has none.

    Raises:
        RowError: no line of a job's output.
    """
    row_id, error = document.get("custom_id" if "custom_id" in document else "id"), document.get("error")
    if isinstance(row_id, str):
        return row_id
    if row_id is None and isinstance(error, dict) and isinstance(error.get("row"), int):
        return error["row"] - 1
    raise RowError(f"{short(document)} is no line of a job's output")


class RowReader:
    """Lines -> rows.

    Attributes:
        forms: that of each file, as far as they are known.
    """

    def __init__(self, forms: Mapping[str, FormName] = {}):
        self.forms: dict[str, FormName] = dict(forms)

    def read(self, ordinal: int, line: Line) -> Row:
        """The row that a line holds; `ordinal` counts lines, of all files, from 0."""
        where = place_of(line.file, line.number)
        try:
            document = _document(line)
            form = self.forms.setdefault(line.file, _form_of(document))
            return self._row(ordinal, document, form, where)
        except GptossError as error:
            form = self.forms.get(line.file, "plain")
            return Row(ordinal, where, form, None, {}, forms.PLAIN, str(error))

    def _row(self, ordinal: int, document: dict[str, Any], form: FormName, where: str) -> Row:
        if _form_of(document) != form:
            raise RowError(
                f"a row in {FORM_NAMES[_form_of(document)]}, expected {FORM_NAMES[form]} as the file's first"
            )
        if form == "plain":
            body = {key: value for key, value in document.items() if key != "id"}
            row_id = _id(document, "id") or f"row-{ordinal + 1}"
            return Row(ordinal, where, form, row_id, body, forms.PLAIN)
        row_id = _id(document, "custom_id")
        row = Row(ordinal, where, form, row_id, {}, forms.PLAIN)
        if row_id is None:
            return row.refused("custom_id is missing, expected a text that no other row has")
        fault, url = _envelope_fault(document), document.get("url")
        return row.refused(fault) if fault else replace(row, body=document["body"], api=forms.OPENAI[str(url)])


def _document(line: Line) -> dict[str, Any]:
    if line.fault:
        raise RowError(line.fault)
    try:
        document = parse_json(line.text, "the row", whole="the row")
    except FileError as error:  # it has no other line
        raise RowError(str(error).removeprefix("the row: ").removeprefix("the row, line 1, ")) from None
    if not isinstance(document, dict):
        raise RowError(f"the row is {short(document)}, expected a JSON object")
    return document


def _form_of(document: Mapping[str, Any]) -> FormName:
    return "openai" if any(key in document for key in _ENVELOPE) else "plain"


def _id(document: Mapping[str, Any], name: str) -> str | None:
    """The row's id; None if it has none."""
    found = document.get(name)
    if isinstance(found, int) and not isinstance(found, bool):
        found = str(found)
    if found is not None and (not isinstance(found, str) or not 0 < len(found) <= MAX_ID_CHARACTERS):
        raise RowError(f"{name} is {short(found)}, expected a text of 1 to {MAX_ID_CHARACTERS} characters")
    return found


def _envelope_fault(document: Mapping[str, Any]) -> str:
    if unknown := [key for key in document if key not in _ENVELOPE]:
        return f"unknown field {short(unknown[0])}, expected {', '.join(_ENVELOPE)}"
    if document.get("method", "POST") != "POST":
        return f"method is {short(document['method'])}, expected 'POST'"
    if document.get("url") not in list(forms.OPENAI):  # whatever it is, a list too
        return f"url is {short(document.get('url'))}, expected one of {', '.join(forms.OPENAI)}"
    if not isinstance(document.get("body"), dict):
        return f"body is {short(document.get('body'))}, expected a JSON object"
    return ""


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
