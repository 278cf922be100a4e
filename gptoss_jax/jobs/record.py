"""What a job is: the file beside its output that says which input, model and settings the answers there came from."""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from gptoss_jax import whole_files
from gptoss_jax.errors import GptossError, short
from gptoss_jax.files import FileError, read_json

FORMAT = 1


class RecordError(GptossError):
    """Output of another job than the one that is to go on."""


@dataclass(frozen=True)
class Record:
    """Everything that an answer depends on, for JSON.

    Attributes:
        input: files, rows and hash of them.
        model: hash of the weights, and how they are computed.
        settings: defaults of prompts and of drawing, the job's seed among them.
        output: what lines look like.
    """

    input: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    output: Mapping[str, Any]

    def __post_init__(self):
        for part in fields(self):  # as JSON gives them back, so that a tuple and a list are no difference
            object.__setattr__(self, part.name, json.loads(json.dumps(getattr(self, part.name))))

    def check_input(self, input: Mapping[str, Any], path: Path) -> None:
        """Raises RecordError where `input` is not that of this record, which stands at `path`."""
        self.check_same(replace(self, input=input), path)

    def check_same(self, now: "Record", path: Path) -> None:
        """Raises RecordError, a line for each difference, where this record, that at `path`, is of another job."""
        if self.output.get("appended") and not now.output.get("appended"):
            raise RecordError(
                f"{path} is of a job that appends its lines to OUT, and --keep-order and --shard write them elsewhere: "
                "leave these out; --restart begins anew"
            )
        differences = []
        for part in map(attrgetter("name"), fields(self)):
            before, after = getattr(self, part), getattr(now, part)
            for name in dict.fromkeys((*before, *after)):
                if before.get(name) != after.get(name):
                    was, now_is = _short(before.get(name)), _short(after.get(name))
                    differences.append(f"{part}, {name}: {was} then, {now_is} now")
        if differences:
            first = f"{path} is of another job than this one; --restart begins anew, another OUT keeps both"
            raise RecordError("\n".join([first, *differences]))


def _short(value: object) -> str:
    return "nothing" if value is None else short(value)


def write(path: Path, record: Record) -> None:
    """Puts the record at `path`, whole.

    Raises:
        WriteError: it cannot be written.
    """
    text = json.dumps({"format": FORMAT, **asdict(record)}, indent=2, ensure_ascii=False) + "\n"
    whole_files.write_whole(path, text.encode())


def create(path: Path, record: Record) -> None:
    """Puts the record at `path` where there is none yet; of several processes that do so at once, one does.

    Raises:
        RecordError: another process has put another job's there.
        WriteError: it cannot be written.
    """
    own = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # process ids are alike on several machines
    write(own, record)
    try:
        os.link(own, path)
        whole_files.sync_folder(path.parent)
    except FileExistsError:
        if existing := read(path):
            existing.check_same(record, path)
    except OSError as error:  # some file systems of clusters know no second name for a file
        raise RecordError(
            f"cannot write {path}: {error.strerror}; --state names a folder that has hard links"
        ) from None
    finally:
        own.unlink()


def read(path: Path) -> Record | None:
    """The record at `path`; None: there is none.

    Raises:
        GptossError: something else stands there.
    """
    if not path.exists():
        return None
    try:
        document = read_json(path)
    except FileError as error:
        raise RecordError(f"{path} is damaged, {error.what}: remove it together with the job's output") from None
    parts = ("input", "model", "settings", "output")
    is_one = isinstance(document, dict) and all(isinstance(document.get(part), dict) for part in parts)
    if not is_one or document.get("format") != FORMAT:
        raise RecordError(f"{path} is no job's record of this version: remove it together with the job's output")
    return Record(*(document[part] for part in parts))
