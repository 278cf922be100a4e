"""What the model is to go on from: prompt, conversation and settings, as flags, files and stdin give them."""

import dataclasses
import datetime
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from openai_harmony import Message, Role

from gptoss_jax.cli import command
from gptoss_jax.cli.flag_values import naming_flags, only_source, read_text, token_ids
from gptoss_jax.cli.prompt_flags import FLAG_OF, PROMPT_FLAGS
from gptoss_jax.errors import GptossError, check_text
from gptoss_jax.grammar import forms
from gptoss_jax.grammar.compiled import CompiledForm, held_form
from gptoss_jax.grammar.forms import AUTO, ToolChoice
from gptoss_jax.harmony import messages, render
from gptoss_jax.harmony.answer import Answer
from gptoss_jax.harmony.messages import Conversation
from gptoss_jax.harmony.settings import Settings
from gptoss_jax.tools.toolbox import Toolbox

SOURCES = ("prompt", "prompt_file", "token_ids")


class Prompt(NamedTuple):
    """What the model is to go on from.

    Attributes:
        token_ids: all of it.
        text: the user's message, if there is one beside the conversation's file.
        conversation: the messages that were rendered, with those that the settings put in front; None: plain ids.
        settings: those fields of `Settings` that acted.
        remarks: what people should know of it, a line each.
        form: what the answer is held to; None: nothing.
    """

    token_ids: list[int]
    text: str | None = None
    conversation: list[Message] | None = None
    settings: Mapping[str, Any] = {}
    remarks: Sequence[str] = ()
    form: CompiledForm | None = None

    def conversation_with(self, answer: Answer) -> list[Message]:
        """The prompt's messages and the answer's; none where the prompt is plain ids."""
        if self.conversation is None:
            return []
        return [*self.conversation, *messages.from_parsed(answer.history())]

    def settings_document(self) -> dict[str, Any]:
        """The flags in PROMPT_FLAGS for JSON, with the values that acted, wherever they came from; else null."""
        values = {**self.settings, "tools": [tool.model_dump(mode="json") for tool in self.settings.get("tools", ())]}
        if response_format := values.get("response_format"):
            values["response_format"] = dataclasses.asdict(response_format)
        return dict.fromkeys(PROMPT_FLAGS) | {FLAG_OF.get(field, field): value for field, value in values.items()}


class Opening(NamedTuple):
    """What flags and files say before anybody speaks.

    Attributes:
        settings: of the flags and the conversation's file.
        conversation: that of --messages; without that flag an empty one.
        remarks: what of the files has no place in a prompt, a line each.
    """

    settings: Settings
    conversation: Conversation
    remarks: list[str]

    def all_remarks(self) -> list[str]:
        """Those, and one where the instructions ask for another effort than the one that acts."""
        effort = render.effort_remark(render.with_opening(self.conversation.messages, self.settings))
        return [*self.remarks, *([effort] if effort else [])]


def opening(options: flags.FlagValues, toolbox: Toolbox | None = None) -> Opening:
    """The settings of the flags, and what the conversation's file sets beside its messages.

    Args:
        options: the flags.
        toolbox: tools that are run here, which the settings then declare.

    Raises:
        GptossError: a value that cannot be, a file that is not what it should be, or a flag that was given and says
            something else than the file, or belongs in a message that the file brings.
    """
    conversation = messages.read_messages(options.messages) if options.messages else Conversation(())
    remarks = list(conversation.remarks)
    of_flags = settings(options, _date(options, conversation), remarks)
    flag_of = {field: FLAG_OF.get(field, field) for field in vars(of_flags)}
    with naming_flags(FLAG_OF):
        given = [field for field, flag in flag_of.items() if options[flag].present]
        acting = render.resolve(of_flags, given, conversation)
        if toolbox is not None:
            acting = toolbox.settings(acting, conversation.messages)
        return Opening(acting, conversation, remarks)


