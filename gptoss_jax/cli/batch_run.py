"""One run of a batch job: what is left of it is answered, here, with other hosts, or on Ray."""

import dataclasses
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from gptoss_jax.api import overrides
from gptoss_jax.checkpoints.identity import identity
from gptoss_jax.cli import command, hosts, interrupts, model_flags, profiling, ray_job, sampling_flags, tool_flags
from gptoss_jax.cli.batch_merge import check_finished, input_document, merge
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.jobs import outputs, summary
from gptoss_jax.jobs import record as records
from gptoss_jax.jobs.inputs import Inputs
from gptoss_jax.jobs.record import Record
from gptoss_jax.jobs.store import Layout, Store, take_over
from gptoss_jax.jobs.summary import Pace, Tally
from gptoss_jax.jobs.survey import Survey
from gptoss_jax.jobs.work import Reading, Worker

if TYPE_CHECKING:
    import gptoss_jax.engine.engine
    import gptoss_jax.runtime.language_model

_WITHOUT_OTHERS = "all"  # the part of a job that no shard shares
_NOT_FOR_ANSWERS = ("checkpoint", "compilation_cache", *hosts.HOST_FLAGS)  # a hash says what the first one names


@dataclasses.dataclass(frozen=True)
class Shard:
    """Every `count`-th row from row `index` on."""

    index: int
    count: int

    @property
    def name(self) -> str:
        """Its journal's."""
        return f"shard-{self.index}-of-{self.count}"


