"""Conversations -> token ids, with the history rules that the format demands. Knows no JAX.

The format is openai/harmony's docs/format.md, and the ids are openai-harmony's. They are made here, since the library
takes time that grows with the square of a word's length, and forgets to drop an old chain of thought while tools are in
flight (vllm#45048).
"""

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from openai_harmony import (
    DeveloperContent,
    Message,
    ReasoningEffort,
    Role,
    SystemContent,
    TextContent,
    ToolNamespaceConfig,
)

from gptoss_jax.errors import GptossError, short
from gptoss_jax.harmony import message_text, tokenizer
from gptoss_jax.harmony.conversation import CONSTRAIN, Conversation, CutMessage
from gptoss_jax.harmony.parsed import NO_TOOLS, kind_of
from gptoss_jax.harmony.settings import ResponseFormat, Settings
from gptoss_jax.harmony.tokenizer import load_tokenizer

Encode = Callable[[str], list[int]]


def _stateless_python() -> ToolNamespaceConfig:
    """As OpenAI's own Python tool of the gpt-oss repository, which keeps nothing from call to call, says it."""
    description = ToolNamespaceConfig.python().description
    assert description is not None
    purpose, _, _ = description.partition("\n\n")
    purpose = purpose.replace("execute Python code", "execute STATELESS Python code")
    return ToolNamespaceConfig(
        name="python",
        description=f"{purpose}\n\nWhen you send a message containing Python code to python, it will be executed by "
        "itself, and what it prints will be returned to you: use print statements to see values.\n\n"
        "IMPORTANT: Your python environment is not shared between calls. You will have to pass your entire code each "
        "time.",
        tools=[],
    )


_BUILTIN_TOOLS = {
    "browser": ToolNamespaceConfig.browser,
    "python": ToolNamespaceConfig.python,
    "stateless_python": _stateless_python,
}

# The settings that speak through each of the two messages in front.
_SETTINGS_OF = {
    Role.SYSTEM: ("reasoning_effort", "knowledge_cutoff", "current_date", "builtin_tools"),
    Role.DEVELOPER: ("instructions", "tools", "response_format"),
}
# What stands in a header is one word: a space in a name would begin another field (`f to=user`), and text that reads
# like a control token would tempt whoever parses the text rather than the ids.
_HEADER_WORD = re.compile(r"[^\s<|>]+")
_CONTENT_TYPE = re.compile(r"(<\|constrain\|>)?[^\s<|>]+")
_ASKED_EFFORT = re.compile(  # "Reasoning: high", "**Reasoning effort:** high", "set reasoning_effort to high"
    r"\breasoning(?:[ _]effort)?(?:[\s*_\"'`:=]+|\s+(?:to|is)\s+)[\"'`]?(low|medium|high)\b(?!-)", re.IGNORECASE
)
_ROLE_OF = {SystemContent: Role.SYSTEM, DeveloperContent: Role.DEVELOPER}
_ROLES = [role.value for role in Role]


def render(
    messages: Sequence[Message],
    settings: Settings | None,
    *,
    for_completion: bool = True,
    drop_old_analysis: bool = True,
    vocab_path: str | Path | None = None,
) -> list[int]:
    """Token ids of a conversation. Text never becomes a control token, whatever it spells.

    Args:
        messages: the conversation. If it brings a system or a developer message of its own, that one stands, and a
            setting that would have to go into it is refused.
        settings: what the system and developer messages in front say; None puts nothing in front.
        for_completion: whether the assistant is to speak next.
        drop_old_analysis: whether `apply_history_rules` is applied.
        vocab_path: as for `tokenizer.load_tokenizer`.

    Raises:
        GptossError: a message that the format does not allow, or settings that contradict the messages.
    """
    for index, message in enumerate(messages):
        check_message(message, f"message {index}")
    conversation = with_opening(messages, settings)
    if drop_old_analysis:
        conversation = apply_history_rules(conversation)
    encode = load_tokenizer(vocab_path).encode
    has_functions = any(map(message_text.has_functions, conversation))
    ids = [token for message in conversation for token in message_ids(message, encode, has_functions)]
    return [*ids, tokenizer.START, *encode("assistant")] if for_completion else ids


def opening(settings: Settings) -> list[Message]:
    """The system message, and the developer message if there is anything for it to say."""
    return [_system_message(settings), *_developer_messages(settings)]


def with_opening(messages: Sequence[Message], settings: Settings | None) -> list[Message]:
    """The messages with those in front that the settings make and the conversation does not bring itself.

    Raises:
        GptossError: a setting other than its default that would have to go into a message which is there already.
    """
    if settings is None:
        return list(messages)
    check_can_be_set(
        messages, [name for name, default in vars(Settings()).items() if getattr(settings, name) != default]
    )
    own = {message.author.role for message in messages}
    added = [message for message in opening(settings) if message.author.role not in own]
    for message in added:
        check_message(message, f"the {message.author.role.value} message made from the settings")
    front = int(bool(messages) and messages[0].author.role is Role.SYSTEM)
    return [*messages[:front], *added, *messages[front:]]


