"""A job's output: results -> one file, whole or not at all: JSONL, plain or packed, or Parquet, here or in a store."""

import os
from collections.abc import Iterable, Iterator

from gptoss_jax import compression, whole_files
from gptoss_jax.files import FileError
from gptoss_jax.jobs import inputs, places

MAX_RESULT_BYTES = 1 << 30  # an answer as long as the context, with 20 log probabilities for each token, has a tenth
_PACKED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_OTHERS = (".csv", ".tsv", ".xlsx", ".bz2", ".xz", ".zip", ".tar", ".arrow", ".feather", ".orc", ".avro", ".pq")


def format_of(name: str) -> str:
    """What a file of this name holds: "parquet", or JSONL packed with "gzip" or "zstd", or "" for plain JSONL.

    Raises:
        FileError: the name ends as that of a format which is not written.
    """
    if name == "-":
        raise FileError(name, "expected the name of a file, from which a job can go on")
    lower = name.lower()
    packed = next((suffix for suffix in _PACKED if lower.endswith(suffix)), "")
    inner = lower.removesuffix(packed)
    if inner.endswith(_OTHERS) or (packed and inner.endswith(".parquet")):
        raise FileError(name, "is written as .jsonl, .jsonl.gz, .jsonl.zst or .parquet only")
    return "parquet" if inner.endswith(".parquet") else _PACKED.get(packed, "")


def can_append(name: str) -> bool:
    """Whether lines can be appended to a file of this name: plain JSONL on this machine."""
    return places.is_local(name) and format_of(name) == ""


def exists(name: str) -> bool:
    """Whether a file of this name is there.

    Raises:
        FileError: a store does not say.
    """
    place = places.find(name)
    if not place.store:
        return os.path.exists(place.path)
    with places.faults_of(name):
        return place.store.exists(place.path)


def check(name: str, read: inputs.Inputs | None = None) -> None:
    """Asks before long work whether `write` can put a file there. In a store it tries, with an empty file.

    Args:
        name: a path or a URL of fsspec.
        read: what the job reads, of which the output must be none.

    Raises:
        GptossError: it cannot, and why.
    """
    place, form = places.find(name), format_of(name)
    if form == "parquet":
        inputs.parquet(name)
    elif form == "zstd":
        compression.zstandard(name)
    if not place.store:
        whole_files.check_can_write(place.path)
    if read and name in read:
        raise FileError(name, "is an input of this job too: give the output another name")
    if place.store:
        places.check_can_upload(place)


def write(name: str, results: Iterable[bytes]) -> None:
    """Writes all results as one file, in a format by its suffix; the same results give the same bytes.

    Args:
        name: a path or a URL of fsspec. What is there is replaced when all is written, and stays if that fails.
        results: JSON objects without line ends, read as they are written.

    Raises:
        GptossError: the file cannot be written, and why. Whatever `results` raises is passed on.
        ValueError: Parquet has no column for a key.
    """
    place, form = places.find(name), format_of(name)
    with places.uploading(place) if place.store else whole_files.writing(place.path) as out:
        if form == "parquet":
            inputs.parquet(name).write(out, results)
            return
        with compression.packing(out, form, name) as packed:
            for result in results:
                packed.write(result + b"\n")


def read(name: str) -> Iterator[bytes]:
    """The results in a file that `write` wrote, as JSON; of Parquet without nulls, but for OpenAI's four keys.

    Raises:
        FileError: the file is not there, damaged, or another's.
    """
    with places.find(name).open() as file:
        if file.peek(4).startswith(b"PAR1"):
            yield from inputs.parquet(name).results(file, name)
            return
        for number, text, fault in inputs.rows(file, name, MAX_RESULT_BYTES):
            if fault:
                raise FileError(f"{name}, line {number}", fault)
            yield text
