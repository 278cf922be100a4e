r"""Control characters on a terminal: shown, not obeyed.

What a model writes, and what files, tensors and configs are called, may hold sequences that set a terminal's title,
fill its clipboard, clear it or move its cursor. All of them begin with a control character, so it is enough to show
each of these as \u001b: no state, and a sequence that comes in parts is caught like a whole one. JSON spells them the
same way, so a document stays one. Tab and newline stay.

Letters stay too, the invisible ones among them: joiners and directional marks are part of Persian, Hindi and emoji, and
what they change is how the text beside them looks, not what the terminal does.
"""

import sys
from collections.abc import Iterable
from typing import Any

_CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - set(map(ord, "\n\t"))
_BYTES_OF_NAMES = range(0xDC80, 0xDD00)  # how Python holds what is no UTF-8 in a file's name; C1 among them
_SHOWN = {code: f"\\u{code:04x}" for code in (*_CONTROLS, *_BYTES_OF_NAMES)}


def visible(text: str) -> str:
    """The text with its control characters spelled out."""
    return text.translate(_SHOWN)


class TerminalStream:
    """A terminal's stream whose text is `visible`.

    Attributes:
        raw: the stream itself, for who draws on the terminal, and sees to it that what others wrote is visible.
    """

    def __init__(self, raw: Any):
        self.raw = raw

    def write(self, text: str) -> int:
        """Writes the text, visible."""
        self.raw.write(visible(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes all of them."""
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def guard_terminals() -> None:
    """From now on whatever this process prints on a terminal is `visible`; through pipes and into files it is exact."""
    sys.stdout, sys.stderr = _guarded(sys.stdout), _guarded(sys.stderr)


def raw_stream(stream: Any) -> Any:
    """The terminal of a guarded stream; any other stream itself."""
    return stream.raw if isinstance(stream, TerminalStream) else stream


def _guarded(stream: Any) -> Any:
    if isinstance(stream, TerminalStream) or not stream.isatty():
        return stream
    return TerminalStream(stream)
