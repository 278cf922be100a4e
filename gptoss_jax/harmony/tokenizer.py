"""The o200k_harmony vocabulary, found offline, sha256 checked. Knows text and ids, neither JAX nor messages."""

import binascii
import codecs
import functools
import hashlib
import lzma
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from gptoss_jax.errors import GptossError

VOCABULARY_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
"""Of the uncompressed `o200k_base.tiktoken`, whichever way it is stored."""
PACKAGED_VOCABULARY = Path(__file__).parent / "data" / "o200k_base.tiktoken.xz"

# Ids of the control tokens: openai/harmony, src/tiktoken_ext/public_encodings.rs.
STARTOFTEXT = 199998
ENDOFTEXT = 199999  # also the padding id
RETURN = 200002
CONSTRAIN = 200003
CHANNEL = 200005
START = 200006
END = 200007
MESSAGE = 200008
CALL = 200012
ENDOFPROMPT = 200018

VOCAB_SIZE = 201_088
"""Rows of the published embedding: 199,998 merged tokens, then control tokens, most of them reserved."""

_NAMES = {
    STARTOFTEXT: "<|startoftext|>",
    ENDOFTEXT: "<|endoftext|>",
    RETURN: "<|return|>",
    CONSTRAIN: "<|constrain|>",
    CHANNEL: "<|channel|>",
    START: "<|start|>",
    END: "<|end|>",
    MESSAGE: "<|message|>",
    CALL: "<|call|>",
}
# ENDOFPROMPT has no name here, since openai-harmony decodes it as a reserved one.
_SPECIAL_TOKENS = {_NAMES.get(i, f"<|reserved_{i}|>"): i for i in range(STARTOFTEXT, VOCAB_SIZE)}

# tiktoken_ext/openai_public.py, `o200k_base`: how text is cut before bytes are merged.
_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

_XZ_MAGIC = b"\xfd7zXZ\x00"


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back; immutable, safe to share between threads.

    Attributes:
        encoding: the tiktoken encoding that does the work.
    """

    encoding: tiktoken.Encoding

    @property
    def vocab_size(self) -> int:
        """Number of ids, reserved ones included: ids run from 0 to `vocab_size - 1`."""
        return VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; control strings such as `<|end|>` in it are ordinary text: no user can forge one.

        The time grows with the length of the text, whatever it holds.

        Raises:
            GptossError: a run of white space longer than tiktoken can match, about a million characters.
        """
        try:
            return self.encoding.encode(text, disallowed_special=())  # `encode_ordinary` would panic
        except ValueError:
            longest = max(map(len, re.findall(r"\s+", text)), default=0)
            raise GptossError(
                f"the tokenizer cannot take the text of {len(text)} characters; its longest run of white space is "
                f"{longest}, expected fewer than a million: shorten the run"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control tokens spelled out, bytes that are no UTF-8 as U+FFFD.

        Raises:
            GptossError: an id outside the vocabulary.
        """
        for token_id in ids:
            _check_id(token_id)
        return self.encoding.decode(ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be a part of a UTF-8 character.

        Raises:
            GptossError: an id outside the vocabulary.
        """
        _check_id(token_id)
        return self.encoding.decode_single_token_bytes(token_id)


class StreamDecoder:
    """Text of ids as they come: never half a character, and all chunks joined equal `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The characters this id completes, perhaps none.

        Raises:
            GptossError: an id outside the vocabulary; what was held back is kept.
        """
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """U+FFFD if an unfinished character is held back, else nothing; the decoder is then as new."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(vocab_path: str | Path | None = None) -> Tokenizer:
    """The gpt-oss tokenizer from the vocabulary in this package; nothing is ever downloaded.

    It takes a third of a second, once.

    Args:
        vocab_path: another copy of `o200k_base.tiktoken`, plain or xz-compressed.

    Raises:
        FileNotFoundError: there is no such file.
        GptossError: the file is truncated or altered; the text names both sha256.
    """
    return _load(None if vocab_path is None else Path(vocab_path))


@functools.cache
def _load(vocab_path: Path | None) -> Tokenizer:
    ranks = _parse_ranks(_read_vocabulary(vocab_path))
    encoding = tiktoken.Encoding(
        "o200k_harmony",
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens=_SPECIAL_TOKENS,
        explicit_n_vocab=VOCAB_SIZE,
    )
    return Tokenizer(encoding)


def _check_id(token_id: int) -> None:
    if not 0 <= token_id < VOCAB_SIZE:
        raise GptossError(f"token id {token_id} is outside the vocabulary: ids run from 0 to {VOCAB_SIZE - 1}")


def _read_vocabulary(vocab_path: Path | None) -> bytes:
    """The checked bytes of the uncompressed vocabulary file."""
    path = vocab_path or PACKAGED_VOCABULARY
    if vocab_path is None:
        remedy = "reinstall gptoss-jax or pass an intact o200k_base.tiktoken"
    else:
        remedy = "pass an intact o200k_base.tiktoken (plain or .xz), or none to use the packaged one"
    if not path.is_file():
        raise FileNotFoundError(
            f"vocabulary file {path}: expected sha256 {VOCABULARY_SHA256}, found no such file; {remedy}"
        )
    stored = path.read_bytes()
    try:
        vocabulary = lzma.decompress(stored) if stored.startswith(_XZ_MAGIC) else stored
    except lzma.LZMAError as error:
        found = f"{hashlib.sha256(stored).hexdigest()} (of the xz file, which cannot be decompressed: {error})"
        raise GptossError(_altered(path, found, remedy)) from error
    found = hashlib.sha256(vocabulary).hexdigest()
    if found != VOCABULARY_SHA256:
        raise GptossError(_altered(path, found, remedy))
    return vocabulary


def _altered(path: Path, found: str, remedy: str) -> str:
    return (
        f"vocabulary file {path} is truncated or altered: expected sha256 {VOCABULARY_SHA256}, found {found}; {remedy}"
    )


def _parse_ranks(vocabulary: bytes) -> dict[bytes, int]:
    """Token bytes to rank, from lines of `base64 rank`."""
    fields = vocabulary.split()
    # In this file, whose hash was checked, a token's rank is its line number: no integer needs to be parsed.
    return dict(zip(map(binascii.a2b_base64, fields[::2]), range(len(fields) // 2), strict=True))
