"""Token ids -> harmony messages, losing no text whatever the model wrote. Knows neither jax nor openai-harmony.

A well-formed stream reads as openai-harmony reads it, but for `<|constrain|>json` in a header that names no recipient:
the library takes that for the recipient, which would make a call of a structured answer. What is not well-formed is
repaired where that is plain, otherwise it is kept as unparsed text; either way a line in `Parsed.faults` says so, and
nothing is raised.

The machine has two states. In a header it collects sections of text: the role's, then one behind each
`<|channel|>` and `<|constrain|>`. In a body all text is content. Between two messages it is in a header which
`<|start|>` has not opened yet. Only when a header ends is it read, with one regular expression for each section.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from gptoss_jax.tokenizer import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    ENDOFTEXT,
    MESSAGE,
    RETURN,
    START,
    STARTOFTEXT,
    StreamDecoder,
    Tokenizer,
)

ParseStatus = Literal["ok", "repaired", "truncated", "unparsed"]
PartKind = Literal["header", "content", "unparsed"]

ROLES = ("assistant", "developer", "system", "tool", "user")
CHANNELS = ("analysis", "commentary", "final")

# The grammar of headers. Each pattern takes what it knows from the beginning of a section, perhaps nothing; what
# it leaves is no part of a header.
_ROLE = rf"(?P<role>{'|'.join(ROLES)})(?P<again>(?:\s*(?P=role))+)?"
_CHANNEL = rf"(?P<channel>{'|'.join(CHANNELS)})"
_ALONE = r"(?=\s+to(?:=|\Z)|\s*\Z)"
_TO = r"\s*to=(?P<recipient>\S+)(?:\s+(?!to=)(?P<type>\S+)(?=\s*\Z))?"
# Without <|message|>, content may follow at once: a recipient ends before a brace, and only `code` is a type.
_TO_LOOSE = r"(?:\s*to(?:=(?P<recipient>[\w.:/-]*)(?:\s+(?P<type>code)(?![a-z]))?|\Z))?\s*"
_ODD = re.compile(r"\ufffd|[^\S \t\n\r\f]")
_UNOPENED = 0  # stands for START as a section's opener if the role is known beforehand or <|start|> is missing
_BEFORE_MESSAGE = {
    START: re.compile(rf"\s*(?:{_ROLE}{_CHANNEL}?(?!\S)|(?!to=)(?P<name>\S+))?(?:{_TO})?\s*"),
    _UNOPENED: re.compile(rf"\s*(?:(?:{_ROLE})?{_CHANNEL}?{_ALONE})?(?:{_TO})?\s*"),
    CHANNEL: re.compile(rf"\s*(?!to=)(?P<channel>\S+)?(?:{_TO}|\s+(?P<bare>\S+)(?=\s*\Z))?\s*"),
    CONSTRAIN: re.compile(r"\s*(?P<type>\S+)?\s*"),
}
_WITHOUT_MESSAGE = {
    START: re.compile(rf"\s*(?:{_ROLE}{_CHANNEL}?(?![a-z])|(?P<name>[a-z][\w.:/-]*){_ALONE})?{_TO_LOOSE}"),
    _UNOPENED: re.compile(rf"\s*(?:(?:{_ROLE})?{_CHANNEL}?{_ALONE})?{_TO_LOOSE}"),
    CHANNEL: re.compile(rf"\s*(?:{_CHANNEL}(?![a-z])|[a-z]+\Z)?{_TO_LOOSE}(?:(?P<bare>code)\s*\Z)?"),
    CONSTRAIN: re.compile(r"(?P<type>\w+)?\s*"),
}


@dataclass(frozen=True)
class Message:
    """One parsed message.

    Attributes:
        role: one of `ROLES`; any other word in a header is the name of a tool.
        content: its text.
        channel: as written, usually one of `CHANNELS`; None if none was.
        recipient: as in `functions.get_weather`; None if the header names none.
        content_type: as openai-harmony spells it: `<|constrain|>json`, `code`.
        name: the author of a tool's message, as in `functions.get_weather`.
    """

    role: str
    content: str
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None


class Part(NamedTuple):
    """A run of text and the message it belongs to, an index into `Parsed.messages`."""

    kind: PartKind
    text: str
    message: int | None


class Delta(NamedTuple):
    """New content of a message under way, for streaming; `message` will be its index in `Parsed.messages`."""

    message: int
    channel: str | None
    recipient: str | None
    text: str


@dataclass(frozen=True)
class Parsed:
    """A whole stream, read.

    Attributes:
        token_ids: as they were fed, the last `<|call|>` or `<|return|>` included.
        text: of `token_ids`, control tokens spelled out.
        messages: in order.
        parts: all text but control tokens, in order.
        parse_status: the worst that holds: `unparsed`, some text belongs to no message; `truncated`, the stream
            broke off inside a message, or a completion holds none; `repaired`, there are faults; `ok`.
        faults: what was not as the format has it, one line each, in order.
    """

    token_ids: tuple[int, ...]
    text: str
    messages: tuple[Message, ...]
    parts: tuple[Part, ...]
    parse_status: ParseStatus
    faults: tuple[str, ...]

    @property
    def final(self) -> str | None:
        """The answer: what is on channel `final`, else what the assistant wrote to all on no channel, else None."""
        final = [m.content for m in self.messages if m.channel == "final"]
        plain = [m.content for m in self.messages if (m.role, m.channel, m.recipient) == ("assistant", None, None)]
        return _paragraphs(final or plain) if final or plain else None

    @property
    def reasoning(self) -> str:
        """What is on channel `analysis` and addressed to nobody."""
        return _paragraphs([m.content for m in self.messages if m.channel == "analysis" and m.recipient is None])

    @property
    def calls(self) -> tuple[Message, ...]:
        """The assistant's messages to tools."""
        nobody = (None, "assistant", "all")
        return tuple(m for m in self.messages if m.role == "assistant" and m.recipient not in nobody)

    @property
    def unparsed_text(self) -> str:
        """The text that belongs to no message; everything that was said, headers too, if there is no answer."""
        return "".join(part.text for part in self.parts if part.kind == "unparsed" or not self.final)


