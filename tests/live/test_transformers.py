"""The product and the reference beside transformers, run on the spot; `make gates` installs it and torch."""

import numpy as np
import pytest

import gptoss_jax
from tests import gate, reference
from tests.gate import TinyModel
from tests.goldens import make as golden

pytest.importorskip("torch", reason="the live comparison needs torch")
pytest.importorskip("transformers", reason="the live comparison needs transformers")


def test_product_equals_transformers(tmp_path):
    """Guards the goldens' reach: another seed's weights and tokens, through transformers on the spot."""
    published = TinyModel(golden.tiny_config(), seed=11).write(tmp_path)
    tokens = golden.token_ids(400, seed=12)
    theirs = golden.transformers_logits(golden.load_transformers(published, "float32"), tokens)
    ours = gptoss_jax.load(published, dtype="float32").logits(tokens.tolist())
    assert gate.failures(ours, theirs, np.arange(len(tokens))) == []


def test_transformers_reads_what_we_write(tiny, tmp_path):
    """Guards both Hugging Face formats with another's reader, and the goldens against its other versions."""
    tokens = golden.token_ids(300, seed=1)
    logits = []
    for format in ("huggingface", "huggingface-bf16"):
        model = golden.load_transformers(tiny.write(tmp_path / format, format), "float32")
        logits.append(golden.transformers_logits(model, tokens))
    assert (logits[0] == logits[1]).all()
    gate.assert_agrees(reference.forward(tiny.tensors, tiny.config, tokens), logits[0], max_abs=1e-4, max_kl=1e-10)
