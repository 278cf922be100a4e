"""Token ids -> harmony messages, losing no text whatever the model wrote. Knows neither jax nor openai-harmony.

A well-formed stream reads as openai-harmony reads it, but for two headers:
- `<|channel|>final<|constrain|>json`, which names no recipient: the library takes the type for one, which would make
  a call of a structured answer. The same holds for `json` or `code` without `<|constrain|>`, and for any one word
  behind `final`; these are types too, though flagged. (Other words on other channels are recipients, flagged.)
- `user:ann`, a user with a name: so the library writes it, but it does not read it.
What is not well-formed is repaired where that is plain, otherwise it is kept as unparsed text; either way a line in
`Parsed.faults` says so, and nothing is raised.

The machine has two states. In a header it collects sections of text: the role's, then one behind each
`<|channel|>` and `<|constrain|>`. In a body all text is content. Between two messages it is in a header which
`<|start|>` has not opened yet. Only when a header ends is it read, word by word.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.tokenizer import (
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

_UNOPENED = 0  # stands for START as a section's opener if the role is known beforehand or <|start|> is missing
_SPELLED = {CHANNEL: "<|channel|>", CONSTRAIN: "<|constrain|>"}
_NOBODYS = (None, "all", "user")  # recipients of what is said to the user
_TYPES = ("code", "json")

# How a section begins; the words behind are told apart by `_Header._take`. All of a pattern is optional.
_ROLE = rf"(?P<role>{'|'.join(ROLES)})(?P<again>(?:\s*(?P=role))+)?"
_CHANNEL = rf"(?P<channel>{'|'.join(CHANNELS)})"
_AUTHOR = rf"(?:{_ROLE}(?:(?<!tool):(?P<name>\S+))?)?{_CHANNEL}?"
_ALONE = r"(?=\s+to(?:=|\s|\Z)|\s*\Z)"  # where no <|start|> was, any other word behind shows that it is prose
_NO_TO = r"(?!to(?:=|\s|\Z))"
_BEGINNINGS = {
    START: re.compile(rf"\s*(?:{_AUTHOR}(?!\S)|{_NO_TO}(?P<tool>\S+))?"),
    _UNOPENED: re.compile(rf"\s*(?:{_AUTHOR}{_ALONE})?"),
    CHANNEL: re.compile(rf"\s*(?:{_NO_TO}(?P<channel>\S+))?"),
    CONSTRAIN: re.compile(rf"\s*(?:{_NO_TO}(?P<type>\S+))?"),
}
# Without <|message|>, content may follow at once. These take what can be header: a recipient ends before a brace,
# and few words are a type.
_TYPE = rf"(?:{'|'.join(_TYPES)})"
_LOOSE_TO = rf"(?:\s*to(?:=[\w.:/-]*(?:\s+{_TYPE}(?=[\s{{[]|\Z))?|\Z))?\s*"
_HEADS = {
    START: re.compile(rf"\s*(?:(?:{_ROLE})?{_CHANNEL}?(?![a-z])|[a-z][\w.:/-]*{_ALONE})?{_LOOSE_TO}"),
    _UNOPENED: re.compile(rf"\s*(?:(?:{_ROLE})?{_CHANNEL}?{_ALONE})?{_LOOSE_TO}"),
    CHANNEL: re.compile(rf"\s*(?:{_CHANNEL}(?![a-z])|[a-z]+\Z)?{_LOOSE_TO}(?:{_TYPE}\s*(?=[{{[]|\Z))?"),
    CONSTRAIN: re.compile(r"\w*\s*"),
}
_WORD = re.compile(r"\S+")
_ODD = re.compile(r"\ufffd|[^\S \t\n\r\f]|<\|")  # openai-harmony, which reads a header as text, cuts it otherwise


@dataclass(frozen=True)
class Message:
    """One parsed message.

    Attributes:
        role: one of `ROLES`; any other word in a header is the name of a tool.
        content: its text.
        channel: as written, usually one of `CHANNELS`; None if none was.
        recipient: as in `functions.get_weather`; None if the header names none.
        content_type: as openai-harmony spells it: `<|constrain|>json`, `code`.
        name: the author of a tool's message, as in `functions.get_weather`, or a user's name.
    """

    role: str
    content: str
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None

    @property
    def is_answer(self) -> bool:
        """From the assistant to the user: on channel `final`, or on none, which is a fault."""
        return _is_answer(self.role, self.channel, self.recipient)


class Part(NamedTuple):
    """A run of text and the message it belongs to, an index into `Parsed.messages`."""

    kind: PartKind
    text: str
    message: int | None


class Delta(NamedTuple):
    """New content of a message under way, for streaming; `message` will be its index in `Parsed.messages`."""

    message: int
    role: str
    channel: str | None
    recipient: str | None
    text: str

    @property
    def is_answer(self) -> bool:
        """As that of the message."""
        return _is_answer(self.role, self.channel, self.recipient)


def _is_answer(role: str, channel: str | None, recipient: str | None) -> bool:
    return role == "assistant" and channel in ("final", None) and recipient in _NOBODYS


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
        """The content of all messages that are answers, joined by a blank line; None if there are none."""
        answers = [message.content for message in self.messages if message.is_answer]
        return _paragraphs(answers) if answers else None

    @property
    def reasoning(self) -> str:
        """What is on channel `analysis` and addressed to nobody."""
        return _paragraphs([m.content for m in self.messages if m.channel == "analysis" and m.recipient is None])

    @property
    def calls(self) -> tuple[Message, ...]:
        """The assistant's messages to tools."""
        nobody = (*_NOBODYS, "assistant")
        return tuple(m for m in self.messages if m.role == "assistant" and m.recipient not in nobody)

    @property
    def unparsed_text(self) -> str:
        """The text that belongs to no message; everything that was said, headers too, if there is no answer."""
        everything = not self.final
        return "".join(part.text for part in self.parts if everything or part.kind == "unparsed")


