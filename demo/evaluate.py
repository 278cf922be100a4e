"""Examines a demo model on questions that were never trained, and prints a table.

    python -m demo.evaluate CHECKPOINT --count 200
    python -m demo.evaluate --count 100 --check

Without CHECKPOINT the model in the package. A row for each family of questions,
and for each thing that may stand around them; a column for each reasoning
effort, greedy, and one for high effort at --temperature. Beside each share of
right answers stands its 95 % interval by Wilson (1927). Then the targets, each
met or missed; with --check the exit code is 1 if one is missed.
"""

if __name__ == "__main__":  # before what takes long to import
    from gptoss_jax.cli import interrupts

    interrupts.end_at_once()

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from demo import cases, conversations
from demo.cases import Case, Score
from gptoss_jax import whole_files
from gptoss_jax.cli import command
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.settings import REASONING_EFFORTS
from gptoss_jax.runtime import demo_model

if TYPE_CHECKING:
    import demo.compact

SHAPES = [shape for shape in conversations.SHAPES if shape != "plain"]
MAX_NEW_TOKENS, MAX_CONTEXT_TOKENS = 256, 512
Scores = Mapping[str, Score]
"""Row -> score."""


class Target(NamedTuple):
    """What must be reached at high effort, greedy.

    Attributes:
        name: in words.
        rows: whose cases count together.
        least: share of right answers.
    """

    name: str
    rows: tuple[str, ...]
    least: float


TARGETS = (
    *(Target(row, (row,), 0.97) for row in ("addition", "subtraction", "comparison", "product_by_digit")),
    *(Target(row, (row,), 0.95) for row in ("counting", "spelling", "reversing")),
    *(Target(row, (row,), 0.85) for row in ("product_two_digits", "sorting_numbers", "sorting_words")),
    Target("arguments of calls", tuple(conversations.CALLS), 0.95),
    Target("says that it does not know", ("unknown",), 0.90),
)
LEAST_WELL_FORMED = 0.98


class Column(NamedTuple):
    """An effort and a temperature."""

    effort: str
    temperature: float

    def __str__(self) -> str:
        return self.effort + (f", T={self.temperature:g}" if self.temperature else "")


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_integer("count", 100, "N: Conversations in each row.", lower_bound=1)
    flags.DEFINE_float("temperature", 1.0, "X: Of one more column at high effort; 0: none.", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "SEED: Of the questions.")
    flags.DEFINE_integer("slots", 32, "N: Answers that run at once.", lower_bound=1)
    flags.DEFINE_string("dtype", "bfloat16", "NAME: Number format of the activations: float32 or bfloat16.")
    flags.DEFINE_list("families", [], "NAMES: Rows to examine; left out: all, and the shapes.")
    flags.DEFINE_string("out", None, "FILE: Where all counts go, as JSON.")
    flags.DEFINE_bool("check", False, "Exit with 1 if a target is missed.")


def main(arguments: list[str]) -> None:
    """Examines what the flags say."""
    options = flags.FLAGS
    if len(arguments) > 1:
        raise GptossError(f"expected one checkpoint, or none for the package's, got {arguments}")
    rows = check_rows(options.families)
    if options.out:
        whole_files.check_can_write(options.out)
    columns = [Column(effort, 0.0) for effort in REASONING_EFFORTS]
    columns += [Column("high", options.temperature)] if options.temperature else []
    results = {}
    with _loaded(Path(arguments[0]) if arguments else demo_model.folder(), options.dtype) as model:
        for column in columns:
            asked = list(drawn(rows, column.effort, options.count, seed=options.seed))
            results[column] = examine(model, asked, column.temperature, slots=options.slots)
            print(f"{column}: {len(asked):,} answers", file=sys.stderr, flush=True)
    print(table(results))
    missed = show_targets(results[Column("high", 0.0)])
    if options.out:
        whole_files.write_whole(options.out, json.dumps(_counts(results), indent=1).encode() + b"\n")
    sys.exit(1 if missed and options.check else 0)