def settings_line(acting: Mapping[str, Any], seed: int) -> str:
    """For people: the settings that act and that they may not have set themselves."""
    line = f"seed {seed}"
    if "current_date" in acting:
        line = f"effort {acting['reasoning_effort']}, date {acting['current_date'] or 'none'}, {line}"
    return line


def settings(options: flags.FlagValues, current_date: str | None, remarks: list[str]) -> Settings:
    """What the flags say the system and developer messages are to say.

    Args:
        options: the flags in PROMPT_FLAGS.
        current_date: what --date comes to.
        remarks: gets what of the files has no place in a prompt, a line each.

    Raises:
        GptossError: a value that cannot be, or a file that is not what it should be.
    """
    if options.system:
        check_text(options.system, "--system")
    tools = messages.read_tools(options.tools, remarks) if options.tools else ()
    response_format = messages.read_response_format(options.response_format) if options.response_format else None
    with naming_flags(FLAG_OF):
        return Settings(
            reasoning_effort=options.reasoning_effort,
            knowledge_cutoff=options.knowledge_cutoff,
            current_date=current_date,
            instructions=options.system,
            tools=tools,
            builtin_tools=tuple(options.builtin_tools),
            response_format=response_format,
        )


def _date(options: flags.FlagValues, conversation: Conversation) -> str | None:
    """That of --date; left out, a chat has today's, unless the conversation brings its own system message."""
    brings_system = any(message.author.role is Role.SYSTEM for message in conversation.messages)
    given = options.date
    if given is None:
        given = "today" if options.chat and not brings_system else "none"
    known = {"none": None, "today": datetime.date.today().isoformat()}
    return known.get(given.lower(), given)


def read(options: flags.FlagValues, arguments: Sequence[str], toolbox: Toolbox | None = None) -> Prompt:
    """What the flags, the positional argument, or stdin ask; `toolbox` as for `opening`.

    Raises:
        GptossError: no prompt, more than one, or one that the format does not allow.
    """
    given = only_source(options, arguments, "prompt", SOURCES)
    if given is None and not options.messages and not sys.stdin.isatty():
        given = "prompt_file", "-"
    match given:
        case ("token_ids", _):
            return Prompt(_plain_ids(options))
        case ("prompt_file", path):
            return _render(options, read_text(path), toolbox)
        case ("prompt", text):
            return _render(options, text, toolbox)
        case _:
            return _render(options, None, toolbox)


def _plain_ids(options: flags.FlagValues) -> list[int]:
    for flag in (*PROMPT_FLAGS, "tool_choice", "messages", "tool_results", "save"):
        if options[flag].present:
            raise GptossError(f"--token-ids is the whole prompt, so {command.spelled(flag)} has no place in it")
    return list(token_ids("token_ids", options.token_ids.split(",")))


def _render(options: flags.FlagValues, text: str | None, toolbox: Toolbox | None) -> Prompt:
    """The conversation in --messages, the results of its calls, and the user's `text`."""
    before = opening(options, toolbox)
    if options.tool_choice == "none":
        before = before._replace(settings=dataclasses.replace(before.settings, tools=()))
    conversation = list(before.conversation.messages)
    if options.tool_results:
        conversation += messages.read_tool_results(options.tool_results, before.conversation, before.remarks)
    if text is not None:
        conversation.append(messages.user(text))
    if not conversation:
        raise GptossError("no prompt: give one in quotes, or --prompt-file, --messages, --token-ids, --chat, or stdin")
    ids = render.render(conversation, before.settings, vocab_path=options.vocab)
    whole, acting = render.with_opening(conversation, before.settings), render.acting(before.settings, conversation)
    form = held_form(Settings(**acting), _tool_choice(options.tool_choice), vocab_path=options.vocab)
    return Prompt(ids, text, whole, acting, before.all_remarks(), form)


def _tool_choice(name: str) -> ToolChoice:
    """That of --tool-choice."""
    if name == "none":
        return AUTO
    return forms.tool_choice(name if name in ("auto", "required") else {"type": "function", "name": name})
