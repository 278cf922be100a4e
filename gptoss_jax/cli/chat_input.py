"""What a user of the chat enters: edited, completed and remembered in a terminal, else lines of stdin."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_jax.cli.escapes import raw_stream
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.runtime import user_cache

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History

HISTORY = "chat_history"
HISTORY_BYTES = 1 << 20  # what is kept of it, at a session's start


def inputs(screen: Screen, completions: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What the user enters, one text after another; a backslash at its end continues a line.

    Args:
        screen: where hints are shown.
        completions: commands, and the words that may follow each; FILE stands for any file's name.
    """
    can_edit = sys.stdin.isatty() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    ask = _editor(screen, completions) if can_edit else _lines()
    while True:
        try:
            text = ask()
            while text.endswith("\\"):
                text = text[:-1] + "\n" + ask()
        except EOFError:
            return
        yield text


def _lines() -> Callable[[], str]:
    """Reads a line; bytes that are no UTF-8 come as half characters, which are refused where they would be used."""
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # pyright: ignore[reportAttributeAccessIssue]  (a text stream)
    mark = "> " if sys.stdin.isatty() and sys.stderr.isatty() else ""

    def read() -> str:
        print(mark, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print("\n" if mark else "", end="", file=sys.stderr)
            raise EOFError
        return line.removesuffix("\n")

    return read


def _editor(screen: Screen, completions: Mapping[str, Sequence[str]]) -> Callable[[], str]:
    """Asks for a line with editing and history; on stderr, so that stdout holds answers only."""
    from prompt_toolkit import PromptSession  # here, since it is needed in a terminal only
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        key_bindings=keys,
        output=create_output(stdout=raw_stream(sys.stderr)),
        completer=_completer(completions),
        complete_while_typing=False,
        history=_history(),
    )

    def ask() -> str:
        while True:
            try:
                return session.prompt("> ", prompt_continuation="  ")
            except KeyboardInterrupt:
                screen.say("(Ctrl-D or /quit ends the session)")

    return ask


def _completer(completions: Mapping[str, Sequence[str]]) -> "Completer":
    """Completes commands, and what may follow them."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class _Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> "Iterator[Completion]":
            command, space, text = document.text_before_cursor.partition(" ")
            words = completions.get(command.lower(), ()) if space else completions
            if "FILE" in words:
                yield from PathCompleter(expanduser=True).get_completions(Document(text), complete_event)
            for word in words:
                typed = text if space else command
                if word.startswith(typed.lower()) and word.islower():
                    yield Completion(word, start_position=-len(typed))

    return _Commands()


def _history() -> "History":
    """What was entered in earlier sessions, kept for its user's eyes; where it cannot be, that of this session."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path = user_cache.cache_folder() / HISTORY
        _prepare(path)
    except (OSError, RuntimeError):  # no home at all raises the second
        return InMemoryHistory()

    class _Kept(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk is no reason to end a chat
                super().store_string(string)

    return _Kept(path)


def _prepare(path: Path) -> None:
    """Makes the file, for its owner alone; of a long one the end stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        os.fchmod(descriptor, 0o600)
        if os.fstat(descriptor).st_size > HISTORY_BYTES:
            file.seek(-HISTORY_BYTES // 2, os.SEEK_END)
            end = file.read().partition(b"\n\n")[2]
            user_cache.keep(path, b"\n" + end)
