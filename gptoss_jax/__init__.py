"""gpt-oss in JAX: published weights in, sharded and streamed tokens out.

    model = gptoss_jax.load("path/to/checkpoint")
    for answer in model.answers(["Why is the sky blue?", "Name three primes."]):
        print(answer.final)

Axis letters, here and in every docstring: B batch, T query tokens, S cache positions, D hidden, N query heads, K key
and value heads, G = N / K, H head size, F expert hidden, E experts, X experts per token, V vocabulary, L layers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptoss_jax.engine.request import EngineConfig, Request
    from gptoss_jax.engine.sampling_params import SamplingParams
    from gptoss_jax.errors import GptossError
    from gptoss_jax.harmony.settings import Settings
    from gptoss_jax.runtime.language_model import LanguageModel
    from gptoss_jax.runtime.loading import load
    from gptoss_jax.runtime.tool_answers import answer_with_tools

__all__ = [
    "EngineConfig",
    "GptossError",
    "LanguageModel",
    "Request",
    "SamplingParams",
    "Settings",
    "answer_with_tools",
    "load",
]

_HOMES = {
    "EngineConfig": "gptoss_jax.engine.request",
    "GptossError": "gptoss_jax.errors",
    "LanguageModel": "gptoss_jax.runtime.language_model",
    "Request": "gptoss_jax.engine.request",
    "SamplingParams": "gptoss_jax.engine.sampling_params",
    "Settings": "gptoss_jax.harmony.settings",
    "answer_with_tools": "gptoss_jax.runtime.tool_answers",
    "load": "gptoss_jax.runtime.loading",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Imports a public name's module when it is first asked for: `load` needs JAX, which takes seconds to import."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "__version__":
        from importlib import metadata  # here, since it takes longer than all else of this file

        return metadata.version("gptoss-jax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
