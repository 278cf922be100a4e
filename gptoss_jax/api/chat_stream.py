"""OpenAI's /v1/chat/completions as a stream: deltas of an answer in, chunks out, which add up to the whole response.

The final answer and the reasoning come as they are drawn. What is the content only if no final answer comes (preambles,
text outside of any message) is sent when the answer has ended, and so are calls: one that was cut is never sent. Log
probabilities stand in the last chunk of a choice, which has its `finish_reason`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.api import chat, openai_fields
from gptoss_jax.api.asked import Asked
from gptoss_jax.api.grown_text import GrownText
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.parsed import Delta

_FIELDS_OF = {"final": ("content",), "reasoning": ("reasoning", "reasoning_content")}


class ChatStream:
    """The chunks of one response."""

    def __init__(self, asked: Asked, response_id: str, model: str, *, created: int = 0, with_usage: bool = False):
        """`created`: seconds since 1970; `with_usage`: a last chunk without any choice says what was used."""
        self._asked, self._response_id, self._with_usage = asked, response_id, with_usage
        self._head = {
            "id": f"chatcmpl-{response_id}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": asked.echo.get("model", model),
            "system_fingerprint": None,
        }
        self._sent = [{kind: GrownText() for kind in _FIELDS_OF} for _ in range(asked.options.n)]

    def begin(self) -> list[dict[str, Any]]:
        """A chunk for each choice, that says who speaks."""
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self._asked.options.n)]

    def take(self, index: int, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """What came of the choice `index`."""
        chunks: list[tuple[str, str]] = []
        for delta in deltas:
            if delta.kind not in _FIELDS_OF or not delta.text:
                continue
            text = self._sent[index][delta.kind].feed(delta.message, delta.text)
            if chunks and chunks[-1][0] == delta.kind:
                text = chunks.pop()[1] + text
            chunks.append((delta.kind, text))
        return [self._chunk(index, dict.fromkeys(_FIELDS_OF[kind], text)) for kind, text in chunks]

    def finish(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        """What is left of a choice whose answer has ended."""
        whole = chat.choice(self._asked, answer, self._response_id, index)
        message, chunks = whole["message"], []
        for kind, fields in _FIELDS_OF.items():
            if rest := self._sent[index][kind].rest(message[fields[0]]):
                chunks.append(self._chunk(index, dict.fromkeys(fields, rest)))
        for number, call in enumerate(message.get("tool_calls", ())):
            chunks.append(self._chunk(index, {"tool_calls": [{"index": number, **call}]}))
        last = self._chunk(index, {}, finish_reason=whole["finish_reason"], logprobs=whole["logprobs"])
        return [*chunks, last | {"gptoss": openai_fields.additions(self._asked, [answer])}]

    def end(self, answers: Sequence[Answer], cached_tokens: int) -> list[dict[str, Any]]:
        """The chunk that says what was used, if it is wanted."""
        if not self._with_usage:
            return []
        used = chat.usage_document(self._asked, answers) | cached_document(cached_tokens)
        return [{**self._head, "choices": [], "usage": used}]

    def _chunk(
        self, index: int, delta: Mapping[str, Any], finish_reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice], **({"usage": None} if self._with_usage else {})}


def cached_document(cached_tokens: int) -> dict[str, Any]:
    """What `usage` says of the tokens of the prompt that the prefix cache held."""
    return {"prompt_tokens_details": {"cached_tokens": cached_tokens}}
