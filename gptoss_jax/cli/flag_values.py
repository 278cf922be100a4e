"""How values of flags are read, and which flags may stand together."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from absl import flags

from gptoss_jax.cli.mistakes import spell_flags, spelled
from gptoss_jax.errors import GptossError
from gptoss_jax.files import decoded

MAX_TEXT_BYTES = 2**28  # so that /dev/zero and its like are refused; far more than anybody waits for to be scored


def refuse_together(options: flags.FlagValues, *pairs: tuple[str, str]) -> None:
    """Raises GptossError if both flags of a pair were given: one of them would have no effect."""
    for first, second in pairs:
        if options[first].value and options[second].value:
            raise GptossError(f"{spelled(first)} and {spelled(second)}: leave one of them out")


def refuse_without(options: flags.FlagValues, *pairs: tuple[str, str]) -> None:
    """Raises GptossError if the first flag of a pair was given and not the second, without which it has no effect."""
    for first, second in pairs:
        if options[first].value and not options[second].value:
            raise GptossError(f"{spelled(first)} has an effect with {spelled(second)} only: give both")


def token_ids(flag: str, texts: Sequence[str]) -> tuple[int, ...]:
    """The token ids that a flag lists.

    Raises:
        GptossError: something else among them.
    """
    try:
        return tuple(map(int, texts))
    except ValueError:
        raise GptossError(f"{spelled(flag)} is {','.join(texts)!r}, expected whole numbers such as 1,2,3") from None


def only_source(
    options: flags.FlagValues, arguments: Sequence[str], what: str, names: Sequence[str]
) -> tuple[str, str] | None:
    """The one of several flags that was given, and its value; a positional argument stands for the first flag.

    Raises:
        GptossError: more than one, or several arguments.
    """
    if len(arguments) > 1:
        raise GptossError(f"unexpected argument {arguments[1]!r}: a {what} of several words goes in quotes")
    sources: dict[str, tuple[str, str]] = {f"a {what}": (names[0], argument) for argument in arguments}
    for name in names:
        value: Any = options[name].value
        if value is not None:
            sources[spelled(name)] = (name, value)
    if len(sources) > 1:
        raise GptossError(f"{' and '.join(sources)}: expected one of them")
    return next(iter(sources.values()), None)


def read_text(path: str) -> str:
    """The text in a file, - being stdin, without a byte order mark and the newline at its end.

    Raises:
        OSError: the file cannot be read.
        GptossError: it has no end in sight, is no UTF-8, or holds white space only.
    """
    name = "stdin" if path == "-" else path
    with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise GptossError(f"{name} holds more than {MAX_TEXT_BYTES >> 20} MiB, expected a text")
    text = decoded(data, name)
    if not text.strip():
        raise GptossError(f"{name} holds no text (--help lists the ways to give one)")
    return text.removesuffix("\n").removesuffix("\r")


@contextmanager
def naming_flags(flag_of: Mapping[str, str] = {}) -> Iterator[None]:
    """Has complaints name flags as people type them, rather than the fields that the flags fill.

    `flag_of`: field -> flag, where they differ.
    """
    try:
        yield
    except GptossError as error:
        raise GptossError(spell_flags(str(error), flag_of)) from None
