"""One answer as it grows: an engine's events in; text to show, messages, and the reason it ended out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.parsed import CHANNELS, NO_TOOLS, Delta, Message, Parsed
from gptoss_jax.harmony.parser import StreamParser
from gptoss_jax.harmony.tokenizer import StreamDecoder, Tokenizer

FINAL = "final"
RAW = "raw"  # the channel of text that is shown as the model wrote it, unparsed


@runtime_checkable
class Drawn(Protocol):
    """What an engine's event says of the next tokens of an answer."""

    @property
    def logprobs(self) -> Sequence[float]:
        """Of each token."""
        ...

    @property
    def top_logprobs(self) -> Sequence[tuple[tuple[int, float], ...]]:
        """Of each token, if asked for: the likeliest ids with their log probabilities."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ends with them; None: it goes on."""
        ...


@dataclass(frozen=True)
class Answer:
    """A finished answer: everything that came, parsed, and why it ended.

    Attributes:
        parsed: ids, text, messages, and how well they parsed.
        logprobs: of each id: natural logarithm, by the model's own distribution.
        top_logprobs: of each id, if asked for: the likeliest ids with their log probabilities.
        finish_reason: "stop" at a stop id or stop string, "length" at the limit, "cancelled" by the user, "error" where
            the model's logits were not finite, "constraint" where the form that it was held to could not be followed.
        stop_string: the one that was found.
        messages: as parsed, the last one cut before the stop string.
    """

    parsed: Parsed
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: str
    stop_string: str | None
    messages: tuple[Message, ...]

    @property
    def final(self) -> str | None:
        """The answer proper; None if the model came to none."""
        return self._cut.final

    @property
    def _cut(self) -> Parsed:
        return replace(self.parsed, messages=self.messages)

    @property
    def unparsed_text(self) -> str:
        """As of `parsed`, without what comes from the stop string on."""
        return self._cut.unparsed_text

    @property
    def stray_text(self) -> str:
        """What the model wrote outside of any message."""
        return self.parsed.stray_text.strip()

    def history(self) -> list[Message]:
        """The messages that a conversation goes on from: all text that came, and no call but those that are whole.

        Stray text stands in place of an answer, or in front of it as a preamble; what came of a call that was cut is
        text which says so. What the model put into the mouths of others is left out, lest it instruct itself. A role
        that is garbled, on a channel of the assistant's, is read as the assistant.
        """
        messages = [_remembered(message) for message in self.messages if _is_own(message)]
        aside = [_remembered(call) for call in self.parsed.announced_calls]
        if self.stray_text:
            channel = FINAL if self.final is None else "commentary"
            aside.append(Message("assistant", self.stray_text, channel, is_cut=self.finish_reason != "stop"))
        at = len(messages) - int(bool(messages) and messages[-1].is_answer)  # what ended in an answer still does
        return [*messages[:at], *aside, *messages[at:]]

    def document(self) -> dict[str, Any]:
        """All of it for JSON."""
        parsed = self.parsed
        return {
            "final": self.final,
            "preambles": list(parsed.preambles),
            "reasoning": parsed.reasoning,
            "tool_calls": [call_document(call) for call in parsed.calls],
            "cut_calls": [call_document(call) for call in parsed.cut_calls],
            "unparsed_text": self.unparsed_text,
            "parse_status": parsed.parse_status,
            "faults": list(parsed.faults),
            "finish_reason": self.finish_reason,
            "stop_string": self.stop_string,
            "messages": [vars(message) for message in self.messages],
            "text": parsed.text,
            "token_ids": list(parsed.token_ids),
            "logprobs": list(self.logprobs),
            "top_logprobs": [[list(pair) for pair in top] for top in self.top_logprobs],
        }


def call_document(call: Message) -> dict[str, Any]:
    """A tool call for JSON: the function's name as the tools' file has it, the arguments as the model wrote them."""
    return {"name": (call.recipient or "").removeprefix("functions."), "arguments": call.content}


def _is_own(message: Message) -> bool:
    """Whether the model may have said it, if anything: a tool's result is not the model's to write."""
    said_nothing = not message.content and (message.is_cut or message.recipient == "assistant")
    if said_nothing and message.kind != "cut_call":
        return False  # so that a conversation goes on from the thoughts before it
    garbled = message.role == "tool" and message.channel in CHANNELS and message.recipient != "assistant"
    return message.role == "assistant" or garbled


