"""Files that others wrote: regular ones only, and JSON that is bounded in size and depth. What is wrong is one line.

Knows nothing of what the files mean. Every JSON file of the product is read here, or parsed here where it may as well
come through a pipe.
"""

import codecs
import json
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptoss_jax.errors import GptossError, one_line, short

CONFIGS = Path(__file__).parents[1] / "configs"
MAX_BYTES = 32 << 20  # thirty times the index of the largest published model
MAX_DIGITS = 600  # twice those of the largest float64, and no more than any Python reads
MAX_DEPTH = 64  # openai-harmony takes no more than 128, each message adding some

_SPECIAL = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
_POINTER = "a Git LFS pointer in place of the file: run `git lfs pull` in its folder, or fetch it with `hf download`"
_PAGE = "a web page saved under this name: fetch the file again"
_BEGINNINGS = {
    b"version https://git-lfs": _POINTER,
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
    b"gguf": "a GGUF file under another name; convert the published safetensors",
    b"pk\x03\x04": "a zip archive, as PyTorch and Excel save: expected another format",
    b"\x80\x02": "a Python pickle, as PyTorch saves: expected another format",
    b"\0\0\0\0": "filled with zeros, as a crash or a broken download leaves it: fetch it again",
    b"\x1f\x8b": "packed with gzip: unpack it",
    b"bzh": "packed with bzip2: unpack it",
    b"\xfd7zxz\0": "packed with xz: unpack it",
}

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)  # the first begins as UTF-16 does
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


class FileError(GptossError):
    """A file that is absent, or cannot be what is expected in its place.

    Attributes:
        what: the message without the file's name.
    """

    def __init__(self, name: str | Path, what: str, joint: str = ": "):
        super().__init__(one_line(f"{name}{joint}{what}"))
        self.what = what


def of_configs(path: str | Path) -> Path:
    """`path`; where nothing is there and it begins with configs/, the file of that name that is installed with us."""
    path = Path(path)
    installed = CONFIGS.joinpath(*path.parts[1:])
    return installed if path.parts[:1] == ("configs",) and not path.exists() and installed.is_file() else path


def check_regular(path: str | Path) -> os.stat_result:
    """What the system knows of the file at `path`, through links.

    Raises:
        FileError: nothing is there, or what is no file: a pipe, say, which would be waited for.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        link = f"a link to {os.readlink(path)}, which is not there: fetch it again" if os.path.islink(path) else ""
        raise FileError(path, link or "no such file") from None
    except OSError as error:
        raise FileError(path, str(error.strerror)) from None
    for is_kind, kind in _SPECIAL.items():
        if is_kind(found.st_mode):
            raise FileError(path, f"{kind}, expected a file")
    return found


def read_json(path: str | Path) -> Any:
    """What the JSON file at `path` holds.

    Raises:
        FileError: it is no regular file, too large, no JSON, or JSON that breaks later: see `parse_json`.
        OSError: the file system does not give it.
    """
    size_bytes = check_regular(path).st_size
    if size_bytes > MAX_BYTES:
        raise FileError(path, f"{size_bytes:,} bytes, expected JSON of at most {MAX_BYTES:,}")
    with open(path, "rb") as file:
        return parse_json(file.read(MAX_BYTES), path)


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object.

    Raises:
        GptossError: a key stands in it twice.
    """
    value = {}
    for key, part in pairs:
        if key in value:
            raise GptossError(f"the key {short(key)} stands twice in one object")
        value[key] = part
    return value


def parse_json(
    data: bytes | str,
    name: str | Path,
    objects: Callable[[list[tuple[str, Any]]], Any] = distinct,
    whole: str = "the file",
) -> Any:
    """The value that a JSON text stands for.

    Args:
        data: the text, or its bytes in UTF-8, of which a byte order mark is passed over.
        name: of the file, for errors.
        objects: makes an object of its keys and values.
        whole: what errors call all of the text.

    Raises:
        FileError: no JSON; a key twice in one object; NaN, infinities, numbers out of float64's range, half characters,
            deep nesting.
    """
    try:
        text = data if isinstance(data, str) else decoded(data, whole)
        value = json.loads(text, object_pairs_hook=objects, parse_int=_integer)
        check_value(value, whole)
        return value
    except json.JSONDecodeError as error:
        fault, joint = f"line {error.lineno}, column {error.colno}: {error.msg}; expected JSON", ", "
    except RecursionError:
        fault, joint = f"is nested too deeply, at most {MAX_DEPTH} levels are taken", " "
    except GptossError as error:
        fault, joint = str(error), ": "
    if known := recognize(data):
        raise FileError(name, known)
    raise FileError(name, fault, joint)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise GptossError(f"a number of {len(digits)} digits is out of range")
    return int(digits)


def decoded(data: bytes, name: str) -> str:
    """The text of a file, without a byte order mark.

    Args:
        data: all of the file.
        name: what errors call it.

    Raises:
        GptossError: it is no UTF-8; UTF-16 and UTF-32 are named, with a way to convert them.
    """
    check_not_wide(data, name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GptossError(
            f"{name} is not valid UTF-8 at byte {error.start}; if it is in Windows' older encoding, "
            "`iconv -f WINDOWS-1252 -t UTF-8` converts it"
        ) from None


def check_not_wide(data: bytes, name: str) -> None:
    """Raises GptossError for a text, called `name`, that begins as UTF-16 or UTF-32, with a way to convert it."""
    for encoding, found in (("UTF-32", data.startswith(_UTF_32)), ("UTF-16", _looks_like_utf_16(data))):
        if found:
            raise GptossError(
                f"{name} is {encoding}, expected UTF-8: convert it with `iconv -f {encoding} -t UTF-8`, or have "
                "PowerShell write UTF-8 (`| Out-File -Encoding utf8 FILE` in place of `> FILE`)"
            )


def _looks_like_utf_16(data: bytes) -> bool:
    """By its mark, or since only every other byte of nearly all of it is zero, as in Latin text without a mark."""
    start = data[:1024]
    few, many = sorted((start[0::2].count(0), start[1::2].count(0)))
    return data.startswith(_UTF_16) or (len(start) > 1 and many > 0.4 * len(start) > 4 * few)


def recognize(data: bytes | str) -> str:
    """What a file is that is not what its name says, and what to do; "" if its beginning is not known."""
    beginning = data[:64].encode(errors="replace") if isinstance(data, str) else data[:64]
    beginning = beginning.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return next((kind for magic, kind in _BEGINNINGS.items() if beginning.startswith(magic)), "")


def check_value(value: object, where: str, depth: int = 0) -> None:
    """Refuses what passes as JSON and breaks later.

    Raises:
        GptossError: half characters, numbers out of float64's range, deep nesting.
    """
    if depth > MAX_DEPTH:
        raise GptossError(f"the value is nested too deeply, at most {MAX_DEPTH} levels are taken")
    if isinstance(value, str):
        if _HALF_CHARACTER.search(value):
            raise GptossError(f"{where} holds half a surrogate pair, which is no text")
    elif isinstance(value, int | float):
        if not abs(value) <= sys.float_info.max:  # Python reads NaN, Infinity, and 1e999 as infinity
            raise GptossError(f"{where}{': NaN is no JSON' if value != value else ' is a number out of range'}")
    elif isinstance(value, dict):
        for key, part in value.items():
            check_value(key, f"a key in {where}", depth)
            check_value(part, f"{where}, {short(key)}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            check_value(part, f"{where}, [{index}]", depth + 1)
