"""The flags that say what a model is told and how it draws, read into `Settings`, `SamplingParams` and `Request`."""

import dataclasses
import datetime
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import flags

from gptoss_jax.cli.command import spell_flags, spelled
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import messages, render
from gptoss_jax.harmony.messages import Conversation
from gptoss_jax.harmony.render import Settings
from gptoss_jax.model.config import ModelConfig

PROMPT_FLAGS = (
    *("system", "reasoning_effort", "date", "knowledge_cutoff"),
    *("tools", "builtin_tools", "response_format"),
)
SAMPLING_FLAGS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty"),
    *("presence_penalty", "logit_bias", "banned_ids", "seed", "stop", "stop_ids", "top_logprobs"),
)
ENGINE_FLAGS = ("max_context_tokens", "deterministic")

_FLAG_OF = {"instructions": "system", "current_date": "date"}  # field of Settings -> flag, where they differ


def define_flags() -> None:
    """The flags named in PROMPT_FLAGS, SAMPLING_FLAGS and ENGINE_FLAGS."""
    flags.DEFINE_string("system", None, "TEXT: Instructions: the developer message, or system prompt.")
    efforts = list(render.REASONING_EFFORTS)
    flags.DEFINE_enum("reasoning_effort", "medium", efforts, "How long the model is asked to think.")
    flags.DEFINE_string("date", None, "DATE: The date it is told: YYYY-MM-DD, or today; left out: none.")
    cutoff = render.DEFAULT_KNOWLEDGE_CUTOFF
    flags.DEFINE_string("knowledge_cutoff", cutoff, "MONTH: The end of its knowledge: YYYY-MM.")
    flags.DEFINE_string("tools", None, "FILE: Functions that it may call: a JSON list in OpenAI's form.")
    flags.DEFINE_list("builtin_tools", [], "NAMES: Tools that it was trained with: browser, python.")
    flags.DEFINE_string("response_format", None, "FILE: The form of the answer: OpenAI's response_format, JSON.")

    flags.DEFINE_integer("max_new_tokens", None, "N: Length of an answer at most; left out: what the context holds.")
    flags.DEFINE_float("temperature", 1.0, "X: Divides the logits; 0 takes the likeliest token each time.")
    flags.DEFINE_integer("top_k", 0, "N: Draw among the k likeliest tokens only; 0 is off.")
    flags.DEFINE_float("top_p", 1.0, "P: Draw among the likeliest that first reach this probability; 1 is off.")
    flags.DEFINE_float("min_p", 0.0, "P: Draw among those at least this share as likely as the first; 0 is off.")
    flags.DEFINE_float("repetition_penalty", 1.0, "X: Divides the logits of tokens in prompt or answer; 1 is off.")
    flags.DEFINE_float("frequency_penalty", 0.0, "X: Taken from a logit for each time the answer holds the token.")
    flags.DEFINE_float("presence_penalty", 0.0, "X: Taken once from the logits of what the answer holds.")
    flags.DEFINE_list("logit_bias", [], "ID=X,...: Added to logits, by token id: 1234=2.5,99=-1; -inf bans.")
    flags.DEFINE_list("banned_ids", [], "IDS: Token ids never to draw: 1,2,3. (Ids that name no token never are.)")
    flags.DEFINE_integer("seed", 0, "N: Same seed, prompt and settings: same tokens.")
    flags.DEFINE_multi_string("stop", [], "TEXT: The answer ends before this text; repeat the flag for several.")
    flags.DEFINE_list("stop_ids", [], "IDS: Token ids that end the answer, beside the model's own: 1,2,3.")
    flags.DEFINE_integer("top_logprobs", 0, "N: Report this many of the likeliest at each step, up to 20 (--json).")

    flags.DEFINE_integer("max_context_tokens", 4096, "N: Prompt and answer at most; memory follows it.")
    flags.DEFINE_bool("deterministic", None, "Same bits alone and in any batch; left out: on CPUs only.")


def settings(options: flags.FlagValues) -> Settings:
    """What the model is told.

    Raises:
        GptossError: a value that cannot be, or a file that is not what it should be.
    """
    date = datetime.date.today().isoformat() if options.date == "today" else options.date
    if options.system:
        messages.check_text(options.system, "--system")
    tools = messages.read_tools(options.tools) if options.tools else ()
    response_format = messages.read_response_format(options.response_format) if options.response_format else None
    with _naming_flags():
        return Settings(
            reasoning_effort=options.reasoning_effort,
            knowledge_cutoff=options.knowledge_cutoff,
            current_date=date,
            instructions=options.system,
            tools=tools,
            builtin_tools=tuple(options.builtin_tools),
            response_format=response_format,
        )


def merge(told: Settings, conversation: Conversation, options: flags.FlagValues) -> Settings:
    """`told` by the flags, and what the conversation's file sets beside its messages.

    Raises:
        GptossError: a flag that was given says something else than the file, or belongs in a message that it brings.
    """
    flag_of = {field: _FLAG_OF.get(field, field) for field in vars(told)}
    with _naming_flags():
        given = [field for field, flag in flag_of.items() if options[flag].present]
        render.check_can_be_set(conversation.messages, given)
    for field, value in conversation.settings.items():
        flag = flag_of[field]
        if options[flag].present and getattr(told, field) != value:
            raise GptossError(
                f"{spelled(flag)} and the conversation's file say different things: leave one of them out"
            )
    return dataclasses.replace(told, **conversation.settings)


