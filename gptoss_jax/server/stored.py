"""Responses that are kept for a while, so that the next one can go on from them: in memory, bounded, by their ids."""

import collections
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Kept(NamedTuple):
    """A response that is kept.

    Attributes:
        response: its JSON.
        items: the conversation that a next one goes on from: all input items, and its output.
        owner: whose key asked for it; nobody else can see it.
        characters: of what it has beyond the one that it went on from.
    """

    response: Mapping[str, Any]
    items: Sequence[Any]
    owner: str
    characters: int


class Stored:
    """The responses that were asked for last. What one shares with those before it is in memory once."""

    def __init__(self, most: int, most_characters: int = 1 << 27):
        """`most`: responses; 0: none are kept. Those unused longest go first."""
        self.most, self._most_characters = most, most_characters
        self._kept: collections.OrderedDict[str, Kept] = collections.OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()  # requests are read in threads

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, response: Mapping[str, Any], before: Sequence[Any], asked: Sequence[Any], owner: str) -> None:
        """Keeps a response.

        Args:
            response: its JSON, with its id and output.
            before: the items of the one that it goes on from.
            asked: its own input items.
            owner: whose it is.
        """
        characters = len(json.dumps([asked, response]))
        kept = Kept(response, [*before, *asked, *response["output"]], owner, characters)
        with self._lock:
            self._kept[response["id"]] = kept
            self._characters += characters
            while self._kept and (len(self._kept) > self.most or self._characters > self._most_characters):
                self._characters -= self._kept.popitem(last=False)[1].characters

    def find(self, response_id: object, owner: str) -> Kept | None:
        """The response with this id, if it is kept and this owner's; it was used now."""
        if not isinstance(response_id, str):
            return None
        with self._lock:
            kept = self._kept.get(response_id)
            if kept is None or kept.owner != owner:
                return None
            self._kept.move_to_end(response_id)
            return kept

    def drop(self, response_id: str, owner: str) -> bool:
        """Forgets a response; whether it was there."""
        with self._lock:
            kept = self._kept.get(response_id)
            if kept is None or kept.owner != owner:
                return False
            del self._kept[response_id]
            self._characters -= kept.characters
            return True
