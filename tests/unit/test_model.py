"""What the model declares, and what a step of it takes of memory."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from benchmarks import true_width
from gptoss_jax.model import kv_cache, layers, sharding, transformer
from gptoss_jax.model.config import parse_config, read_config
from gptoss_jax.model.kv_cache import KVCache
from gptoss_jax.runtime.program_memory import program_memory
from tests import gate
from tests.gate import TinyModel
from tests.goldens import make as golden

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def small():
    """Two layers, one of each kind."""
    return TinyModel(golden.two_layers_config())


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-120b", 4.504), ("gpt-oss-20b", 3.003)])
def test_cache_size_at_full_context(name, gib):
    """Guards the ring: sliding-window layers that kept the whole context would double the cache."""
    config = read_config(CONFIGS / f"{name}.json")
    tokens = config.max_context_tokens
    make = functools.partial(
        kv_cache.empty,
        config,
        slots=1,
        pages=kv_cache.num_pages(tokens),
        max_context_tokens=tokens,
        dtype=transformer.DTYPE_POLICIES["bfloat16"].cache,
    )
    cache: KVCache = jax.eval_shape(make)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert size / 2**30 == pytest.approx(gib, rel=0.01)
    assert config.cache_bytes(tokens) / 2**30 == pytest.approx(gib, rel=0.001)


@pytest.mark.parametrize(("window", "context", "ring"), [(128, 4096, 128), (128, 40, 40), (1 << 24, 100, 100)])
def test_the_ring_is_no_longer_than_window_and_context(window, context, ring):
    """Guards the memory of a config whose window is wider than any context: 10^9 tokens for each slot and layer."""
    config = dataclasses.replace(read_config(CONFIGS / "tiny.json"), sliding_window=window)
    make = functools.partial(
        kv_cache.empty, config, slots=3, pages=2, max_context_tokens=context, dtype=jnp.dtype(jnp.bfloat16)
    )
    cache: KVCache = jax.eval_shape(make)
    rings = [cache.k[i].shape for i in range(config.num_layers) if config.has_sliding_window(i)]
    assert set(rings) == {(3, ring, config.num_kv_heads * config.head_dim)}


@pytest.fixture(scope="module")
def logits_by_window(small, tmp_path_factory) -> dict[int, list[np.ndarray]]:
    """Of 24 tokens, with a cache and without one, by the width of the sliding window."""
    tokens, found = golden.token_ids(24, seed=5), {}
    for window in (64, 1 << 24):
        folder = small._replace(config=small.config | {"sliding_window": window}).write(tmp_path_factory.mktemp("w"))
        model = gptoss_jax.load(folder, dtype="float32")
        alone, _ = transformer.forward(model.model, model.params, jnp.asarray(tokens, jnp.int32)[None])
        found[window] = [model.logits(tokens.tolist()), np.asarray(alone[0])]
    return found


def test_a_window_wider_than_the_context_sees_all_of_it(logits_by_window):
    """Guards the shorter ring, and sequences without a cache, against tokens that fall out of it."""
    narrow, wide = logits_by_window.values()
    for ours, theirs in zip(narrow, wide, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(wide[0]).max() > 0.1


@pytest.mark.parametrize(
    ("name", "total", "per_token"), [("gpt-oss-20b", 13.76e9, 3.70e9), ("gpt-oss-120b", 65.25e9, 4.97e9)]
)
def test_cost_model(name, total, per_token):
    """Guards the byte model that shares of the bandwidth limit rest on, against published sizes."""
    config = read_config(CONFIGS / f"{name}.json")
    assert config.weight_bytes == pytest.approx(total, rel=0.003)
    assert config.decode_bytes(1, 0) == pytest.approx(per_token, rel=0.003)


def test_declaration_covers_the_published_tensors():
    """Guards the declaration: every published tensor has one leaf of its size, and nothing is declared beside them."""
    config = golden.tiny_config()
    tensors = TinyModel(config).tensors
    leaves = transformer.declare(parse_config(config), sharding.make()).leaves
    assert len(leaves) == len(tensors)
    for path, leaf in leaves.items():
        published = gate.published_tensor(tensors, path)
        assert (published.size, published.dtype) == (np.prod(leaf.shape), leaf.dtype), path


def test_whole_model_is_never_dequantised():
    """Guards memory at true width: a decoding step's temporaries are a few experts' weights, not the layer's 32."""
    raw = true_width.raw_config(2) | {"vocab_size": 512, "eos_token_id": 1, "pad_token_id": 0}
    config = parse_config(raw)
    compiled = _abstract_step(config, tokens=1, context=1024).compile()
    one_expert = 3 * config.hidden_size * config.intermediate_size * np.dtype(np.float32).itemsize
    assert program_memory(compiled).temporary_bytes < 4 * one_expert


def _abstract_step(config, tokens: int, context: int):
    """A bfloat16 step of one slot, lowered without any weights."""
    policy = transformer.DTYPE_POLICIES["bfloat16"]
    declared = transformer.declare(config, sharding.make(), policy=policy)
    params = transformer.nest({p: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for p, leaf in declared.leaves.items()})
    pages = kv_cache.num_pages(context)
    make = functools.partial(
        kv_cache.empty, config, slots=1, pages=pages, max_context_tokens=context, dtype=policy.cache
    )
    ids, counts = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    step = jax.jit(functools.partial(transformer.step, declared), donate_argnums=3)
    return step.lower(params, ids, counts, jax.eval_shape(make))


