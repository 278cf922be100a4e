"""A chat in a terminal or a pipe: lines of input, commands that begin with a slash, answers as they come."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from absl import flags
from openai_harmony import Message

from gptoss_jax.cli import interrupts, mistakes, model_flags, prompts, sampling_flags
from gptoss_jax.cli.answer_view import AnswerView, remarks
from gptoss_jax.cli.chat_session import ChatSession
from gptoss_jax.cli.escapes import raw_stream
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import messages
from gptoss_jax.harmony.answer import AnswerStream, call_document
from gptoss_jax.harmony.settings import REASONING_EFFORTS
from gptoss_jax.harmony.tokenizer import START, load_tokenizer

_NOT_IN_CHAT = (
    "prompt",
    "prompt_file",
    "tool_results",
    "token_ids",
    "json",
    "raw",
    "stats",
    "save",
    "n",
    "top_logprobs",
)


def run(options: flags.FlagValues, arguments: Sequence[str]) -> None:
    """A session of prompts and answers, with the settings that the flags give, until the input ends or /quit.

    Raises:
        GptossError: flags, files or weights that are not what they should be.
        BrokenPipeError: nobody reads stdout any more.
    """
    screen = Screen(quiet=options.quiet)
    session = _session(options, arguments, screen)
    converse(session, screen, show_reasoning=options.show_reasoning)


def _session(options: flags.FlagValues, arguments: Sequence[str], screen: Screen) -> ChatSession:
    """The conversation that --messages holds, and the model that goes on with it."""
    _refuse_what_chat_asks_for(options, arguments)
    sampling, config = sampling_flags.sampling(options), model_flags.config(options)
    before = prompts.read_conversation(options)
    settings = prompts.merge(prompts.settings(options), before, options)
    request = sampling_flags.request(options, config, [START], sampling)
    tokenizer, stop_strings = load_tokenizer(options.vocab), tuple(options.stop)
    AnswerStream(tokenizer, stop_strings=stop_strings)  # refuses what it cannot look for
    _, engine = model_flags.load_for_answers(options, screen, slots=1)
    return ChatSession(engine, tokenizer, request, stop_strings, settings, list(before.messages), options.vocab)


def _refuse_what_chat_asks_for(options: flags.FlagValues, arguments: Sequence[str]) -> None:
    wrong = [mistakes.spelled(flag) for flag in _NOT_IN_CHAT if options[flag].present]
    if wrong == ["--save"] and not arguments:
        raise GptossError("--chat and --save: leave --save out; /save FILE in the session writes the conversation")
    if wrong or arguments:
        raise GptossError(
            f"--chat and {[*wrong, 'a prompt'][0]}: leave one of them out; a chat asks for prompts itself"
        )


def converse(session: ChatSession, screen: Screen, *, show_reasoning: bool) -> None:
    """Reads and answers until the input ends or /quit."""
    console = _Console(session, screen, show_reasoning)
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

    def __init__(self, session: ChatSession, screen: Screen, show_reasoning: bool):
        self._session, self._screen, self._show_reasoning = session, screen, show_reasoning
        self.ended = False
        efforts = "|".join(REASONING_EFFORTS)
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
        """Runs a command, or answers the line."""
        name, _, text = line.partition(" ")
        try:
            messages.check_text(line, "what was entered")
            if name in self._commands:
                self._commands[name].act(text.strip())
            elif line.startswith("/"):
                raise GptossError(f"unknown command {name}: /help lists them (a space in front makes it text)")
            elif line.strip():
                self._answer_text(line.strip())
        except (GptossError, OSError) as error:
            self._screen.say(str(error))

    def say_what_waits(self) -> None:
        """Tells the user which call /result answers next."""
        for call in self._session.waiting()[:1]:
            self._screen.say(f"{call} waits: /result answers it")

    def _answer_text(self, text: str) -> None:
        for call in self._session.waiting():
            self._screen.say(f"{call} is left without a result")
        self._answer([messages.user(text)])

    def _answer(self, new: Sequence[Message]) -> None:
        """An answer to `new` messages."""
        view = AnswerView(self._screen, show_reasoning=self._show_reasoning)
        try:
            with interrupts.noted() as pressed:
                sample = self._session.answer(new, view.show, lambda: pressed() or self._screen.reader_left)
        except GptossError as error:
            raise GptossError(f"{mistakes.spell_flags(str(error))} (/reset forgets the conversation)") from None
        view.finish(sample.answer)
        for call in map(call_document, sample.answer.parsed.calls):
            self._screen.say(f"call {call['name']}({call['arguments']}): /result answers it")
        for remark in remarks(sample.answer, "" if self._show_reasoning else "/reasoning"):
            self._screen.say(remark)

    def _quit(self, text: str) -> None:
        self.ended = True

    def _effort(self, text: str) -> None:
        self._session.change(reasoning_effort=text)

    def _system(self, text: str) -> None:
        self._session.change(instructions=text)

    def _reasoning(self, text: str) -> None:
        self._show_reasoning = not self._show_reasoning
        self._screen.say(f"reasoning is {'shown' if self._show_reasoning else 'hidden'}")

    def _result(self, text: str) -> None:
        results = self._session.take_result(text)
        if results:
            self._answer(results)
        else:
            self.say_what_waits()

    def _reset(self, text: str) -> None:
        self._session.forget()

    def _save(self, text: str) -> None:
        if not text:
            raise GptossError("/save: expected a file name")
        messages.write_messages(text, self._session.conversation())
        self._screen.say(f"{len(self._session.messages)} messages written to {text}")

    def _stats(self, text: str) -> None:
        tokens = sum(len(sample.answer.parsed.token_ids) for sample in self._session.samples)
        seconds = sum(sample.last_token_seconds - sample.first_token_seconds for sample in self._session.samples)
        context = len(self._session.render(self._session.messages))
        limit = self._session.engine.engine_config.max_context_tokens
        speed = f" at {(tokens - len(self._session.samples)) / seconds:.2f} tokens/s" if seconds else ""
        self._screen.say(f"answers: {len(self._session.samples)}, of {tokens} tokens{speed}")
        self._screen.say(
            f"conversation: {context} of {limit} tokens; effort: {self._session.settings.reasoning_effort}"
        )

    def _help(self, text: str) -> None:
        for name, (usage, meaning, _) in self._commands.items():
            self._screen.say(f"  {f'{name} {usage}':<26}{meaning}")


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
    from prompt_toolkit import PromptSession  # here, since it is needed in a terminal only
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(key_bindings=keys, output=create_output(stdout=raw_stream(sys.stderr)))

    def ask() -> str:
        while True:
            try:
                return session.prompt("> ", prompt_continuation="  ")
            except KeyboardInterrupt:
                screen.say("(Ctrl-D or /quit ends the session)")

    return ask