def apply_history_rules(messages: Sequence[Message]) -> list[Message]:
    """The messages without the chain of thought that led to an answer.

    Once a later user message follows a turn that ended in an answer, what stands on the analysis channel up to there is
    dropped, calls of built-in tools included, since the model makes them while it thinks; and with a call the result
    that answers it, on whichever channel. After the last such turn everything is kept: tools may be in flight, and
    a turn that was cut goes on from its thoughts.
    """
    answered = messages[: turn_starts(messages)[-1]]
    thoughts = {i for i, message in enumerate(answered) if message.channel == "analysis"}
    results = call_results(messages)
    dropped = thoughts | {results.get(i) for i in thoughts}
    return [message for i, message in enumerate(messages) if i not in dropped]


def turn_starts(messages: Sequence[Message]) -> list[int]:
    """Index where each turn begins: 0, and that of each user message that follows a turn which ended in an answer."""
    starts, is_answer = [0], False
    for index, message in enumerate(messages):
        if message.author.role is Role.USER:
            starts += [index] if is_answer else []
            is_answer = False
        elif message.author.role is Role.ASSISTANT:
            is_answer = is_whole_answer(message)
    return starts


def is_whole_answer(message: Message) -> bool:
    """Whether the assistant answers in it, and did not break off."""
    is_final = kind_of(message.author.role.value, message.channel, message.recipient) == "final"
    return is_final and not isinstance(message, CutMessage)


def call_results(messages: Sequence[Message]) -> dict[int, int | None]:
    """Index of each tool call -> index of the message that answers it; None if none does before the turn ends."""
    results, waiting = {}, []
    for index, message in enumerate(messages):
        if message.author.role is Role.USER:
            waiting = []
        elif message.author.role is Role.ASSISTANT and message.recipient not in NO_TOOLS:
            results[index] = None
            waiting.append(index)
        elif message.author.role is Role.TOOL:
            call = next((i for i in waiting if messages[i].recipient == message.author.name), None)
            if call is not None:
                results[call] = index
                waiting.remove(call)
    return results


def waiting_calls(messages: Sequence[Message]) -> list[int]:
    """Indices of the last turn's tool calls that no message answers yet."""
    start = _last_user(messages)
    return [start + call for call, result in call_results(messages[start:]).items() if result is None]


def calls_without_result(messages: Sequence[Message]) -> list[str]:
    """The recipients of all tool calls, in any turn, that no message answers."""
    return [str(messages[call].recipient) for call, result in call_results(messages).items() if result is None]


def _last_user(messages: Sequence[Message]) -> int:
    """Index of the last user message, 0 if there is none."""
    return next((i for i in reversed(range(len(messages))) if messages[i].author.role is Role.USER), 0)


def check_message(message: Message, where: str) -> None:
    """Refuses what the format cannot say, or what would read as something else.

    Args:
        message: any message.
        where: what the error calls it.

    Raises:
        GptossError: a header field that is not one word, a tool that has no name or the name of a role, a
            `<|constrain|>` that is not the assistant's, text that no tokenizer takes.
    """
    _check_header(message, where)
    for part in message.content:
        role = _ROLE_OF.get(type(part))
        if role not in (None, message.author.role):
            raise GptossError(
                f"{where} has role {message.author.role.value!r}, but its content is a {role.value} message's"
            )
    try:
        body = message_text.body(message, has_functions=True)
    except GptossError as error:
        raise GptossError(f"{where}: {error}") from None
    header = (message.author.name, message.recipient, message.channel, message.content_type)
    for text in [*filter(None, header), body]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise GptossError(
                f"{where} holds half a surrogate pair ({text[error.start]!r}), which is no text"
            ) from None


def _check_header(message: Message, where: str) -> None:
    role, name = message.author.role, message.author.name
    fields = {"name": name, "recipient": message.recipient, "channel": message.channel}
    for field, value in {**fields, "content_type": message.content_type}.items():
        constrains = field == "content_type" and role is Role.ASSISTANT
        pattern = _CONTENT_TYPE if constrains else _HEADER_WORD
        if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
            raise GptossError(f"{where}: {field} is {short(value)}, expected one word without <, | and >")
    # A tool's name stands where other messages have their role.
    if role is Role.TOOL and (name is None or name.partition(":")[0] in _ROLES):
        raise GptossError(f"{where}: the tool's name is {short(name)}, expected one such as 'functions.get_weather'")


