"""A conversation as JSON files hold it, in harmony's terms."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openai_harmony import Message

CONSTRAIN = "<|constrain|>"
"""What stands in front of a content type that binds the assistant."""


class CutMessage(Message):
    """A message of the assistant's that broke off, at a limit or by the user: a turn that ends in it has not ended."""


@dataclass(frozen=True)
class Conversation:
    """A conversation as a file holds it.

    Attributes:
        messages: in harmony's terms.
        settings: fields of `Settings` that the file sets: `dataclasses.replace(settings, **conversation.settings)`.
        call_ids: index of a tool call in `messages` -> its id, where the file gave one; harmony has none.
        remarks: what of the file is not in `messages`, a line each.
    """

    messages: tuple[Message, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    call_ids: Mapping[int, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
