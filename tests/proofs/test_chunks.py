"""However a prompt is cut into chunks, batched or cached, its logits are those of the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.model import kv_cache, sharding, transformer
from gptoss_jax.model.config import parse_config
from tests import gate, reference
from tests.gate import TinyModel
from tests.goldens import make as golden

FLOAT32 = transformer.DTYPE_POLICIES["float32"]


class Runner:
    """A tiny model that runs chunks of any width over a cache."""

    def __init__(self, config: dict, tensors: dict, slots: int, context: int):
        self.config = parse_config(config)
        laid_out = sharding.make()
        declared = transformer.declare(self.config, laid_out, policy=FLOAT32)
        self.params = transformer.nest(
            {
                path: jnp.asarray(gate.published_tensor(tensors, path).reshape(leaf.shape))
                for path, leaf in declared.leaves.items()
            }
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
    return TinyModel(golden.two_layers_config())


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
    """Guards the sliding window's edge: a change of one token reaches such a layer 127 positions on, and not 128."""
    runner = Runner(small.config, small.tensors, slots=1, context=320)
    layer = runner.params["layers"]
    full_off = layer[1]["attention"]["out"]["weight"]
    layer[1]["attention"]["out"]["weight"] = jnp.zeros_like(full_off)  # only the sliding window carries anything over
    tokens = golden.token_ids(200, seed=3)
    changed = tokens.copy()
    changed[10] = (changed[10] + 1) % 512
    for widths in ([200], [64], [150, 1]):
        (before,), (after,) = runner.chunks([tokens], widths), runner.chunks([changed], widths)
        moved = np.abs(before - after).max(axis=-1) > 0
        assert moved[10 : 10 + 128].all()
        assert not moved[10 + 128 :].any()
