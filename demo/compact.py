"""A model without the rows of its vocabulary that were never trained: the same answers, many times as fast.

Drawing a token costs as much as the vocabulary is large; with 200,000 rows the rest of the demo model is nothing beside
it. All rows that were never trained are one row here: that of the unknown word.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from demo import vocabulary
from gptoss_jax.checkpoints import opening
from gptoss_jax.checkpoints.orbax import writer
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.model import sharding, transformer
from gptoss_jax.runtime import loading
from gptoss_jax.runtime.answers import collect
from gptoss_jax.runtime.language_model import LanguageModel


class CompactModel:
    """A demo model over the rows that it was trained on.

    Attributes:
        ids: of each row, rising.
        model: over these rows.
    """

    ids: list[int]
    model: LanguageModel

    def __init__(self, checkpoint: Path, scratch: Path, *, dtype: str = "bfloat16"):
        """Reads a checkpoint, writes its used rows into the folder `scratch`, which must not exist, and loads them.

        Raises:
            GptossError: no checkpoint of demo.fresh, trained or not.
        """
        one_device = sharding.make()
        stored = opening.open_weights(checkpoint)
        leaves = dict(stored.read(transformer.declare(stored.config, one_device).leaves, one_device))
        used = np.flatnonzero(~vocabulary.unused(np.asarray(leaves["unembedding"])))
        stops = [token for token in stored.config.stop_ids if token in used]
        self.ids = [int(token) for token in used]
        self._row_of = {token: row for row, token in enumerate(self.ids)}
        config = dataclasses.replace(
            stored.config,
            vocab_size=len(used),
            stop_ids=tuple(self._row_of[token] for token in stops),
            pad_id=self._row_of[vocabulary.unknown_id()],
        )
        rows = {name: np.asarray(leaves[name])[used] for name in ("embedding", "unembedding")}
        writer.save(scratch, {**leaves, **rows}, config)
        self.model = loading.load(scratch, dtype=dtype)

    def answers(
        self,
        prompts: Iterable[Sequence[int]],
        sampling: SamplingParams,
        *,
        max_new_tokens: int,
        max_context_tokens: int,
        slots: int,
    ) -> Iterator[Answer]:
        """The answer to each prompt of token ids, in order, as `LanguageModel.answers` gives them."""
        tokenizer, requests, streams = load_tokenizer(), [], []
        for prompt in prompts:
            streams.append(AnswerStream(tokenizer))
            rows, ends_at = tuple(map(self._row, prompt)), self._ends_at(streams[-1])
            requests.append(Request(rows, self.model.config.stop_ids, max_new_tokens, sampling, ends_at))
        engine = self.model.engine(EngineConfig(slots=slots, max_context_tokens=max_context_tokens))
        for sample in collect(engine, requests, streams):
            yield sample.answer

    def _ends_at(self, stream: AnswerStream) -> Callable[[int], bool]:
        def ends_at(row: int) -> bool:
            return stream.ends_at(self.ids[row])

        return ends_at

    def _row(self, token: int) -> int:
        return self._row_of.get(token, self.model.config.pad_id)
