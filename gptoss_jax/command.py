"""What every command line does alike: dashes in flag names, one line for what the user can mend, exit code 2."""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

EXIT_CODE = 2
INTERRUPTED = 128 + signal.SIGINT


def run(main: Callable[[list[str]], None], name: str) -> None:
    """Runs `main` on the command line's positional arguments.

    `--two-words` and `--two_words` are the same flag, and flags may follow positional arguments. A ValueError or
    OSError that `main` raises becomes a line on stderr per problem, behind `name`, and exit code 2; Ctrl-C exit code
    130. Anything else is a fault of ours and keeps its traceback.
    """
    app.run(lambda argv: _guard(main, argv[1:], name), flags_parser=lambda argv: _parse(argv, name))


def refuse(message: str, name: str) -> NoReturn:
    """Says what is wrong, line by line, and exits with 2."""
    for line in message.splitlines():
        print(f"{name}: {line}", file=sys.stderr)
    sys.exit(EXIT_CODE)


def _parse(argv: Sequence[str], name: str) -> list[str]:
    flags.FLAGS.set_gnu_getopt(True)
    logging.set_verbosity(logging.WARNING)  # --verbosity=0 brings the libraries' own progress back
    if {"--help", "-h"} & set(argv[1:]):
        print(f"{sys.modules['__main__'].__doc__}\nFlags (dashes and underscores are the same):\n")
        print(flags.FLAGS.main_module_help())
        sys.exit(0)
    words = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    try:
        return flags.FLAGS(words)
    except flags.Error as error:
        refuse(f"{' '.join(str(error).split())} (--help lists the flags)", name)


def _guard(main: Callable[[list[str]], None], arguments: list[str], name: str) -> None:
    try:
        main(arguments)
    except BrokenPipeError:  # `| head` has seen enough; Python would complain once more while closing stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError) as error:
        refuse(str(error), name)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(INTERRUPTED)
