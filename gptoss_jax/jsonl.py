"""Files of JSON lines that others wrote: read line by line in bounded memory, plain or packed. Reads no JSON."""

import codecs
import io
from collections.abc import Iterator, Sequence

from gptoss_jax import compression, files
from gptoss_jax.errors import GptossError, short
from gptoss_jax.files import FileError

MAX_LINE_BYTES = 32 << 20  # thirty times the text of the longest context
_BUFFER_BYTES = 1 << 18
_HEAD_BYTES = 1 << 16  # by which a file of another kind is known
_TABLE, _ARRAY, _DOCUMENT = "a CSV file or another table", "one JSON array", "one JSON text over many lines"
_TO_JSONL = {
    _TABLE: 'python -c "import csv,json,sys; [print(json.dumps(r)) for r in csv.DictReader(sys.stdin)]" < FILE',
    _ARRAY: 'python -c "import json,sys; [print(json.dumps(r)) for r in json.load(sys.stdin)]" < FILE',
    _DOCUMENT: "jq -c . FILE",
}


def lines(
    file: io.BufferedReader, name: str, max_line_bytes: int = MAX_LINE_BYTES, *, may_be_lists: bool = False
) -> Iterator[tuple[int, bytes | None]]:
    """Each line of a file: its number from 1, and what it holds without its end; b"" where it is blank.

    Args:
        file: where it begins; packed with gzip or zstd, or not.
        name: for errors.
        max_line_bytes: of a longer line None is given.
        may_be_lists: whether lines may be JSON arrays; where not, a file that begins with one is refused as a whole.

    Raises:
        FileError: the file is damaged, or of another kind.
    """
    number = 0
    try:
        unpacked = compression.unpacked(file, name)
        _check_jsonl(unpacked.peek(_HEAD_BYTES)[:_HEAD_BYTES], name, may_be_lists)
        for number, (text, is_whole) in enumerate(_lines(unpacked, max_line_bytes), 1):
            yield number, text if is_whole else None
    except compression.Damaged as error:
        what = f"cannot be unpacked after line {number}: {error}; it was cut or damaged: make or fetch it again"
        raise FileError(name, what) from None


def _lines(file: io.BufferedReader, max_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """Each line without its end, and whether it is whole; b"" where it is blank."""
    mark = codecs.BOM_UTF8
    while text := file.readline(max_bytes + 2):  # with its end
        rest, is_whole = text, len(text) < max_bytes + 2 or text.endswith(b"\n")
        while not is_whole and not rest.endswith(b"\n") and (rest := file.readline(_BUFFER_BYTES)):
            pass
        line, mark = text.removeprefix(mark).removesuffix(b"\n").removesuffix(b"\r"), b""
        yield line if line.strip() else b"", is_whole and len(line) <= max_bytes


def _check_jsonl(head: bytes, name: str, may_be_lists: bool) -> None:
    """Refuses a file of another kind as a whole: each of its lines would be a fault.

    Raises:
        FileError: what the file is, and how to make JSONL of it.
    """
    try:
        files.check_not_wide(head, "the file")
    except GptossError as error:
        raise FileError(name, str(error)) from None
    if known := files.recognize(head):
        raise FileError(name, known)
    lines = [line.strip() for line in head.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()]
    if kind := _other_kind(lines, name, may_be_lists):
        fix = f": make it with `{_TO_JSONL[kind]} > FILE.jsonl`" if kind in _TO_JSONL else ""
        raise FileError(name, f"{kind}, expected JSONL, one object a line{fix}")


def _other_kind(lines: Sequence[bytes], name: str, may_be_lists: bool) -> str:
    """What a file is by its first lines; "" if it may be JSONL, of which any line may be wrong."""
    first = lines[0] if lines else b"{}"
    if first == b"{" and not any(line.startswith(b"{") for line in lines[1:2]):
        return _DOCUMENT
    begins_with_list = first.startswith((b"[{", b"[ {"))
    if may_be_lists and begins_with_list:
        return ""
    if first == b"[" or begins_with_list:
        return _ARRAY
    if not first.startswith(b"{") and name.lower().endswith((".csv", ".tsv")):
        return _TABLE
    if any(line.startswith(b"{") for line in lines) or not lines:
        return ""
    text = first.decode(errors="replace").replace("\t", ",")
    is_table = text.isprintable() and "\ufffd" not in text and ("," in text or ";" in text)
    return _ARRAY if text.startswith("[") else _TABLE if is_table else f"begins with {short(first)}"
