"""Conversations -> training examples: token ids as inference would see them, and which of them are learned.

Knows no files and no JAX.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from openai_harmony import Message, Role

from gptoss_jax.harmony import message_text, render, tokenizer
from gptoss_jax.harmony.conversation import Conversation, CutMessage
from gptoss_jax.harmony.parsed import NO_TOOLS
from gptoss_jax.harmony.settings import Settings
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.training.options import CHANNELS

_KEPT_OPENINGS = 4096
_UNNAMED_CHANNEL = "final"  # where the assistant's words stand if a message names none
_OPENING_ROLES = (Role.SYSTEM, Role.DEVELOPER)


class Example(NamedTuple):
    """A prompt and what the assistant says to it.

    Attributes:
        ids: of all of it.
        learned: for each id 1 if it is one that the model learns to predict, else 0.
    """

    ids: list[int]
    learned: bytearray


class ExampleMaker:
    """Makes examples of conversations, and keeps the ids of what they begin with: most begin alike."""

    def __init__(self, channels: Collection[str] = CHANNELS, settings: Settings | None = None):
        """Loads the tokenizer.

        Args:
            channels: of CHANNELS, those of the assistant's messages that are learned.
            settings: what system and developer messages say where a conversation does not set it itself.
        """
        self._channels = frozenset(channels)
        self._settings = settings or Settings()
        self._encode = load_tokenizer().encode
        self._prompt = (
            len(self._encode("assistant")) + 1
        )  # what inference puts in front of an answer: its header's start
        self._openings: dict[object, list[Message]] = {}
        self._opening_ids: dict[tuple[int, bool], list[int]] = {}

    def examples(self, conversation: Conversation) -> list[Example]:
        """One example for each turn in which the assistant says something on the chosen channels.

        A turn goes from a user's message to the answer, calls of tools and their results included. An example is the
        conversation up to there, with the history rules applied as they were when the turn was drawn: thoughts of this
        turn are kept, those of earlier ones dropped. Only this turn's messages are learned: earlier ones are in
        examples of their own, where they can have their thoughts. An answer at the end ends with <|return|>.

        Raises:
            GptossError: settings that contradict the messages, or text that no tokenizer takes.
        """
        messages = self._whole(conversation)
        starts = render.turn_starts(messages)
        ids: dict[tuple[int, bool], list[int]] = {}
        made = []
        for start, next_start in zip(starts, [*starts[1:], len(messages)], strict=True):
            end = _last_of_assistant(messages, start, next_start)
            if any(map(self._is_learned, messages[start:end])):
                made.append(self._example(messages[:end], start, ids))
        return made

    def _whole(self, conversation: Conversation) -> list[Message]:
        """The messages with those in front that the settings make."""
        settings = render.resolve(self._settings, (), conversation)
        if any(message.author.role in _OPENING_ROLES for message in conversation.messages):
            return render.with_opening(conversation.messages, settings)
        key = _key(settings)
        if key not in self._openings:
            if len(self._openings) >= _KEPT_OPENINGS:
                self._openings, self._opening_ids = {}, {}
            self._openings[key] = render.with_opening((), settings)
            self._opening_ids |= {(id(message), flag): [] for message in self._openings[key] for flag in (True, False)}
        return [*self._openings[key], *conversation.messages]

    def _example(self, messages: Sequence[Message], start: int, ids: dict[tuple[int, bool], list[int]]) -> Example:
        """The example that ends with the last message, of which the messages from `start` on are learned."""
        own = len(messages) - start
        kept = render.apply_history_rules(messages) if start else messages
        has_functions = any(map(message_text.has_functions, kept))
        example = Example([], bytearray())
        for index, message in enumerate(kept):
            part = self._ids(message, has_functions, ids)
            example.ids.extend(part)
            if index < len(kept) - own or not self._is_learned(message):
                example.learned.extend(bytes(len(part)))
            else:
                example.learned.extend(_learned(message, len(part), self._prompt if _is_prompted(kept, index) else 0))
        return _ended(example, kept[-1])

    def _ids(self, message: Message, has_functions: bool, known: dict[tuple[int, bool], list[int]]) -> list[int]:
        """Ids of a message, which an opening's or an earlier example's may be already: objects that are still alive."""
        key = id(message), has_functions
        known = self._opening_ids if key in self._opening_ids else known
        found = known.get(key)
        if not found:
            found = known[key] = render.message_ids(message, self._encode, has_functions)
        return found

    def _is_learned(self, message: Message) -> bool:
        is_assistant = message.author.role is Role.ASSISTANT
        return is_assistant and (message.channel or _UNNAMED_CHANNEL) in self._channels


def has_assistant(conversation: Conversation) -> bool:
    """Whether the assistant says anything in it."""
    return any(message.author.role is Role.ASSISTANT for message in conversation.messages)


def _last_of_assistant(messages: Sequence[Message], start: int, end: int) -> int:
    """Where the turn's last message of the assistant's ends: what follows it is not learned by anybody."""
    while end > start and messages[end - 1].author.role is not Role.ASSISTANT:
        end -= 1
    return end


def _is_prompted(messages: Sequence[Message], index: int) -> bool:
    """Whether a message begins an answer, so that inference gives `<|start|>assistant`; else the model draws it.

    A call ends the drawing, any other message of the assistant's leads to the next one.
    """
    before = messages[index - 1] if index else None
    if before is None or before.author.role is not Role.ASSISTANT:
        return True
    return before.recipient not in NO_TOOLS or isinstance(before, CutMessage)


def _learned(message: Message, count: int, prompt: int) -> bytes:
    """The flags of an assistant's message: all but its prompt, and but the end of one that broke off."""
    is_cut = isinstance(message, CutMessage)
    return bytes(prompt) + b"\1" * (count - prompt - is_cut) + bytes(is_cut)


def _ended(example: Example, last: Message) -> Example:
    """The example with the end that inference would have: <|return|> after an answer, nothing after what broke off."""
    if isinstance(last, CutMessage):
        return Example(example.ids[:-1], example.learned[:-1])
    if render.is_whole_answer(last):
        example.ids[-1] = tokenizer.RETURN
    return example


def _key(settings: Settings) -> tuple[object, ...]:
    """What is the same for settings that say the same; tools and schemas cannot be hashed themselves."""
    values = {**vars(settings), "tools": tuple(tool.model_dump_json() for tool in settings.tools)}
    return *values.pop("builtin_tools"), str(values.pop("response_format")), *values.values()
