"""An interactive session: a conversation with history, commands that begin with a slash, answers as they come."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from openai_harmony import Message
from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from gptoss_jax.cli.command import spell_flags
from gptoss_jax.cli.terminal import AnswerView, Screen, interruptible, remarks
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.request import Request
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import messages, render
from gptoss_jax.harmony.answer import AnswerStream, call_document
from gptoss_jax.harmony.messages import Conversation
from gptoss_jax.harmony.parser import Delta
from gptoss_jax.harmony.render import Settings
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.runtime.answers import Sample, collect


@dataclass
class ChatSession:
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
        results: of the calls that wait, in order, those that are there.
    """

    runner: Engine
    words: Tokenizer
    request: Request
    stop_strings: tuple[str, ...]
    settings: Settings
    said: list[Message]
    vocab_path: str | None = None
    samples: list[Sample] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    def answer(
        self, new: Sequence[Message], show: Callable[[list[Delta]], None], interrupted: Callable[[], bool]
    ) -> Sample:
        """The answer to `new` messages, both of which the conversation then holds.

        Raises:
            GptossError: the conversation no longer fits the context; it stays as it was.
        """
        said = [*self.said, *new]
        stream = AnswerStream(self.words, stop_strings=self.stop_strings)
        prompt = tuple(self.render(said))
        request = replace(self.request, token_ids=prompt, ends_at=stream.ends_at)
        (sample,) = collect(self.runner, [request], [stream], show, interrupted)
        self.said = [*said, *messages.from_parsed(sample.answer.history())]
        self.samples.append(sample)
        self.results = []
        return sample

    def waiting(self) -> list[str]:
        """The names of the calls that wait for a result, in order."""
        names = [str(self.said[call].recipient) for call in render.waiting_calls(self.said)]
        return names[len(self.results) :]

    def take_result(self, text: str) -> list[Message]:
        """Notes the result of the first call that waits; gives all of them once none waits any more.

        Raises:
            GptossError: no call waits.
        """
        calls = render.waiting_calls(self.said)
        if not calls:
            raise GptossError("no call waits for a result")
        results = [*self.results, text]
        if len(results) < len(calls):
            self.results = results
            return []
        names = [self.said[call].recipient for call in calls]
        rows = [{"name": name, "content": result} for name, result in zip(names, results, strict=True)]
        return messages.tool_results(rows, Conversation(tuple(self.said)))

    def forget(self) -> None:
        """Empties the conversation."""
        self.said, self.results = [], []

    def render(self, said: Sequence[Message]) -> list[int]:
        """The ids behind which the assistant speaks next."""
        return render.render(said, self.settings, vocab_path=self.vocab_path)

    def change(self, **fields: str) -> None:
        """Other settings from the next turn on.

        Raises:
            GptossError: a value that cannot be, or the conversation brings system messages of its own.
        """
        settings = replace(self.settings, **fields)
        render.check_can_be_set(self.said, list(fields))
        self.settings = settings

    def conversation(self) -> list[Message]:
        """All messages, with what the settings put in front."""
        return render.with_opening(self.said, self.settings)


def run(talk: ChatSession, screen: Screen, *, show_reasoning: bool) -> None:
    """Reads and answers until the input ends or /quit."""
    console = _Console(talk, screen, show_reasoning)
    screen.say("/help lists the commands; Alt-Enter begins a new line; Ctrl-C stops an answer, Ctrl-D ends the session")
    console.say_what_waits()
    for text in _inputs(screen):
        console.take(text)
        screen.check_reader()
        if console.ended:
            return


class _Command(NamedTuple):
    usage: str
    meaning: str
    act: Callable[[str], None]


class _Console:
    """What a session does with a line of input.

    Attributes:
        ended: the session is over.
    """

    def __init__(self, talk: ChatSession, screen: Screen, show_reasoning: bool):
        self._talk, self._screen, self._show_reasoning = talk, screen, show_reasoning
        self.ended = False
        efforts = "|".join(render.REASONING_EFFORTS)
        self._commands = {
            "/effort": _Command(efforts, "how long the model thinks", self._effort),
            "/system": _Command("TEXT", "instructions; without TEXT: none", self._system),
            "/reasoning": _Command("", "show the reasoning, or hide it again", self._reasoning),
            "/result": _Command("TEXT", "the result of the first tool call that waits for one", self._result),
            "/reset": _Command("", "forget the conversation", self._reset),
            "/save": _Command("FILE", "write the conversation, for --messages", self._save),
            "/stats": _Command("", "tokens, speed and context so far", self._stats),
            "/help": _Command("", "this list", self._help),
            "/quit": _Command("", "end the session, as Ctrl-D does", self._quit),
        }

    def take(self, line: str) -> None:
        """Runs a command, or answers what is said."""
        name, _, text = line.partition(" ")
        try:
            messages.check_text(line, "what was entered")
            if name in self._commands:
                self._commands[name].act(text.strip())
            elif line.startswith("/"):
                raise GptossError(f"unknown command {name}: /help lists them (a space in front makes it text)")
            elif line.strip():
                self._say(line.strip())
        except (GptossError, OSError) as error:
            self._screen.say(str(error))

    def say_what_waits(self) -> None:
        """Tells the user which call /result answers next."""
        for call in self._talk.waiting()[:1]:
            self._screen.say(f"{call} waits: /result answers it")

    def _say(self, text: str) -> None:
        for call in self._talk.waiting():
            self._screen.say(f"{call} is left without a result")
        self._turn([messages.user(text)])

    def _turn(self, new: Sequence[Message]) -> None:
        """An answer to `new` messages."""
        view = AnswerView(self._screen, show_reasoning=self._show_reasoning)
        try:
            with interruptible(insisting=False) as pressed:
                sample = self._talk.answer(new, view.show, lambda: pressed() or self._screen.reader_left)
        except GptossError as error:
            raise GptossError(f"{spell_flags(str(error))} (/reset forgets the conversation)") from None
        view.finish(sample.answer)
        for call in map(call_document, sample.answer.parsed.calls):
            self._screen.say(f"call {call['name']}({call['arguments']}): /result answers it")
        for remark in remarks(sample.answer, "" if self._show_reasoning else "/reasoning"):
            self._screen.say(remark)

    def _quit(self, text: str) -> None:
        self.ended = True

    def _effort(self, text: str) -> None:
        self._talk.change(reasoning_effort=text)

    def _system(self, text: str) -> None:
        self._talk.change(instructions=text)

    def _reasoning(self, text: str) -> None:
        self._show_reasoning = not self._show_reasoning
        self._screen.say(f"reasoning is {'shown' if self._show_reasoning else 'hidden'}")

    def _result(self, text: str) -> None:
        results = self._talk.take_result(text)
        if results:
            self._turn(results)
        else:
            self.say_what_waits()

    def _reset(self, text: str) -> None:
        self._talk.forget()

    def _save(self, text: str) -> None:
        if not text:
            raise GptossError("/save: expected a file name")
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
    ask = _editor(screen) if sys.stdin.isatty() else _lines()
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
    sys.stdin.reconfigure(errors="surrogateescape")  # pyright: ignore[reportAttributeAccessIssue]  (a text stream)

    def read() -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    return read


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
