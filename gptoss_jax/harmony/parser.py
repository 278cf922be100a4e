"""Token ids -> harmony messages, losing no text whatever the model wrote. Knows neither JAX nor openai-harmony.

A well-formed stream reads as openai-harmony reads it, but for two headers:
- `<|channel|>final<|constrain|>json`, which names no recipient: the library takes the type for one, which would make
  a call of a structured answer. The same holds for `json` or `code` without `<|constrain|>`, and for any one word
  after `final`; these are types too, though flagged. (Other words on other channels are recipients, flagged.)
- `user:ann`, a user with a name: so the library writes it, but it does not read it.
What is not well-formed is repaired where that is plain, otherwise it is kept as unparsed text; either way a line in
`Parsed.faults` says so, and nothing is raised.

The machine has two states. In a header it collects sections of text: the role's, then one after each
`<|channel|>` and `<|constrain|>`. In a body all text is content. Between two messages it is in a header which
`<|start|>` has not opened yet. Only when a header ends is it read, word by word.
"""

from collections.abc import Sequence
from dataclasses import replace

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.header import Header
from gptoss_jax.harmony.parsed import ROLES, Delta, Message, Parsed, ParseStatus, Part, PartKind
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


class StreamParser:
    """Reads a stream id by id: `feed` each, `flush` once at the end, then `result`.

    Args:
        tokenizer: the vocabulary.
        role: whose header the stream begins in; a completion begins after `<|start|>assistant`. None: the stream
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
        self._header = Header((role, None), started=True) if role else Header()
        self._message: Message | None = None  # whose body is under way; its content is still empty
        self._content: list[str] = []
        self._ids: list[int] = []
        self._messages: list[Message] = []
        self._announced_calls: list[Message] = []
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
            deltas += self._close(terminated=False, is_cut=not stopped)
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
        return Parsed(
            token_ids=ids,
            text=text,
            messages=tuple(self._messages),
            announced_calls=tuple(self._announced_calls),
            parts=tuple(self._parts),
            parse_status=self._status(),
            faults=tuple(self._faults),
        )

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
        self._header = Header(started=True)
        return deltas

    def _channel(self) -> list[Delta]:
        deltas, header = [], self._header
        if self._message is not None or header.holds_content:
            self._faults.append("<|channel|> inside a message, which ends there")
            deltas = self._close(terminated=False)
            self._header = Header(header.author, started=True)
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

    def _close(self, *, terminated: bool, is_cut: bool = False) -> list[Delta]:
        """End the message or the header under way; what comes next should be `<|start|>`."""
        deltas = []
        if self._message is None:
            deltas = self._close_header(self._header, terminated=terminated, is_cut=is_cut)
        else:
            content = "".join(self._content)
            self._add([("content", content)], len(self._messages))
            self._messages.append(replace(self._message, content=content, is_cut=is_cut))
        self._message, self._header = None, Header()
        return deltas

    def _close_header(self, header: Header, *, terminated: bool, is_cut: bool) -> list[Delta]:
        """End a header without `<|message|>`: what it leaves over is content if it says on which channel or to whom."""
        message = header.read(before_message=False)
        content = "".join(text for kind, text in header.texts if kind == "content")
        if header.started or not header.empty:
            self._faults.append("header without <|message|>" if header.started else "text between messages")
        calls = message.kind in ("call", "cut_call")
        if header.is_bare and not calls and (terminated or (is_cut and header.started and header.fields)):
            self._add([("unparsed", text) for _, text in header.texts], None)  # an answer may be the one word "user"
            return []
        if (message.channel is None and message.recipient is None) or not (content or (terminated and not calls)):
            self._announced_calls += [replace(message, is_cut=True)] if calls else []
            self._add([("header" if kind == "header" else "unparsed", text) for kind, text in header.texts], None)
            return []
        self._faults += header.faults
        self._add(header.texts, len(self._messages))
        deltas = [self._delta(message, content)] if content else []
        self._messages.append(replace(message, content=content, is_cut=is_cut))
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
