"""What a stream of token ids is read as: messages, parts, and how well the stream kept to the format."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, NamedTuple

ParseStatus = Literal["ok", "repaired", "truncated", "unparsed"]
PartKind = Literal["header", "content", "unparsed"]
MessageKind = Literal["final", "reasoning", "preamble", "call", "cut_call", "other"]

ROLES = ("assistant", "developer", "system", "tool", "user")
CHANNELS = ("analysis", "commentary", "final")

NO_TOOLS = (None, "all", "user", "assistant")
"""Recipients of the assistant's that are no tools: what it tells itself on `final` is an answer all the same."""


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
        is_cut: the stream broke off in it. Not compared: openai-harmony's messages, which these equal, do not say it.
    """

    role: str
    content: str
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None
    is_cut: bool = field(default=False, compare=False)

    @property
    def kind(self) -> MessageKind:
        """Where people find its text, which is in one place only.

        - `final`: from the assistant to no tool, on that channel, or on none, which is a fault
        - `reasoning`: on channel `analysis`, neither a call nor the result of one
        - `preamble`: from the assistant to no tool, on channel `commentary`
        - `call`: from the assistant to a tool
        - `cut_call`: a call that broke off before its arguments were whole, or names no tool
        - `other`: by another role, or on an unknown channel
        """
        kind = kind_of(self.role, self.channel, self.recipient)
        return "cut_call" if kind == "call" and self.is_cut and not _is_json_object(self.content) else kind

    @property
    def is_answer(self) -> bool:
        """Its text belongs to the answer proper."""
        return self.kind == "final"


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
    def kind(self) -> MessageKind:
        """As that of the message, of which it is not known yet whether it will be cut."""
        return kind_of(self.role, self.channel, self.recipient)

    @property
    def is_answer(self) -> bool:
        """As that of the message."""
        return self.kind == "final"


def names_no_tool(recipient: str | None) -> bool:
    """A namespace without a function in it, as in `functions.`."""
    return recipient == "functions" or (recipient or "").endswith(".")


def kind_of(role: str, channel: str | None, recipient: str | None) -> MessageKind:
    """The `Message.kind` that a header says, of a message that is whole."""
    if role == "assistant" and recipient not in NO_TOOLS:
        return "cut_call" if names_no_tool(recipient) else "call"
    if channel == "analysis" and (role == "assistant" or recipient is None):
        return "reasoning"
    if role == "assistant" and channel in ("final", None):
        return "final"
    return "preamble" if role == "assistant" and channel == "commentary" else "other"


def _is_json_object(text: str) -> bool:
    """Nothing can be missing at the end of an object, as it can of a number or of a program."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@dataclass(frozen=True)
class Parsed:
    """A whole stream, read.

    Attributes:
        token_ids: as they were fed, the last `<|call|>` or `<|return|>` included.
        text: of `token_ids`, control tokens spelled out.
        messages: in order.
        announced_calls: those of which no more came than a header that names the tool; they are no messages.
        parts: all text but control tokens, in order.
        parse_status: the worst that holds: `unparsed`, some text belongs to no message; `truncated`, the stream
            broke off inside a message, or a completion holds none; `repaired`, there are faults; `ok`.
        faults: what was not as the format has it, one line each, in order.
    """

    token_ids: tuple[int, ...]
    text: str
    messages: tuple[Message, ...]
    announced_calls: tuple[Message, ...]
    parts: tuple[Part, ...]
    parse_status: ParseStatus
    faults: tuple[str, ...]

    @property
    def final(self) -> str | None:
        """The content of all messages that are answers, joined by a blank line; None if there are none."""
        answers = self._contents("final")
        return _paragraphs(answers) if answers else None

    @property
    def reasoning(self) -> str:
        """What is on channel `analysis`, but calls and their results."""
        return _paragraphs(self._contents("reasoning"))

    @property
    def preambles(self) -> tuple[str, ...]:
        """What the assistant says on channel `commentary`, mostly before it calls a tool."""
        return tuple(filter(None, self._contents("preamble")))

    @property
    def calls(self) -> tuple[Message, ...]:
        """The assistant's messages to tools, those that are whole."""
        return tuple(message for message in self.messages if message.kind == "call")

    @property
    def cut_calls(self) -> tuple[Message, ...]:
        """What came of calls that are none: they broke off, or name no tool."""
        return (*(message for message in self.messages if message.kind == "cut_call"), *self.announced_calls)

    @property
    def stray_text(self) -> str:
        """What was written outside of any message."""
        runs = groupby(self.parts, key=lambda part: part.kind == "unparsed")
        return _paragraphs(["".join(part.text for part in run) for is_stray, run in runs if is_stray])

    @property
    def unparsed_text(self) -> str:
        """All text that is in none of the others: stray text, content of other roles and channels, and of cut calls.

        Where no message has come, only words of headers, these.
        """
        if not self.messages and all(part.kind == "header" for part in self.parts):
            return "".join(part.text for part in self.parts)
        return _paragraphs([self.stray_text, *self._contents("other", "cut_call")])

    def _contents(self, *kinds: MessageKind) -> list[str]:
        return [message.content for message in self.messages if message.kind in kinds]


def _paragraphs(contents: Sequence[str]) -> str:
    return "\n\n".join(filter(None, contents))
