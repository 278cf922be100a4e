"""Reads the header of a harmony message once it has ended, word by word: author, channel, recipient, content type."""

import re

from gptoss_jax.harmony.parsed import CHANNELS, NO_TOOLS, ROLES, Message, PartKind, names_no_tool
from gptoss_jax.harmony.tokenizer import CHANNEL, CONSTRAIN, START

_UNOPENED = 0  # stands for START as a section's opener if the role is known beforehand or <|start|> is missing
_SPELLED = {CHANNEL: "<|channel|>", CONSTRAIN: "<|constrain|>"}
_TYPES = ("code", "json")

# How a section begins; `Header._take` says what the words after it are. All of a pattern is optional.
_ROLE = rf"(?P<role>{'|'.join(ROLES)})(?P<again>(?:\s*(?P=role))+)?"
_CHANNEL = rf"(?P<channel>{'|'.join(CHANNELS)})"
_AUTHOR = rf"(?:{_ROLE}(?:(?<!tool):(?P<name>\S+))?)?{_CHANNEL}?"
_ALONE = r"(?=\s+to(?:=|\s|\Z)|\s*\Z)"  # where no <|start|> was, any other word after it shows that it is prose
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


def _begin(pattern: re.Pattern[str], text: str) -> tuple[int, dict[str, str]]:
    """How much a pattern takes from the beginning of a text, and its groups that are not empty."""
    found = pattern.match(text)
    return (found.end(), {kind: word for kind, word in found.groupdict().items() if word}) if found else (0, {})


class Header:
    """A header under way: who writes, if known beforehand, and whether `<|start|>` was; `read` once it has ended."""

    def __init__(self, author: tuple[str, str | None] | None = None, *, started: bool = False):
        self.author = author  # role and name; once read, never None
        self.started = started
        self.sections: list[tuple[int, list[str]]] = [(START if started and not author else _UNOPENED, [])]
        self.fields: dict[str, str] = {}  # what each word that was read means -> the word
        self.texts: list[tuple[PartKind, str]] = []  # cut into what is header, content at best, or neither
        self.faults: list[str] = []

    @property
    def empty(self) -> bool:
        """Nothing has come yet."""
        return len(self.sections) == 1 and not self.sections[0][1]

    @property
    def is_bare(self) -> bool:
        """No control token says that its words are a header's."""
        return len(self.sections) == 1 and self.sections[0][0] == _UNOPENED

    @property
    def holds_content(self) -> bool:
        """The last section goes on after the channel: `<|message|>` was left out."""
        opener, chunks = self.sections[-1]
        text = "".join(chunks)
        return len(self.sections) > 1 and _begin(_HEADS[opener], text)[0] < len(text)

    def read(self, *, before_message: bool) -> Message:
        """The message that is announced, whether `<|message|>` ended the header or not."""
        for i, (opener, chunks) in enumerate(self.sections):
            text = "".join(chunks)
            # What follows a role's section shows that it is whole, whatever ends the header.
            whole = before_message or (i == 0 and len(self.sections) > 1)
            end = self._read_section(opener, text if whole else text[: _begin(_HEADS[opener], text)[0]])
            self.texts.append(("header", text[:end]))
            self.texts.append(("unparsed" if whole else "content", text[end:]))
            self._flag("text in a header that is no part of it", whole and end < len(text))
        return self._announced()

    def _read_section(self, opener: int, text: str) -> int:
        """Reads words; returns where those begin that are no part of a header."""
        begun, fields = _begin(_BEGINNINGS[opener], text)
        if opener in _SPELLED:
            self._flag(f"no word right after {_SPELLED[opener]}", not fields or text[0].isspace())
        if opener == CONSTRAIN:
            fields["type"] = _SPELLED[CONSTRAIN] + fields.get("type", "")
        if opener == CHANNEL and "channel" in fields:
            self._drop_stray(fields["channel"])
        for kind, word in fields.items():
            self._note(kind, word)
        self._flag(f"no <|channel|> before {fields.get('channel')!r}", opener != CHANNEL and "channel" in fields)
        words = list(_WORD.finditer(text, begun))
        taken = self._take([word[0] for word in words], after_channel=opener == CHANNEL)
        end = words[taken].start() if taken < len(words) else len(text)
        self._flag("odd characters in a header", _ODD.search(text, 0, end))
        return end

    def _take(self, words: list[str], *, after_channel: bool) -> int:
        """Takes recipients, and one word more if it is the only one; returns the number of words."""
        is_to = [word == "to" or word.startswith("to=") for word in words]
        for i, word in enumerate(words):
            addressed = "recipient" in self.fields
            if is_to[i]:
                self._flag("content type before the recipient", "type" in self.fields)
                self._note("recipient", word[3:])
            elif is_to.count(False) == 1 and (addressed or after_channel):
                # openai-harmony takes it for the recipient if there is no other.
                is_type = any(is_to) or addressed or self.fields.get("channel") == "final" or word in _TYPES
                self._flag(f"content type without <|constrain|>: {word!r}", is_type and not addressed)
                self._flag(f"recipient without to=: {word!r}", not is_type)
                self._note("type" if is_type else "recipient", word)
            else:
                return i
        return len(words)

    def _drop_stray(self, channel: str) -> None:
        """Forgets a header of the assistant's before its real one, as the 20b writes it (llama.cpp#21286).

        `commentary to=assistant<|channel|>final`: where a channel follows another, and what was read so far names no
        tool, the later header stands.
        """
        role, _ = self.author or _author(self.fields) or ("assistant", None)
        stray, recipient = self.fields.get("channel"), self.fields.get("recipient")
        if stray and role == "assistant" and (recipient in NO_TOOLS or names_no_tool(recipient)):
            self.faults.append(f"stray channel {stray!r} before {channel!r}")
            for kind in ("channel", "recipient", "type"):
                self.fields.pop(kind, None)

    def _note(self, kind: str, word: str) -> None:
        """Notes a word; of a kind, the first stands."""
        self._flag(f"to= without a {kind}", not word)
        self._flag(f"second {kind} in one header: {word!r}", word and kind in self.fields)
        if word:
            self.fields.setdefault(kind, word)

    def _announced(self) -> Message:
        channel, recipient, tool = map(self.fields.get, ("channel", "recipient", "tool"))
        author = self.author or _author(self.fields)
        self._flag("no <|start|> before a header", not self.started)
        self._flag("no role in a header", self.started and author is None)
        self._flag("role written twice", "again" in self.fields or (self.author and "role" in self.fields))
        self._flag(f"unknown role {tool!r}", tool and not recipient)
        self._flag(f"unknown channel {channel!r}", channel not in (None, *CHANNELS))
        role, name = self.author = author or ("assistant", None)
        self._flag("no channel in a header", role == "assistant" and channel is None)
        self._flag("the assistant addresses itself", role == recipient == "assistant")
        self._flag(f"recipient that names no tool: {recipient!r}", role == "assistant" and names_no_tool(recipient))
        return Message(role, "", channel, recipient, self.fields.get("type"), name)

    def _flag(self, fault: str, found: object) -> None:
        if found:
            self.faults.append(fault)


def _author(fields: dict[str, str]) -> tuple[str, str | None] | None:
    """Role and name; a word that is no role is the name of a tool, and so is `tool` itself."""
    role, tool = fields.get("role"), fields.get("tool")
    if role and role != "tool":
        return role, fields.get("name")
    if tool and fields.get("channel") == "final" and "recipient" not in fields:
        return "assistant", None  # no tool answers: it is the role, garbled
    return ("tool", tool or role) if tool or role else None
