"""A batch job: from the flags to a line for each row, what people hear of it on the way, and the exit code."""

import dataclasses
import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from gptoss_jax.api import overrides
from gptoss_jax.api.asked import Options
from gptoss_jax.checkpoints.identity import identity
from gptoss_jax.cli import command, hosts, interrupts, model_flags, prompts, ray_job, sampling_flags
from gptoss_jax.cli.flag_values import token_ids
from gptoss_jax.cli.mistakes import spelled
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.errors import GptossError, listed
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.jobs import outputs, places, summary
from gptoss_jax.jobs import record as records
from gptoss_jax.jobs.inputs import Inputs
from gptoss_jax.jobs.record import Record
from gptoss_jax.jobs.rows import FORM_NAMES, Row
from gptoss_jax.jobs.store import Layout, Merged, Store, done_rows, remove_parts, take_over
from gptoss_jax.jobs.summary import Pace, Tally
from gptoss_jax.jobs.survey import Survey, survey
from gptoss_jax.jobs.work import Reading, Worker

if TYPE_CHECKING:
    import gptoss_jax.engine.engine
    import gptoss_jax.runtime.language_model

_WITHOUT_OTHERS = "all"  # the part of a job that no shard shares
_NOT_FOR_ANSWERS = ("checkpoint", "compilation_cache", *hosts.HOST_FLAGS)  # a hash says what the first one names
MAX_SHARDS = 100_000


@dataclasses.dataclass(frozen=True)
class Shard:
    """Every `count`-th row from row `index` on."""

    index: int
    count: int

    @property
    def name(self) -> str:
        """Its journal's."""
        return f"shard-{self.index}-of-{self.count}"


