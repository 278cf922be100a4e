"""What every command line does alike: dashes in flag names, one line for what the user can mend, exit code 2."""

import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

EXIT_CODE = 2


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main` on the command line's positional arguments.

    `--two-words` and `--two_words` are the same flag, and flags may follow positional arguments. A ValueError or
    OSError that `main` raises becomes one line on stderr per problem and exit code 2; Ctrl-C exit code 130. Anything
    else is a fault of ours and keeps its traceback.
    """
    app.run(lambda argv: _guard(main, argv[1:]), flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    flags.FLAGS.set_gnu_getopt(True)
    words = [re.sub(r"^--?[a-zA-Z][\w-]*", lambda name: name[0].replace("-", "_"), word) for word in argv[1:]]
    words = [re.sub(r"^_+", lambda dashes: "-" * len(dashes[0]), word) for word in words]
    try:
        return flags.FLAGS([argv[0], *words])
    except flags.Error as error:
        sys.exit(_report(f"{error} (--help lists the flags)"))


def _guard(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    try:
        main(arguments)
    except (ValueError, OSError) as error:
        sys.exit(_report(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _report(message: str) -> int:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return EXIT_CODE