@contextlib.contextmanager
def _loaded(checkpoint: Path, dtype: str) -> Iterator["demo.compact.CompactModel"]:
    from demo.compact import CompactModel  # here, since it imports JAX

    with tempfile.TemporaryDirectory(prefix="demo-evaluate-") as scratch:
        yield CompactModel(checkpoint, Path(scratch) / "compact", dtype=dtype)


def _counts(results: Mapping[Column, Scores]) -> dict[str, dict[str, dict[str, int]]]:
    return {
        str(column): {row: dataclasses.asdict(score) for row, score in scores.items()}
        for column, scores in results.items()
    }


def check_rows(names: Sequence[str]) -> list[str]:
    """The rows that are to be examined.

    Raises:
        GptossError: a name that no row has.
    """
    known = [*conversations.QUESTIONS, *conversations.CALLS, *SHAPES]
    conversations.check_known("--families", names, known)
    return list(names) or known


def drawn(rows: Sequence[str], effort: str, count: int, *, seed: int) -> Iterator[Case]:
    """The cases of all rows; the same questions at each effort."""
    for row in rows:
        draw = cases.of_shape if row in SHAPES else cases.of_family
        yield from draw(row, effort, count, seed=seed)


def examine(
    model: "demo.compact.CompactModel", asked: Sequence[Case], temperature: float, *, slots: int
) -> dict[str, Score]:
    """Row -> how the model did on its cases.

    Raises:
        GptossError: cases that the model cannot be asked.
    """
    answers = model.answers(
        [case.token_ids for case in asked],
        SamplingParams(temperature=temperature),
        max_new_tokens=MAX_NEW_TOKENS,
        max_context_tokens=MAX_CONTEXT_TOKENS,
        slots=slots,
    )
    scores: dict[str, Score] = {}
    for case, given in zip(asked, answers, strict=True):
        scores.setdefault(case.row, Score()).add(case, given)
    return scores


# ---- what is printed ----


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, "Probable inference, the law of succession")."""
    z = 1.959964
    share, scale = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def table(results: Mapping[Column, Scores]) -> str:
    """Shares of right answers in percent with their intervals, in Markdown; tokens of an answer below."""
    rows = list(dict.fromkeys(row for scores in results.values() for row in scores))
    lines = [f"| right answers, % (95 % interval) | n | {' | '.join(map(str, results))} |"]
    lines.append("|---|---|" + "---|" * len(results))
    for row in rows:
        found = [scores.get(row, Score()) for scores in results.values()]
        lines.append(f"| {row} | {max(score.count for score in found)} | {' | '.join(map(_right, found))} |")
    sums = [sum(scores.values(), Score()) for scores in results.values()]
    count = max(score.count for score in sums)
    formed = " | ".join(_share(score.well_formed, score.count) for score in sums)
    tokens = " | ".join(f"{score.tokens / max(score.count, 1):.0f}" for score in sums)
    return "\n".join(
        [
            *lines,
            f"| all | {count} | {' | '.join(map(_right, sums))} |",
            f"| well-formed harmony | {count} | {formed} |",
            f"| tokens of an answer, mean | {count} | {tokens} |",
        ]
    )


def _right(score: Score) -> str:
    return _share(score.right, score.count)


def _share(right: int, count: int) -> str:
    if not count:
        return ""
    low, high = wilson(right, count)
    return f"{100 * right / count:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def targets(scores: Scores) -> list[tuple[str, float, float]]:
    """Name, share and least share of each target whose rows were examined."""
    found = []
    for target in TARGETS:
        score = sum((scores[row] for row in target.rows if row in scores), Score())
        if score.count:
            found.append((target.name, score.right / score.count, target.least))
    everything = sum(scores.values(), Score())
    return [*found, ("well-formed harmony", everything.well_formed / everything.count, LEAST_WELL_FORMED)]


def show_targets(scores: Scores) -> int:
    """Prints each target, met or missed; gives the number of those missed."""
    missed = 0
    for name, share, least in targets(scores):
        is_met = share >= least
        missed += not is_met
        print(f"{'met   ' if is_met else 'MISSED'} {name}: {100 * share:.1f} %, at least {100 * least:.0f} %")
    return missed


def cli() -> None:
    """What `python -m` runs."""
    define_flags()
    command.run(main, "evaluate")


if __name__ == "__main__":
    cli()
