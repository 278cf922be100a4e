"""Files of conversations, one a line -> examples; whatever is wrong with any of them is found before training."""

import collections
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gptoss_jax import files, jsonl
from gptoss_jax.errors import Fault, GptossError, listed
from gptoss_jax.files import FileError
from gptoss_jax.harmony import messages
from gptoss_jax.training.examples import Example, ExampleMaker, has_assistant

_REMARKS = 10


class DataError(GptossError):
    """Conversations that nothing can be learned from: a line for each, or for many that are alike."""


class Found(NamedTuple):
    """An example, and where it comes from.

    Attributes:
        file: index of the file.
        line: its number, from 1.
        digest: 64 bits of the line's hash, the same for all examples of the line.
        example: the tokens.
    """

    file: int
    line: int
    digest: int
    example: Example


class Reader:
    """Reads all examples of some files, once.

    Attributes:
        conversations: how many there are.
        unlearned: how many of these have no message on the channels that are learned, so that no example is theirs.
    """

    def __init__(self, names: Sequence[str], maker: ExampleMaker, row_tokens: int):
        """Reads nothing yet.

        Args:
            names: of JSONL files, plain or packed with gzip or zstd.
            maker: makes examples of a conversation.
            row_tokens: the most that an example may have.
        """
        self.conversations = self.unlearned = 0
        self._names, self._maker, self._row_tokens = names, maker, row_tokens
        self._faults: list[Fault] = []
        self._remarks = collections.Counter[str]()
        self._remark_of: dict[str, str] = {}

    def examples(self) -> Iterator[Found]:
        """All examples, in the order of the files.

        Raises:
            DataError: in the end, if anything is wrong with any of the files.
        """
        for index, name in enumerate(self._names):
            before = self.conversations, len(self._faults)
            try:
                yield from self._of_file(index, name)
            except FileError as error:
                self._faults.append(Fault(name, error.what))
            except OSError as error:
                self._faults.append(Fault(name, error.strerror or str(error)))
            if before == (self.conversations, len(self._faults)):
                self._faults.append(Fault(name, "holds no conversation, expected one a line"))
        if not self._faults and self.conversations == self.unlearned:
            what = "the assistant says nothing on the channels to learn in any conversation: choose others"
            self._faults.append(Fault(", ".join(self._names), what))
        if self._faults:
            raise DataError(listed(self._faults))

    def remarks(self) -> list[str]:
        """What people should know of the conversations, a line for each kind; of many kinds the most frequent."""
        lines = []
        for kind, count in self._remarks.most_common(_REMARKS):
            lines.append(f"{count:,} of {self.conversations:,} conversations: {self._remark_of[kind]}")
        if self.unlearned:
            lines.append(
                f"{self.unlearned:,} of {self.conversations:,} conversations: nothing on the channels to learn"
            )
        return lines

    def _of_file(self, index: int, name: str) -> Iterator[Found]:
        files.check_regular(name)
        with open(name, "rb") as file:
            for number, line in jsonl.lines(file, name, may_be_lists=True):
                if line == b"":
                    continue
                self.conversations += 1
                try:
                    examples = self._of_line(line)
                except GptossError as error:
                    what = error.what.removeprefix("line 1, ") if isinstance(error, FileError) else str(error)
                    self._faults.append(Fault(f"{name}, line {number}", what))
                    continue
                digest = int.from_bytes(hashlib.sha256(line or b"").digest()[:8], "little")
                yield from (Found(index, number, digest, example) for example in examples)

    def _of_line(self, line: bytes | None) -> list[Example]:
        """The examples of one conversation.

        Raises:
            GptossError: it is none, or one to learn nothing from.
        """
        if line is None:
            raise DataError(f"the line is longer than {jsonl.MAX_LINE_BYTES:,} bytes, which no row holds")
        conversation = messages.from_json(files.parse_json(line, "", whole="the line"), "the line")
        if not has_assistant(conversation):
            raise DataError("the assistant says nothing, expected a message of role 'assistant' to learn")
        examples = self._maker.examples(conversation)
        for example in examples:
            if len(example.ids) > self._row_tokens:
                raise DataError(
                    f"the conversation has {len(example.ids):,} tokens, expected at most the {self._row_tokens:,} of a "
                    "row: take longer rows, or shorten it"
                )
        self.unlearned += not examples
        for remark in conversation.remarks:
            kind = re.sub(r"\d+", "0", remark)
            self._remarks[kind] += 1
            self._remark_of.setdefault(kind, remark)
        return examples
