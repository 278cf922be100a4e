"""All examples of a run as a few arrays: made of files once, kept in the run's folder, read from there by a resume."""

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt64

from gptoss_jax import files, whole_files
from gptoss_jax.files import FileError
from gptoss_jax.harmony.settings import Settings
from gptoss_jax.training.examples import ExampleMaker
from gptoss_jax.training.jsonl import DataError, Reader
from gptoss_jax.training.options import CHANNELS

_FORMAT = 1  # of the folder, and of how examples are made: a new one makes all of them anew
_RECORD = "corpus.json"
_ARRAYS = ("ids", "learned", "offsets", "lines", "digests")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """N examples of together T tokens, in the order of the files.

    Attributes:
        ids: the token ids of all examples, one after the other.
        learned: whether each is learned: predicted from those before it.
        lines: of each example its file, an index into `files`, and its line from 1.
        digests: of each example 64 bits of its line's hash.
        offsets: where each example begins in `ids`, and where the last ends.
        files: names, as they were given.
        conversations: how many lines there are.
        remarks: what people should know of the conversations, a line each.
        key: hash of the files and of all that examples depend on; "" for a part of a corpus.
    """

    ids: Int32[np.ndarray, "T"]
    learned: Bool[np.ndarray, "T"]
    lines: Int32[np.ndarray, "N 2"]
    digests: UInt64[np.ndarray, "N"]
    offsets: Int64[np.ndarray, "N+1"]
    files: tuple[str, ...]
    conversations: int
    remarks: tuple[str, ...] = ()
    key: str = ""

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def lengths(self) -> Int64[np.ndarray, "N"]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    def where(self, example: int) -> str:
        """The file and the line that an example comes from."""
        file, line = self.lines[example]
        return f"{self.files[file]}, line {line}"

    def take(self, examples: Int64[np.ndarray, "M"]) -> "Corpus":
        """A corpus of some of the examples, in the order of their numbers."""
        examples = np.sort(examples)
        lengths = self.lengths[examples]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        chosen = np.repeat(self.offsets[examples] - offsets[:-1], lengths) + np.arange(offsets[-1])
        lines = self.lines[examples]
        return dataclasses.replace(
            self,
            ids=self.ids[chosen],
            learned=self.learned[chosen],
            offsets=offsets,
            lines=lines,
            digests=self.digests[examples],
            conversations=len(np.unique(lines, axis=0)),
            key="",
        )

    def split(self, held_out: float) -> tuple["Corpus", "Corpus"]:
        """The corpus in two by the hash of the lines: about this share in the second, whatever else is in the files.

        Equal lines are on the same side, and stay there when lines are added or moved.

        Raises:
            DataError: nothing would be on one of the sides.
        """
        is_held_out = self.digests < np.uint64(min(int(held_out * 2**64), 2**64 - 1))
        if is_held_out.all() or not is_held_out.any():
            raise DataError(
                f"a share of {held_out:g} of {self.conversations:,} conversations leaves none for "
                f"{'training' if is_held_out.any() else 'validation'}: choose another, or give a file for validation"
            )
        return self.take(np.flatnonzero(~is_held_out)), self.take(np.flatnonzero(is_held_out))


def read(
    names: Sequence[str],
    *,
    row_tokens: int,
    channels: Sequence[str] = CHANNELS,
    settings: Settings | None = None,
    report: Callable[[int], None] | None = None,
) -> Corpus:
    """The corpus of some files; see `Reader` and `ExampleMaker` for the arguments.

    Args:
        names: the files.
        row_tokens: the most that an example may have.
        channels: what is learned.
        settings: what system and developer messages say where conversations do not set it.
        report: gets the number of examples so far, now and then.

    Raises:
        DataError: all that is wrong with the files.
    """
    reader = Reader(names, ExampleMaker(channels, settings), row_tokens)
    ids, learned, offsets = array.array("i"), bytearray(), array.array("q", [0])
    lines, digests = array.array("i"), array.array("Q")
    for found in reader.examples():
        ids.extend(found.example.ids)
        learned += found.example.learned
        offsets.append(len(ids))
        lines.extend((found.file, found.line))
        digests.append(found.digest)
        if report and not len(digests) % 1000:
            report(len(digests))
    return Corpus(
        np.frombuffer(ids, np.int32),
        np.frombuffer(learned, np.bool_),
        np.frombuffer(lines, np.int32).reshape(-1, 2),
        np.frombuffer(digests, np.uint64),
        np.frombuffer(offsets, np.int64),
        tuple(names),
        reader.conversations,
        tuple(reader.remarks()),
    )


