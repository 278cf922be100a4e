"""/v1/completions: a request and its response; of several prompts, the answers to each in their order.

With `echo` a prompt is given back, with its log probabilities where these are asked for: what evaluations score with.
`max_tokens` may then be 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.api import completions
from gptoss_jax.api.asked import Asked
from gptoss_jax.api.chat_stream import cached_document
from gptoss_jax.api.completions import Prompt
from gptoss_jax.api.completions_stream import CompletionsStream
from gptoss_jax.api.fields import boolean
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.parsed import Delta
from gptoss_jax.server import bodies, events
from gptoss_jax.server.exchange import Model, new_id, now
from gptoss_jax.server.problems import Problem

FIELDS = completions.FIELDS
MOST_PROMPTS = 128


class CompletionsExchange:
    """See `exchange.Exchange`.

    Attributes:
        to_score: prompts whose log probabilities are wanted: ids, and how many of the likeliest beside each.
    """

    def __init__(self, body: Mapping[str, Any], model: Model):
        """Reads a request.

        Raises:
            GptossError, Problem: something that cannot be done as asked.
        """
        model.check_name(body)
        fields = bodies.sort(body, FIELDS)
        acting = dict(fields.acting)
        self._echo = boolean(acting.pop("echo", False), "echo")
        self._draws = not (self._echo and acting.get("max_tokens") == 0)
        if not self._draws:
            acting["max_tokens"] = 1  # for the checks; nothing is drawn
        defaults = model.defaults()
        self._each = [
            completions.ask({**acting, "prompt": prompt}, defaults, model.vocab_path)
            for prompt in _prompts(acting.get("prompt"))
        ]
        self._model, self._id, self._created = model, new_id(), now()
        self.stream, self.headers, self._with_usage = fields.stream, fields.headers, fields.with_usage
        self._prompts: list[Prompt | None] = [Prompt(each.token_ids) if self._echo else None for each in self._each]
        self._chunks: list[CompletionsStream] = []

    @property
    def asked(self) -> Sequence[Asked]:
        """None where prompts are only scored."""
        return self._each if self._draws else []

    @property
    def to_check(self) -> Sequence[Asked]:
        """All of it, that the model must be able to read."""
        return self._each

    @property
    def to_score(self) -> list[tuple[tuple[int, ...], int]]:
        """See the class."""
        if not self._echo or not self._each[0].options.logprobs:
            return []
        return [(each.token_ids, each.options.sampling.top_logprobs) for each in self._each]

    def take_scores(self, prompts: Sequence[Prompt]) -> None:
        """Takes in what `to_score` asked for, before the first event."""
        self._prompts = list(prompts)

    # ---- events ----

    def begin(self) -> Sequence[bytes]:
        """Prompts that are given back."""
        self._chunks = [
            CompletionsStream(
                each,
                self._id,
                self._model.names[0],
                created=self._created,
                with_usage=self._with_usage,
                prompt=prompt,
            )
            for each, prompt in zip(self._each, self._prompts, strict=True)
        ]
        chunks = [chunk for at, each in enumerate(self._chunks) for chunk in self._placed(at, each.begin())]
        return events.data(chunks)

    def take(self, number: int, deltas: Sequence[Delta]) -> Sequence[bytes]:
        """Chunks with what came."""
        at, index = divmod(number, self._n)
        return events.data(self._placed(at, self._chunks[at].take(index, deltas)))

    def finish(self, number: int, deltas: Sequence[Delta], answer: Answer) -> Sequence[bytes]:
        """The last chunk of a choice, which knows all of its text."""
        del deltas
        at, index = divmod(number, self._n)
        return events.data(self._placed(at, self._chunks[at].finish(index, answer)))

    def end(self, answers: Sequence[Answer], cached_tokens: int) -> Sequence[bytes]:
        """The usage, if it is asked for, and the end."""
        if not self._draws:
            ended = [self._scored(at) | {"text": "", "logprobs": None} for at in range(len(self._each))]
            last = [{**self._head("text_completion"), "choices": ended}]
            if self._with_usage:
                last.append({**self._head("text_completion"), "choices": [], "usage": self._used_alone()})
            return [*events.data(last), events.DONE]
        usages = []
        for at, each in enumerate(self._chunks):
            usages += each.end(answers[at * self._n : (at + 1) * self._n], 0)
        if usages:
            usages = [usages[0] | {"usage": _sum([one["usage"] for one in usages]) | cached_document(cached_tokens)}]
        return [*events.data(usages), events.DONE]

    def fail(self, problem: Problem) -> Sequence[bytes]:
        """The error."""
        return events.data([problem.document()])

    # ---- whole ----

    def whole(self, answers: Sequence[Answer], cached_tokens: int) -> dict[str, Any]:
        """The response."""
        name = self._model.names[0]
        if not self._draws:
            scored = [self._scored(at) for at in range(len(self._each))]
            return {**self._head("text_completion"), "choices": scored, "usage": self._used_alone()}
        documents = [
            completions.response(each, answers[at * self._n : (at + 1) * self._n], self._id, name)
            for at, each in enumerate(self._each)
        ]
        shown = []
        for document, prompt in zip(documents, self._prompts, strict=True):
            for choice in document["choices"]:
                given = completions.echoed(choice, prompt, self._model.tokenizer) if prompt else choice
                shown.append({**given, "index": len(shown)})
        answers_kept = [answer for document in documents for answer in document["gptoss"]["answers"]]
        return {
            **documents[0],
            "created": self._created,
            "choices": shown,
            "usage": _sum([document["usage"] for document in documents]) | cached_document(cached_tokens),
            "gptoss": {**documents[0]["gptoss"], "answers": answers_kept},
        }

    @property
    def _n(self) -> int:
        return self._each[0].options.n

    def _head(self, kind: str) -> dict[str, Any]:
        name = self._each[0].echo.get("model", self._model.names[0])
        head = {"id": f"cmpl-{self._id}", "object": kind, "created": self._created, "model": name}
        return {**head, "system_fingerprint": None}

    def _used_alone(self) -> dict[str, int]:
        """Of prompts after which nothing is drawn."""
        tokens = sum(len(each.token_ids) for each in self._each)
        return {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}

    def _scored(self, at: int) -> dict[str, Any]:
        """The choice of a prompt after which nothing is drawn."""
        nothing = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        logprobs = nothing if self._each[at].options.logprobs else None
        empty = {"index": at, "text": "", "logprobs": logprobs, "finish_reason": "length"}
        prompt = self._prompts[at]
        return completions.echoed(empty, prompt, self._model.tokenizer) if prompt else empty

    def _placed(self, at: int, chunks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Chunks of the prompt `at`, with their choice's index among all."""
        placed = []
        for chunk in chunks:
            numbered = [{**choice, "index": at * self._n + choice["index"]} for choice in chunk["choices"]]
            placed.append({**chunk, "choices": numbered})
        return placed


def _prompts(prompt: object) -> list[object]:
    """The prompts of a request, each a text or a list of ids.

    Raises:
        GptossError: none, or more than anybody may send at once.
    """
    if not isinstance(prompt, list) or not any(isinstance(part, str | list) for part in prompt):
        return [prompt]
    if len(prompt) > MOST_PROMPTS:
        raise GptossError(f"prompt holds {len(prompt)} prompts, expected at most {MOST_PROMPTS}")
    return prompt


def _sum(usages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {name: sum(usage[name] for usage in usages) for name in names}
