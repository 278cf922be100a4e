"""Server-sent events: JSON -> bytes."""

import json
from collections.abc import Iterable
from typing import Any

CONTENT_TYPE = "text/event-stream; charset=utf-8"
KEEP_ALIVE = b": the answer is on its way\n\n"  # a comment, which clients pass over
DONE = b"data: [DONE]\n\n"
# No ends of lines to the standard, but to clients that cut a text as Python's `splitlines` does; JSON can do without.
_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})


def data(documents: Iterable[dict[str, Any]]) -> list[bytes]:
    """Events without names, as chat and completions have them."""
    return [b"data: " + _json(document) + b"\n\n" for document in documents]


def named(documents: Iterable[dict[str, Any]]) -> list[bytes]:
    """Events that are called by their `type`, as responses have them."""
    return [b"event: " + document["type"].encode() + b"\ndata: " + _json(document) + b"\n\n" for document in documents]


def _json(document: dict[str, Any]) -> bytes:
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_LINE_ENDS).encode()
