"""gpt-oss in JAX: published weights in, sharded and streamed tokens out.

Axis letters, here and in every docstring: B rows, T query tokens, S cache positions, D hidden, N query heads, K key
and value heads, G = N / K, H head size, F expert hidden, E experts, X experts per token, V vocabulary, L layers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptoss_jax.runtime.language_model import LanguageModel, load

__all__ = ["LanguageModel", "load"]


def __getattr__(name: str) -> Any:
    """Imports the runtime when it is first asked for: the parts below it stay usable, and quick to import, alone."""
    if name in __all__:
        from gptoss_jax.runtime import language_model

        return getattr(language_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