def test_dtypes_of_the_policy_hold(small):
    """Guards the policy table: under bfloat16 the cache is bfloat16 and logits are float32."""
    logits, cache = _abstract_step(parse_config(small.config), tokens=4, context=128).out_info
    assert logits.dtype == jnp.float32
    assert {array.dtype for array in cache.k + cache.v} == {jnp.dtype(jnp.bfloat16)}


def test_params_are_a_plain_tree():
    """Guards the declaration's purpose: paths name leaves, layers are numbered, experts stay packed."""
    config = parse_config(json.loads((CONFIGS / "tiny.json").read_text()))
    leaves = transformer.declare(config, sharding.make()).leaves
    tree = transformer.nest(leaves)
    assert tree["layers"][0]["attention"]["q"]["weight"] == leaves["layers/0/attention/q/weight"]
    assert {leaf.dtype for path, leaf in leaves.items() if path.endswith(("blocks", "scales"))} == {np.dtype(np.uint8)}


def test_scattered_writes_equal_slices():
    """Guards the cache off CPUs: accelerators scatter what CPUs write slice by slice."""
    rng = np.random.default_rng(0)
    stored = jnp.asarray(rng.standard_normal((5, 8, 8)), jnp.bfloat16)
    new = jnp.asarray(rng.standard_normal((3, 6, 8)), jnp.bfloat16)
    places = rng.permutation(40)[:18].reshape(3, 6)
    major, minor = jnp.asarray(places // 8, jnp.int32), jnp.asarray(places % 8, jnp.int32)
    first, end = jnp.array([0, 2, 3], jnp.int32), jnp.array([6, 5, 3], jnp.int32)
    slices = kv_cache._write_slices(stored, new, major, minor, first, end)
    scattered = kv_cache._write_scattered(stored, new, major, minor, first, end)
    np.testing.assert_array_equal(np.asarray(slices), np.asarray(scattered))
    assert int((np.asarray(slices) != np.asarray(stored)).any(axis=2).sum()) == 9


def test_a_token_is_written_without_a_pass_over_the_pool():
    """Guards decoding at long contexts: a pool made float32 and back, or copied, for every token and layer."""
    pool, new = jax.ShapeDtypeStruct((512, 64, 512), jnp.bfloat16), jax.ShapeDtypeStruct((1, 1, 8, 64), jnp.float32)
    table, positions = jax.ShapeDtypeStruct((1, 512), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def steps(pool, new, table, positions):
        def write(i, pool):
            return kv_cache.write_pages(pool, new, table, positions + i)

        return jax.lax.fori_loop(0, 3, write, pool)

    compiled = jax.jit(steps, donate_argnums=0).lower(pool, new, table, positions).compile()
    text = compiled.as_text() or ""
    assert "u16[512,64,512]" in text and "f32[512,64,512]" not in text
    assert program_memory(compiled).temporary_bytes < 1 << 20


@pytest.fixture(scope="module")
def exact_and_rounded(small, tmp_path_factory):
    """The two layers with dense weights in bfloat16, and in eight bits."""
    folder = small.write(tmp_path_factory.mktemp("dense"))
    models = [gptoss_jax.load(folder, dense=dense) for dense in ("bfloat16", "int8")]
    for model in models:
        model.logits([1])  # compiles
    return models


def test_int8_weights_are_the_nearest_and_half_as_large(exact_and_rounded):
    """Guards --dense int8: what is rounded, how far, and what is left exact."""
    exact, rounded = exact_and_rounded
    stored, kept = (jax.tree_util.tree_leaves_with_path(m.params) for m in (exact, rounded))
    eight_bits = {jax.tree_util.keystr(path[:-1]) for path, x in kept if x.dtype == jnp.int8}
    projections = {
        f"[{i}]['attention']['{name}']['weight']"
        for i in range(exact.config.num_layers)
        for name in ("q", "k", "v", "out")
    }
    assert {key.removeprefix("['layers']") for key in eight_bits} == projections | {"['unembedding']"}
    same = {jax.tree_util.keystr(path): x for path, x in kept}
    for path, w in stored:
        if jax.tree_util.keystr(path) in eight_bits:
            continue
        np.testing.assert_array_equal(np.asarray(w), np.asarray(same[jax.tree_util.keystr(path)]))
    w = np.asarray(exact.params["layers"][1]["attention"]["out"]["weight"], np.float32)  # [D, N, H]
    values, scales = map(np.asarray, rounded.params["layers"][1]["attention"]["out"]["weight"])
    assert (np.abs(values * scales[:, None, None] - w) <= scales[:, None, None] * 0.5001).all()
    assert (np.abs(values).max(axis=(1, 2)) == 127).all()
    assert exact.decode_bytes(1, 0) - rounded.decode_bytes(1, 0) == (
        (exact.config.attention_bytes + exact.config.unembedding_bytes) // 2
    )


def test_int8_weights_change_logits_a_little(exact_and_rounded):
    """Guards --dense int8: its cost is bounded, and it is what runs."""
    tokens = golden.token_ids(200, seed=3).tolist()
    theirs, ours = (model.logits(tokens) for model in exact_and_rounded)
    assert 1e-6 < golden.divergence(theirs, ours).mean() < 5e-3  # measured 7e-4 and 1.6e-3; nothing would be suspicious


def test_rows_of_zeros_stay_zeros_in_eight_bits():
    """Guards a division by the largest weight of a row that has none."""
    values, scales = map(np.asarray, layers.quantize(jnp.zeros((2, 3), jnp.bfloat16).at[1, 2].set(-2), 1))
    assert (values * scales[:, None]).tolist() == [[0, 0, 0], [0, 0, -2]]