def _paragraphs(contents: list[str]) -> str:
    return "\n\n".join(filter(None, contents))


def _begin(pattern: re.Pattern[str], text: str) -> tuple[int, dict[str, str]]:
    """How much a pattern takes from the beginning of a text, and its groups that are not empty."""
    found = pattern.match(text)
    return (found.end(), {kind: word for kind, word in found.groupdict().items() if word}) if found else (0, {})


class _Header:
    """A header under way: who writes, if known beforehand, and whether `<|start|>` was; `read` once it has ended."""

    def __init__(self, author: tuple[str, str | None] | None = None, *, started: bool = False):
        self.author = author  # role and name; once read, never None
        self.started = started
        self.sections: list[tuple[int, list[str]]] = [(START if started and not author else _UNOPENED, [])]
        self.said: dict[str, str] = {}  # words by what they mean
        self.texts: list[tuple[PartKind, str]] = []  # cut into what is header, content at best, or neither
        self.faults: list[str] = []

    @property
    def empty(self) -> bool:
        """Nothing has come yet."""
        return len(self.sections) == 1 and not self.sections[0][1]

    @property
    def holds_content(self) -> bool:
        """The last section goes on behind the channel: `<|message|>` was left out."""
        opener, pieces = self.sections[-1]
        text = "".join(pieces)
        return len(self.sections) > 1 and _begin(_HEADS[opener], text)[0] < len(text)

    def read(self, *, before_message: bool) -> Message:
        """The message that is announced, whether `<|message|>` ended the header or not."""
        for i, (opener, pieces) in enumerate(self.sections):
            text = "".join(pieces)
            # What follows a role's section shows that it is whole, whatever ends the header.
            whole = before_message or (i == 0 and len(self.sections) > 1)
            end = self._read_section(opener, text if whole else text[: _begin(_HEADS[opener], text)[0]])
            self.texts.append(("header", text[:end]))
            self.texts.append(("unparsed" if whole else "content", text[end:]))
            self._flag("text in a header that is no part of it", whole and end < len(text))
        return self._announced()

    def _read_section(self, opener: int, text: str) -> int:
        """Reads words; returns where those begin that are no part of a header."""
        begun, said = _begin(_BEGINNINGS[opener], text)
        if opener in _SPELLED:
            self._flag(f"no word right behind {_SPELLED[opener]}", not said or text[0].isspace())
        if opener == CONSTRAIN:
            said["type"] = _SPELLED[CONSTRAIN] + said.get("type", "")
        for kind, word in said.items():
            self._say(kind, word)
        self._flag(f"no <|channel|> before {said.get('channel')!r}", opener != CHANNEL and "channel" in said)
        words = list(_WORD.finditer(text, begun))
        taken = self._take([word[0] for word in words], behind_channel=opener == CHANNEL)
        end = words[taken].start() if taken < len(words) else len(text)
        self._flag("odd characters in a header", _ODD.search(text, 0, end))
        return end

    def _take(self, words: list[str], *, behind_channel: bool) -> int:
        """Takes recipients, and one word more if it is the only one; returns the number of words."""
        is_to = [word == "to" or word.startswith("to=") for word in words]
        for i, word in enumerate(words):
            addressed = "recipient" in self.said
            if is_to[i]:
                self._flag("content type before the recipient", "type" in self.said)
                self._say("recipient", word[3:])
            elif is_to.count(False) == 1 and (addressed or behind_channel):
                # openai-harmony takes it for the recipient if there is no other.
                is_type = any(is_to) or addressed or self.said.get("channel") == "final" or word in _TYPES
                self._flag(f"content type without <|constrain|>: {word!r}", is_type and not addressed)
                self._flag(f"recipient without to=: {word!r}", not is_type)
                self._say("type" if is_type else "recipient", word)
            else:
                return i
        return len(words)

    def _say(self, kind: str, word: str) -> None:
        """Notes a word; of a kind, the first stands."""
        self._flag(f"to= without a {kind}", not word)
        self._flag(f"second {kind} in one header: {word!r}", word and kind in self.said)
        if word:
            self.said.setdefault(kind, word)

    def _announced(self) -> Message:
        channel, recipient, tool = map(self.said.get, ("channel", "recipient", "tool"))
        author = self.author or _author(self.said)
        self._flag("no <|start|> before a header", not self.started)
        self._flag("no role in a header", self.started and author is None)
        self._flag("role written twice", "again" in self.said or (self.author and "role" in self.said))
        self._flag(f"unknown role {tool!r}", tool and not recipient)
        self._flag(f"unknown channel {channel!r}", channel not in (None, *CHANNELS))
        role, name = self.author = author or ("assistant", None)
        self._flag("no channel in a header", role == "assistant" and channel is None)
        return Message(role, "", channel, recipient, self.said.get("type"), name)

    def _flag(self, fault: str, found: object) -> None:
        if found:
            self.faults.append(fault)


