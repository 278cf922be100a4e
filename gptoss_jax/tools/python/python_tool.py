"""The built-in python tool: each call's code runs in a sandbox, and what it prints is the output."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_jax.errors import short
from gptoss_jax.tools.python import sandbox
from gptoss_jax.tools.python.sandbox import Limits, Outcome, Sandbox
from gptoss_jax.tools.tool import ToolOutput

if TYPE_CHECKING:
    from openai_harmony import ToolDescription

_MAX_SOURCE_CHARACTERS = 1 << 20


class PythonTool:
    """Runs Python. Mistakes in the code are tracebacks, and what the model is to read.

    Without a sandbox there is no tool: code never runs outside one. Scripts may run at the same time, cells of a
    session one after the other. A session that meets a limit begins anew at the next call, and the output says so.

    Args:
        stateful: calls are cells of one session, which keeps variables and files, and shows the value of a last
            expression; else each is a script in a sandbox of its own.
        limits: what code may use.
        packages: a folder of packages that code may import (`pip install --target FOLDER numpy`); else the standard
            library alone.

    Raises:
        GptossError: this machine gives no sandbox, or `packages` is no folder.
    """

    functions: "tuple[ToolDescription, ...]" = ()

    def __init__(self, *, stateful: bool = False, limits: Limits | None = None, packages: Path | None = None):
        self._stateful, self._limits, self._packages = stateful, limits or Limits(), packages
        self.builtin: str | None = "python" if stateful else "stateless_python"  # what the system message says of it
        sandbox.check(self._limits, packages)
        self._one_cell, self._changes = threading.Lock(), threading.Lock()
        self._sandboxes: set[Sandbox] = set()
        self._session: Sandbox | None = None
        self._is_closed = False

    def takes(self, recipient: str) -> bool:
        """Whether a call is for Python."""
        return recipient == "python"

    def call(self, recipient: str, arguments: str) -> ToolOutput:
        """Run code."""
        if not self.takes(recipient):
            return ToolOutput(f"there is no tool {short(recipient)}; Python code goes to python", failed=True)
        if len(arguments) > _MAX_SOURCE_CHARACTERS:
            return ToolOutput(
                f"{len(arguments):,} characters of code, of {_MAX_SOURCE_CHARACTERS:,} at most", failed=True
            )
        try:
            return self._run_cell(arguments) if self._stateful else self._run_script(arguments)
        except OSError as error:
            return ToolOutput(f"the sandbox did not start: {error.strerror}", failed=True)

    def close(self) -> None:
        """End all processes, those of calls that still run too."""
        with self._changes:
            self._is_closed = True
        for running in tuple(self._sandboxes):
            running.close()

    def _run_script(self, code: str) -> ToolOutput:
        running = self._started(is_session=False)
        try:
            return _output(running.run(code), lost="")
        finally:
            running.close()
            self._sandboxes.discard(running)

    def _run_cell(self, code: str) -> ToolOutput:
        with self._one_cell:
            if self._session is None or self._session.is_closed:
                self._sandboxes.clear()
                self._session = self._started(is_session=True)
            return _output(self._session.run(code), lost="; its variables and files are lost")

    def _started(self, *, is_session: bool) -> Sandbox:
        with self._changes:
            if self._is_closed:
                raise OSError(0, "the tool is closed")
            running = Sandbox(self._limits, is_session=is_session, packages=self._packages)
            self._sandboxes.add(running)
        return running


def _output(outcome: Outcome, lost: str) -> ToolOutput:
    if outcome.broken:
        return ToolOutput(f"the sandbox did not start: {outcome.broken}", failed=True)
    if outcome.stopped:
        line_break = "" if outcome.text.endswith("\n") or not outcome.text else "\n"
        return ToolOutput(f"{outcome.text}{line_break}[{outcome.stopped}{lost}]", failed=True)
    return ToolOutput(outcome.text)
