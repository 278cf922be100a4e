"""What every command line does alike: help, dashes in flag names, one line for what the user can mend, exit code 2."""

import functools
import gc
import json
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TextIO

from absl import app, flags, logging

from gptoss_jax.errors import GptossError

EXIT_CODE = 2
INTERRUPTED = 128 + signal.SIGINT
HELP_WIDTH = 80
GC_THRESHOLD = 100_000  # objects; at Python's 700, scanning JAX's modules while they load takes a tenth of the start

Sections = Mapping[str, Sequence[str]]
"""Headings of the help text -> names of the flags below them."""


def run(main: Callable[[list[str]], None], name: str, sections: Sections | None = None) -> None:
    """Runs `main` on the command line's positional arguments.

    `--two-words` and `--two_words` are the same flag, and flags may follow positional arguments. A GptossError
    or OSError that `main` raises becomes a line on stderr per problem, after `name`, and exit code 2; Ctrl-C exit code
    130. Anything else is a bug and keeps its traceback.

    Args:
        main: the command; its module's docstring is its help.
        name: what it is called in messages.
        sections: how its flags are grouped in --help; None: in one section.
    """

    def guarded(argv: list[str]) -> None:
        try:
            _guard(main, argv[1:], name)
        finally:  # the exit code is decided, however long a hand insists
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            except KeyboardInterrupt:  # it did while the memory of a model was given back
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    gc.set_threshold(GC_THRESHOLD)
    open_streams(name)
    parse = functools.partial(_parse, name=name, sections=sections, module=main.__module__)
    app.run(guarded, flags_parser=parse)


def refuse(message: str, name: str) -> NoReturn:
    """Says what is wrong, line by line, and exits with 2."""
    try:
        for line in message.splitlines():
            print(f"{name}: {line}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        write_nowhere(sys.stderr)
    sys.exit(EXIT_CODE)


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """While the block runs, Ctrl-C ends the process at once: JAX's imports would swallow an exception."""
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def open_streams(name: str) -> None:
    """Streams that the shell closed (`<&-`): reading gives nothing, stderr goes nowhere; an answer needs a place."""
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if sys.stdout is None:
        refuse("stdout is closed, expected a place for the answer: > FILE, or > /dev/null", name)


def spelled(name: str) -> str:
    """A flag as people type it: --two-words."""
    return f"--{name.replace('_', '-')}"


def spell_flags(message: str, names: Mapping[str, str] = {}) -> str:
    """A library's message with the flags of this command as people type them.

    `names`: what the library calls a flag -> the flag, where they differ.
    """
    known = {name: name for name in flags.FLAGS if "_" in name} | dict(names)
    return re.sub(rf"\b({'|'.join(known)})\b", lambda found: spelled(known[found[0]]), message)


def write_nowhere(stream: TextIO) -> None:
    """Sends what is still written to `stream`, which nobody reads, to nowhere: Python would complain at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def help_text(options: flags.FlagValues, sections: Sections) -> str:
    """Every flag of every section with its values, meaning and default, on lines of at most 80 columns."""
    parts = []
    for heading, names in sections.items():
        parts.append(f"{heading}:")
        parts += [_flag_help(options[name]) for name in names]
        parts.append("")
    return "\n".join(parts)


def to_json(document: object, *, ensure_ascii: bool = False) -> str:
    """Indented JSON, with lists of numbers on one line each; if `ensure_ascii`, other characters as escapes."""
    text = json.dumps(document, indent=2, ensure_ascii=ensure_ascii)
    # Newlines within strings are escaped, so a bracket before a newline is a list's.
    return re.sub(r"\[\n\s+([-+.\deE,\s]+?)\n\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def _flag_help(flag: flags.Flag) -> str:
    value, meaning = _value_and_meaning(flag)
    usage = f"  --[no]{spelled(flag.name)[2:]}" if flag.boolean else f"  {spelled(flag.name)} {value}"
    meaning = meaning.split(";\n")[0]  # what absl adds to a flag that may be repeated
    default = "" if flag.boolean or flag.default in (None, "") or flag.default == [] else f" [{flag.default}]"
    indent = " " * 6
    return f"{usage}\n" + textwrap.fill(meaning + default, HELP_WIDTH, initial_indent=indent, subsequent_indent=indent)


def _value_and_meaning(flag: flags.Flag) -> tuple[str, str]:
    """Help that begins with `WORD: ` names the flag's value so; absl begins an enum's with `<one|another>: `."""
    found = re.fullmatch(r"<?([A-Z][A-Z=,.]*|[\w|-]+(?=>))>?: (.*)", flag.help or "", re.DOTALL)
    return (found[1], found[2]) if found else (flag.flag_type().upper(), flag.help or "")


def _parse(argv: Sequence[str], name: str, sections: Sections | None = None, module: str = "__main__") -> list[str]:
    flags.FLAGS.set_gnu_getopt(True)
    logging.set_verbosity(logging.WARNING)  # --verbosity=0 brings the libraries' own progress back
    if {"--help", "-h"} & set(argv[1:]):
        print(f"{sys.modules[module].__doc__}\nDashes and underscores in flags are the same.\n")
        print(help_text(flags.FLAGS, sections or {"Flags": _flags_of(module)}))
        sys.exit(0)
    try:
        arguments = flags.FLAGS([_as_defined(argument) for argument in argv])
    except flags.Error as error:
        refuse(f"{' '.join(str(error).split())} (--help lists the flags)", name)
    for flag in map(flags.FLAGS.__getitem__, flags.FLAGS):
        if flag.value == "" and _value_and_meaning(flag)[0] == "FILE":
            refuse(f"{spelled(flag.name)} is empty, expected the name of a file", name)
    return arguments


def _flags_of(module: str) -> list[str]:
    """Names of the flags that a command's module defines."""
    key = sys.argv[0] if module == "__main__" else module  # as absl keeps them
    return [flag.name for flag in flags.FLAGS.get_key_flags_for_module(key)]


def _as_defined(argument: str) -> str:
    """A flag with the underscores that its definition has; any other argument as it is."""
    return re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), argument)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt; inside a callback of the garbage collector, which would drop it, a moment later."""
    if frame and any(frame.f_code is getattr(callback, "__code__", None) for callback in gc.callbacks):
        threading.Timer(0.01, os.kill, [os.getpid(), number]).start()
    else:
        raise KeyboardInterrupt


def _guard(main: Callable[[list[str]], None], arguments: list[str], name: str) -> None:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is for jobs in a script's background
        signal.signal(signal.SIGINT, _interrupt)
    try:
        main(arguments)
    except BrokenPipeError:  # `| head` has seen enough
        write_nowhere(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except (GptossError, OSError) as error:
        refuse(str(error), name)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(INTERRUPTED)