def _author(said: dict[str, str]) -> tuple[str, str | None] | None:
    """Role and name; a word that is no role is the name of a tool, and so is `tool` itself."""
    role, tool = said.get("role"), said.get("tool")
    if role and role != "tool":
        return role, said.get("name")
    if tool and said.get("channel") == "final" and "recipient" not in said:
        return "assistant", None  # no tool answers: it is the role, garbled
    return ("tool", tool or role) if tool or role else None


class StreamParser:
    """Reads a stream id by id: `feed` each, `flush` once at the end, then `result`.

    Args:
        tokenizer: the vocabulary.
        role: whose header the stream begins in; a completion begins behind `<|start|>assistant`. None: the stream
            begins with `<|start|>`.

    Raises:
        GptossError: no such role.
    """

    def __init__(self, tokenizer: Tokenizer, *, role: str | None = "assistant"):
        if role not in (None, *ROLES):
            raise GptossError(f"role {role!r}: expected one of {', '.join(ROLES)}, or None if <|start|> comes first")
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
            GptossError: an id outside the vocabulary (the stream may go on without it), or the stream has ended.
        """
        self._check_open()
        if token_id < STARTOFTEXT:
            deltas = self._write(self._decoder.feed(token_id))
        else:
            spelled = self._tokenizer.decode([token_id])  # raises before anything is changed
            deltas = self._write(self._decoder.flush()) + self._control(token_id, spelled)
        self._ids.append(token_id)
        return deltas

    def flush(self, *, stopped: bool = False) -> list[Delta]:
        """End the stream; returns the content that was held back.

        Args:
            stopped: the caller ended the stream on purpose, so that an open message is not truncated.

        Raises:
            GptossError: the stream has ended already.
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
            GptossError: the stream has not ended.
        """
        if self._truncated is None:
            raise GptossError("the stream has not ended: call flush() before result()")
        ids, text = tuple(self._ids), self._tokenizer.decode(self._ids)
        return Parsed(ids, text, tuple(self._messages), tuple(self._parts), self._status(), tuple(self._faults))

    def _check_open(self) -> None:
        if self._truncated is not None:
            raise GptossError("the stream has ended: feed another StreamParser")

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
        return [self._delta(self._message, text)]

    def _delta(self, message: Message, text: str) -> Delta:
        return Delta(len(self._messages), message.role, message.channel, message.recipient, text)

    def _add(self, texts: list[tuple[PartKind, str]], message: int | None) -> None:
        self._parts += [Part(kind, text, None if kind == "unparsed" else message) for kind, text in texts if text]

    # What control tokens do.

    def _control(self, token_id: int, spelled: str) -> list[Delta]:
        in_header = self._message is None
        if token_id == START:
            return self._restart()
        if token_id == CHANNEL:
            return self._channel()
        if token_id in (END, RETURN, CALL, ENDOFTEXT):
            return self._end(spelled)
        if in_header and token_id == CONSTRAIN:
            self._header.sections.append((CONSTRAIN, []))
        elif in_header and token_id == MESSAGE:
            self._open_body()
        else:
            self._faults.append(f"{spelled} ignored: it has no meaning here")
        return []

    def _restart(self) -> list[Delta]:
        deltas = []
        if self._message is not None:
            self._faults.append("<|start|> inside a message, which ends there")
        if self._message is not None or not self._header.empty:
            deltas = self._close(terminated=False)
        elif self._header.started:
            self._faults.append("<|start|> written twice")
        self._header = _Header(started=True)
        return deltas

    def _channel(self) -> list[Delta]:
        deltas, header = [], self._header
        if self._message is not None or header.holds_content:
            self._faults.append("<|channel|> inside a message, which ends there")
            deltas = self._close(terminated=False)
            self._header = _Header(header.author, started=True)
        self._header.sections.append((CHANNEL, []))
        return deltas

    def _open_body(self) -> None:
        self._message, self._content = self._header.read(before_message=True), []
        self._faults += self._header.faults
        self._add(self._header.texts, len(self._messages))

    def _end(self, spelled: str) -> list[Delta]:
        if spelled == "<|endoftext|>":
            self._faults.append("<|endoftext|> in place of the end of a message")
        elif self._message is None and self._header.empty and not self._header.started:
            self._faults.append(f"{spelled} ends no message")
        return self._close(terminated=True)

    def _close(self, *, terminated: bool) -> list[Delta]:
        """End the message or the header under way; what comes next should be `<|start|>`."""
        deltas = []
        if self._message is None:
            deltas = self._close_header(self._header, terminated=terminated)
        else:
            content = "".join(self._content)
            self._add([("content", content)], len(self._messages))
            self._messages.append(replace(self._message, content=content))
        self._message, self._header = None, _Header()
        return deltas

    def _close_header(self, header: _Header, *, terminated: bool) -> list[Delta]:
        """End a header without `<|message|>`: what it leaves over is content if it says on which channel or to whom."""
        message = header.read(before_message=False)
        content = "".join(text for kind, text in header.texts if kind == "content")
        if header.started or not header.empty:
            self._faults.append("header without <|message|>" if header.started else "text between messages")
        if (message.channel is None and message.recipient is None) or not (content or terminated):
            self._add([("header" if kind == "header" else "unparsed", text) for kind, text in header.texts], None)
            return []
        self._faults += header.faults
        self._add(header.texts, len(self._messages))
        deltas = [self._delta(message, content)] if content else []
        self._messages.append(replace(message, content=content))
        return deltas


def parse(
    token_ids: Sequence[int], tokenizer: Tokenizer, *, role: str | None = "assistant", stopped: bool = False
) -> Parsed:
    """Read a whole stream; see `StreamParser` for the arguments.

    Raises:
        GptossError: an id outside the vocabulary, or no such role.
    """
    parser = StreamParser(tokenizer, role=role)
    for token_id in token_ids:
        parser.feed(token_id)
    parser.flush(stopped=stopped)
    return parser.result()
