"""The settings that system and developer messages are made of.

Quick to import: openai-harmony is not needed to say what can be set.
"""

import datetime
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gptoss_jax.errors import GptossError, check_list

if TYPE_CHECKING:
    import openai_harmony

REASONING_EFFORTS = ("low", "medium", "high")
GRAMMAR_TYPES = ("json_object", "regex", "lark")
BUILTIN_TOOLS = ("browser", "python", "stateless_python")  # the last: python, whose calls share nothing
DEFAULT_KNOWLEDGE_CUTOFF = "2024-06"

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class ResponseFormat:
    """A JSON schema that the answer follows. It stands in the prompt, and the answer is held to it.

    Attributes:
        name: letters, digits, and _ . - only.
        schema: the JSON schema.
        description: what it is for; stands as a comment above the schema.
        strict: a keyword that cannot be enforced is refused; else it is passed over.

    Raises:
        GptossError: another name.
    """

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool = True

    def __post_init__(self):
        _check_names("response_format", [self.name])

    @property
    def section(self) -> str:
        """The section of the developer message (docs/format.md, "Structured output")."""
        comment = "".join(f"// {line}\n" for line in (self.description or "").splitlines())
        schema = json.dumps(self.schema, ensure_ascii=False, separators=(",", ":"))
        return f"# Response Formats\n\n## {self.name}\n\n{comment}{schema}"


@dataclass(frozen=True)
class GrammarFormat:
    """A form that the answer is held to, of which the prompt says nothing: the instructions should.

    Attributes:
        type: any JSON object, a regular expression of the whole answer, or a grammar in llguidance's Lark.
        grammar: the expression or the grammar; of a JSON object "".

    Raises:
        GptossError: another type, or no grammar where there has to be one.
    """

    type: Literal["json_object", "regex", "lark"]
    grammar: str = ""

    def __post_init__(self):
        if self.type not in GRAMMAR_TYPES:
            raise _refused("type", self.type, f"one of {', '.join(GRAMMAR_TYPES)}")
        if not isinstance(self.grammar, str) or bool(self.grammar) == (self.type == "json_object"):
            raise _refused(self.type, self.grammar, "no text" if self.type == "json_object" else "text")

    def document(self) -> dict[str, str]:
        """As `response_format` is written in requests."""
        return {"type": self.type, **({self.type: self.grammar} if self.grammar else {})}


@dataclass(frozen=True)
class Settings:
    """What the system and developer messages say.

    Attributes:
        reasoning_effort: one of REASONING_EFFORTS.
        knowledge_cutoff: "YYYY-MM".
        current_date: "YYYY-MM-DD"; None leaves the line out, so that the same input always gives the same ids.
        instructions: what other formats call the system prompt; None or empty leaves the section out.
        tools: functions that the model may call.
        builtin_tools: of BUILTIN_TOOLS, those that the model may call.
        response_format: the form that the final answer is held to.

    Raises:
        GptossError: a value that a field cannot have.
    """

    reasoning_effort: str = "medium"
    knowledge_cutoff: str = DEFAULT_KNOWLEDGE_CUTOFF
    current_date: str | None = None
    instructions: str | None = None
    tools: tuple["openai_harmony.ToolDescription", ...] = ()
    builtin_tools: tuple[str, ...] = ()
    response_format: ResponseFormat | GrammarFormat | None = None

    def __post_init__(self):
        if self.reasoning_effort not in REASONING_EFFORTS:
            raise _refused("reasoning_effort", self.reasoning_effort, f"one of {', '.join(REASONING_EFFORTS)}")
        if not _is_date(f"{self.knowledge_cutoff}-01"):
            raise _refused("knowledge_cutoff", self.knowledge_cutoff, "a month as YYYY-MM")
        if self.current_date is not None and not _is_date(self.current_date):
            raise _refused("current_date", self.current_date, "a date as YYYY-MM-DD, or none")
        self._check_types()
        if not set(self.builtin_tools) <= set(BUILTIN_TOOLS):
            raise _refused("builtin_tools", list(self.builtin_tools), f"of {', '.join(BUILTIN_TOOLS)}")
        _check_names("builtin_tools", [namespace(name) for name in self.builtin_tools])
        _check_names("tools", [tool.name for tool in self.tools])

    def _check_types(self) -> None:
        if not isinstance(self.instructions, str | None):
            raise _refused("instructions", self.instructions, "text or None")
        check_list("builtin_tools", self.builtin_tools, ", ".join(BUILTIN_TOOLS))
        check_list("tools", self.tools, "openai_harmony.ToolDescription")
        if not all(hasattr(tool, "name") for tool in self.tools):
            raise _refused("tools", self.tools, "a list of openai_harmony.ToolDescription")
        if not isinstance(self.response_format, ResponseFormat | GrammarFormat | None):
            raise _refused("response_format", self.response_format, "a ResponseFormat or None")


def namespace(builtin_tool: str) -> str:
    """What calls to one of BUILTIN_TOOLS are addressed to: "python" or "browser"."""
    return builtin_tool.removeprefix("stateless_")


def _is_date(text: object) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return False


def _check_names(field: str, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if not _NAME.fullmatch(name):
            raise _refused(f"a name in {field}", name, "letters, digits, and _ . - only")
        if count > 1:
            raise GptossError(f"{field} holds {name[:80]!r} {count} times, expected once")


def _refused(field: str, value: object, expected: str) -> GptossError:
    return GptossError(f"{field} is {repr(value)[:80]}, expected {expected}")
