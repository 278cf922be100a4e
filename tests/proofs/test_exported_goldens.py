"""Exports in every format against transformers' goldens: what goes out is the model that came in."""

from pathlib import Path

import numpy as np
import pytest

import gptoss_jax
from converters import convert
from gptoss_jax.checkpoints.export import FORMATS, open_export
from tests import gate
from tests.goldens import make as golden

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "tiny.npz")


@pytest.fixture(scope="module")
def checkpoint(tiny_folder, tmp_path_factory) -> Path:
    """The golden model, converted."""
    dst = tmp_path_factory.mktemp("golden") / "checkpoint"
    convert.run(convert.Options(tiny_folder, dst))
    return dst


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_gives_transformers_logits(format, checkpoint, tmp_path):
    """Guards every table backwards, and each config.json, by numbers that others computed."""
    open_export(checkpoint, format, shard_bytes=400_000).run(tmp_path / "out")
    model = gptoss_jax.load(tmp_path / "out", dtype="float32")
    for tokens, theirs in zip(GOLDEN["short_tokens"], GOLDEN["short_float32"], strict=True):
        logits = model.logits(tokens.tolist())[-len(theirs) :]
        positions = np.arange(len(tokens))[-len(theirs) :]
        assert gate.failures(logits, theirs, positions) == []
    assert len(GOLDEN["short_tokens"][0]) == golden.SHORT_TOKENS