def kept(
    folder: Path,
    names: Sequence[str],
    *,
    row_tokens: int,
    channels: Sequence[str] = CHANNELS,
    settings: Settings | None = None,
    report: Callable[[int], None] | None = None,
) -> Corpus:
    """The corpus of `read`, memory-mapped from `folder`, where it is put first if no equal one is there.

    Raises:
        DataError: all that is wrong with the files.
        WriteError: it cannot be written; no part of it is left.
    """
    key = _key(names, row_tokens, channels, settings or Settings())
    if not (folder / key).is_dir():
        made = read(names, row_tokens=row_tokens, channels=channels, settings=settings, report=report)
        save(dataclasses.replace(made, key=key), folder)
    return open_kept(folder, key)


def save(corpus: Corpus, folder: Path) -> None:
    """Puts the corpus into a folder of `folder` that has its key for a name, whole or not at all.

    Raises:
        WriteError: it cannot be written.
    """
    record = {"format": _FORMAT, "files": corpus.files, "conversations": corpus.conversations}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder, prefix=".unfinished-"))
        try:
            for name in _ARRAYS:
                np.save(unfinished / f"{name}.npy", getattr(corpus, name))
            text = json.dumps({**record, "remarks": corpus.remarks}, ensure_ascii=False, indent=2)
            whole_files.write_whole(unfinished / _RECORD, text.encode())
            with contextlib.suppress(FileExistsError):
                os.rename(unfinished, folder / corpus.key)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise whole_files.WriteError(f"cannot write the corpus to {folder}: {error.strerror or error}") from None
    whole_files.sync_folder(folder)


def open_kept(folder: Path, key: str) -> Corpus:
    """The corpus that `save` put there, its arrays memory-mapped.

    Raises:
        FileError: it is not there, or damaged.
    """
    place = folder / key
    record = files.read_json(place / _RECORD)
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise FileError(place, "another version's corpus: remove the folder, and it is made anew")
    arrays = {name: _mapped(place / f"{name}.npy") for name in _ARRAYS}
    if not len(arrays["ids"]) == len(arrays["learned"]) == arrays["offsets"][-1]:
        raise FileError(place, "the arrays do not belong together: remove the folder, and it is made anew")
    names, remarks = tuple(record["files"]), tuple(record["remarks"])
    return Corpus(**arrays, files=names, conversations=record["conversations"], remarks=remarks, key=key)


def _mapped(path: Path) -> Any:
    files.check_regular(path)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise FileError(path, f"damaged ({error}): remove its folder, and it is made anew") from None


def _key(names: Sequence[str], row_tokens: int, channels: Sequence[str], settings: Settings) -> str:
    """A hash of the files' names and bytes, and of what else decides what examples are made of them.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256(repr((_FORMAT, row_tokens, tuple(channels), settings)).encode())
    for name in names:
        try:
            files.check_regular(name)
            with open(name, "rb") as file:
                of_file = hashlib.file_digest(file, "sha256").hexdigest()
        except FileError as error:
            raise DataError(str(error)) from None
        except OSError as error:
            raise DataError(f"{name}: {error.strerror}") from None
        digest.update(f"{name!r} {of_file}".encode())
    return digest.hexdigest()[:32]