def _paragraphs(contents: list[str]) -> str:
    return "\n\n".join(filter(None, contents))


@dataclass
class _Header:
    """A header under way: who writes, if known beforehand, and for each section its opener and pieces of text."""

    author: tuple[str, str | None] | None = None
    started: bool = False
    sections: list[tuple[int, list[str]]] = field(init=False)

    def __post_init__(self):
        self.sections = [(START if self.started and not self.author else _UNOPENED, [])]

    @property
    def empty(self) -> bool:
        """Nothing has come yet."""
        return len(self.sections) == 1 and not self.sections[0][1]

    @property
    def holds_content(self) -> bool:
        """The last section goes on behind the channel: `<|message|>` was left out."""
        opener, pieces = self.sections[-1]
        text = "".join(pieces)
        return len(self.sections) > 1 and _taken(_WITHOUT_MESSAGE[opener], text).end() < len(text)


class _Reading(NamedTuple):
    """What a header announces; its text, cut into what is header, content at best, or neither; what is wrong."""

    message: Message
    texts: list[tuple[PartKind, str]]
    faults: list[str]


def _taken(pattern: re.Pattern[str], section: str) -> re.Match[str]:
    """What a pattern takes from the beginning of a section."""
    found = pattern.match(section)
    assert found is not None, "all of a pattern is optional"
    return found


def _read(header: _Header, *, before_message: bool) -> _Reading:
    """Read a header that has ended, with `<|message|>` or without."""
    fields: dict[str, str] = {}
    texts: list[tuple[PartKind, str]] = []
    faults = []
    for i, (opener, pieces) in enumerate(header.sections):
        text = "".join(pieces)
        # What follows a role's section shows that it is whole, whatever ends the header.
        whole = before_message or (i == 0 and len(header.sections) > 1)
        found = _taken((_BEFORE_MESSAGE if whole else _WITHOUT_MESSAGE)[opener], text)
        texts.append(("header", found[0]))
        texts.append(("unparsed" if whole else "content", text[found.end() :]))
        if whole and found.end() < len(text):
            faults.append("text in a header that is no part of it")
        said = {name: value for name, value in found.groupdict().items() if value}
        if opener == CONSTRAIN:
            said["type"] = "<|constrain|>" + said.get("type", "")
        faults += _section_faults(opener, text, said)
        faults += [f"second {name} in one header: {said[name]!r}" for name in said if name in fields]
        fields = said | fields
    message, more = _announced(header, fields)
    return _Reading(message, texts, faults + more)


