"""The work of a job: rows to be answered, in an order that suits the engine, and finished lines, as they come."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gptoss_jax.api.asked import Asked, Options
from gptoss_jax.api.tool_turn import ToolTurn
from gptoss_jax.engine.request import EngineConfig, Request, RequestError
from gptoss_jax.errors import GptossError
from gptoss_jax.grammar.compiled import held_form
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.jobs.inputs import Inputs, Line
from gptoss_jax.jobs.rows import TOOLS_FAILED, Row, RowReader
from gptoss_jax.jobs.survey import Survey
from gptoss_jax.jobs.tool_rows import MOST_WORKING, Again, AtTools, RowTools
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.runtime.answers import Sample, as_they_end
from gptoss_jax.tools.choice import Wanted

if TYPE_CHECKING:
    import gptoss_jax.engine.engine

WINDOW_ROWS = 1024  # rows that are put in order at a time, and held in memory
PREFIX_TOKENS = 128  # prompts that share so many tokens are answered one after another
LINES_AT_ONCE = 256
_NO_MORE: Any = object()


class Task(NamedTuple):
    """A row to be answered.

    Attributes:
        row: it.
        asked: what it asks; None: it is refused, and `row.fault` says why.
        wanted: its tools that are run here; None: none.
    """

    row: Row
    asked: Asked | None
    wanted: Wanted | None = None


@dataclass(frozen=True)
class Reading:
    """How a row is read.

    Attributes:
        defaults: what acts where a row says nothing; its seed is the job's.
        config: the model that answers.
        engine_config: prompts and answers have to fit it.
        vocab_path: as for `harmony.render`.
        tools: those that are run here; None: none.
    """

    defaults: Options
    config: ModelConfig
    engine_config: EngineConfig
    vocab_path: str | None = None
    tools: RowTools | None = None

    def check_defaults(self) -> None:
        """Raises GptossError for defaults under which no row can be answered, however short."""
        options = dataclasses.replace(self.defaults, max_new_tokens=1)
        form = held_form(options.settings, vocab_path=self.vocab_path)
        Asked((0,), options, {}, form=form).request(self.config.stop_ids).check(self.config, self.engine_config)

    def task(self, row: Row) -> Task:
        """What a row asks, checked against the model."""
        if row.fault:
            return Task(row, None)
        try:
            asked, wanted = self._ask(row)
            asked.request(self.config.stop_ids).check(self.config, self.engine_config)
        except GptossError as error:
            return Task(row.refused(str(error)), None)
        return Task(row, asked, wanted)

    def _ask(self, row: Row) -> tuple[Asked, Wanted | None]:
        if self.tools is None:
            return row.ask(self.defaults, self.vocab_path), None
        return self.tools.ask(row, self.defaults, self.vocab_path)

    def fault_of(self, row: Row) -> str:
        """Why a row cannot be answered; "" if it can."""
        return self.task(row).row.fault

    def tasks(self, inputs: Inputs, survey: Survey, wanted: np.ndarray) -> Iterator[Task]:
        """The second pass: the rows that are wanted, bool [N], in the order in which they are best answered.

        Raises:
            GptossError: the input has changed since the survey.
        """
        rows = self._tasks(inputs, survey, wanted)
        while window := list(itertools.islice(rows, WINDOW_ROWS)):
            yield from in_order(window)

    def _tasks(self, inputs: Inputs, survey: Survey, wanted: np.ndarray) -> Iterator[Task]:
        reader = RowReader(survey.forms)
        for ordinal, line in wanted_lines(inputs, survey, wanted):
            yield self.task(survey.checked(reader.read(ordinal, line)))


def wanted_lines(inputs: Inputs, survey: Survey, wanted: np.ndarray) -> Iterator[tuple[int, Line]]:
    """The lines of the rows that are wanted, bool [N], and their ordinals.

    Raises:
        GptossError: the input has changed since the survey.
    """
    count = 0
    for ordinal, line in enumerate(inputs.lines()):
        count += 1
        if not survey.places.has(ordinal, line):
            raise GptossError(f"{line.file}:{line.number} has changed while the job ran, expected what it began with")
        if wanted[ordinal]:
            yield ordinal, line
    if count != survey.num_rows:
        raise GptossError(f"the input had {survey.num_rows:,} rows when the job began, and {count:,} now")


def in_order(tasks: Sequence[Task]) -> list[Task]:
    """Prompts that begin alike next to each other, so that their beginning is read once; the longest work first.

    What takes long is begun early, lest it run alone at the end.
    """

    def beginning(task: Task) -> tuple[int, ...]:
        return task.asked.token_ids[:PREFIX_TOKENS] if task.asked else ()

    def work(task: Task) -> int:
        return 0 if task.asked is None else len(task.asked.token_ids) + (task.asked.options.max_new_tokens or 0)

    longest: dict[tuple[int, ...], int] = {}
    for task in tasks:
        longest[beginning(task)] = max(longest.get(beginning(task), 0), work(task))
    return sorted(tasks, key=lambda task: (-longest[beginning(task)], beginning(task), -work(task), task.row.ordinal))


@dataclass
class _Open:
    """A row whose answers are under way."""

    row: Row
    asked: Asked
    has_tools: bool = False
    answers: dict[int, Answer] = field(default_factory=dict)


class Worker:
    """Answers tasks with one engine.

    Attributes:
        engine: runs them.
    """

    def __init__(
        self,
        engine: "gptoss_jax.engine.engine.Engine",
        tokenizer: Tokenizer,
        model_name: str,
        put: Callable[[Sequence[bytes]], None],
        tools: RowTools | None = None,
    ):
        """A worker.

        Args:
            engine: runs tasks.
            tokenizer: the vocabulary.
            model_name: stands in responses.
            put: takes finished lines, which count once it returns.
            tools: those of tasks that want some.
        """
        self.engine, self._tokenizer, self._model_name, self._put = engine, tokenizer, model_name, put
        self._ready: list[bytes] = []  # lines that no answer is waited for
        self._open: dict[int, tuple[_Open, int]] = {}  # by number of the request
        self._numbers = itertools.count()
        self._at_tools = None if tools is None else AtTools(tools, tokenizer, engine.config, engine.engine_config)
        self._open_of: dict[int, _Open] = {}  # by ordinal: rows whose tools may work

    def run(self, tasks: Iterable[Task | None], interrupted: Callable[[], bool]) -> bool:
        """Answers them all, or until interrupted: what was under way then has no line.

        None among the tasks: there are no more as yet; the next one is asked for once the engine has done a dispatch.

        Returns:
            Whether they are all answered.

        Raises:
            OSError: a line cannot be put.
            GptossError: as `tasks` raises it.
        """
        was_interrupted = False

        def stops() -> bool:
            nonlocal was_interrupted
            was_interrupted = interrupted()
            return was_interrupted

        try:
            for ended in as_they_end(self.engine, self._requests(tasks), interrupted=stops):
                self._put_lines([*filter(None, itertools.starmap(self._line, ended))])
            self._put_lines([])
        finally:
            if self._at_tools is not None:
                self._at_tools.close()
        return not was_interrupted

    def _requests(self, tasks: Iterable[Task | None]) -> Iterator[tuple[Request, AnswerStream] | None]:
        """What the engine is asked: rows whose tools are done go before new ones."""
        at_tools = self._at_tools
        if at_tools is None:
            yield from self._new_requests(tasks)
            return
        coming, has_more = self._new_requests(tasks), True
        while has_more or self._open_of:
            rests = not has_more or at_tools.num_working >= MOST_WORKING
            for again in at_tools.again(waits=rests and self.engine.is_idle):
                yield from self._asked_again(at_tools, again)
            if rests:
                self._put_lines([])
                yield None
                continue
            pair = next(coming, _NO_MORE)
            has_more = pair is not _NO_MORE
            if has_more:
                yield pair

    def _new_requests(self, tasks: Iterable[Task | None]) -> Iterator[tuple[Request, AnswerStream] | None]:
        for task in tasks:
            if task is None:
                self._put_lines([])
                yield None
                continue
            row, asked, wanted = self._checked(task)
            if asked is None:
                self._ready.append(row.error_line())
                if len(self._ready) >= LINES_AT_ONCE:
                    self._put_lines([])
                    yield None  # an interruption is heard
                continue
            opened = _Open(row, asked, wanted is not None)
            if wanted is not None and self._at_tools is not None:
                self._at_tools.begin(row.ordinal, asked, wanted, row.response_id)
                self._open_of[row.ordinal] = opened
            pairs = zip(*asked.requests(self._tokenizer, self.engine.config.stop_ids), strict=True)
            for place, pair in enumerate(pairs):
                self._open[next(self._numbers)] = opened, place
                yield pair

    def _asked_again(self, at_tools: AtTools, again: Again) -> Iterator[tuple[Request, AnswerStream]]:
        """The next round of a row, or its line where there is none."""
        opened = self._open_of[again.key]
        if again.asked is not None:
            try:
                self.engine.check(again.asked[0])
            except RequestError:
                at_tools.does_not_fit(again.key)
            else:
                self._open[next(self._numbers)] = opened, 0
                yield again.asked
                return
        turn = self._ended(at_tools, again.key)
        if again.fault:
            self._ready.append(opened.row.error_line(TOOLS_FAILED, again.fault))
        else:
            self._ready.append(opened.row.answered_turn(turn, self._model_name))

    def _ended(self, at_tools: AtTools, ordinal: int) -> ToolTurn:
        del self._open_of[ordinal]
        return at_tools.end(ordinal)

    def _checked(self, task: Task) -> Task:
        """The task, refused where the engine's memory, which is known only now, can never hold it."""
        if task.asked is None:
            return task
        try:
            self.engine.check(task.asked.request(()))
        except RequestError as error:
            return Task(task.row.refused(str(error)), None)
        return task

    def _line(self, number: int, sample: Sample) -> bytes | None:
        """The line of a row, once the last of its answers is there."""
        opened, place = self._open.pop(number)
        answer, row = sample.answer, opened.row
        if answer.finish_reason == "cancelled":
            return None
        if opened.has_tools and self._at_tools is not None:
            if self._at_tools.take(row.ordinal, answer):
                return None
            return row.answered_turn(self._ended(self._at_tools, row.ordinal), self._model_name)
        opened.answers[place] = answer
        if len(opened.answers) < opened.asked.options.n:
            return None
        answers = [opened.answers[place] for place in sorted(opened.answers)]
        return row.answered(opened.asked, answers, self._model_name)

    def _put_lines(self, lines: list[bytes]) -> None:
        if lines or self._ready:
            lines, self._ready = [*self._ready, *lines], []
            self._put(lines)
