"""A batch job: from the flags to a line for each row, what people hear of its rows, and the exit code."""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from gptoss_jax.api import overrides
from gptoss_jax.api.asked import Options
from gptoss_jax.cli import command, hosts, model_flags, profiling, prompts, ray_job, sampling_flags, tool_flags
from gptoss_jax.cli.batch_merge import merge
from gptoss_jax.cli.batch_run import JobRun, Shard
from gptoss_jax.cli.flag_values import naming_flags, token_ids
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.errors import GptossError, listed
from gptoss_jax.jobs import outputs, places
from gptoss_jax.jobs.inputs import Inputs
from gptoss_jax.jobs.rows import FORM_NAMES, Row
from gptoss_jax.jobs.store import Layout
from gptoss_jax.jobs.survey import Survey, survey
from gptoss_jax.jobs.tool_rows import RowTools
from gptoss_jax.jobs.work import Reading

MAX_SHARDS = 100_000
MAX_SLOTS = 1 << 16


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
    profiling.check(options)
    if options.ray:
        ray_job.check(options)  # here, so that what is missing is said before all rows are read
    names, out = _names(options, arguments)
    _shard(options)  # here, as all flags are, before anything is read
    if options.merge and out is not None:
        inputs = Inputs(names)
        return merge(screen, _layout(options, out, inputs), _survey(screen, inputs, lambda row: row.fault))
    with tool_flags.offered(options) as offer:
        return _run(options, screen, names, out, None if offer is None else RowTools(offer, options.tool_rounds))


def _run(
    options: flags.FlagValues, screen: Screen, names: Sequence[str], out: str | None, tools: RowTools | None
) -> int:
    defaults, remarks = _defaults(options)
    config = model_flags.config(options)
    reading = Reading(defaults, config, _engine_config(options), options.vocab, tools)
    with naming_flags():
        reading.check_defaults()
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
    return JobRun(screen, options, inputs, layout, found, reading, _shard(options)).run()


# ---- what the flags say ----


def _names(options: flags.FlagValues, arguments: Sequence[str]) -> tuple[list[str], str | None]:
    if options.validate and len(arguments) == 1:
        return list(arguments), None
    if len(arguments) < 2:
        raise GptossError(
            f"got {' '.join(arguments) or 'no file'}, expected IN and OUT: python -m gptoss_jax.batch IN OUT"
        )
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
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise GptossError(f"--max-new-tokens is {options.max_new_tokens}, expected at least 1")
    if not 1 <= options.n <= overrides.MAX_ANSWERS:
        raise GptossError(f"--n is {options.n}, expected 1 to {overrides.MAX_ANSWERS}")
    return Options(settings, sampling, **given), remarks


def _engine_config(options: flags.FlagValues) -> Any:
    if not 1 <= options.slots <= MAX_SLOTS:
        raise GptossError(f"--slots is {options.slots}, expected 1 to {MAX_SLOTS}")
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
