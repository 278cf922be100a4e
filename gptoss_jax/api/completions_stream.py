"""OpenAI's /v1/completions as a stream: text in, chunks out, which add up to the whole response.

Log probabilities stand in the last chunk of a choice, which has its `finish_reason`; a prompt that is given back, in
the first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.api import completions, openai_fields
from gptoss_jax.api.asked import Asked
from gptoss_jax.api.chat_stream import cached_document
from gptoss_jax.api.grown_text import GrownText
from gptoss_jax.api.tokens import usage
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.parsed import Delta
from gptoss_jax.harmony.tokenizer import load_tokenizer


class CompletionsStream:
    """The chunks of one response."""

    def __init__(
        self,
        asked: Asked,
        response_id: str,
        model: str,
        *,
        created: int = 0,
        with_usage: bool = False,
        prompt: completions.Prompt | None = None,
    ):
        """`created`, `with_usage`: as for chat; `prompt`: one that is given back in front of each choice."""
        self._asked, self._with_usage, self._prompt = asked, with_usage, prompt
        self._tokenizer = load_tokenizer(asked.vocab_path)
        self._head = {
            "id": f"cmpl-{response_id}",
            "object": "text_completion",
            "created": created,
            "model": asked.echo.get("model", model),
            "system_fingerprint": None,
        }
        self._sent = [GrownText() for _ in range(asked.options.n)]

    def begin(self) -> list[dict[str, Any]]:
        """The prompts that are given back."""
        if self._prompt is None:
            return []
        nothing = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        empty = {"text": "", "logprobs": nothing if self._asked.options.logprobs else None}
        given = completions.echoed(empty, self._prompt, self._tokenizer)
        return [self._chunk(index, given["text"], logprobs=given["logprobs"]) for index in range(self._asked.options.n)]

    def take(self, index: int, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """What came of the choice `index`, while it goes on: the end of an answer may not belong to its text."""
        text = "".join(self._sent[index].feed(delta.message, delta.text) for delta in deltas)
        return [self._chunk(index, text)] if text else []

    def finish(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        """What is left of a choice whose answer has ended."""
        whole = completions.choice(self._asked, answer, index, self._tokenizer)
        rest, logprobs = self._sent[index].rest(whole["text"]), whole["logprobs"]
        if self._prompt is not None and logprobs:
            before = len(self._tokenizer.decode(self._prompt.token_ids))
            logprobs = {**logprobs, "text_offset": [before + offset for offset in logprobs["text_offset"]]}
        last = self._chunk(index, rest, finish_reason=whole["finish_reason"], logprobs=logprobs)
        return [last | {"gptoss": openai_fields.additions(self._asked, [answer])}]

    def end(self, answers: Sequence[Answer], cached_tokens: int) -> list[dict[str, Any]]:
        """The chunk that says what was used, if it is wanted."""
        if not self._with_usage:
            return []
        used = usage(self._asked, answers).document() | cached_document(cached_tokens)
        return [{**self._head, "choices": [], "usage": used}]

    def _chunk(
        self, index: int, text: str, finish_reason: str | None = None, logprobs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice], **({"usage": None} if self._with_usage else {})}
