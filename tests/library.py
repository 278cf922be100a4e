"""openai-harmony's own encoding, working offline from our vocabulary: what ids and rendered text are compared with."""

import lzma
import tempfile
from pathlib import Path

import openai_harmony
import pytest

from gptoss_jax.harmony.tokenizer import PACKAGED_VOCABULARY

FOLDER_VARIABLE = "TIKTOKEN_ENCODINGS_BASE"
"""Names the folder where openai-harmony looks for the vocabulary before it downloads it."""


def harmony_encoding() -> openai_harmony.HarmonyEncoding:
    """openai-harmony's gpt-oss encoding."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        (Path(folder) / "o200k_base.tiktoken").write_bytes(lzma.decompress(PACKAGED_VOCABULARY.read_bytes()))
        patch.setenv(FOLDER_VARIABLE, folder)
        return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
