"""Python in the sandbox: reads source code from stdin and runs it, as a script or cell by cell.

Started as `python -c SOURCE script` or `... session`. Each source is 8 bytes of length and UTF-8. A script's end is the
process's; in a session variables stay. File descriptor 3 says "begun" before each, and "done" after each of a session.
A mistake in the code is a traceback, in which this file does not stand.
"""

import ast
import linecache
import os
import sys
import traceback
import types
from typing import Any, BinaryIO

_SPOKEN_ON, _PACKAGES = 3, "/packages"


def main() -> None:
    """Run one script, or the cells of a session until stdin ends."""
    sources = os.fdopen(os.dup(0), "rb")
    os.close(0)
    os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)  # becomes stdin, so that input() ends at once
    os.set_inheritable(_SPOKEN_ON, False)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    is_session = sys.argv[1] == "session"
    sys.argv[:] = ["script.py"]
    sys.path[:] = [path for path in (*sys.path, _PACKAGES) if os.path.exists(path)]
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    if is_session:
        _session(sources, vars(module))
    else:
        sys.exit(not _ran_whole(_next_source(sources) or b"", "script.py", vars(module), shows_last=False))


def _session(sources: BinaryIO, variables: dict[str, Any]) -> None:
    process, cell = os.getpid(), 0
    while (source := _next_source(sources)) is not None:
        cell += 1
        try:
            _ran_whole(source, f"cell {cell}", variables, shows_last=True)
        except SystemExit as asked:
            print(f"SystemExit: {asked}", file=sys.stderr)
        if os.getpid() != process:  # a child that the cell forked, and that came back here
            sys.stdout.flush()
            os._exit(0)
        sys.stdout.flush()
        os.write(_SPOKEN_ON, b"done\n")


def _next_source(sources: BinaryIO) -> bytes | None:
    header = sources.read(8)
    if not header:
        return None
    source = sources.read(int.from_bytes(header, "big"))
    os.write(_SPOKEN_ON, b"begun\n")
    return source


def _ran_whole(source: bytes, name: str, variables: dict[str, Any], *, shows_last: bool) -> bool:
    """Run a source, and print the traceback of what it raises. False if it raised.

    Args:
        source: the code.
        name: what tracebacks call it.
        variables: the globals.
        shows_last: whether the value of a last expression is printed, as by an interactive Python.
    """
    text = source.decode(errors="replace")
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    try:
        codes = _compiled(source, name, shows_last)
    except Exception as error:  # the compiler's frames would say nothing of the code
        return _raised(error.with_traceback(None))
    try:
        for code in codes:
            exec(code, variables)
    except SystemExit:
        raise
    except BaseException as error:
        frame_here = error.__traceback__
        return _raised(error.with_traceback(frame_here.tb_next if frame_here else None))
    return True


def _raised(error: BaseException) -> bool:
    sys.stdout.flush()
    traceback.print_exception(error)
    return False


def _compiled(source: bytes, name: str, shows_last: bool) -> list[types.CodeType]:
    tree = ast.parse(source, name)
    if not (shows_last and tree.body and isinstance(tree.body[-1], ast.Expr)):
        return [compile(tree, name, "exec")]
    last = tree.body.pop()
    return [compile(tree, name, "exec"), compile(ast.Interactive([last]), name, "single")]


if __name__ == "__main__":
    main()