def _section_faults(opener: int, text: str, said: dict[str, str]) -> list[str]:
    channel = said.get("channel")
    gap = not text[:1].strip()
    faults = {
        "no word right behind <|channel|>": opener == CHANNEL and gap,
        "no word right behind <|constrain|>": opener == CONSTRAIN and gap,
        f"no <|channel|> before {channel!r}": opener != CHANNEL and channel is not None,
        "odd white space or bytes that are no UTF-8 in a header": _ODD.search(text) is not None,
    }
    return [fault for fault, found in faults.items() if found]


def _announced(header: _Header, fields: dict[str, str]) -> tuple[Message, list[str]]:
    """The message that the fields of a header announce, and their faults."""
    author = header.author or _author(fields)
    role, name = author or ("assistant", None)
    channel, recipient, content_type = (fields.get(key) for key in ("channel", "recipient", "type"))
    bare = fields.get("bare")  # as openai-harmony has it: the content type behind a recipient, else the recipient
    faults = {
        "no <|start|> before a header": not header.started,
        "no role in a header": header.started and author is None,
        "role written twice": "again" in fields or (header.author is not None and "role" in fields),
        f"unknown role {name!r}": "name" in fields and not (recipient or bare),
        "no channel in a header": role == "assistant" and channel is None,
        f"unknown channel {channel!r}": channel not in (None, *CHANNELS),
        f"recipient without to=: {bare!r}": bare and not recipient,
        f"second type in one header: {bare!r}": bare and recipient and content_type,
    }
    if recipient:
        content_type = content_type or bare
    message = Message(role, "", channel, recipient or bare, content_type, name)
    return message, [fault for fault, found in faults.items() if found]


def _author(fields: dict[str, str]) -> tuple[str, str | None] | None:
    """Role and name; a word that is no role is the name of a tool, and so is `tool` itself."""
    role = fields.get("role")
    if role and role != "tool":
        return role, None
    name = fields.get("name") or role
    return ("tool", name) if name else None