def check_can_be_set(messages: Sequence[Message], fields: Collection[str]) -> None:
    """Raises GptossError if one of these fields of `Settings` belongs in a message that the conversation brings."""
    own = {message.author.role for message in messages}
    for role, names in _SETTINGS_OF.items():
        named = [name for name in names if name in fields and role in own]
        if named:
            raise GptossError(
                f"the conversation brings its own {role.value} message, so {', '.join(named)} cannot be set; "
                "change that message or take it out"
            )


def resolve(settings: Settings, given: Collection[str], conversation: Conversation) -> Settings:
    """The settings that act on a conversation: those given, its own, and for the rest defaults, which give way.

    Args:
        settings: defaults, with those over them that were given beside the conversation.
        given: the names of those.
        conversation: its messages, and what it sets itself.

    Raises:
        GptossError: a setting was given that the conversation sets otherwise, or that belongs in a message which it
            brings.
    """
    check_can_be_set(conversation.messages, given)
    for name, value in conversation.settings.items():
        if name in given and getattr(settings, name) != value:
            raise GptossError(f"{name} and the conversation say different things: leave one of them out")
    return Settings(**(acting(settings, conversation.messages) | dict(conversation.settings)))


def effort_remark(messages: Sequence[Message]) -> str | None:
    """Which effort acts, where the instructions ask for another one; `messages` with those in front."""
    contents = [part for message in messages for part in message.content]
    efforts = [part.reasoning_effort for part in contents if isinstance(part, SystemContent)]
    acting = [effort.value.lower() for effort in efforts if effort]
    texts = [part.instructions or "" for part in contents if isinstance(part, DeveloperContent)]
    asked = [found for text in texts for found in _ASKED_EFFORT.finditer(text) if found[1].lower() not in acting]
    if not acting or not asked:
        return None
    return f"the instructions say {asked[0][0]!r}, but the effort that acts is {acting[-1]}"


def acting(settings: Settings, messages: Sequence[Message]) -> dict[str, Any]:
    """The settings that act: those whose message the conversation does not bring itself."""
    own = {message.author.role for message in messages}
    names = [name for role, fields in _SETTINGS_OF.items() if role not in own for name in fields]
    return {name: getattr(settings, name) for name in names}


def _system_message(settings: Settings) -> Message:
    content = SystemContent(
        reasoning_effort=ReasoningEffort[settings.reasoning_effort.upper()],
        knowledge_cutoff=settings.knowledge_cutoff,
        conversation_start_date=settings.current_date,
    )
    for name in settings.builtin_tools:
        content = content.with_tools(_BUILTIN_TOOLS[name]())
    return Message.from_role_and_content(Role.SYSTEM, content)


def _developer_messages(settings: Settings) -> list[Message]:
    """One message, or none."""
    parts = []
    if settings.instructions or settings.tools:
        content = DeveloperContent(instructions=settings.instructions or None)
        parts.append(content.with_function_tools(settings.tools) if settings.tools else content)
    if isinstance(settings.response_format, ResponseFormat):
        gap = "\n\n" if parts else ""
        parts.append(TextContent(text=gap + settings.response_format.section))
    return [Message.from_role_and_contents(Role.DEVELOPER, parts)] if parts else []


def message_ids(message: Message, encode: Encode, has_functions: bool) -> list[int]:
    """Header, body and end of one message; each part of the header is encoded by itself, as the library does.

    Args:
        message: one that `check_message` takes.
        encode: text -> ids.
        has_functions: whether the conversation has function tools, which a system message mentions.

    Raises:
        GptossError: text that no tokenizer takes.
    """
    nobody = NO_TOOLS if message.author.role is Role.ASSISTANT else (None, "all")  # the library would call them
    calls = message.recipient not in nobody
    try:
        ids = [tokenizer.START, *(token for part in message_text.author(message) for token in encode(part))]
        if calls:
            ids += encode(f" to={message.recipient}")
        if message.channel is not None:
            ids += [tokenizer.CHANNEL, *encode(message.channel)]
        if message.content_type is not None:
            ids += _content_type_ids(message.content_type, encode)
        ids += [tokenizer.MESSAGE, *encode(message_text.body(message, has_functions=has_functions))]
    except GptossError as error:
        raise GptossError(f"a message of role {message.author.role.value}: {error}") from None
    return [*ids, tokenizer.CALL if calls and message.author.role is Role.ASSISTANT else tokenizer.END]


def _content_type_ids(content_type: str, encode: Encode) -> list[int]:
    if content_type.startswith(CONSTRAIN):
        return [*encode(" "), tokenizer.CONSTRAIN, *encode(content_type.removeprefix(CONSTRAIN))]
    return encode(f" {content_type}")
