"""`forward`, which needs no cache: its logits, on any mesh, and its taps are those of the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.errors import GptossError
from gptoss_jax.model import transformer
from tests import reference
from tests.gate import TinyModel
from tests.goldens import make as golden
from tests.proofs.test_sharding import CONFIG

LENGTHS = (127, 128, 129, 300)


@pytest.fixture(scope="module")
def small():
    """Two layers, one of each kind, of sizes that meshes divide."""
    return TinyModel(CONFIG)


def _forward(model, sequences, taps=()):
    """Logits of each token of each sequence, and what was tapped."""
    counts = jnp.asarray([len(sequence) for sequence in sequences], jnp.int32)
    tokens = np.zeros((len(sequences), int(counts.max())), np.int32)
    for slot, sequence in enumerate(sequences):
        tokens[slot, : len(sequence)] = sequence
    run = jax.jit(functools.partial(transformer.forward, model.model, taps=taps))
    logits, found = run(model.params, jnp.asarray(tokens), counts=counts)
    return [np.asarray(logits[slot, : len(sequence)]) for slot, sequence in enumerate(sequences)], found


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """The small model as a published checkpoint."""
    return small.write(tmp_path_factory.mktemp("forward"))


@pytest.mark.parametrize("mesh", [None, "data=4,expert=2", "tensor=8"])
def test_a_forward_without_a_cache_equals_the_whole(folder, small, mesh):
    """Guards training and analysis: positions, window, sinks and padding are those of the cached steps, on any mesh."""
    sequences = [golden.token_ids(length, seed=length) for length in LENGTHS]
    model = gptoss_jax.load(folder, dtype="float32", mesh=mesh)
    logits, found = _forward(model, sequences)
    assert found == {}
    for sequence, ours in zip(sequences, logits, strict=True):
        assert np.abs(ours - reference.forward(small.tensors, small.config, sequence)).max() < 5e-4


def test_taps_are_the_references(folder, small, monkeypatch):
    """Guards what a researcher looks at: streams, router logits and heads are those of the float64 reference."""
    seen, linear, moe = {}, reference.linear, reference.moe_layer

    def spy_linear(x, weights, name):
        place = {"mlp.router": "router", "self_attn.o_proj": "attention"}.get(name)
        out = linear(x, weights, name)
        if place:
            seen.setdefault(place, []).append(out if place == "router" else x)
        return out

    def spy_moe(x, weights, config):
        added = moe(x, weights, config)
        seen.setdefault("residual", []).append(x + added)
        return added

    monkeypatch.setattr(reference, "linear", spy_linear)
    monkeypatch.setattr(reference, "moe_layer", spy_moe)
    tokens = golden.token_ids(200, seed=2)
    reference.forward(small.tensors, small.config, tokens)
    model = gptoss_jax.load(folder, dtype="float32")
    names = [f"layers/{layer}/{place}" for layer in range(2) for place in ("residual", "router", "attention")]
    found = model.activations(tokens.tolist(), names)
    assert sorted(found) == sorted(names)
    for name, ours in found.items():
        _, layer, place = name.split("/")
        np.testing.assert_allclose(ours.reshape(len(tokens), -1), seen[place][int(layer)], rtol=1e-3, atol=2e-4)
    with pytest.raises(GptossError, match="tap 'layers/2/router', expected layers/0 to layers/1, and of each one of"):
        model.activations([1], ["layers/2/router"])


def test_taps_that_are_off_cost_nothing(folder, monkeypatch):
    """Guards production: a program without taps is, to the letter, that of a model that has no places to tap."""
    model = gptoss_jax.load(folder)
    tokens = jnp.zeros((1, 8), jnp.int32)

    def text(taps=()):
        run = jax.jit(functools.partial(transformer.forward, model.model, taps=taps))
        return run.lower(model.params, tokens).as_text()

    off, on = text(), text(["layers/0/router"])
    assert on != off
    monkeypatch.setattr(transformer.Taps, "of_layer", lambda self, layer: lambda place, activation: None)
    assert text() == off
