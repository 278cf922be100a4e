"""The compact vocabulary: only the token ids that conversations hold, so that embeddings need few rows."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int32

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import tokenizer

ALWAYS = (
    tokenizer.STARTOFTEXT,
    tokenizer.ENDOFTEXT,
    tokenizer.RETURN,
    tokenizer.CONSTRAIN,
    tokenizer.CHANNEL,
    tokenizer.START,
    tokenizer.END,
    tokenizer.MESSAGE,
    tokenizer.CALL,
    tokenizer.ENDOFPROMPT,
)
"""Control tokens with a meaning: a model may have to read or draw them, whatever it was trained on."""


class VocabularyError(GptossError):
    """A token id that the compact vocabulary does not hold."""


class CompactVocabulary:
    """Token ids <-> rows of the compact embedding.

    Attributes:
        ids: the id of each row, rising.
    """

    ids: Int32[np.ndarray, "rows"]

    def __init__(self, ids: Iterable[int] | np.ndarray):
        """Takes any ids, also more than once; `ALWAYS` is added.

        Raises:
            VocabularyError: an id outside the full vocabulary.
        """
        given = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
        used = np.unique(np.concatenate([given, np.asarray(ALWAYS, np.int64)]))
        for outside in (used[0], used[-1]):
            if not 0 <= outside < tokenizer.VOCAB_SIZE:
                raise VocabularyError(f"token id {outside} is outside the vocabulary of {tokenizer.VOCAB_SIZE:,} ids")
        self.ids = used.astype(np.int32)
        self._row_of = np.full(tokenizer.VOCAB_SIZE, -1, np.int32)
        self._row_of[self.ids] = np.arange(len(self.ids), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Int32[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape"]:
        """The row of each id.

        Raises:
            VocabularyError: an id that has none.
        """
        rows = self._row_of[ids]
        if rows.size and rows.min() < 0:
            absent = ids[rows < 0].flat[0]
            raise VocabularyError(f"token id {absent} is not among the {len(self):,} of the compact vocabulary")
        return rows


def of_corpora(ids: Iterable[np.ndarray]) -> CompactVocabulary:
    """The vocabulary of what several corpora hold: those of validation too, whose tokens are read as well."""
    return CompactVocabulary(np.concatenate([np.unique(each) for each in ids]))
