"""Files of conversations -> the batches of a run, from any place in it, and those that it is measured on. No JAX."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptoss_jax.training import batch as batches
from gptoss_jax.training import corpus as corpora
from gptoss_jax.training import vocabulary as vocabularies
from gptoss_jax.training.batch import Batch
from gptoss_jax.training.corpus import Corpus
from gptoss_jax.training.options import TrainOptions
from gptoss_jax.training.packing import Packer, Position, RowStream
from gptoss_jax.training.vocabulary import CompactVocabulary


class Sources(NamedTuple):
    """Where conversations come from.

    Attributes:
        training: files.
        validation: files; none where there is no validation, or a share of the others.
        share: of the training files' conversations, kept for validation; 0 where files are, or none.
    """

    training: tuple[str, ...]
    validation: tuple[str, ...] = ()
    share: float = 0.0


@dataclasses.dataclass(frozen=True)
class Feed:
    """The data of a run.

    Attributes:
        options: of the run.
        training: what is learned.
        held_out: what is measured; None: nothing.
        vocabulary: rows of a compact embedding for token ids; None: all of them.
        remarks: what people should know of the conversations, a line each.
    """

    options: TrainOptions
    training: Packer
    held_out: Packer | None
    vocabulary: CompactVocabulary | None
    remarks: tuple[str, ...]

    @property
    def total_steps(self) -> int:
        """Of the run; with `epochs`, by the rows of the first one, since others may have a row more or less."""
        if self.options.steps is not None:
            return self.options.steps
        assert self.options.epochs is not None, "options have one of the two"
        return max(1, math.ceil(self.options.epochs * len(self.training.plan(0)) / self.options.batch_rows))

    @property
    def described(self) -> str:
        """For people: a line with all numbers."""
        corpus, plan = self.training.corpus, self.training.plan(0)
        learned, row_tokens = int(corpus.learned.sum()), self.options.row_tokens
        line = (
            f"{_counted(corpus)}, {len(corpus.ids):,} tokens, {learned:,} of them learned; "
            f"an epoch is {len(plan):,} rows of {row_tokens:,} tokens, {plan.padding_share:.1%} of them padding"
        )
        if self.held_out is not None:
            line += f"; {_counted(self.held_out.corpus)} for validation"
        return line

    def take(self, position: Position) -> tuple[Batch, Position]:
        """The batch at a place in the data, and the place after it."""
        stream = RowStream(self.training, position)
        rows = stream.take(self.options.batch_rows)
        return batches.stack(rows, self.options.batch_rows, self.vocabulary), stream.position

    def places(self, position: Position) -> list[str]:
        """Of each row of that batch: its conversations, as file and line."""
        found = []
        for _ in range(self.options.batch_rows):
            if position.row >= len(self.training.plan(position.epoch)):
                position = Position(position.epoch + 1)
            members = self.training.plan(position.epoch).members(position.row)
            lines = dict.fromkeys(self.training.corpus.where(member.example) for member in members)
            found.append("; ".join(lines))
            position = position._replace(row=position.row + 1)
        return found

    def validation(self) -> Iterator[Batch]:
        """All batches of what is measured, each as large as the part of a step that is computed at once."""
        if self.held_out is None:
            return
        at_once, count = self.options.batch_rows // self.options.accumulate, len(self.held_out.plan(0))
        for start in range(0, count, at_once):
            rows = [self.held_out.row(0, row) for row in range(start, min(start + at_once, count))]
            yield batches.stack(rows, at_once, self.vocabulary)


def _counted(corpus: Corpus) -> str:
    return f"{corpus.conversations:,} conversation{'s' * (corpus.conversations != 1)}"


def read(
    sources: Sources, options: TrainOptions, folder: Path | None, report: Callable[[int], None] = lambda count: None
) -> Feed:
    """The data of a run.

    Args:
        sources: the files.
        options: of the run.
        folder: where the files' token ids are kept for a resume; None: nowhere.
        report: gets the number of conversations read so far, now and then.

    Raises:
        DataError: all that is wrong with the files.
        WriteError: the folder cannot be written.
    """

    def of_files(names: tuple[str, ...]) -> Corpus:
        given = {"row_tokens": options.row_tokens, "channels": options.channels, "report": report}
        return corpora.read(names, **given) if folder is None else corpora.kept(folder, names, **given)

    training = of_files(sources.training)
    validation = of_files(sources.validation) if sources.validation else None
    remarks = (*training.remarks, *(validation.remarks if validation else ()))
    if sources.share:
        training, validation = training.split(sources.share)
    both = [training] if validation is None else [training, validation]
    return Feed(
        options,
        Packer(training, options.row_tokens, options.seed),
        None if validation is None else Packer(validation, options.row_tokens, 0),
        vocabularies.of_corpora(np.asarray(corpus.ids) for corpus in both) if options.compact_vocabulary else None,
        tuple(dict.fromkeys(remarks)),
    )