def run(options: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Does the job that the flags describe, or what is left of it.

    Args:
        options: all flags of `gptoss_jax.batch`.
        arguments: files; the last is the output.

    Returns:
        The exit code.

    Raises:
        GptossError: flags, files, rows or weights that are not what they should be.
        OSError: what is on a disk is there, and no more fits.
    """
    screen = Screen(quiet=options.quiet)
    if options.ray:
        ray_job.check(options)  # here, so that what is missing is said before all rows are read
    names, out = _names(options, arguments)
    shard = _shard(options)
    if options.merge and out is not None:
        inputs = Inputs(names)
        return _merge(screen, _layout(options, out, inputs), _survey(screen, inputs, lambda row: row.fault))
    defaults, remarks = _defaults(options)
    config = model_flags.config(options)
    reading = Reading(defaults, config, _engine_config(options), options.vocab)
    inputs = Inputs(names)
    if options.ray:
        inputs.check_others_can_read()
    layout = None if out is None else _layout(options, out, inputs)
    hosts.join(options, screen)  # from here on the first process alone speaks
    for remark in remarks:
        screen.say(remark)
    found = _survey(screen, inputs, reading.fault_of)
    _report(screen, options, found)
    if options.validate or layout is None:
        return command.EXIT_CODE if found.num_faults else 0
    return _Job(screen, options, inputs, layout, found, reading, shard).run()


# ---- what the flags say ----


def _names(options: flags.FlagValues, arguments: Sequence[str]) -> tuple[list[str], str | None]:
    if options.validate and len(arguments) == 1:
        return list(arguments), None
    if len(arguments) < 2:
        raise GptossError(f"{len(arguments)} file names, expected IN and OUT: python -m gptoss_jax.batch IN OUT")
    return list(arguments[:-1]), arguments[-1]


def _layout(options: flags.FlagValues, out: str, inputs: Inputs) -> Layout:
    outputs.check(out, inputs)
    place = places.find(out)
    if place.store and not options.state:
        raise GptossError(f"{out} is in a store: --state names a path here for the files that a job goes on from")
    if not place.store and os.path.exists(place.path) and not os.path.isfile(place.path):
        raise GptossError(f"{out} is no file, expected one that a job can go on from")
    return Layout(out if place.store else place.path, options.state or os.path.realpath(place.path))


def _shard(options: flags.FlagValues) -> Shard | None:
    if options.shard is None:
        return None
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", options.shard)
    if not found or not int(found[1]) < int(found[2]) <= MAX_SHARDS:
        raise GptossError(f"--shard is {options.shard!r}, expected I/N such as 0/8, I from 0 to N - 1")
    return Shard(int(found[1]), int(found[2]))


def _defaults(options: flags.FlagValues) -> tuple[Options, list[str]]:
    """What acts where a row says nothing, and remarks on the files that say it."""
    date, remarks = options.date, list[str]()
    if date and date.lower() == "today":
        raise GptossError("--date is today, which is another day tomorrow: expected YYYY-MM-DD or none")
    settings = prompts.settings(options, None if date is None or date.lower() == "none" else date, remarks)
    sampling = sampling_flags.sampling(options)
    given = {
        "max_new_tokens": options.max_new_tokens,
        "stop": tuple(options.stop),
        "stop_ids": token_ids("stop_ids", options.stop_ids),
        "n": options.n,
        "logprobs": options.logprobs or sampling.top_logprobs > 0,
    }
    for name, least in (("n", 1), ("max_new_tokens", 1)):
        if given[name] is not None and given[name] < least:
            raise GptossError(f"{spelled(name)} is {given[name]}, expected at least {least}")
    return Options(settings, sampling, **given), remarks


def _engine_config(options: flags.FlagValues) -> Any:
    if options.slots < 1:
        raise GptossError(f"--slots is {options.slots}, expected at least 1")
    return sampling_flags.engine_config(options, options.slots, pool_tokens=options.pool_tokens)


# ---- what the rows are ----


def _survey(screen: Screen, inputs: Inputs, fault_of: Callable[[Row], str]) -> Survey:
    with screen.status() as show:
        count = 0

        def noting(row: Row) -> str:
            nonlocal count
            count += 1
            if count % 1000 == 0:
                show(f"checking rows: {count:,}")
            return fault_of(row)

        return survey(inputs, noting)


def _report(screen: Screen, options: flags.FlagValues, found: Survey) -> None:
    """Says what was found.

    Raises:
        GptossError: there are no rows, or bad ones and --on-bad-row=stop.
    """
    for file, rows in found.places.rows_of_files().items():
        screen.note(f"{file}: {rows:,} row{'s' * (rows != 1)} in {FORM_NAMES[found.forms.get(file, 'plain')]}")
    if found.blank_lines:
        screen.note(f"{found.blank_lines:,} blank line{'s' * (found.blank_lines != 1)} left out")
    if not found.num_rows:
        raise GptossError("the input has no rows, expected at least one")
    if not found.num_faults:
        return
    faults = listed(found.faults)
    count = f"{found.num_faults:,} bad row{'s' * (found.num_faults != 1)}"
    if options.on_bad_row == "stop" and not options.validate:
        raise GptossError(f"{faults}\n{count}: nothing was done (--on-bad-row=error gives each a line with its error)")
    for line in faults.split("\n"):
        screen.say(line)
    screen.say(count if options.validate else f"{count} of {found.num_rows:,}: each gets a line with its error")


# ---- the job ----


class _Job:
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
        self._weights = identity(Path(options.checkpoint))
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
        told = np.zeros(self._found.num_rows + 1, np.bool_)  # the rows to answer, and whether the job goes on
        has_told = False

        def tell(wanted: np.ndarray, *, goes_on: bool = True) -> None:
            nonlocal has_told
            told[:-1], told[-1], has_told = wanted, goes_on, True
            hosts.of_first(told)

        try:
            code = self._lead(tell)
        except BaseException:
            if not has_told:
                tell(told[:-1], goes_on=False)
            raise
        if not has_told:
            tell(told[:-1])
        return code

    def _follow(self) -> int:
        """Answers what the first process answers, which alone keeps the lines."""
        told = hosts.of_first(np.zeros(self._found.num_rows + 1, np.bool_))
        if not told[-1]:
            return command.EXIT_CODE
        return self._answer(lambda lines: None, told[:-1]) if told[:-1].any() else 0

    def _lead(self, tell: Callable[[np.ndarray], None]) -> int:
        layout, record = self._layout, self._record()
        if layout.is_finished and not self._options.restart:
            if existing := records.read(layout.record):
                existing.check_same(record, layout.record)
            return _finished(self._screen, layout, self._found)
        part = self._part(record)
        if self._options.ray and part is not None and not self._options.restart:
            take_over(layout, part, record)
        with Store(layout, part, record, restart=self._options.restart) as store:
            done = store.done(self._found, self._tally.add)
            wanted = ~done & self._is_mine()
            self._say_what_is_there(done)
            tell(wanted)
            code = self._answered(store, wanted) if wanted.any() else 0
            if part is not None:  # its lines are counted when they are joined, while no other process may write them
                return code if code or self._shard else _merge(self._screen, layout, self._found, self._run)
        summary.write(layout, record, self._tally, self._found.num_rows, self._run)
        self._screen.note(f"{self._tally.line()}; {layout.summary} has it all")
        return code

    def _record(self) -> Record:
        options, defaults, found = self._options, self._reading.defaults, self._found
        settings = overrides.settings_document(vars(defaults.settings)) | overrides.options_document(defaults)
        model = {name: options[name].value for name in model_flags.MODEL_FLAGS if name not in _NOT_FOR_ANSWERS}
        engine = {name: options[name].value for name in sampling_flags.ENGINE_FLAGS}
        return Record(
            input=_input(found),
            model={"weights": self._weights, **model},
            settings={**settings, **engine},
            output={"appended": self._is_appended()},
        )

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

    def _answered(self, store: Store, wanted: np.ndarray) -> int:
        return self._answer_on_ray(wanted) if self._options.ray else self._answer(store.append, wanted)

    def _answer(self, keep: Callable[[Sequence[bytes]], None], wanted: np.ndarray) -> int:
        """Answers the rows that are wanted; `keep` puts their lines on the disk."""
        options, screen = self._options, self._screen
        language_model, engine = model_flags.load_for_answers(options, screen, self._reading.engine_config)
        pace = Pace(self._tally, self._tally.rows + int(wanted.sum()))
        with screen.status() as show, interrupts.noted_with_sigterm() as signalled:

            def put(lines: Sequence[bytes]) -> None:
                keep(lines)
                for line in lines:
                    self._tally.add(json.loads(line))
                show(pace.line())

            worker = Worker(engine, load_tokenizer(options.vocab), self._model_name, put)
            stopped = hosts.agreed(lambda: bool(signalled()))
            is_done = worker.run(self._reading.tasks(self._inputs, self._found, wanted), stopped)
            number = 0 if is_done else signalled() or signal.SIGINT  # another host's
            pace.end()
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
    active = pace.new_answer_tokens / done.decode_steps
    context = (pace.new_prompt_tokens + pace.new_answer_tokens // 2) // pace.new_answers
    bytes_per_second = done.decode_steps * language_model.decode_bytes(max(1, round(active)), context) / pace.seconds
    bandwidth = language_model.read_bandwidth(at_least=bytes_per_second)
    return document | {
        "mean_active_slots": round(active, 2),
        "read_bandwidth_gb_per_second": round(bandwidth / 1e9, 2),
        "share_of_bandwidth_limit": round(bytes_per_second / bandwidth, 4),
    }


def _input(found: Survey) -> dict[str, Any]:
    """What tells an input from others."""
    return {"files": list(found.places.rows_of_files()), "rows": found.num_rows, "sha256": found.digest}


def _finished(screen: Screen, layout: Layout, found: Survey) -> int:
    """Checks a job that has nothing left to do; gives the exit code."""
    if missing := int((~done_rows(outputs.read(layout.out), found, layout.out)).sum()):
        raise GptossError(
            f"{layout.out} lacks {missing:,} of {found.num_rows:,} rows, which it had: --restart begins anew"
        )
    remove_parts(layout)  # what a crash has left of them
    screen.note(f"nothing is left to do: {layout.out} has all {found.num_rows:,} rows")
    return 0


def _merge(screen: Screen, layout: Layout, found: Survey, run: dict[str, Any] | None = None) -> int:
    """Makes OUT of the parts, if no row is missing, and removes them; gives the exit code."""
    record = records.read(layout.record)
    if record and layout.is_finished:
        record.check_input(_input(found), layout.record)
        return _finished(screen, layout, found)
    if record is None or not layout.parts.exists():
        raise GptossError(f"{layout.parts} is not there: no shard of a job with this OUT has begun, or all are joined")
    record.check_input(_input(found), layout.record)
    merged = Merged(layout, found)
    if merged.missing.size:
        first = found.places.where(int(merged.missing[0]))
        raise GptossError(
            f"{merged.missing.size:,} of {found.num_rows:,} rows have no line yet, the first at {first}: "
            "run the shards that are missing, or the job without --shard, then --merge"
        )
    if merged.num_repeated:
        screen.note(f"{merged.num_repeated:,} lines left out, of rows that were answered twice")
    tally = Tally()
    outputs.write(layout.out, map(tally.noting, merged.lines()))
    summary.write(layout, record, tally, found.num_rows, run)
    remove_parts(layout)
    screen.note(f"{tally.line()}; {layout.summary} has it all")
    return 0