class JobRun:
    """One run of a job."""

    def __init__(
        self,
        screen: Screen,
        options: flags.FlagValues,
        inputs: Inputs,
        layout: Layout,
        found: Survey,
        reading: Reading,
        shard: Shard | None,
    ):
        self._screen, self._options, self._inputs, self._layout = screen, options, inputs, layout
        self._found, self._reading, self._shard = found, reading, shard
        self._weights = identity(Path(options.checkpoint), Path(options.adapter) if options.adapter else None)
        self._tally = Tally()
        self._run: dict[str, Any] | None = None  # how fast this one was

    @property
    def _model_name(self) -> str:
        return f"gpt-oss {self._weights[:12]}"

    def run(self) -> int:
        """Does what is left, over several hosts with all of them; gives the exit code."""
        if self._options.coordinator is None:
            return self._lead(lambda wanted: None)
        hosts.check_same("the input", self._found.digest)
        return self._lead_others() if hosts.is_first() else self._follow()

    def _lead_others(self) -> int:
        """As `_lead`; whatever becomes of it, the others hear what to do."""
        message = np.zeros(self._found.num_rows + 1, np.bool_)  # the rows to answer, and whether the job goes on
        has_sent = False

        def send(wanted: np.ndarray, *, goes_on: bool = True) -> None:
            nonlocal has_sent
            message[:-1], message[-1], has_sent = wanted, goes_on, True
            hosts.of_first(message)

        try:
            code = self._lead(send)
        except BaseException:
            if not has_sent:
                send(message[:-1], goes_on=False)
            raise
        if not has_sent:
            send(message[:-1])
        return code

    def _follow(self) -> int:
        """Answers what the first process answers, which alone keeps the lines."""
        message = hosts.of_first(np.zeros(self._found.num_rows + 1, np.bool_))
        if not message[-1]:
            return command.EXIT_CODE
        return self._answer(lambda lines: None, message[:-1]) if message[:-1].any() else 0

    def _lead(self, send: Callable[[np.ndarray], None]) -> int:
        layout, record = self._layout, self._record()
        if layout.is_finished and not self._options.restart:
            if existing := records.read(layout.record):
                existing.check_same(record, layout.record)
            return check_finished(self._screen, layout, self._found)
        part = self._part(record)
        if self._options.ray and part is not None and not self._options.restart:
            take_over(layout, part, record)
        with Store(layout, part, record, restart=self._options.restart) as store:
            done = store.done(self._found, self._tally.add)
            wanted = ~done & self._is_mine()
            self._say_what_is_there(done)
            send(wanted)
            code = self._answer_all(store, wanted) if wanted.any() else 0
            if part is not None:  # its lines are counted when they are joined, while no other process may write them
                if self._shard and not code:
                    self._screen.note("this shard is done; when all are, --merge makes OUT of them")
                return code if code or self._shard else merge(self._screen, layout, self._found, self._run)
        if self._run is None and summary.is_complete(layout):
            self._screen.note(f"nothing is left to do: {layout.out} has all {self._found.num_rows:,} rows")
            return code
        summary.write(layout, record, self._tally, self._found.num_rows, self._run)
        self._screen.note(f"{self._tally.line()}; {layout.summary} has it all")
        return code

    def _record(self) -> Record:
        options, defaults, found = self._options, self._reading.defaults, self._found
        settings = overrides.settings_document(vars(defaults.settings)) | overrides.options_document(defaults)
        model = {name: options[name].value for name in model_flags.MODEL_FLAGS if name not in _NOT_FOR_ANSWERS}
        engine = {name: options[name].value for name in sampling_flags.ENGINE_FLAGS}
        return Record(
            input=input_document(found),
            model={"weights": self._weights, **model},
            settings={**settings, **engine, **self._tools_document()},
            output={"appended": self._is_appended()},
        )

    def _tools_document(self) -> dict[str, Any]:
        """Which tools are run here, and what they declare; nothing, where there are none."""
        if (tools := self._reading.tools) is None:
            return {}
        given = {name: self._options[name].value for name in tool_flags.TOOL_FLAGS}
        functions = tools.offer.declared(tools.offer.all).functions
        return {**given, "functions": [function.model_dump(mode="json") for function in functions]}

    def _is_appended(self) -> bool:
        """Whether finished lines are appended to OUT itself: not if an earlier run of the job has written parts."""
        options, layout = self._options, self._layout
        if options.keep_order or options.ray or self._shard or not outputs.can_append(layout.out):
            return False
        existing = None if options.restart else records.read(layout.record)
        return existing is None or existing.output.get("appended") is not False

    def _part(self, record: Record) -> str | None:
        if record.output["appended"]:
            return None
        return self._shard.name if self._shard else _WITHOUT_OTHERS

    def _is_mine(self) -> np.ndarray:
        """Rows of this shard, bool [N]."""
        shard = self._shard or Shard(0, 1)
        return np.arange(self._found.num_rows) % shard.count == shard.index

    def _say_what_is_there(self, done: np.ndarray) -> None:
        if done.any():
            self._screen.note(f"going on: {int(done.sum()):,} of {len(done):,} rows are done")

    def _answer_all(self, store: Store, wanted: np.ndarray) -> int:
        return self._answer_on_ray(wanted) if self._options.ray else self._answer(store.append, wanted)

    def _answer(self, keep: Callable[[Sequence[bytes]], None], wanted: np.ndarray) -> int:
        """Answers the rows that are wanted; `keep` puts their lines on the disk."""
        options, screen = self._options, self._screen
        language_model, engine = model_flags.load_for_answers(options, screen, self._reading.engine_config)
        pace = Pace(self._tally, self._tally.rows + int(wanted.sum()))
        failed: list[OSError] = []
        with screen.status() as show, interrupts.noted_with_sigterm() as signalled:

            def put(lines: Sequence[bytes]) -> None:
                try:
                    if not failed:
                        keep(lines)
                except OSError as error:  # raised when all hosts have stopped: the others would wait for this one
                    failed.append(error)
                if failed:
                    return
                for line in lines:
                    self._tally.add(json.loads(line))
                show(pace.line())

            tools = self._reading.tools
            worker = Worker(engine, load_tokenizer(options.vocab), self._model_name, put, tools)
            stopped = hosts.agreed(lambda: bool(signalled() or failed))
            with profiling.traced(options, screen):
                is_done = worker.run(self._reading.tasks(self._inputs, self._found, wanted), stopped)
            number = 0 if is_done else signalled() or signal.SIGINT  # another host's
            pace.end()
        if failed:
            raise failed[0]
        self._run = {**pace.document(), **_share_of_limit(language_model, engine, pace)}
        return self._ended(pace, number)

    def _ended(self, pace: Pace, number: int) -> int:
        """The exit code of a run that a signal of this number has ended; 0: none has."""
        self._screen.note(pace.line())
        if number:
            self._screen.say("interrupted: the same command goes on")
        return 128 + number if number else 0

    def _answer_on_ray(self, wanted: np.ndarray) -> int:
        """As `_answer`, by workers that keep the lines in parts of their own."""
        job = ray_job.job(self._options, self._inputs, self._layout, self._found, self._reading, self._model_name)
        pace = Pace(self._tally, self._tally.rows + int(wanted.sum()))
        workers, number = ray_job.answer(self._options, self._screen, job, wanted, pace)
        self._run = {**pace.document(), "workers": workers}
        return self._ended(pace, number)


def _share_of_limit(
    language_model: "gptoss_jax.runtime.language_model.LanguageModel",
    engine: "gptoss_jax.engine.engine.Engine",
    pace: Pace,
) -> dict[str, Any]:
    """What the run was beside what the devices' memories allow: the bytes that its decoding steps have to read, per
    second of the whole run, the reading of prompts included, over the measured bandwidth.
    """
    done = engine.statistics
    document: dict[str, Any] = {
        "prefix_cache_hit_rate": round(done.hit_rate, 4),
        "preemptions": done.preemptions,
        "decode_steps": done.decode_steps,
    }
    if not (done.decode_steps and pace.new_answers):
        return document
    active = (pace.new_answer_tokens - pace.new_answers) / done.decode_steps  # an answer's first token needs no step
    # On the average half an answer is there; several of them may share a prompt, which is counted once a row.
    context = pace.new_prompt_tokens // pace.new_rows + pace.new_answer_tokens // (2 * pace.new_answers)
    bytes_per_second = done.decode_steps * language_model.decode_bytes(max(1, round(active)), context) / pace.seconds
    bandwidth = language_model.read_bandwidth(at_least=bytes_per_second)
    return document | {
        "mean_active_slots": round(active, 2),
        "read_bandwidth_gb_per_second": round(bandwidth / 1e9, 2),
        "share_of_bandwidth_limit": round(bytes_per_second / bandwidth, 4),
    }
