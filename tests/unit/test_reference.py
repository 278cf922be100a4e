"""The float64 reference against transformers' logits and against numbers that can be checked by hand."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from converters.random_model import random_tensors
from tests import reference
from tests.goldens import make


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    """Logits of transformers; `tests/goldens/make.py` says what the arrays are."""
    with np.load(Path(make.__file__).with_name("tiny.npz")) as file:
        return dict(file)


@pytest.fixture(scope="module")
def config(goldens) -> dict:
    """The goldens' config."""
    return json.loads(str(goldens["meta"]))["config"]


@pytest.fixture(scope="module")
def tensors(config) -> dict[str, np.ndarray]:
    """The goldens' weights."""
    return random_tensors(config, make.WEIGHTS_SEED)


def test_goldens_are_whole(goldens, config):
    """Guards the file: its inputs can be made again, its parts fit, bfloat16 is close but not equal."""
    assert config == make.tiny_config()
    assert (goldens["long_tokens"] == make.token_ids(9000, make.LONG_SEED)).all()
    for seed, token_ids in zip(make.SHORT_SEEDS, goldens["short_tokens"], strict=True):
        assert (token_ids == make.token_ids(320, seed)).all()
    assert (goldens["long_positions"] == make.golden_positions()).all()
    borders = {0, 1, 126, 127, 128, 129, 130, 4094, 4095, 4096, 4097, 8190, 8191, 8192, 8193, 8999}
    assert borders <= set(goldens["long_positions"])
    kl = make.divergence(goldens["long_float32"], goldens["long_bfloat16"])
    np.testing.assert_allclose(kl, goldens["long_bfloat16_kl"][goldens["long_positions"]], rtol=1e-5)
    edges = goldens["range_edges"]
    means = [goldens["long_bfloat16_kl"][low:high].mean() for low, high in pairwise(edges)]
    np.testing.assert_allclose(means, goldens["range_bfloat16_kl"], rtol=1e-4)
    assert (goldens["range_bfloat16_kl"] > 1e-4).all() and (goldens["range_bfloat16_kl"] < 1e-3).all()


def test_yarn_known_answers(config):
    """Guards YaRN's correction range, which must not be rounded, and its concentration."""
    assert reference.yarn_range(config) == pytest.approx((8.092779, 17.398025), abs=5e-7)
    frequencies, concentration = reference.yarn(config)
    assert concentration == pytest.approx(1.3465736, abs=5e-8)
    plain = 150_000.0 ** (-np.arange(32) / 32)
    assert (frequencies[:9] == plain[:9]).all()  # extrapolated
    np.testing.assert_allclose(frequencies[18:], plain[18:] / 32, rtol=1e-15)  # interpolated


def test_mxfp4_known_answers():
    """Guards the 16 codes, the low nibble coming first, and the scale's bias of 127."""
    codes = np.arange(16, dtype=np.uint8)
    block = codes | codes[::-1] << 4  # elements 0, 15, 1, 14, ...
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    for scale, factor in ((127, 1), (128, 2), (120, 2**-7), (1, 2.0**-126), (254, 2.0**127)):
        got = reference.mxfp4(block[None, None], np.array([[scale]], np.uint8))
        wanted = np.stack([values, values[::-1]], axis=-1).reshape(1, 32) * factor
        assert got.tobytes() == wanted.tobytes()


def test_swiglu_known_answers():
    """Guards the clamp of the gate, from above only: random weights hide it (KL 1e-13)."""
    gate, up = np.array([9, -9, 9, -9, 0.5]), np.array([9, 9, -9, -9, 0.25])
    clamped_gate, clamped_up = np.array([7, -9, 7, -9, 0.5]), np.array([7, 7, -7, -7, 0.25])
    wanted = clamped_gate / (1 + np.exp(-1.702 * clamped_gate)) * (clamped_up + 1)
    got = reference.swiglu(np.stack([gate, up], axis=-1).reshape(-1), 7.0)
    np.testing.assert_allclose(got, wanted, rtol=1e-15)


def test_query_blocks_do_not_matter(config, tensors, monkeypatch):
    """Guards the seams between blocks of queries, in sliding-window layers above all."""
    token_ids = make.token_ids(300, 1)
    whole = reference.forward(tensors, config, token_ids)
    monkeypatch.setattr(reference, "QUERY_BLOCK", 13)
    np.testing.assert_allclose(reference.forward(tensors, config, token_ids), whole, atol=1e-10)
