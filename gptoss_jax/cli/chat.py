"""A chat in a terminal or a pipe: lines of input, commands that begin with a slash, answers as they come."""

import difflib
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from absl import flags
from openai_harmony import Message

from gptoss_jax.cli import chat_input, interrupts, mistakes, model_flags, prompts, sampling_flags, tool_flags
from gptoss_jax.cli.answer_view import AnswerView
from gptoss_jax.cli.chat_session import ChatSession, no_tools
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.cli.tool_view import ToolView
from gptoss_jax.engine.request import RequestError
from gptoss_jax.errors import GptossError, check_text
from gptoss_jax.grammar.compiled import held_form
from gptoss_jax.harmony import messages, render
from gptoss_jax.harmony.answer import AnswerStream
from gptoss_jax.harmony.settings import REASONING_EFFORTS
from gptoss_jax.harmony.tokenizer import START, load_tokenizer
from gptoss_jax.tools.toolbox import Toolbox

_NOT_IN_CHAT = (
    "prompt",
    "tool_choice",
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
    _refuse_what_chat_asks_for(options, arguments)
    with tool_flags.offered(options) as offer:
        new_tools = no_tools if offer is None else offer.open
        session = _session(options, screen, new_tools)
        try:
            converse(session, screen, show_reasoning=options.show_reasoning)
        finally:
            session.tools.close()


def _session(options: flags.FlagValues, screen: Screen, new_tools: Callable[[], Toolbox]) -> ChatSession:
    """The conversation that --messages holds, and the model that goes on with it."""
    sampling = sampling_flags.sampling(options)
    model_flags.default_to_demo_model(options, screen)
    config = model_flags.config(options)
    tools = new_tools()
    opening = prompts.opening(options, tools)
    form = held_form(opening.settings, vocab_path=options.vocab)  # refused now rather than at the first answer
    request = sampling_flags.request(options, config, [START], sampling, form)
    tokenizer, stop_strings = load_tokenizer(options.vocab), tuple(options.stop)
    AnswerStream(tokenizer, stop_strings=stop_strings)  # refuses what it cannot look for
    _, engine = model_flags.load_for_answers(options, screen, sampling_flags.engine_config(options))
    messages, settings = list(opening.conversation.messages), opening.settings
    screen.note(prompts.settings_line(render.acting(settings, messages), sampling.seed))
    for remark in (*opening.all_remarks(), *(form.remarks if form else ())):
        screen.say(remark)
    return ChatSession(
        engine,
        tokenizer,
        request,
        stop_strings,
        settings,
        messages,
        options.vocab,
        new_tools=new_tools,
        tool_rounds=options.tool_rounds,
        tools=tools,
    )


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
    for text in chat_input.inputs(screen, console.completions()):
        console.take(text)
        screen.check_reader()
        if console.ended:
            return


_OTHER_NAMES = {"/exit": "/quit", "/bye": "/quit", "/q": "/quit", "/clear": "/reset", "/new": "/reset", "/?": "/help"}


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
            "/effort": _Command(efforts, "how long the model thinks; alone: says it", self._effort),
            "/system": _Command("TEXT", "instructions; without TEXT: none", self._system),
            "/reasoning": _Command("", "show the reasoning, or hide it again", self._reasoning),
            "/retry": _Command("", "draw the last answer anew", self._retry),
            "/result": _Command("TEXT", "the result of the first tool call that waits for one", self._result),
            "/reset": _Command("", "forget the conversation; /clear too", self._reset),
            "/save": _Command("FILE", "write the conversation, for --messages", self._save),
            "/stats": _Command("", "tokens, speed and context so far", self._stats),
            "/help": _Command("", "this list", self._help),
            "/quit": _Command("", "end the session, as Ctrl-D and /exit do", self._quit),
        }

    def take(self, line: str) -> None:
        """Runs a command, or answers the line."""
        typed, _, text = line.partition(" ")
        name = _OTHER_NAMES.get(typed.lower(), typed.lower())
        try:
            check_text(line, "what was entered")
            if name in self._commands:
                self._commands[name].act(text.strip())
            elif line.startswith("/"):
                raise GptossError(f"unknown command {typed}: {self._hint(name)} (a space in front makes it text)")
            elif line.strip():
                self._answer_text(line.strip())
        except GptossError as error:
            self._screen.say(str(error))
        except OSError as error:
            self._screen.say(mistakes.of_file(error))

    def completions(self) -> Mapping[str, Sequence[str]]:
        """What may follow each command."""
        return {name: command.usage.split("|") for name, command in self._commands.items()}

    def _hint(self, name: str) -> str:
        names = [*self._commands, *(other for other in _OTHER_NAMES if len(other) > len("/q"))]
        meant = difflib.get_close_matches(name, names, n=1)
        return f"did you mean {meant[0]}?" if meant else "/help lists them"

    def say_what_waits(self) -> None:
        """Tells the user which call /result answers next."""
        for call in self._session.waiting()[:1]:
            self._screen.say(f"{call} waits: /result answers it")

    def _answer_text(self, text: str) -> None:
        for call in self._session.waiting():
            self._screen.say(f"{call} is left without a result")
        self._answer([messages.user(text)])

    def _answer(self, new: Sequence[Message] | None) -> None:
        """An answer to `new` messages; None: another to those of the last."""
        view = ToolView(
            self._screen,
            lambda: AnswerView(self._screen, show_reasoning=self._show_reasoning),
            to_see_reasoning="" if self._show_reasoning else "/reasoning",
        )
        try:
            with interrupts.noted() as pressed:
                asked = view, lambda: pressed() or self._screen.reader_left
                turn = self._session.retry(*asked) if new is None else self._session.answer(new, *asked)
        except RequestError as error:
            raise GptossError(f"{mistakes.spell_flags(str(error))} (/reset forgets the conversation)") from None
        for call in turn.waiting():
            self._screen.say(f"call {call.document()['name']}({call.arguments}): /result answers it")
        view.ended(turn)
        if turn.was_interrupted_in_a_call:
            self._session.renew_tools()

    def _quit(self, text: str) -> None:
        self.ended = True

    def _effort(self, text: str) -> None:
        if text:
            self._session.change(reasoning_effort=text.lower())
        self._screen.say(f"effort is {self._session.settings.reasoning_effort} ({', '.join(REASONING_EFFORTS)})")

    def _system(self, text: str) -> None:
        before = self._session.settings.instructions
        self._session.change(instructions=text)
        were = f" (before: {textwrap.shorten(before, 60)})" if before else ""
        self._screen.say(f"instructions are set{were}" if text else f"there are no instructions{were}")

    def _reasoning(self, text: str) -> None:
        self._show_reasoning = not self._show_reasoning
        self._screen.say(f"reasoning is {'shown' if self._show_reasoning else 'hidden'}")

    def _result(self, text: str) -> None:
        results = self._session.take_result(text)
        if results:
            self._answer(results)
        else:
            self.say_what_waits()

    def _retry(self, text: str) -> None:
        self._answer(None)

    def _reset(self, text: str) -> None:
        count = len(self._session.messages)
        self._session.forget()
        self._screen.say(f"the conversation is forgotten ({count} messages)")

    def _save(self, text: str) -> None:
        if not text:
            raise GptossError("/save: expected a file name")
        path = os.path.expanduser(text)  # as a shell would have done
        messages.write_messages(path, self._session.conversation())
        self._screen.say(f"{len(self._session.messages)} messages written to {path}")

    def _stats(self, text: str) -> None:
        tokens = sum(len(sample.answer.parsed.token_ids) for sample in self._session.samples)
        seconds = sum(sample.last_token_seconds - sample.first_token_seconds for sample in self._session.samples)
        context = len(self._session.render(self._session.messages))
        limit = self._session.engine.engine_config.max_context_tokens
        speed = f" at {(tokens - len(self._session.samples)) / seconds:.2f} tokens/s" if seconds else ""
        self._screen.say(f"answers: {len(self._session.samples)}, of {tokens} tokens{speed}")
        found = self._session.engine.statistics
        self._screen.say(f"prompts: {found.prompt_tokens} tokens, {found.cached_prompt_tokens} of them read before")
        self._screen.say(
            f"conversation: {context} of {limit} tokens; effort: {self._session.settings.reasoning_effort}"
        )

    def _help(self, text: str) -> None:
        for name, (usage, meaning, _) in self._commands.items():
            self._screen.say(f"  {f'{name} {usage}':<26}{meaning}")
