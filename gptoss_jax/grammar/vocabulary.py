"""The harmony vocabulary as llguidance takes it, made once, when the first grammar is asked for."""

import functools
import importlib
import importlib.util
from typing import Any

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.tokenizer import ENDOFTEXT, VOCAB_SIZE, Tokenizer

NEEDED = ("llguidance", "jsonschema")
INSTALL = "pip install 'gptoss-jax[structured]'"


class NotInstalledError(GptossError):
    """What holds answers to a form is not here; the message says how to install it."""


def missing() -> list[str]:
    """Packages that holding answers needs, the check of finished ones included, and that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def llguidance() -> Any:
    """The package, which is not needed for anything else.

    Raises:
        NotInstalledError: it is not here, or what else is needed.
    """
    if names := missing():
        reason = f"holding answers to a form needs {' and '.join(names)}, which is not installed: {INSTALL}"
        raise NotInstalledError(reason)
    return importlib.import_module("llguidance")


@functools.lru_cache(maxsize=4)
def ll_tokenizer(tokenizer: Tokenizer) -> Any:
    """`llguidance.LLTokenizer` over the whole vocabulary; the first call takes seconds, in which no other thread runs.

    Its end of text is `<|endoftext|>`, which no harmony grammar allows: `<|return|>` and `<|call|>` are written out.

    Raises:
        NotInstalledError: as `llguidance`.
    """
    package = llguidance()
    wrapper = importlib.import_module("llguidance.tiktoken")
    return wrapper.lltokenizer_from_encoding(
        tokenizer.encoding, n_vocab=VOCAB_SIZE, eos_token=ENDOFTEXT, slices=package.LLTokenizer.json_slices()
    )


def prepare(tokenizer: Tokenizer) -> None:
    """Does all that the first form of a process, and the first check of an answer, would else wait for."""
    ll_tokenizer(tokenizer)
    importlib.import_module("jsonschema")
