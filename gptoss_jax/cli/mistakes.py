"""What is said of a mistake, in the words of whoever made it: the flag as typed, what it takes, what was meant."""

import difflib
import re
from collections.abc import Mapping

from absl import flags

from gptoss_jax.errors import short, shortened
from gptoss_jax.runtime import device_memory

# What other programs call things -> flags here, of which a command has one or none.
_ELSEWHERE = {
    "c": ("max_context_tokens",),
    "ctx_size": ("max_context_tokens",),
    "effort": ("reasoning_effort",),
    "f": ("prompt_file", "file"),
    "i": ("chat",),
    "input": ("prompt_file", "file"),
    "interactive": ("chat",),
    "m": ("checkpoint",),
    "max_length": ("max_new_tokens", "max_context_tokens"),
    "max_model_len": ("max_context_tokens",),
    "max_tokens": ("max_new_tokens", "max_context_tokens"),
    "model": ("checkpoint",),
    "model_path": ("checkpoint",),
    "n_ctx": ("max_context_tokens",),
    "n_predict": ("max_new_tokens",),
    "num_predict": ("max_new_tokens",),
    "o": ("save",),
    "output": ("save",),
    "p": ("prompt", "text"),
    "q": ("quiet",),
    "s": ("seed",),
    "silent": ("quiet",),
    "sys": ("system",),
    "system_prompt": ("system",),
    "t": ("temperature",),
    "temp": ("temperature",),
    "think": ("reasoning_effort",),
    "v": ("stats",),
    "verbose": ("stats",),
}
# Flags by which a run takes less of a device's memory, with a value where it is that one which helps.
_LESS_MEMORY = {
    "max_context_tokens": "",
    "slots": "",
    "pool_tokens": "",
    "n": "",
    "dense": " int8",
    "batch_rows": "",
    "row_tokens": "",
    "accumulate": "",
    "rematerialize": "",
    "mesh": "",
}
# What absl says of a value, after `flag --name=value: `.
_REASONS = r"invalid literal|could not convert|value should be|\('Non-bool|\S+ is not |Flag --|Exceeds|empty string"


def spelled(name: str) -> str:
    """A flag as people type it: --two-words."""
    return f"--{name.replace('_', '-')}"


def spell_flags(message: str, names: Mapping[str, str] = {}) -> str:
    """A library's message with the flags of this command as people type them.

    `names`: what the library calls a flag -> the flag, where they differ.
    """
    known = {name: name for name in flags.FLAGS if "_" in name} | dict(names)
    first, _, rest = message.partition(" ")
    if first in flags.FLAGS and first not in known and rest.startswith("is "):  # `seed is -2`; elsewhere seed is a word
        return f"{spelled(first)} {spell_flags(rest, names)}"
    return re.sub(rf"\b({'|'.join(known)})\b", lambda found: spelled(known[found[0]]), message)


def of_file(error: OSError) -> str:
    """A file's error without its number; one of our own as it is."""
    if not error.strerror:
        return str(error)
    return f"{error.filename}: {error.strerror}" if isinstance(error.filename, str) else error.strerror


def of_memory(error: BaseException) -> str | None:
    """What a device that ran out of memory needed and had, and the flags that help; None for another error."""
    if not (found := device_memory.out_of_memory(error)):
        return None
    ours = _own_flags()
    helping = [f"{spelled(name)}{value}" for name, value in _LESS_MEMORY.items() if name in ours]
    return f"{found}; what helps: {', '.join(helping)}" if helping else found


def of_flag(error: Exception) -> str:
    """What absl found wrong with a command line."""
    message = " ".join(str(error).split())
    if isinstance(error, flags.UnrecognizedFlagError):
        name, meant = error.flagname, _meant(error.flagname)
        typed = f"-{name}" if len(name) == 1 else spelled(shortened(name))
        return f"unknown flag {typed}" + (f": did you mean {spelled(meant)}?" if meant else "")
    if isinstance(error.__context__, OSError):
        return f"--flagfile: {of_file(error.__context__)}"
    if found := re.fullmatch(rf"flag --(\w+)=(.*?): (?:{_REASONS}).*", message):
        return _of_value(flags.FLAGS[found[1]], found[2])
    if found := re.fullmatch(r"(?:Missing value for flag )?(-\S+?)(=\S*)?( does not take an argument)?", message):
        what = "takes no value" if found[3] else "has no value, expected one after it"
        return f"{found[1].replace('_', '-')} {what}"
    return spell_flags(message)


def _of_value(flag: flags.Flag, value: str) -> str:
    if flag.value is None and value == "None":  # a flag that is needed
        return f"{spelled(flag.name)} is missing, expected {flag.help}"
    return f"{spelled(flag.name)} is {short(value)}, expected {_expected(flag)}"


def _expected(flag: flags.Flag) -> str:
    if isinstance(flag.parser, flags.EnumParser):
        return f"one of {', '.join(flag.parser.enum_values)}"
    return "true or false" if flag.boolean else flag.parser.syntactic_help


def _meant(name: str) -> str | None:
    """The flag of this command that a name which it has not may stand for."""
    ours = _own_flags()
    elsewhere = [flag for flag in _ELSEWHERE.get(name, ()) if flag in ours]
    return next(iter(elsewhere or difflib.get_close_matches(name, [*ours, "version", "help"], n=1)), None)


def _own_flags() -> list[str]:
    """All flags but those that absl brings."""
    modules = flags.FLAGS.flags_by_module_dict()
    return [flag.name for module, found in modules.items() if not module.startswith("absl.") for flag in found]
