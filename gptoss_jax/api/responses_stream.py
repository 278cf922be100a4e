"""OpenAI's /v1/responses as a stream: deltas of an answer in, events out, whose last one holds the whole response.

Reasoning and text come as they are drawn; a call comes when it is whole, in one delta, so that none is sent that was
cut. Items stand in the last event's output in the order in which they were sent.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.api import responses
from gptoss_jax.api.asked import Asked
from gptoss_jax.api.openai_fields import made_id
from gptoss_jax.api.tool_items import CallItem
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.parsed import Delta
from gptoss_jax.tools.tool import ToolOutput

_PREFIXES = {"reasoning": "rs", "preamble": "msg", "final": "msg"}
_PHASES = {"preamble": "commentary", "final": "final_answer"}
_LAST = {"completed": "response.completed", "incomplete": "response.incomplete"}
_NOT_YET = {"status": "in_progress", "output": [], "usage": None, "error": None, "incomplete_details": None}


class ResponsesStream:
    """The events of one response."""

    def __init__(self, asked: Asked, response_id: str, model: str, *, added: Mapping[str, Any] = {}):
        """`added`: fields of the response beside those of `responses.response`, its times and links."""
        self._asked, self._response_id, self._model, self._added = asked, response_id, model, added
        self._numbers = itertools.count()
        self._items: list[dict[str, Any]] = []  # sent whole, in order
        self._answer_id = response_id  # that of the answer under way, from which its items have theirs
        self._open: _OpenItem | None = None

    def begin(self) -> list[dict[str, Any]]:
        """Events that say that the response is under way."""
        head = {**responses.under_way(self._asked, self._response_id, self._model), **self._added, **_NOT_YET}
        return [self._event(f"response.{kind}", response=head) for kind in ("created", "in_progress")]

    def take(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """What came of the answer."""
        events = []
        shown = [delta for delta in deltas if delta.kind in _PREFIXES and delta.text]
        for (message, kind), run in itertools.groupby(shown, key=lambda delta: (delta.message, delta.kind)):
            if self._open is None or self._open.message != message:
                events += [*self._close({}), *self._begin(message, kind)]
            events += self._grow("".join(delta.text for delta in run))
        return events

    def finish(self, answer: Answer) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """What is left of an answer that has ended, but the last event; and the whole response."""
        whole = {**responses.response(self._asked, [answer], self._response_id, self._model), **self._added}
        events = self._finish_items(whole["output"])
        whole["output"] = self._items
        return events, whole

    def _finish_items(self, output: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What is left to send of an answer with this output."""
        items = {item["id"]: item for item in output}
        events = self._close(items)
        sent = {item["id"] for item in self._items}
        for item in output:
            if item["id"] not in sent:
                events += self._whole_item(item)
        self._items = [items.get(item["id"], item) for item in self._items]
        return events

    # ---- rounds of calls that are carried out here ----

    def finish_round(self, output: Sequence[dict[str, Any]], next_id: str) -> list[dict[str, Any]]:
        """What is left of an answer with this output, after which the response goes on; `next_id`: the next one's."""
        events = self._finish_items(output)
        self._answer_id = next_id
        return events

    def begin_call(self, item: CallItem) -> list[dict[str, Any]]:
        """A call, before its tool works."""
        place = {"item_id": item.id, "output_index": len(self._items)}
        added = self._event("response.output_item.added", output_index=len(self._items), item=item.document(None))
        return [added, *(self._event(kind, **place, **fields) for kind, fields in item.begun())]

    def end_call(self, item: CallItem, output: ToolOutput) -> list[dict[str, Any]]:
        """The same call, with what it gave."""
        place = {"item_id": item.id, "output_index": len(self._items)}
        events = [self._event(kind, **place, **fields) for kind, fields in item.ended(output)]
        document = item.document(output)
        events.append(self._event("response.output_item.done", output_index=len(self._items), item=document))
        self._items.append(document)
        return events

    def last(self, whole: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The last event, with the whole response; one whose numbers were not finite has failed."""
        return [self._event(_LAST.get(whole["status"], "response.failed"), response=dict(whole))]

    def fail(self, error: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Events in place of all that would come: the response has failed, and the error that clients raise.

        Args:
            error: OpenAI's object: a message, a type, a param and a code.
        """
        code = "rate_limit_exceeded" if error["type"] == "rate_limit_error" else "server_error"
        head = {**responses.under_way(self._asked, self._response_id, self._model), **self._added, **_NOT_YET}
        failed = {**head, "status": "failed", "error": {"code": code, "message": error["message"]}}
        fields = {name: error[name] for name in ("code", "message", "param")}
        return [
            self._event("response.failed", response={**failed, "output": self._items}),
            self._event("error", **fields, error=dict(error)),
        ]

    # ---- items ----

    def _begin(self, message: int, kind: str) -> list[dict[str, Any]]:
        item = _OpenItem(message, kind, made_id(_PREFIXES[kind], self._answer_id, message))
        self._open = item
        return [
            self._event("response.output_item.added", output_index=len(self._items), item=item.document("", [])),
            self._in_part("response.content_part.added", item, part=item.part("")),
        ]

    def _grow(self, text: str) -> list[dict[str, Any]]:
        item = self._open
        assert item is not None
        item.texts.append(text)
        extra = {} if item.kind == "reasoning" else {"logprobs": []}
        return [self._in_part(f"response.{item.name}.delta", item, delta=text, **extra)]

    def _close(self, whole_items: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Ends the item that is open, if one is; `whole_items`: those of the whole response, once they are known."""
        item, self._open = self._open, None
        if item is None:
            return []
        text = "".join(item.texts)
        document = whole_items.get(item.id) or item.document("completed", [item.part(text)])
        part = document["content"][0]
        extra = {} if item.kind == "reasoning" else {"logprobs": part["logprobs"]}
        events = [
            self._in_part(f"response.{item.name}.done", item, text=text, **extra),
            self._in_part("response.content_part.done", item, part=part),
            self._event("response.output_item.done", output_index=len(self._items), item=document),
        ]
        self._items.append(document)
        return events

    def _whole_item(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """An item of which nothing was sent: a call, or text that only the end shows to be the answer."""
        if item["type"] != "function_call":
            [part] = item["content"]
            opened = _OpenItem(-1, "reasoning" if item["type"] == "reasoning" else "final", item["id"])
            opened.phase = item.get("phase")
            self._open = opened
            added = self._event(
                "response.output_item.added", output_index=len(self._items), item=opened.document("", [])
            )
            part_added = self._in_part("response.content_part.added", opened, part=opened.part(""))
            grown = self._grow(part["text"]) if part["text"] else []
            return [added, part_added, *grown, *self._close({item["id"]: item})]
        place = {"item_id": item["id"], "output_index": len(self._items)}
        arguments = item["arguments"]
        begun = {**item, "arguments": "", "status": "in_progress"}
        events = [
            self._event("response.output_item.added", output_index=len(self._items), item=begun),
            self._event("response.function_call_arguments.delta", **place, delta=arguments),
            self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=arguments),
            self._event("response.output_item.done", output_index=len(self._items), item=item),
        ]
        self._items.append(item)
        return events

    def _in_part(self, kind: str, item: "_OpenItem", **fields: Any) -> dict[str, Any]:
        return self._event(kind, item_id=item.id, output_index=len(self._items), content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}


class _OpenItem:
    """An item whose text is under way."""

    def __init__(self, message: int, kind: str, own_id: str):
        self.message, self.kind, self.id = message, kind, own_id
        self.phase = _PHASES.get(kind)
        self.texts: list[str] = []

    @property
    def name(self) -> str:
        """What events call its text."""
        return "reasoning_text" if self.kind == "reasoning" else "output_text"

    def part(self, text: str) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def document(self, status: str, content: list[Any]) -> dict[str, Any]:
        status = status or "in_progress"
        if self.kind == "reasoning":
            return {"type": "reasoning", "id": self.id, "summary": [], "content": content, "status": status}
        return {
            "type": "message",
            "id": self.id,
            "role": "assistant",
            "status": status,
            "phase": self.phase,
            "content": content,
        }
