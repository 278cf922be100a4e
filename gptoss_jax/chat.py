"""An interactive session: a conversation with history, commands that begin with a slash, answers as they come."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from openai_harmony import Message, Role
from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from gptoss_jax import harmony, messages
from gptoss_jax.answer import AnswerStream, Sample, call_document, collect
from gptoss_jax.engine import Engine, Request
from gptoss_jax.harmony import Settings
from gptoss_jax.messages import Conversation
from gptoss_jax.parser import Delta
from gptoss_jax.terminal import AnswerView, Screen, interruptible, remarks
from gptoss_jax.tokenizer import Tokenizer


@dataclass
class Talk:
    """A conversation and the engine that goes on with it. Knows no terminal.

    Attributes:
        runner: one row at least.
        words: the vocabulary.
        request: how answers are drawn and end; its tokens are those of each turn.
        stop_strings: texts before which an answer ends.
        settings: what the model is told.
        said: the conversation so far, without what the settings put in front.
        vocab_path: as for `harmony.render`.
        samples: the answers of this session.
    """

    runner: Engine
    words: Tokenizer
    request: Request
    stop_strings: tuple[str, ...]
    settings: Settings
    said: list[Message]
    vocab_path: str | None = None
    samples: list[Sample] = field(default_factory=list)

    def answer(
        self, new: Sequence[Message], show: Callable[[list[Delta]], None], interrupted: Callable[[], bool]
    ) -> Sample:
        """The answer to `new` messages, both of which the conversation then holds.

        Raises:
            ValueError: the conversation no longer fits the context; it stays as it was.
        """
        said = [*self.said, *new]
        stream = AnswerStream(self.words, stop_strings=self.stop_strings)
        prompt = tuple(self.render(said))
        request = replace(self.request, token_ids=prompt, ends_at=stream.ends_at)
        (sample,) = collect(self.runner, [request], [stream], show, interrupted)
        self.said = [*said, *messages.from_parsed(sample.answer.history())]
        self.samples.append(sample)
        return sample

    def render(self, said: Sequence[Message]) -> list[int]:
        """The ids behind which the assistant speaks next."""
        return harmony.render(said, self.settings, vocab_path=self.vocab_path)

    def change(self, **fields: str) -> None:
        """Other settings from the next turn on.

        Raises:
            ValueError: a value that cannot be, or the conversation brings system messages of its own.
        """
        settings = replace(self.settings, **fields)
        harmony.check_can_be_set(self.said, list(fields))
        self.settings = settings

    def conversation(self) -> list[Message]:
        """All messages, with what the settings put in front."""
        return harmony.with_opening(self.said, self.settings)


def run(talk: Talk, screen: Screen, *, show_reasoning: bool) -> None:
    """Reads and answers until the input ends or /quit."""
    console = _Console(talk, screen, show_reasoning)
    screen.say("/help lists the commands; Alt-Enter begins a new line; Ctrl-C stops an answer, Ctrl-D ends the session")
    for text in _inputs(screen):
        if text.startswith("/"):
            if not console.obey(text):
                return
        elif text.strip():
            console.turn([Message.from_role_and_content(Role.USER, text.strip())])


class _Command(NamedTuple):
    usage: str
    meaning: str
    act: Callable[[str], None]


class _Console:
    """What a session does with a line of input."""

    def __init__(self, talk: Talk, screen: Screen, show_reasoning: bool):
        self._talk, self._screen, self._show_reasoning = talk, screen, show_reasoning
        efforts = "|".join(harmony.REASONING_EFFORTS)
        self._commands = {
            "/effort": _Command(efforts, "how long the model thinks", self._effort),
            "/system": _Command("TEXT", "instructions; without TEXT: none", self._system),
            "/reasoning": _Command("", "show the reasoning, or hide it again", self._reasoning),
            "/result": _Command("TEXT", "the result of the tool call that waits for one", self._result),
            "/reset": _Command("", "forget the conversation", self._reset),
            "/save": _Command("FILE", "write the conversation, for --messages", self._save),
            "/stats": _Command("", "tokens, speed and context so far", self._stats),
            "/help": _Command("", "this list", self._help),
            "/quit": _Command("", "end the session, as Ctrl-D does", self._help),
        }

    def obey(self, line: str) -> bool:
        """Runs a command; false if the session is to end."""
        name, _, text = line.partition(" ")
        if name == "/quit":
            return False
        if name not in self._commands:
            self._screen.say(f"unknown command {name}: /help lists them (a space in front makes it text)")
            return True
        try:
            self._commands[name].act(text.strip())
        except (ValueError, OSError) as error:
            self._screen.say(str(error))
        return True

    def turn(self, new: Sequence[Message]) -> None:
        """An answer to `new` messages."""
        view = AnswerView(self._screen, show_reasoning=self._show_reasoning)
        try:
            with interruptible() as interrupted:
                sample = self._talk.answer(new, view.show, interrupted)
        except ValueError as error:
            self._screen.say(f"{error} (/reset forgets the conversation)")
            return
        view.finish(sample.answer)
        for call in map(call_document, sample.answer.parsed.calls):
            self._screen.say(f"call {call['name']}({call['arguments']}): /result answers it")
        for remark in remarks(sample.answer):
            self._screen.say(remark)

    def _effort(self, text: str) -> None:
        self._talk.change(reasoning_effort=text)

    def _system(self, text: str) -> None:
        self._talk.change(instructions=text)

    def _reasoning(self, text: str) -> None:
        self._show_reasoning = not self._show_reasoning
        self._screen.say(f"reasoning is {'shown' if self._show_reasoning else 'hidden'}")

    def _result(self, text: str) -> None:
        self.turn(messages.tool_results([{"content": text}], Conversation(tuple(self._talk.said))))

    def _reset(self, text: str) -> None:
        self._talk.said = []

    def _save(self, text: str) -> None:
        if not text:
            raise ValueError("/save: expected a file name")
        messages.write_messages(text, self._talk.conversation())
        self._screen.say(f"{len(self._talk.said)} messages written to {text}")

    def _stats(self, text: str) -> None:
        tokens = sum(len(sample.answer.parsed.token_ids) for sample in self._talk.samples)
        seconds = sum(sample.last_token_seconds - sample.first_token_seconds for sample in self._talk.samples)
        context = len(self._talk.render(self._talk.said))
        limit = self._talk.runner.engine_config.max_context_tokens
        speed = f" at {(tokens - len(self._talk.samples)) / seconds:.2f} tokens/s" if seconds else ""
        self._screen.say(f"answers: {len(self._talk.samples)}, of {tokens} tokens{speed}")
        self._screen.say(f"conversation: {context} of {limit} tokens; effort: {self._talk.settings.reasoning_effort}")

    def _help(self, text: str) -> None:
        for name, command in self._commands.items():
            self._screen.say(f"  {f'{name} {command.usage}':<26}{command.meaning}")


def _inputs(screen: Screen) -> Iterator[str]:
    """What the user enters: edited in a terminal, else lines of stdin; a backslash at its end continues a line."""
    ask = _editor(screen) if sys.stdin.isatty() else _next_line
    while True:
        try:
            text = ask()
            while text.endswith("\\"):
                text = text[:-1] + "\n" + ask()
        except EOFError:
            return
        yield text


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _editor(screen: Screen) -> Callable[[], str]:
    """Asks for a line with editing and history; on stderr, so that stdout holds answers only."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(key_bindings=keys, output=create_output(stdout=sys.stderr))

    def ask() -> str:
        while True:
            try:
                return session.prompt("> ", prompt_continuation="  ")
            except KeyboardInterrupt:
                screen.say("(Ctrl-D or /quit ends the session)")

    return ask