def _remembered(message: Message) -> Message:
    """What a conversation keeps of a message: no recipient but a tool's, no call but a whole one of the assistant's."""
    if message.recipient in NO_TOOLS or message.kind == "call":
        recipient = message.recipient if message.kind == "call" else None
        return replace(message, role="assistant", name=None, recipient=recipient)
    channel = "analysis" if message.channel == "analysis" else "commentary"
    return Message("assistant", f"[cut call to {message.recipient}] {message.content}", channel, is_cut=True)


class AnswerStream:
    """Reads one request's tokens. Give `ends_at` to the engine as the request's; `take` its events as they come."""

    def __init__(self, tokenizer: Tokenizer, *, stop_strings: Sequence[str] = (), raw: bool = False):
        """Stop strings are looked for in the answer, not in the reasoning; if `raw`, in all text as it came."""
        self._parser = StreamParser(tokenizer)
        self._raw = StreamDecoder(tokenizer) if raw else None
        self._stop = StopStrings(stop_strings)
        self._ready: list[Delta] = []
        self._answering: Delta | None = None  # where the text that the stop strings hold back belongs
        self._shown = 0  # characters of that message that came through them
        self._logprobs: list[float] = []
        self._top_logprobs: list[tuple[tuple[int, float], ...]] = []
        self._reason: str | None = None

    def ends_at(self, token_id: int) -> bool:
        """Reads the next token; true if a stop string is complete with it."""
        deltas = self._parser.feed(token_id)
        if self._raw:
            deltas = [Delta(0, "assistant", RAW, None, self._raw.feed(token_id))]
        for delta in deltas:
            self._read(delta)
        return self._stop.found is not None

    def take(self, event: Drawn) -> list[Delta]:
        """What is to be shown after `event`: never half a character, nor what may be the beginning of a stop string."""
        self._logprobs += event.logprobs
        self._top_logprobs += event.top_logprobs
        self._reason = event.finish_reason
        return self._drain()

    def finish(self) -> tuple[Answer, list[Delta]]:
        """The answer, and what is still to be shown; without a last event it was cancelled."""
        # A stop string ends an answer on purpose; in raw text it may cut a call.
        deltas = self._parser.flush(stopped=self._stop.found is not None and not self._raw)
        if self._raw:
            deltas = [Delta(0, "assistant", RAW, None, self._raw.flush())]
        for delta in deltas:
            self._read(delta)
        self._show(self._stop.flush())
        parsed = self._parser.result()
        messages = parsed.messages
        if self._stop.found is not None and not self._raw:
            messages = (*messages[:-1], replace(messages[-1], content=messages[-1].content[: self._shown]))
        answer = Answer(
            parsed=parsed,
            logprobs=tuple(self._logprobs),
            top_logprobs=tuple(self._top_logprobs),
            finish_reason=self._reason or "cancelled",
            stop_string=self._stop.found,
            messages=messages,
        )
        return answer, self._drain()

    def _read(self, delta: Delta) -> None:
        """Puts a delta where it is to be shown, the answer's through the stop strings."""
        if not delta.is_answer and delta.channel != RAW:
            self._ready.append(delta)
            return
        if self._answering is None or self._answering.message != delta.message:
            self._show(self._stop.flush())  # a stop string does not reach into another message
            self._answering, self._shown = delta, 0
        self._show(self._stop.feed(delta.text))

    def _show(self, text: str) -> None:
        if text and self._answering:
            self._shown += len(text)
            self._ready.append(self._answering._replace(text=text))

    def _drain(self) -> list[Delta]:
        ready, self._ready = self._ready, []
        return ready


class StopStrings:
    """Finds the first of some strings in text that comes in chunks, holding back what may become one.

    Attributes:
        found: the string that was found; from then on no text comes out.
    """

    def __init__(self, strings: Sequence[str]):
        if "" in strings:
            raise GptossError("a stop string is empty, expected at least one character")
        self.found: str | None = None
        self._strings, self._held = tuple(strings), ""

    def feed(self, text: str) -> str:
        """What of the text so far can be shown: all but the string that was found, or may be under way."""
        if self.found is not None:
            return ""
        self._held += text
        places = [(at, string) for string in self._strings if (at := self._held.find(string)) >= 0]
        if places:
            at, self.found = min(places, key=lambda place: (place[0], -len(place[1])))
            shown, self._held = self._held[:at], ""
            return shown
        most = len(self._held) + 1
        begun = (
            n for string in self._strings for n in range(min(len(string), most)) if self._held.endswith(string[:n])
        )
        keep = max(begun, default=0)
        at = len(self._held) - keep
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def flush(self) -> str:
        """What was held back."""
        shown, self._held = self._held, ""
        return shown
