"""What a stream of token ids is read as: messages, parts, and how well the stream kept to the format."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

ParseStatus = Literal["ok", "repaired", "truncated", "unparsed"]
PartKind = Literal["header", "content", "unparsed"]

ROLES = ("assistant", "developer", "system", "tool", "user")
CHANNELS = ("analysis", "commentary", "final")

_NOBODYS = (None, "all", "user")  # recipients of what is addressed to the user


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
        """The text that belongs to no message; all of the stream's text, headers too, if there is no answer."""
        everything = not self.final
        return "".join(part.text for part in self.parts if everything or part.kind == "unparsed")


def _paragraphs(contents: list[str]) -> str:
    return "\n\n".join(filter(None, contents))
