"""Parquet files <-> rows of JSON, in bounded memory. Results have one schema for each form, whatever the rows hold.

Imported only where such a file is met: it needs the package pyarrow.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gptoss_jax.errors import GptossError, short
from gptoss_jax.files import FileError

MAGIC = b"PAR1"
_READ_ROWS = 256  # that are held at once
_GROUP_ROWS, _GROUP_BYTES = 8192, 16 << 20  # a row group of results is written when it has either, in JSON
_BUFFER_BYTES = 1 << 20

# What a result's column holds: an Arrow type by name, {field: ...}, [element], or any value as the text of its JSON.
_JSON = "json"
_ERROR = {"code": "string", "message": "string", "line": "string", "row": "int64"}
PLAIN: Mapping[str, Any] = {
    "id": "string",
    "final": "string",
    "reasoning": "string",
    "preambles": ["string"],
    "tool_calls": _JSON,
    "cut_calls": _JSON,
    "unparsed_text": "string",
    "token_ids": ["int32"],
    "parse_status": "string",
    "faults": ["string"],
    "finish_reason": "string",
    "stop_string": "string",
    "logprobs": ["float64"],
    "top_logprobs": _JSON,
    "usage": dict.fromkeys(("prompt_tokens", "completion_tokens", "reasoning_tokens", "total_tokens"), "int64"),
    "settings": _JSON,
    "metadata": _JSON,
    "answers": _JSON,
    "remarks": ["string"],
    "error": _ERROR,
}
OPENAI: Mapping[str, Any] = {
    "id": "string",
    "custom_id": "string",
    "response": {"status_code": "int32", "request_id": "string", "body": _JSON},
    "error": _ERROR,
}


def rows(file: Any, name: str) -> Iterator[tuple[int, bytes, str]]:
    """Each row of a Parquet file: its number from 1, its JSON without nulls, or b"" and why it has none.

    Args:
        file: from any position; it is read by row groups.
        name: for errors.

    Raises:
        FileError: the file is damaged, or a column's type has no JSON.
    """
    number = 0
    try:
        opened = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
        _check_schema(opened.schema_arrow, name)
        for batch in opened.iter_batches(batch_size=_READ_ROWS):
            for row in _values(batch):
                number += 1
                yield number, *_json_or_fault(row)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise FileError(name, f"the Parquet file is damaged after row {number}: {what}") from None


def _check_schema(schema: pa.Schema, name: str) -> None:
    for column in schema.names:
        if schema.names.count(column) > 1:
            raise FileError(name, f"two columns are named {short(column)}")
    for column in schema:
        if without := _without_json(column.type):
            raise FileError(
                name,
                f"the column {short(column.name)} holds {without}, which has no JSON: expected text, numbers, true and "
                "false, lists and structs of these; cast it to text or leave it out",
            )


def _without_json(kind: pa.DataType) -> str:
    """The type within a type that JSON has nothing for; "" if there is none."""
    types = pa.types
    if types.is_struct(kind):
        return next(filter(None, (_without_json(kind.field(i).type) for i in range(kind.num_fields))), "")
    if types.is_map(kind):
        return _without_json(kind.item_type) if types.is_string(kind.key_type) else str(kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_dictionary(kind):
        return _without_json(kind.value_type)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind)
    return "" if is_text or is_number or types.is_boolean(kind) or types.is_null(kind) else str(kind)


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch, or why one is none; row by row where one of them has a fault."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except (UnicodeDecodeError, KeyError):
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist(maps_as_pydicts="strict")[0]
            except UnicodeDecodeError:
                yield "a text is not valid UTF-8"
            except KeyError:
                yield "a map has a key twice"


def _json_or_fault(row: dict[str, Any] | str) -> tuple[bytes, str]:
    if isinstance(row, str):
        return b"", row
    found = _without_nulls(row)
    try:
        return _compact(found).encode(), ""
    except ValueError:
        column = next(column for column in found if not _is_finite(found[column]))
        return b"", f"the column {short(column)} holds NaN or an infinity, which JSON has not"


def _is_finite(value: Any) -> bool:
    try:
        return bool(_compact(value))
    except ValueError:
        return False


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _without_nulls(value: Any) -> Any:
    """A struct's absent fields are nulls in Parquet; in a list a null is an element."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def write(out: Any, results: Iterable[bytes]) -> None:
    """Writes a job's results as Parquet; the first says which form all have.

    Args:
        out: a file to write to.
        results: JSON objects in UTF-8.

    Raises:
        ValueError: a key that the form does not know.
    """
    results = iter(results)
    first = next(results, b"{}")
    form = OPENAI if "custom_id" in json.loads(first) else PLAIN
    schema = pa.schema(_fields(form))
    with pq.ParquetWriter(out, schema, compression="zstd", write_page_checksum=True) as writer:
        for group in _groups(itertools.chain([first] if first != b"{}" else [], results)):
            found = [_column(json.loads(result), form, "result") for result in group]
            writer.write_table(pa.Table.from_pylist(found, schema=schema))


def _groups(results: Iterable[bytes]) -> Iterator[list[bytes]]:
    group, size_bytes = [], 0
    for result in results:
        group.append(result)
        size_bytes += len(result)
        if len(group) == _GROUP_ROWS or size_bytes >= _GROUP_BYTES:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group


def _arrow(kind: Any) -> pa.DataType:
    if isinstance(kind, list):
        return pa.list_(_arrow(kind[0]))
    if isinstance(kind, Mapping):
        return pa.struct(_fields(kind))
    return pa.string() if kind == _JSON else pa.type_for_alias(kind)


def _fields(kinds: Mapping[str, Any]) -> list[pa.Field]:
    return [pa.field(name, _arrow(kind)) for name, kind in kinds.items()]


def _column(value: Any, kind: Any, where: str) -> Any:
    """A value as Arrow takes it. Of a struct's keys Arrow passes over those that it does not know."""
    if value is None:
        return None
    if kind == _JSON:
        return _compact(value)
    if not isinstance(kind, Mapping):
        return value
    if unknown := value.keys() - kind.keys():
        raise ValueError(f"{where} has the keys {sorted(unknown)}, which have no column")
    return {key: _column(part, kind[key], f"{where}, {key}") for key, part in value.items()}


def results(file: Any, name: str) -> Iterator[bytes]:
    """The results that `write` wrote, as JSON. What was null is left out, but for the four keys of OpenAI's form.

    Raises:
        FileError: the file is damaged, or another's.
    """
    for number, text, fault in rows(file, name):
        if fault:
            raise FileError(name, f"row {number}: {fault}")
        try:
            yield _compact(_result(json.loads(text))).encode()
        except (GptossError, json.JSONDecodeError) as error:
            raise FileError(name, f"row {number} is no result of a job: {error}") from None


def _result(row: dict[str, Any]) -> dict[str, Any]:
    if "custom_id" in row:
        return dict.fromkeys(OPENAI) | _value(row, OPENAI)
    return _value(row, PLAIN)


def _value(column: Any, kind: Any) -> Any:
    """The value that `_column` made a column's of."""
    if kind == _JSON:
        return json.loads(column)
    if not isinstance(kind, Mapping):
        return column
    if unknown := column.keys() - kind.keys():
        raise GptossError(f"the column {short(sorted(unknown)[0])} is not known")
    return {key: _value(part, kind[key]) for key, part in column.items()}
