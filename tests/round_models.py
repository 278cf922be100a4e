"""An engine without a model that answers each prompt with the next of some texts: for tests of tool calls."""

import dataclasses
from collections.abc import Callable, Sequence

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.request import EngineConfig
from gptoss_jax.engine.runner import NOTHING_PENDING
from gptoss_jax.harmony import tool_schemas
from gptoss_jax.harmony.tokenizer import VOCAB_SIZE
from gptoss_jax.model.config import read_config
from gptoss_jax.tools.tool import ToolOutput
from tests.fake_runner import FakeRunner
from tests.goldens.make import ROOT
from tests.made_answers import WEATHER, WORDS, ids_of

CONFIG = dataclasses.replace(read_config(ROOT / "configs" / "tiny.json"), vocab_size=VOCAB_SIZE)
THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
FINAL = THOUGHT + "<|channel|>final<|message|>It rains.<|return|>"


def calling(name: str, arguments: str) -> str:
    """An answer that thinks and calls a function."""
    return f"{THOUGHT}<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"


def running(code: str) -> str:
    """An answer that thinks and runs Python."""
    return f"{THOUGHT}<|channel|>analysis to=python code<|message|>{code}<|call|>"


class AnswersInTurn(FakeRunner):
    """A runner that gives one text after another, or what `texts` says to the text of a prompt.

    `prompts` lists the ids that it was asked with.
    """

    def __init__(self, sizes: EngineConfig, texts: Sequence[str] | Callable[[str], str]):
        super().__init__(sizes)
        self.prompts: list[tuple[int, ...]] = []
        coming = iter(() if callable(texts) else texts)
        self._say = texts if callable(texts) else lambda prompt: next(coming)
        self._scripts: dict[int, list[int]] = {}

    def admit(self, slot, request, drawn, cached=0, pending=NOTHING_PENDING) -> None:
        super().admit(slot, request, drawn, cached, pending)
        self.prompts.append(tuple(request.token_ids))
        self._scripts[slot] = list(ids_of(self._say(WORDS.decode(request.token_ids))))

    def _draw(self, slot, budget, ids=()) -> int:
        token = self._scripts[slot].pop(0)
        self._token[slot] = token
        self._remaining[slot] = 0 if token in self._stop_ids[slot] else budget - 1
        return token


def engine(texts: Sequence[str] | Callable[[str], str], max_context_tokens: int = 512, slots: int = 1) -> Engine:
    """An engine that answers so."""
    sizes = EngineConfig(slots=slots, max_context_tokens=max_context_tokens, prefill_widths=(64,), prefix_snapshots=0)
    return Engine(AnswersInTurn(sizes, texts), CONFIG, sizes)


class Weather:
    """A tool with one function; `asked` lists the arguments of its calls, `closed` counts."""

    builtin = None

    def __init__(self, says: str = '{"rain": true}', name: str = "get_weather"):
        self.functions = tool_schemas.tools([{**WEATHER, "name": name}])
        self.asked: list[str] = []
        self.closed = 0
        self._says, self._name = says, name

    def takes(self, recipient: str) -> bool:
        return recipient == f"functions.{self._name}"

    def call(self, recipient: str, arguments: str) -> ToolOutput:
        self.asked.append(arguments)
        return ToolOutput(self._says)

    def close(self) -> None:
        self.closed += 1


class Interpreter:
    """A built-in tool that gives back the code it is given; `broken`: it raises."""

    builtin, functions = "python", ()

    def __init__(self, broken: bool = False):
        self._broken = broken

    def takes(self, recipient: str) -> bool:
        return recipient == "python"

    def call(self, recipient: str, arguments: str) -> ToolOutput:
        if self._broken:
            raise RuntimeError("no such\nplace")
        return ToolOutput(f"ran {arguments}")

    def close(self) -> None:
        pass
