"""What every command line does alike: help, dashes in flag names, one line for what the user can mend, exit code 2."""

import functools
import gc
import itertools
import json
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TextIO

from absl import app, flags, logging

from gptoss_jax.cli import interrupts, mistakes, watch
from gptoss_jax.cli.escapes import guard_terminals
from gptoss_jax.cli.mistakes import spelled
from gptoss_jax.errors import GptossError
from gptoss_jax.runtime import device_memory

EXIT_CODE = 2
HELP_WIDTH = 80
HELP = {"--help", "-h", "-?", "--helpshort", "--helpfull"}  # the last two are absl's
GC_THRESHOLD = 100_000  # objects; at Python's 700, scanning JAX's modules while they load takes a tenth of the start

Sections = Mapping[str, Sequence[str]]
"""Headings of the help text -> names of the flags below them."""


def run(main: Callable[[list[str]], None], name: str, sections: Sections | None = None) -> None:
    """Runs `main` on the command line's positional arguments.

    `--two-words` and `--two_words` are the same flag, and flags may follow positional arguments. A GptossError
    or OSError that `main` raises becomes a line on stderr per problem, after `name`, and exit code 2, and so does a
    device that runs out of memory; Ctrl-C exit code 130. Anything else is a bug and keeps its traceback.

    Args:
        main: the command; its module's docstring is its help.
        name: what it is called in messages.
        sections: how its flags are grouped in --help; None: in one section.
    """
    gc.set_threshold(GC_THRESHOLD)
    device_memory.reserve()  # before JAX looks
    open_streams(name)
    parse = functools.partial(_parse, name=name, sections=sections, module=main.__module__)
    try:
        _guard(lambda: app.run(lambda argv: main(argv[1:]), flags_parser=parse), name)
    finally:  # the exit code is decided, however long a hand insists
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt:  # it did while the memory of a model was given back
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def refuse(message: str, name: str) -> NoReturn:
    """Says what is wrong, line by line, and exits with 2."""
    watch.fail(EXIT_CODE)
    try:
        for line in message.split("\n"):
            print(f"{name}: {line}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        write_nowhere(sys.stderr)
    sys.exit(EXIT_CODE)


def open_streams(name: str) -> None:
    """Makes the standard streams what commands expect.

    Where the shell closed one (`<&-`), reading gives nothing and stderr goes nowhere; an answer needs a place. On
    terminals control characters are shown, and a character that an encoding lacks is no reason to stop.
    """
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if sys.stdout is None:
        refuse("stdout is closed, expected a place for the answer: > FILE, or > /dev/null", name)
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]  (a text stream)
    guard_terminals()
    logging.get_absl_handler().python_handler.setStream(sys.stderr)  # it has the one from before


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
    given = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    default = "" if flag.boolean or given in (None, "") else f" [{given}]"
    indent = " " * 6
    return f"{usage}\n" + textwrap.fill(meaning + default, HELP_WIDTH, initial_indent=indent, subsequent_indent=indent)


def _value_and_meaning(flag: flags.Flag) -> tuple[str, str]:
    """Help that begins with `WORD: ` names the flag's value so; absl begins an enum's with `<one|another>: `."""
    found = re.fullmatch(r"<?([A-Z][A-Z=,./:]*|[\w|-]+(?=>))>?: (.*)", flag.help or "", re.DOTALL)
    return (found[1], found[2]) if found else (flag.flag_type().upper(), flag.help or "")


def _parse(argv: Sequence[str], name: str, sections: Sections | None = None, module: str = "__main__") -> list[str]:
    flags.FLAGS.set_gnu_getopt(True)
    logging.set_verbosity(logging.WARNING)  # --verbosity=0 brings the libraries' own progress back
    typed = set(itertools.takewhile(lambda argument: argument != "--", argv[1:]))
    if typed & HELP:
        print(f"{sys.modules[module].__doc__}\nDashes and underscores in flags are the same.\n")
        print(help_text(flags.FLAGS, sections or {"Flags": _flags_of(module)}))
        sys.exit(0)
    if "--version" in typed:
        print(f"gptoss-jax {_version()}")
        sys.exit(0)
    try:
        arguments = flags.FLAGS([_as_defined(argument) for argument in argv])
    except (flags.Error, ValueError) as error:  # absl raises the second for --noflag=value
        refuse(f"{mistakes.of_flag(error)} (--help lists the flags)", name)
    for flag in map(flags.FLAGS.__getitem__, flags.FLAGS):
        if flag.value == "" and _value_and_meaning(flag)[0] == "FILE":
            refuse(f"{spelled(flag.name)} is empty, expected the name of a file", name)
    return arguments


def _version() -> str:
    import importlib.metadata  # here, since it takes as long as the rest of --help

    try:
        return importlib.metadata.version("gptoss-jax")
    except importlib.metadata.PackageNotFoundError:  # a checkout
        return "is not installed"


def _flags_of(module: str) -> list[str]:
    """Names of the flags that a command's module defines."""
    key = sys.argv[0] if module == "__main__" else module  # as absl keeps them
    return [flag.name for flag in flags.FLAGS.get_key_flags_for_module(key)]


def _as_defined(argument: str) -> str:
    """A flag with the underscores that its definition has, --no-two-words too; any other argument as it is."""
    defined = re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), argument)
    without = re.fullmatch(r"--no_(\w+)(=.*)?", defined)
    return f"--no{defined[5:]}" if without and without[1] in flags.FLAGS else defined


def _guard(work: Callable[[], None], name: str) -> None:
    """Does the work, and says in one line, or by an exit code, what kept it from being done."""
    interrupts.raise_when_pressed()
    try:
        try:
            work()
        finally:
            _flush()
    except BrokenPipeError:  # `| head` has seen enough
        write_nowhere(sys.stdout)
        watch.fail(128 + signal.SIGPIPE)
        sys.exit(128 + signal.SIGPIPE)
    except GptossError as error:
        refuse(str(error), name)
    except OSError as error:
        refuse(mistakes.of_file(error), name)
    except Exception as error:
        if not (message := mistakes.of_memory(error)):
            watch.wait_for_verdict()  # a library's error may come of another process's end
            watch.fail(1)
            raise
        refuse(message, name)
    except KeyboardInterrupt:
        watch.fail(interrupts.EXIT_CODE)
        print(file=sys.stderr)
        sys.exit(interrupts.EXIT_CODE)


def _flush() -> None:
    """Writes what was printed, while a full disk can still be said; at Python's exit it would be a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        write_nowhere(sys.stdout)
        raise OSError(error.errno, error.strerror, "stdout") from None