class StreamParser:
    """Reads a stream id by id: `feed` each, `flush` once at the end, then `result`.

    Args:
        tokenizer: the vocabulary.
        role: whose header the stream begins in; a completion begins behind `<|start|>assistant`. None: the stream
            begins with `<|start|>`.

    Raises:
        ValueError: no such role.
    """

    def __init__(self, tokenizer: Tokenizer, *, role: str | None = "assistant"):
        if role not in (None, *ROLES):
            raise ValueError(f"role {role!r}: expected one of {', '.join(ROLES)}, or None if <|start|> comes first")
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._is_completion = role is not None
        self._header = _Header((role, None), started=True) if role else _Header()
        self._message: Message | None = None  # whose body is under way; its content is still empty
        self._content: list[str] = []
        self._ids: list[int] = []
        self._messages: list[Message] = []
        self._parts: list[Part] = []
        self._faults: list[str] = []
        self._truncated: bool | None = None  # None until the stream has ended

    def feed(self, token_id: int) -> list[Delta]:
        """Take the next id; returns the content it completes, perhaps none.

        Raises:
            ValueError: an id outside the vocabulary (the stream may go on without it), or the stream has ended.
        """
        self._check_open()
        if token_id < STARTOFTEXT:
            deltas = self._write(self._decoder.feed(token_id))
        else:
            spelled = self._tokenizer.decode([token_id])
            deltas = self._write(self._decoder.flush())
            act = (_IN_HEADER if self._message is None else _IN_BODY).get(token_id)
            if act is None:
                self._faults.append(f"{spelled} ignored: it has no meaning here")
            else:
                deltas += act(self, token_id)
        self._ids.append(token_id)
        return deltas

    def flush(self, *, stopped: bool = False) -> list[Delta]:
        """End the stream; returns the content that was held back.

        Args:
            stopped: the caller ended the stream on purpose, so that an open message is not truncated.

        Raises:
            ValueError: the stream has ended already.
        """
        self._check_open()
        deltas = self._write(self._decoder.flush())
        under_way = self._message is not None or self._header.started or len(self._header.sections) > 1
        if self._message is not None or not self._header.empty:
            deltas += self._close(terminated=False)
        self._truncated = (under_way and not stopped) or (self._is_completion and not self._messages)
        return deltas

    def result(self) -> Parsed:
        """All that was read.

        Raises:
            ValueError: the stream has not ended.
        """
        if self._truncated is None:
            raise ValueError("the stream has not ended: call flush() before result()")
        return Parsed(
            tuple(self._ids),
            self._tokenizer.decode(self._ids),
            tuple(self._messages),
            tuple(self._parts),
            self._status(),
            tuple(self._faults),
        )

    def _check_open(self) -> None:
        if self._truncated is not None:
            raise ValueError("the stream has ended: feed another StreamParser")

    def _status(self) -> ParseStatus:
        if any(part.kind == "unparsed" for part in self._parts):
            return "unparsed"
        if self._truncated:
            return "truncated"
        return "repaired" if self._faults else "ok"

    def _write(self, text: str) -> list[Delta]:
        """Text of ordinary ids."""
        if not text:
            return []
        if self._message is None:
            self._header.sections[-1][1].append(text)
            return []
        self._content.append(text)
        return [Delta(len(self._messages), self._message.channel, self._message.recipient, text)]

    def _add(self, texts: list[tuple[PartKind, str]], message: int | None) -> None:
        self._parts += [Part(kind, text, None if kind == "unparsed" else message) for kind, text in texts if text]

    # What control tokens do.

    def _restart(self, token_id: int) -> list[Delta]:
        """`<|start|>`."""
        deltas = []
        if self._message is not None:
            self._faults.append("<|start|> inside a message, which ends there")
            deltas = self._close(terminated=False)
        elif not self._header.empty:
            deltas = self._close(terminated=False)
        elif self._header.started:
            self._faults.append("<|start|> written twice")
        self._header = _Header(started=True)
        return deltas

    def _section(self, token_id: int) -> list[Delta]:
        """`<|channel|>`; `<|constrain|>` in a header."""
        deltas = []
        if token_id == CHANNEL:
            message = self._message
            if message is None and self._header.holds_content:
                message = _read(self._header, before_message=False).message
            if message is not None:
                self._faults.append("<|channel|> inside a message, which ends there")
                deltas = self._close(terminated=False)
                self._header = _Header((message.role, message.name), started=True)
        self._header.sections.append((token_id, []))
        return deltas

    def _open_body(self, token_id: int) -> list[Delta]:
        """`<|message|>` in a header."""
        reading = _read(self._header, before_message=True)
        self._faults += reading.faults
        self._add(reading.texts, len(self._messages))
        self._message, self._content = reading.message, []
        return []

    def _end(self, token_id: int) -> list[Delta]:
        """A token that ends messages."""
        if token_id == ENDOFTEXT:
            self._faults.append("<|endoftext|> in place of the end of a message")
        elif self._message is None and self._header.empty and not self._header.started:
            self._faults.append(f"{self._tokenizer.decode([token_id])} ends no message")
        return self._close(terminated=True)

    def _close(self, *, terminated: bool) -> list[Delta]:
        """End the message or the header under way; what comes next should be `<|start|>`."""
        if self._message is None:
            deltas = self._close_header(terminated=terminated)
        else:
            deltas = []
            content = "".join(self._content)
            self._add([("content", content)], len(self._messages))
            self._messages.append(replace(self._message, content=content))
        self._message, self._header = None, _Header()
        return deltas

    def _close_header(self, *, terminated: bool) -> list[Delta]:
        """End a header without `<|message|>`: what it leaves over is content if it says on which channel or to whom."""
        message, texts, faults = _read(self._header, before_message=False)
        content = "".join(text for kind, text in texts if kind == "content")
        if self._header.started or not self._header.empty:
            self._faults.append("header without <|message|>" if self._header.started else "text between messages")
        if (message.channel is None and message.recipient is None) or not (content or terminated):
            self._add([("header" if kind == "header" else "unparsed", text) for kind, text in texts], None)
            return []
        self._faults += faults
        self._add(texts, len(self._messages))
        self._messages.append(replace(message, content=content))
        if not content:
            return []
        return [Delta(len(self._messages) - 1, message.channel, message.recipient, content)]


_ENDS = dict.fromkeys((END, RETURN, CALL, ENDOFTEXT), StreamParser._end)
_IN_BODY = {START: StreamParser._restart, CHANNEL: StreamParser._section, **_ENDS}
_IN_HEADER = {**_IN_BODY, CONSTRAIN: StreamParser._section, MESSAGE: StreamParser._open_body}


def parse(
    token_ids: Sequence[int], tokenizer: Tokenizer, *, role: str | None = "assistant", stopped: bool = False
) -> Parsed:
    """Read a whole stream; see `StreamParser` for the arguments.

    Raises:
        ValueError: an id outside the vocabulary, or no such role.
    """
    parser = StreamParser(tokenizer, role=role)
    for token_id in token_ids:
        parser.feed(token_id)
    parser.flush(stopped=stopped)
    return parser.result()
