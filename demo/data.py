"""Writes the demo model's conversations, a JSON object a line, in the form of `--messages`.

    python -m demo.data data.jsonl --count 300000 --seed 0
    python -m demo.data questions.jsonl --count 1000 --held-out

One question in ten, by a hash of its operands, is never in the first file and
alone in the second. The same seed gives the same bytes.
"""

if __name__ == "__main__":  # before what takes long to import
    from gptoss_jax.cli import interrupts

    interrupts.end_at_once()

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from absl import flags

from demo import conversations
from gptoss_jax import whole_files
from gptoss_jax.cli import command
from gptoss_jax.errors import GptossError


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_integer("count", 300_000, "N: Conversations.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "SEED: The same seed gives the same conversations.")
    flags.DEFINE_list("more", [], "NAMES: Families that are drawn four times as often.")
    flags.DEFINE_bool("held_out", False, "Questions that are kept for evaluation, in place of those to train on.")


def main(arguments: list[str]) -> None:
    """Writes what the flags say."""
    options = flags.FLAGS
    if len(arguments) != 1:
        raise GptossError(f"expected one file to write, got {arguments or 'none'}")
    conversations.check_known("--more", options.more, [*conversations.QUESTIONS, *conversations.CALLS])
    counts = write(
        arguments[0], count=options.count, seed=options.seed, held_out=options.held_out, more=tuple(options.more)
    )
    for family, count in sorted(counts.items()):
        print(f"{family:20} {count:8,}")


def write(path: str | Path, *, count: int, seed: int, held_out: bool, more: Sequence[str] = ()) -> Counter[str]:
    """Writes `count` conversations, whole or not at all, and counts them by family.

    Raises:
        WriteError: the file cannot be written.
    """
    counts: Counter[str] = Counter()
    with whole_files.writing(path) as out:
        for example in examples(count, seed=seed, held_out=held_out, more=more):
            counts[example.family] += 1
            line = json.dumps(example.document, ensure_ascii=False, separators=(",", ":"))
            out.write(line.encode() + b"\n")
    return counts


def examples(count: int, *, seed: int, held_out: bool, more: Sequence[str] = ()) -> Iterator[conversations.Example]:
    """The conversations of a seed, one by one; families in `more` are drawn more often."""
    random = Random(f"{seed} {held_out}")
    for _ in range(count):
        yield conversations.example(random, held_out, more=more)


def cli() -> None:
    """What `python -m` runs."""
    define_flags()
    command.run(main, "data")


if __name__ == "__main__":
    cli()
