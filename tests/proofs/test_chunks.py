"""However a prompt is cut, batched or cached, and without a cache at all, the logits are the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.errors import GptossError
from gptoss_jax.model import kv_cache, sharding, transformer
from gptoss_jax.model.config import parse_config
from tests import reference
from tests.gate import TinyModel
from tests.goldens import make as golden
from tests.unit.test_model import _leaf

FLOAT32 = transformer.DTYPE_POLICIES["float32"]


class Runner:
    """A tiny model that runs chunks of any width over a cache."""

    def __init__(self, config: dict, tensors: dict, slots: int, context: int):
        self.config = parse_config(config)
        laid_out = sharding.make()
        declared = transformer.declare(self.config, laid_out, policy=FLOAT32)
        self.params = transformer.nest(
            {path: jnp.asarray(_leaf(tensors, path).reshape(leaf.shape)) for path, leaf in declared.leaves.items()}
        )
        self.slots, self.context, pages = slots, context, kv_cache.num_pages(context)
        self.cache = kv_cache.empty(
            self.config, slots=slots, pages=slots * pages, max_context_tokens=context, dtype=FLOAT32.cache
        )
        # Pages out of order, so that a position that takes its page's number for granted is caught.
        table = np.random.default_rng(0).permutation(slots * pages).reshape(slots, pages)
        self.cache = self.cache._replace(page_table=jnp.asarray(table, jnp.int32))
        self.run = jax.jit(functools.partial(transformer.all_logits, declared))

    def chunks(self, sequences: list[np.ndarray], widths: list[int]) -> list[np.ndarray]:
        """Logits of every token of every sequence, run in chunks of `widths` (the last one repeats)."""
        done = np.zeros(self.slots, np.int64)
        lengths = np.array([len(sequence) for sequence in sequences])
        cache, found = self.cache, [[] for _ in sequences]
        widths = list(widths)
        while (done < lengths).any():
            width = widths.pop(0) if len(widths) > 1 else widths[0]
            tokens, counts = np.zeros((self.slots, width), np.int32), np.minimum(lengths - done, width).astype(np.int32)
            for slot, sequence in enumerate(sequences):
                tokens[slot, : counts[slot]] = sequence[done[slot] : done[slot] + counts[slot]]
            logits, cache = self.run(self.params, jnp.asarray(tokens), jnp.asarray(counts), cache)
            for slot in range(self.slots):
                found[slot].append(np.asarray(logits[slot, : counts[slot]]))
            done += counts
        assert (np.asarray(cache.lengths) == lengths).all()
        return [np.concatenate(chunks) for chunks in found]


@pytest.fixture(scope="module")
def small():
    """Two layers, one of each kind."""
    config = golden.tiny_config() | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return TinyModel(config)


LENGTHS = (127, 128, 129, 300)


@pytest.mark.parametrize("widths", [[300], [1], [7], [128], [127, 2, 171], [200, 64]], ids=str)
def test_chunked_prefill_of_a_ragged_batch_equals_the_whole(widths, small):
    """Guards ring wrap-around, page arithmetic, padding and chunk borders: every cut gives the reference's logits."""
    sequences = [golden.token_ids(length, seed=length) for length in LENGTHS]
    runner = Runner(small.config, small.tensors, slots=len(LENGTHS), context=320)
    for sequence, logits in zip(sequences, runner.chunks(sequences, widths), strict=True):
        expected = reference.forward(small.tensors, small.config, sequence)
        assert np.abs(logits - expected).max() < 5e-4


@pytest.mark.parametrize("length", [4097, 9000])
def test_long_prompts_in_chunks(length, small):
    """Guards positions past YaRN's original context, many pages, and a ring that wrapped dozens of times."""
    tokens = golden.token_ids(length, seed=length)
    runner = Runner(small.config, small.tensors, slots=1, context=9024)
    positions = np.r_[0, 126:131, 4090:4097, length - 3 : length]
    expected = reference.forward(small.tensors, small.config, tokens, positions)
    (odd_cuts,) = runner.chunks([tokens], [500, 1000, 77, 512])
    (wide_cuts,) = runner.chunks([tokens], [2048])
    assert np.abs(odd_cuts[positions] - expected).max() < 2e-3
    assert np.abs(wide_cuts[positions] - expected).max() < 2e-3


def test_steps_after_a_long_prompt_equal_the_whole(small):
    """Guards the hand-over from prefill to decoding, where a ring that lost its order shows first."""
    tokens = golden.token_ids(300, seed=9)
    runner = Runner(small.config, small.tensors, slots=1, context=320)
    (logits,) = runner.chunks([tokens], [260, 1])
    assert np.abs(logits - reference.forward(small.tensors, small.config, tokens)).max() < 5e-4


def test_window_ends_at_distance_127(small):
    """Guards the window's edge: a change of one token reaches a sliding-window layer 127 positions on, and not 128."""
    runner = Runner(small.config, small.tensors, slots=1, context=320)
    layer = runner.params["layers"]
    # Only the sliding-window layer carries anything over.
    full_off = layer[1]["attention"]["out"]["weight"]
    layer[1]["attention"]["out"]["weight"] = jnp.zeros_like(full_off)
    tokens = golden.token_ids(200, seed=3)
    changed = tokens.copy()
    changed[10] = (changed[10] + 1) % 512
    for widths in ([200], [64], [150, 1]):
        (before,), (after,) = runner.chunks([tokens], widths), runner.chunks([changed], widths)
        moved = np.abs(before - after).max(axis=-1) > 0
        assert moved[10 : 10 + 128].all()
        assert not moved[10 + 128 :].any()


# ---- without a cache, and taps ----


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


@pytest.mark.parametrize("mesh", [None, "expert=7", "data=4"])
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