def sampling(options: flags.FlagValues) -> SamplingParams:
    """How tokens are drawn.

    Raises:
        GptossError: a value out of its range.
    """
    same_name = ("repetition_penalty", "frequency_penalty", "presence_penalty", "temperature", "top_k", "top_p")
    values: dict[str, Any] = {name: options[name].value for name in (*same_name, "min_p", "top_logprobs", "seed")}
    biases, banned = _biases(options.logit_bias), ids("banned_ids", options.banned_ids)
    with _naming_flags():
        return SamplingParams(**values, logit_bias=biases, banned_ids=banned)


def refuse_together(options: flags.FlagValues, *pairs: tuple[str, str]) -> None:
    """Raises GptossError if both flags of a pair were given: one of them would have no effect."""
    for first, second in pairs:
        if options[first].value and options[second].value:
            raise GptossError(f"{spelled(first)} and {spelled(second)}: leave one of them out")


def refuse_without(options: flags.FlagValues, *pairs: tuple[str, str]) -> None:
    """Raises GptossError if the first flag of a pair was given and not the second, without which it has no effect."""
    for first, second in pairs:
        if options[first].value and not options[second].value:
            raise GptossError(f"{spelled(first)} has an effect with {spelled(second)} only: give both")


def as_acted(options: flags.FlagValues, told: Mapping[str, Any], asked: Request) -> dict[str, Any]:
    """The flags in PROMPT_FLAGS and SAMPLING_FLAGS for JSON, with the values that acted, wherever they came from.

    `told`: the fields of `Settings` that acted; of others null is echoed.
    """
    said = {**told, "tools": [tool.model_dump(mode="json") for tool in told.get("tools", ())]}
    if told.get("response_format"):
        said["response_format"] = dataclasses.asdict(told["response_format"])
    acted = dict.fromkeys(PROMPT_FLAGS) | {_FLAG_OF.get(field, field): value for field, value in said.items()}
    return acted | {name: options[name].value for name in SAMPLING_FLAGS} | {"stop_ids": list(asked.stop_ids)}


def request(options: flags.FlagValues, config: ModelConfig, token_ids: Sequence[int], drawn: SamplingParams) -> Request:
    """What the engine is asked, checked against the model before its weights are read.

    Raises:
        RequestError: the model cannot serve it.
    """
    stop_ids = tuple(dict.fromkeys((*config.stop_ids, *ids("stop_ids", options.stop_ids))))
    asked = Request(tuple(token_ids), stop_ids, options.max_new_tokens, drawn)
    with _naming_flags():
        asked.check(config, engine_config(options))
    return asked


def engine_config(options: flags.FlagValues, slots: int = 1) -> EngineConfig:
    """What the engine is compiled for.

    Raises:
        GptossError: a size that cannot be.
    """
    with _naming_flags():
        return EngineConfig(
            slots=slots, max_context_tokens=options.max_context_tokens, deterministic=options.deterministic
        )


def ids(flag: str, words: Sequence[str]) -> tuple[int, ...]:
    """The token ids that a flag lists.

    Raises:
        GptossError: something else among them.
    """
    try:
        return tuple(map(int, words))
    except ValueError:
        raise GptossError(f"{spelled(flag)} is {','.join(words)!r}, expected whole numbers such as 1,2,3") from None


def only_source(
    options: flags.FlagValues, arguments: Sequence[str], what: str, names: Sequence[str]
) -> tuple[str, str] | None:
    """The one of several flags that was given, and its value; words behind the flags stand for the first flag.

    Raises:
        GptossError: more than one, or several words.
    """
    if len(arguments) > 1:
        raise GptossError(f"unexpected argument {arguments[1]!r}: a {what} of several words goes in quotes")
    sources: dict[str, tuple[str, str]] = {f"a {what}": (names[0], word) for word in arguments}
    for name in names:
        value: Any = options[name].value
        if value is not None:
            sources[spelled(name)] = (name, value)
    if len(sources) > 1:
        raise GptossError(f"{' and '.join(sources)}: expected one of them")
    return next(iter(sources.values()), None)


def read_text(path: str) -> str:
    """The text in a file, - being stdin, without the newline at its end.

    Raises:
        OSError: the file cannot be read.
        GptossError: it is no UTF-8, or holds white space only.
    """
    name = "stdin" if path == "-" else path
    try:
        text = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise GptossError(f"{name} is not valid UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise GptossError(f"{name} holds no text (--help lists the ways to give one)")
    return text.removesuffix("\n")


def _biases(pairs: Sequence[str]) -> dict[int, float]:
    try:
        biases = [(int(token), float(bias)) for token, bias in (pair.split("=") for pair in pairs)]
    except ValueError:
        raise GptossError(f"--logit-bias is {','.join(pairs)!r}, expected pairs such as 1234=2.5,99=-inf") from None
    for token, count in Counter(token for token, _ in biases).items():
        if count > 1:
            raise GptossError(f"--logit-bias names id {token} {count} times, expected once")
    return dict(biases)


@contextmanager
def _naming_flags() -> Iterator[None]:
    """Has complaints name the flags, rather than the fields that they fill."""
    try:
        yield
    except GptossError as error:
        raise GptossError(spell_flags(str(error), _FLAG_OF)) from None
