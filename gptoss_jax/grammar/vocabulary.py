"""The harmony vocabulary as llguidance takes it, made once, when the first grammar is asked for."""

import functools
import importlib
from typing import Any

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.tokenizer import ENDOFTEXT, VOCAB_SIZE, Tokenizer

INSTALL = "pip install 'gptoss-jax[structured]'"


def llguidance() -> Any:
    """The package, which is not needed for anything else.

    Raises:
        GptossError: it is not installed.
    """
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise GptossError(f"holding answers to a form needs llguidance, which is not installed: {INSTALL}") from None


@functools.lru_cache(maxsize=4)
def ll_tokenizer(tokenizer: Tokenizer) -> Any:
    """`llguidance.LLTokenizer` over the whole vocabulary; the first call takes a second or more, without the GIL.

    Its end of text is `<|endoftext|>`, which no harmony grammar allows: `<|return|>` and `<|call|>` are written out.

    Raises:
        GptossError: llguidance is not installed.
    """
    package = llguidance()
    wrapper = importlib.import_module("llguidance.tiktoken")
    return wrapper.lltokenizer_from_encoding(
        tokenizer.encoding, n_vocab=VOCAB_SIZE, eos_token=ENDOFTEXT, slices=package.LLTokenizer.json_slices()
    )
