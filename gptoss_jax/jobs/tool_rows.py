"""Rows whose calls are carried out here: in threads, so that no other row waits, and then they are asked again."""

import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gptoss_jax.api import forms, hosted_tools
from gptoss_jax.api.asked import Asked, Options, TurnForm
from gptoss_jax.api.tool_turn import ToolTurn
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.jobs.rows import Row
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.tools import rounds
from gptoss_jax.tools.choice import Offer, Wanted
from gptoss_jax.tools.rounds import Call
from gptoss_jax.tools.tool import MOST_ROUNDS
from gptoss_jax.tools.toolbox import Toolbox

MOST_CALLS_AT_ONCE = 32  # of all rows; more wait
MOST_WORKING = 64  # rows whose tools work; while there are as many, no new row begins
_PATIENCE_SECONDS = 0.05  # that an engine without work waits for a tool before it hears of an interruption


@dataclass(frozen=True)
class RowTools:
    """The tools that a job has switched on.

    Attributes:
        offer: makes them.
        most_rounds: how often a row's calls are carried out.
    """

    offer: Offer
    most_rounds: int = MOST_ROUNDS

    def ask(self, row: Row, defaults: Options, vocab_path: str | None) -> tuple[Asked, Wanted | None]:
        """What a row asks, and the tools that it has.

        A row of /v1/responses has those that it asks for, as a server's clients do; any other conversation has all; a
        prompt of ids or plain text has none.

        Raises:
            GptossError: something that cannot be.
        """
        body = dict(row.body)
        wanted = self._wanted(row, body)
        if wanted is None:
            return dataclasses.replace(row, body=body).ask(defaults, vocab_path), None
        declaring = dataclasses.replace(defaults, toolbox=self.offer.declared(wanted))
        asked = dataclasses.replace(row, body=body).ask(declaring, vocab_path)
        if asked.options.n > 1:
            raise GptossError(f"n is {asked.options.n}, expected 1 for a row whose tools are run here")
        if row.api is forms.RESPONSES:
            asked = dataclasses.replace(asked, echo={**asked.echo, "tools": row.body["tools"]})
        return asked, wanted

    def _wanted(self, row: Row, body: dict[str, object]) -> Wanted | None:
        """The tools that a row has; those that it names itself are taken out of its request."""
        if row.api is forms.RESPONSES:
            return hosted_tools.wanted(body, self.offer)
        if not isinstance(row.api, TurnForm) or "token_ids" in body or body.get("tool_choice") == "none":
            return None
        return self.offer.all


class Again(NamedTuple):
    """A row that goes on: what the engine is asked next, or None: its rounds have ended; or why it cannot go on."""

    key: int
    asked: tuple[Request, AnswerStream] | None
    fault: str = ""


@dataclass
class _Working:
    """A row with tools of its own, from its first call on."""

    turn: ToolTurn
    wanted: Wanted
    toolbox: Toolbox | None = None


@dataclass
class AtTools:
    """Rows that have tools: their rounds, and what becomes of their calls.

    Attributes:
        tools: those of the job.
        tokenizer: the vocabulary.
        config: the model that answers.
        engine_config: a conversation that is longer than its context has no further round.
        num_working: rows whose calls are being carried out, or that have not been asked again since.
    """

    tools: RowTools
    tokenizer: Tokenizer
    config: ModelConfig
    engine_config: EngineConfig
    num_working: int = 0
    _rows: dict[int, _Working] = field(default_factory=dict)
    _done: "queue.SimpleQueue[Again]" = field(default_factory=queue.SimpleQueue)
    _at_once: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(MOST_CALLS_AT_ONCE))
    _is_closed: bool = False

    def begin(self, key: int, asked: Asked, wanted: Wanted, response_id: str) -> None:
        """A row, under a number of its own, before its first answer."""
        declared = self.tools.offer.declared(wanted)
        turn = ToolTurn(asked, declared, response_id, self.tools.most_rounds)
        self._rows[key] = _Working(turn, wanted)

    def take(self, key: int, answer: Answer) -> bool:
        """Adds a row's answer; whether calls are carried out now. If not, its rounds have ended."""
        row = self._rows[key]
        calls = row.turn.rounds.take(answer)
        if calls:
            self.num_working += 1
            # A daemon: a tool that hangs must not keep the process from ending.
            threading.Thread(target=self._work, args=(key, row, calls), name="tools", daemon=True).start()
        return bool(calls)

    def again(self, *, waits: bool) -> Iterator[Again]:
        """The rows whose calls are done; `waits`: for a while, where there are none yet."""
        while True:
            try:
                found = self._done.get(block=waits, timeout=_PATIENCE_SECONDS)
            except queue.Empty:
                return
            waits = False
            self.num_working -= 1
            yield found

    def does_not_fit(self, key: int) -> None:
        """What a row would go on with is longer than the engine's memory."""
        self._rows[key].turn.rounds.does_not_fit()

    def end(self, key: int) -> ToolTurn:
        """The rounds of a row, which has no more; its tools are stopped."""
        row = self._rows.pop(key)
        if row.toolbox is not None:
            row.toolbox.close()
        return row.turn

    def close(self) -> None:
        """Stops the tools of all rows, whatever they are doing."""
        self._is_closed = True
        for key in list(self._rows):
            self.end(key)

    # ---- in a thread of the row's own ----

    def _work(self, key: int, row: _Working, calls: Sequence[Call]) -> None:
        try:
            with self._at_once:
                self._carry_out(row, calls)
            self._done.put(Again(key, self._next(row.turn)))
        except Exception as error:  # ends this row, and no other
            said = str(error) if isinstance(error, GptossError) else f"{type(error).__name__}: {error}"
            self._done.put(Again(key, None, f"its tools cannot go on: {said}"))

    def _carry_out(self, row: _Working, calls: Sequence[Call]) -> None:
        if row.toolbox is None and not self._is_closed:
            row.toolbox = self.tools.offer.open(*row.wanted)
            row.toolbox.most_calls = row.turn.asked.most_calls
        if row.toolbox is not None:
            row.turn.rounds.put([rounds.called_now(row.toolbox, call) for call in calls])

    def _next(self, turn: ToolTurn) -> tuple[Request, AnswerStream] | None:
        if turn.rounds.ended is not None:
            return None
        stream = AnswerStream(self.tokenizer, stop_strings=turn.asked.options.stop)
        request = turn.next_request(self.config.stop_ids, stream, self.engine_config.max_context_tokens)
        return None if request is None else (request, stream)
