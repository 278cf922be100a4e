"""A request whose calls are carried out here: the rounds of its answers, and what the engine is asked for each."""

import dataclasses
from collections.abc import Mapping, Sequence

from gptoss_jax.api.asked import Asked
from gptoss_jax.engine.request import Request
from gptoss_jax.grammar.compiled import held_form
from gptoss_jax.harmony import render
from gptoss_jax.harmony.answer import AnswerStream
from gptoss_jax.tools.rounds import Rounds
from gptoss_jax.tools.toolbox import Toolbox, declared


class ToolTurn:
    """The rounds of one request.

    Attributes:
        asked: the request.
        response_id: the response's own part of its id.
        rounds: where they stand.
        prompt_tokens: of all rounds so far.
        servers: function -> the MCP server that it is of.
    """

    def __init__(self, asked: Asked, toolbox: Toolbox, response_id: str, most_rounds: int):
        """`toolbox` says which calls are answered here; who carries them out is the caller's to say."""
        self.asked, self.response_id, self._toolbox = asked, response_id, toolbox
        self._declared = declared(asked.conversation)
        self.rounds = Rounds(
            asked.conversation,
            toolbox,
            self._declared,
            most_rounds=most_rounds,
            most_tokens=asked.options.max_new_tokens,
        )
        self.prompt_tokens = len(asked.token_ids)
        self.servers: Mapping[str, str] = {
            function.name: getattr(tool, "name", "") for tool in toolbox.tools for function in tool.functions
        }
        # A call may be asked for once, not for ever.
        vocab = asked.vocab_path
        self._later = asked
        if asked.form is not None:
            self._later = dataclasses.replace(asked, form=held_form(asked.options.settings, vocab_path=vocab))

    def asked_in(self, round: int) -> Asked:
        """The request as the answer of this round is held to it."""
        return self._later if round else self.asked

    def answer_id(self, round: int) -> str:
        """From which the items of a round's answer have their ids."""
        return f"{self.response_id}/{round}" if round else self.response_id

    def is_ours(self, recipient: str) -> bool:
        """Whether calls to `recipient` are no client's to answer."""
        return self._toolbox.takes(recipient) or recipient not in self._declared

    def next_request(
        self, model_stop_ids: Sequence[int], stream: AnswerStream, max_context_tokens: int
    ) -> Request | None:
        """What the engine is asked next; None: the conversation no longer fits its context."""
        ids = tuple(render.render(self.rounds.messages, None, vocab_path=self.asked.vocab_path))
        room, left = max_context_tokens - len(ids), self.rounds.tokens_left
        if room < 1:
            self.rounds.does_not_fit()
            return None
        self.prompt_tokens += len(ids)
        return dataclasses.replace(
            self._later.request(model_stop_ids),
            token_ids=ids,
            max_new_tokens=None if left is None else min(left, room),
            ends_at=stream.ends_at,
        )
