"""What became of a job's rows, counted from the finished lines, and how fast: for people and for programs."""

import copy
import importlib.metadata
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptoss_jax import files, whole_files
from gptoss_jax.jobs.record import Record
from gptoss_jax.jobs.store import Layout

_VERSIONS = ("gptoss-jax", "jax", "jaxlib", "numpy")


@dataclass
class Tally:
    """Counts over finished lines.

    Attributes:
        rows: lines.
        errors: of those that have an error, by code.
        finish_reasons: of answers.
        parse_statuses: alike.
        prompt_tokens: of rows that were answered.
        answer_tokens: of all their answers, reasoning included.
    """

    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    parse_statuses: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def add(self, document: Mapping[str, Any]) -> None:
        """Counts one more line."""
        self.rows += 1
        if error := document.get("error"):
            self.errors[error["code"]] += 1
        usage, answers = _usage_and_answers(document)
        self.prompt_tokens += usage.get("prompt_tokens", usage.get("input_tokens", 0))
        self.answer_tokens += usage.get("completion_tokens", usage.get("output_tokens", 0))
        for answer in answers:
            self.finish_reasons[answer["finish_reason"]] += 1
            if "parse_status" in answer:  # plain text is not parsed
                self.parse_statuses[answer["parse_status"]] += 1

    def line(self) -> str:
        """For people."""
        answers, cut = self.finish_reasons.total(), self.finish_reasons["length"]
        repaired = self.parse_statuses["repaired"] + self.parse_statuses["unparsed"]
        return (
            f"{self.rows:,} row{'s' * (self.rows != 1)}: {answers:,} answer{'s' * (answers != 1)} "
            f"({cut:,} cut at their limit, {repaired:,} that broke the format), "
            f"{self.num_errors:,} error{'s' * (self.num_errors != 1)}"
        )

    @property
    def num_errors(self) -> int:
        """Rows with an error."""
        return self.errors.total()

    def document(self) -> dict[str, Any]:
        """All of it for JSON; `truncation_rate` is the share of answers that came to their limit."""
        answers = self.finish_reasons.total()
        return {
            "rows": self.rows,
            "rows_with_errors": self.num_errors,
            "errors": dict(sorted(self.errors.items())),
            "answers": answers,
            "finish_reasons": dict(sorted(self.finish_reasons.items())),
            "parse_statuses": dict(sorted(self.parse_statuses.items())),
            "truncation_rate": self.finish_reasons["length"] / answers if answers else None,
            "prompt_tokens": self.prompt_tokens,
            "answer_tokens": self.answer_tokens,
        }


def _usage_and_answers(document: Mapping[str, Any]) -> tuple[Mapping[str, Any], Iterator[Mapping[str, Any]]]:
    """What a line of either form says of tokens and of each answer; nothing, where it holds none."""
    body = document
    if "custom_id" in document:
        body = (document["response"] or {}).get("body", {})
        additions = body.get("gptoss", {})
        answers = additions.get("answers", [])
        return body.get("usage", {}), iter(answers[-1:] if "calls" in additions else answers)
    answers = document.get("answers", [document] if "finish_reason" in document else [])
    return body.get("usage", {}), iter(answers)


class Pace:
    """How fast a run goes, beside what was there before it began.

    Attributes:
        tally: of all lines.
        total: rows that are to be done.
    """

    def __init__(self, tally: Tally, total: int):
        self.tally, self.total = tally, total
        self._before = copy.deepcopy(tally)
        self._began = time.monotonic()  # a clock that nobody sets
        self._ended: float | None = None

    def end(self) -> None:
        """The run has ended: time stands still."""
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the run began, until its end."""
        return max((self._ended or time.monotonic()) - self._began, 1e-9)

    @property
    def new_rows(self) -> int:
        """Rows of this run."""
        return self.tally.rows - self._before.rows

    @property
    def new_answers(self) -> int:
        """Answers of this run."""
        return self.tally.finish_reasons.total() - self._before.finish_reasons.total()

    @property
    def new_prompt_tokens(self) -> int:
        """Tokens of the prompts of this run."""
        return self.tally.prompt_tokens - self._before.prompt_tokens

    @property
    def new_answer_tokens(self) -> int:
        """Tokens drawn in this run."""
        return self.tally.answer_tokens - self._before.answer_tokens

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Read and drawn, in this run."""
        return self.new_prompt_tokens / self.seconds, self.new_answer_tokens / self.seconds

    @property
    def seconds_left(self) -> float | None:
        """At this pace; None: nothing is known yet."""
        return (self.total - self.tally.rows) * self.seconds / self.new_rows if self.new_rows else None

    def line(self) -> str:
        """For people, while it runs."""
        read, drawn = self.tokens_per_second
        left = f", {duration(self.seconds_left)} left" if self.seconds_left else ""
        count = self.tally.num_errors
        errors = f", {count:,} error{'s' * (count != 1)}" if count else ""
        return f"{self.tally.rows:,} of {self.total:,} rows, {read:,.0f} tokens/s in, {drawn:,.0f} out{left}{errors}"

    def document(self) -> dict[str, Any]:
        """For JSON, when it has ended."""
        read, drawn = self.tokens_per_second
        return {
            "rows": self.new_rows,
            "wall_seconds": round(self.seconds, 3),
            "prompt_tokens_per_second": round(read, 3),
            "answer_tokens_per_second": round(drawn, 3),
        }


def duration(seconds: float) -> str:
    """As people say it: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def write(layout: Layout, record: Record, tally: Tally, total: int, run: Mapping[str, Any] | None) -> None:
    """Puts the summary of a job at `layout.summary`, whole.

    Args:
        layout: the job's files.
        record: what the job is.
        tally: of all its finished lines.
        total: rows of the input.
        run: how fast the run that ends here was; None: it answered nothing.

    Raises:
        WriteError: it cannot be written.
    """
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
    document = {
        "output": layout.out,
        "complete": tally.rows == total,
        "rows_of_input": total,
        **tally.document(),
        "run": run,
        "input": record.input,
        "model": record.model,
        "settings": record.settings,
        "versions": {"python": platform.python_version(), **versions},
    }
    whole_files.write_whole(layout.summary, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def is_complete(layout: Layout) -> bool:
    """Whether there is a summary of all rows already.

    Raises:
        GptossError: something else stands there.
    """
    if not layout.summary.exists():
        return False
    document = files.read_json(layout.summary)
    return isinstance(document, dict) and document.get("complete") is True
