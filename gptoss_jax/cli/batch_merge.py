"""The end of a batch job whose lines are in parts: one output, whole, of which no row is missing."""

from typing import Any

from gptoss_jax.cli.terminal import Screen
from gptoss_jax.errors import GptossError
from gptoss_jax.jobs import outputs, summary
from gptoss_jax.jobs import record as records
from gptoss_jax.jobs.store import Layout, Merged, done_rows, remove_parts
from gptoss_jax.jobs.summary import Tally
from gptoss_jax.jobs.survey import Survey


def input_document(found: Survey) -> dict[str, Any]:
    """What tells an input from others."""
    return {"files": list(found.places.rows_of_files()), "rows": found.num_rows, "sha256": found.digest}


def check_finished(screen: Screen, layout: Layout, found: Survey) -> int:
    """Checks a job that has nothing left to do; gives the exit code."""
    if missing := int((~done_rows(outputs.read(layout.out), found, layout.out)).sum()):
        raise GptossError(
            f"{layout.out} lacks {missing:,} of {found.num_rows:,} rows, which it had: --restart begins anew"
        )
    remove_parts(layout)  # what a crash has left of them
    screen.note(f"nothing is left to do: {layout.out} has all {found.num_rows:,} rows")
    return 0


def merge(screen: Screen, layout: Layout, found: Survey, run: dict[str, Any] | None = None) -> int:
    """Makes OUT of the parts, if no row is missing, and removes them; gives the exit code."""
    record = records.read(layout.record)
    if record and layout.is_finished:
        record.check_input(input_document(found), layout.record)
        return check_finished(screen, layout, found)
    if record and record.output.get("appended"):
        raise GptossError(
            f"{layout.out} is of a job without shards, which appends its lines: there is nothing to merge"
        )
    if record is None or not layout.parts.exists():
        raise GptossError(f"{layout.parts} is not there: no shard of a job with this OUT has begun, or all are joined")
    record.check_input(input_document(found), layout.record)
    tally = Tally()
    merged = Merged(layout, found, tally.add)
    if merged.missing.size:
        first = found.places.where(int(merged.missing[0]))
        raise GptossError(
            f"{merged.missing.size:,} of {found.num_rows:,} rows have no line yet, the first at {first}: "
            "run the shards that are missing, or the job without --shard, then --merge"
        )
    if merged.num_repeated:
        screen.note(f"{merged.num_repeated:,} lines left out, of rows that were answered twice")
    outputs.write(layout.out, merged.lines())
    summary.write(layout, record, tally, found.num_rows, run)
    remove_parts(layout)
    screen.note(f"{tally.line()}; {layout.summary} has it all")
    return 0
