"""The reference against transformers' goldens, the product against both; and the gate against known bugs."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from converters.random_checkpoint import with_vocab_size
from converters.random_model import random_tensors
from gptoss_jax.model import experts, layers, rope
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.runtime import language_model as runtime
from gptoss_jax.runtime.language_model import LanguageModel
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels.expert_mlp import reference as expert_reference
from tests import gate, reference
from tests.gate import TinyModel
from tests.goldens import make as golden

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "tiny.npz")


def test_reference_equals_transformers_up_to_9000_tokens(tiny):
    """Guards all formulas beyond the window, beyond the original 4,096 tokens of context, and beyond 8,192.

    The float32 goldens drift with the position, since their angles are float32: the bounds are twice what was
    measured.
    """
    positions, edges = GOLDEN["long_positions"], GOLDEN["range_edges"]
    logits = reference.forward(tiny.tensors, tiny.config, GOLDEN["long_tokens"], positions)
    bounds = [(2e-5, 2e-11), (2e-4, 6e-10), (5e-4, 7e-9), (7e-4, 1.3e-8)]
    for (low, high), (max_abs, max_kl) in zip(pairwise(edges), bounds, strict=True):
        here = (positions >= low) & (positions < high)
        assert here.sum() >= 24
        gate.assert_agrees(logits[here], GOLDEN["long_float32"][here], max_abs, max_kl)


def test_reference_equals_transformers_on_short_sequences(tiny):
    """Guards the reference's formulas on eight more inputs."""
    tensors = tiny.tensors
    for tokens, theirs in zip(GOLDEN["short_tokens"], GOLDEN["short_float32"], strict=True):
        gate.assert_agrees(reference.forward(tensors, tiny.config, tokens, range(-4, 0)), theirs, 3e-5, 3e-11)


def test_float32_passes_the_gate_up_to_9000_tokens(tiny_folder):
    """Guards every formula, at positions below 128, above 128, above 4,096 and above 8,192, against transformers."""
    model = gptoss_jax.load(tiny_folder, dtype="float32")
    logits = model.logits(GOLDEN["long_tokens"].tolist())
    positions = GOLDEN["long_positions"]
    assert gate.failures(logits[positions], GOLDEN["long_float32"], positions) == []


def test_bfloat16_is_as_near_to_float32_as_transformers_is(tiny, tiny_folder):
    """Guards the dtype policy: our bfloat16's gap may not exceed transformers' own on the same 2,560 tokens."""
    model = gptoss_jax.load(tiny_folder)
    tensors, ours = tiny.tensors, []
    for tokens in GOLDEN["short_tokens"]:
        exact = reference.forward(tensors, tiny.config, tokens)
        ours.append(golden.divergence(exact, model.logits(tokens.tolist())))
    assert np.mean(ours) <= GOLDEN["short_bfloat16_kl"].mean()


def test_whole_numbers_in_experts_cost_no_fidelity(tiny, tiny_folder):
    """Guards bfloat16's experts on CPUs, whose activations become 16-bit whole numbers, block by block.

    Beside exact products of the same bfloat16s the divergence from float32 may grow by 2 % at most, and one position
    in 300, where two tokens are as likely as each other, may go the other way. (`python -m tests.fidelity` says the
    same of 9,000 positions.)
    """
    exact = reference.forward(tiny.tensors, tiny.config, TOKENS)
    kl, top1 = {}, {}
    for kernels in ("auto", "expert_mlp=reference"):
        logits = gptoss_jax.load(tiny_folder, kernels=kernels).logits(TOKENS.tolist())
        kl[kernels] = golden.divergence(exact, logits).mean()
        top1[kernels] = np.sum(logits.argmax(-1) == exact.argmax(-1))
    assert kl["auto"] <= 1.02 * kl["expert_mlp=reference"]
    assert top1["auto"] >= top1["expert_mlp=reference"] - 1


def test_bfloat16_far_out(tiny_folder):
    """Guards bfloat16 angles and caches at long positions, which short prompts do not show."""
    model = gptoss_jax.load(tiny_folder)
    positions = GOLDEN["long_positions"]
    logits = model.logits(GOLDEN["long_tokens"].tolist())[positions]
    ours = golden.divergence(GOLDEN["long_float32"], logits)
    theirs = golden.divergence(GOLDEN["long_float32"], GOLDEN["long_bfloat16"])
    assert ours.mean() <= theirs.mean()


def test_one_layer_at_true_width(tmp_path):
    """Guards the true shapes (D = F = 2880, N = H = 64, K = G = 8), where an exchange of axes still fits."""
    config = json.loads((golden.ROOT / "configs" / "gpt-oss-20b.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    wide = TinyModel(with_vocab_size(config, golden.VOCAB))
    tokens = golden.token_ids(6, seed=4)
    logits = gptoss_jax.load(wide.write(tmp_path), dtype="float32").logits(tokens.tolist())
    expected = reference.forward(wide.tensors, wide.config, tokens)
    assert gate.failures(logits, expected, np.arange(len(tokens))) == []


# ---- the mutation suite ----

# Two layers, one with a sliding window and one without, show every bug and compile fast. D = F is for the transposed
# down_proj alone.
TOKENS = golden.token_ids(300, seed=7)
# For Pallas's interpreters, which take a tenth of a second for a token: more than the window, and enough for a weight.
SOME_TOKENS, FEW_TOKENS = TOKENS[:140], TOKENS[:16]
INTERPRETED = {
    name: f"attention={name},expert_mlp={name}" for name in (f"{device}-interpreted" for device in ("gpu", "tpu"))
}


class Case:
    """A small model, what the reference says of it, and what the product makes of it."""

    def __init__(self, folder: Path, config: dict, edit: Callable[[dict], None] | None = None):
        self.folder = TinyModel(config).write(folder)
        self.tensors = random_tensors(config, 0)
        self.edit = edit
        if edit:
            edit(self.tensors)
        self.expected = reference.forward(self.tensors, config, TOKENS)
        self._compiled: dict[str, LanguageModel] = {}

    def load(self, kernels: str = "auto") -> LanguageModel:
        """The model, whose program is traced with the code as it is when it first runs."""
        model = gptoss_jax.load(self.folder, dtype="float32", kernels=kernels)
        if self.edit:
            for layer in range(model.config.num_layers):
                block = model.params["layers"][layer]["moe"]
                prefix = f"model.layers.{layer}.mlp.experts."
                block["gate_up"]["bias"] = jnp.asarray(self.tensors[prefix + "gate_up_proj_bias"])
                block["down"]["scales"] = jnp.asarray(self.tensors[prefix + "down_proj_scales"])
        return model

    def compiled(self, kernels: str = "auto") -> LanguageModel:
        """The model, compiled once for all mutations of its weights: they are arguments of its program."""
        if kernels not in self._compiled:
            self._compiled[kernels] = self.load(kernels)
        return self._compiled[kernels]

    def failures(self, model: LanguageModel, tokens: np.ndarray = TOKENS) -> list[str]:
        """Why the gate refuses what the model says of `tokens`, which are the first of TOKENS."""
        with pytest.MonkeyPatch.context() as patch:
            if tokens is not TOKENS:  # no padding, for which an interpreter takes as long as for tokens
                patch.setattr(runtime, "LOGITS_CHUNK_TOKENS", len(tokens))
            logits = model.logits(tokens.tolist())
        assert np.isfinite(logits).all()  # a mutation that breaks everything would be caught for nothing
        return gate.failures(logits, self.expected[: len(tokens)], np.arange(len(tokens)))


def _deep_negative_gates(tensors: dict[str, np.ndarray]) -> None:
    """Gates near -9 and large down weights: what SwiGLU gives there is tiny, so it is made to count."""
    for name in tensors:
        if name.endswith("gate_up_proj_bias"):
            tensors[name] = tensors[name].copy()
            tensors[name][:, 0::2] -= np.asarray(9, tensors[name].dtype)
        if name.endswith("down_proj_scales"):
            tensors[name] = tensors[name] + np.uint8(9)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Case:
    """The small model."""
    return Case(tmp_path_factory.mktemp("plain"), golden.two_layers_config())


@pytest.fixture(scope="module")
def square(tmp_path_factory) -> Case:
    """The small model with D = F, where a transposed matrix keeps its shape."""
    return Case(tmp_path_factory.mktemp("square"), golden.two_layers_config() | {"intermediate_size": 96})


@pytest.fixture(scope="module")
def negative(tmp_path_factory) -> Case:
    """The small model in the region that a gate clamped from below would change."""
    return Case(tmp_path_factory.mktemp("negative"), golden.two_layers_config(), _deep_negative_gates)


@pytest.mark.parametrize("case", ["plain", "square", "negative"])
def test_unmutated_product_passes(case, request):
    """Guards the suite itself: a gate that fails the right product would catch every mutation for nothing."""
    case = request.getfixturevalue(case)
    assert case.failures(case.compiled()) == []


@pytest.mark.parametrize("tokens", [SOME_TOKENS, FEW_TOKENS], ids=len)
@pytest.mark.parametrize("kernels", INTERPRETED)
def test_product_passes_through_kernels_for_accelerators(kernels, tokens, plain):
    """Guards the kernels for GPUs and TPUs within the whole model: the same gate, run by Pallas's interpreters."""
    model = plain.compiled(INTERPRETED[kernels])
    assert f"expert_mlp: {kernels} (asked for by name)" in model.kernels
    assert plain.failures(model, tokens) == []


Change = Callable[[jax.Array], jax.Array]


def _with_weights(model: LanguageModel, path: Sequence[str], change: Change) -> Any:
    """The model's weights, the one at `path` of every layer changed."""
    params = model.params
    for layer in params["layers"]:
        params = _changed(params, ("layers", layer, *path), change)
    return params


def _changed(tree: Any, path: Sequence[str | int], change: Change) -> Any:
    if not path:
        return change(tree)
    return tree | {path[0]: _changed(tree[path[0]], path[1:], change)}


WEIGHT_MUTATIONS: dict[str, tuple[tuple[str, ...], Change]] = {
    "sinks off": (("attention", "sinks"), lambda w: jnp.full_like(w, -1e9)),
    "sinks scaled": (("attention", "sinks"), lambda w: w * jnp.bfloat16(0.125)),
    "router bias off": (("moe", "router", "bias"), jnp.zeros_like),
    "nibbles swapped": (("moe", "down", "blocks"), lambda w: (w << 4) | (w >> 4)),
    "scale bias 126": (("moe", "gate_up", "scales"), lambda w: w + jnp.uint8(1)),
    "one expert's weights random": (
        ("moe", "gate_up", "blocks"),
        lambda w: w.at[3].set(jax.random.bits(jax.random.key(0), w.shape[1:], jnp.uint8)),
    ),
}


@pytest.mark.parametrize("name", WEIGHT_MUTATIONS)
def test_gate_catches_wrong_weights(name, plain, monkeypatch):
    """Guards the gate: a weight left out, scaled or misread must show."""
    model = plain.compiled()
    monkeypatch.setattr(model, "params", _with_weights(model, *WEIGHT_MUTATIONS[name]))
    assert plain.failures(model)


@pytest.mark.parametrize("kernels", INTERPRETED)
@pytest.mark.parametrize("name", WEIGHT_MUTATIONS)
def test_gate_catches_wrong_weights_through_kernels_for_accelerators(name, kernels, plain, monkeypatch):
    """Guards the gate with those kernels in place: what is misread must show through their weight layouts as well."""
    path, change = WEIGHT_MUTATIONS[name]
    model, way = plain.compiled(INTERPRETED[kernels]), expert_op.AS_PUBLISHED
    if "/".join(path[1:]) in experts.PACKED:
        way = expert_op.IMPLEMENTATIONS[kernels].layout[experts.PACKED.index("/".join(path[1:]))]
    params = _with_weights(model, path, lambda w: way.pack(change(way.unpack(w))))
    monkeypatch.setattr(model, "params", params)
    assert plain.failures(model, FEW_TOKENS)


CONFIG_MUTATIONS = {
    "window 127": {"sliding_window": 127},
    "window 129": {"sliding_window": 129},
    "limit off": {"swiglu_limit": 1e9},
}


@pytest.mark.parametrize(
    ("name", "kernels", "tokens"),
    [
        *(pytest.param(name, "auto", TOKENS, id=f"{name}-auto") for name in CONFIG_MUTATIONS),
        # Interpreted, a token takes a second: one side of the window, and no more tokens than show the clamp.
        *(pytest.param("window 127", names, SOME_TOKENS, id=f"window 127-{d}") for d, names in INTERPRETED.items()),
        *(pytest.param("limit off", names, FEW_TOKENS, id=f"limit off-{d}") for d, names in INTERPRETED.items()),
    ],
)
def test_gate_catches_wrong_numbers(name, kernels, tokens, plain, tmp_path):
    """Guards the gate: a window off by one key, or a clamp that never bites, must show."""
    for file in plain.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text()) | CONFIG_MUTATIONS[name]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plain.failures(gptoss_jax.load(tmp_path, dtype="float32", kernels=kernels), tokens)


def _rounded_range(config):
    low, high = _exact_range(config)
    return np.floor(low), np.ceil(high)


def _interleaved_rotation(x, cosine, sine):
    even, odd = x[..., 0::2], x[..., 1::2]
    cosine, sine = cosine[:, :, None], sine[:, :, None]
    return jnp.stack([even * cosine - odd * sine, odd * cosine + even * sine], axis=-1).reshape(x.shape)


def _softmax_before_top_k(logits, top_k, is_token=None):
    del is_token  # padding's outputs are dropped later too
    weights, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)
    return ids, weights


def _swiglu_like(h, limit, *, alpha=1.702, low=-jnp.inf, plus=1.0, halves=False):
    half = h.shape[-1] // 2
    gate_part, linear = (h[:, :half], h[:, half:]) if halves else (h[:, 0::2], h[:, 1::2])
    gate_part = jnp.clip(gate_part, low, limit)
    return gate_part * jax.nn.sigmoid(alpha * gate_part) * (jnp.clip(linear, -limit, limit) + plus)


def _bias_after_weighting(x, expert_ids, routing_weights, weights, *, limit):
    unbiased = weights._replace(down_bias=jnp.zeros_like(weights.down_bias))
    plain_sum = expert_reference.expert_mlp(x, expert_ids, routing_weights, unbiased, limit=limit)
    return plain_sum + weights.down_bias[expert_ids].sum(axis=1).astype(jnp.float32)


def _transposed_down(x, weights, limit):
    gate_up = expert_reference.mxfp4.dequantize(weights.gate_up_blocks, weights.gate_up_scales, x.dtype)
    down = expert_reference.mxfp4.dequantize(weights.down_blocks, weights.down_scales, x.dtype)
    h = x @ gate_up.T + weights.gate_up_bias.astype(x.dtype)
    return expert_reference.swiglu(h, limit) @ down + weights.down_bias.astype(x.dtype)


def _norm_in_bfloat16(x, scale, eps):
    x = x.astype(jnp.bfloat16)
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(mean + jnp.bfloat16(eps)) * scale).astype(jnp.float32)


_exact_range = rope.correction_range
# name: (object, attribute, what stands there instead, the case that shows it)
CODE_MUTATIONS = {
    "YaRN correction range rounded": (rope, "correction_range", _rounded_range, "plain"),
    "concentration factor missing": (rope, "concentration", lambda config: 1.0, "plain"),
    "rotate pairs interleaved": (rope, "rotate", _interleaved_rotation, "plain"),
    "window parity swapped": (ModelConfig, "has_sliding_window", lambda self, layer: layer % 2 == 1, "plain"),
    "softmax before top-k without renormalising": (experts, "route", _softmax_before_top_k, "plain"),
    "alpha 1": (expert_reference, "ALPHA", 1.0, "plain"),
    "gate clamped below": (expert_reference, "swiglu", lambda h, limit: _swiglu_like(h, limit, low=-limit), "negative"),
    "+1 missing": (expert_reference, "swiglu", lambda h, limit: _swiglu_like(h, limit, plus=0.0), "plain"),
    "gate/up as halves": (expert_reference, "swiglu", lambda h, limit: _swiglu_like(h, limit, halves=True), "plain"),
    "down_proj transposed": (expert_reference, "one_expert", _transposed_down, "square"),
    "RMSNorm in bfloat16": (layers, "rms_norm", _norm_in_bfloat16, "plain"),
}


@pytest.mark.parametrize("name", CODE_MUTATIONS)
def test_gate_catches_wrong_code(name, request, monkeypatch):
    """Guards the gate: each of these has shipped in a public port of gpt-oss, and must show."""
    owner, attribute, mutant, case = CODE_MUTATIONS[name]
    case = request.getfixturevalue(case)
    if attribute == "has_sliding_window":  # the config would contradict it, and be refused before the gate
        monkeypatch.setattr(ModelConfig, "layer_types", ["sliding_attention", "full_attention"])
    monkeypatch.setattr(owner, attribute, mutant)
    kernels = "expert_mlp=reference" if owner is expert_reference else "auto"  # the mutant has to be what runs
    assert case.failures(case.load(kernels))


def test_gate_catches_expert_bias_after_weighting(plain, monkeypatch):
    """Guards the gate: the down bias belongs inside the weighted sum."""
    biased = {**expert_op.IMPLEMENTATIONS, "biased": expert_op.ExpertMlp(_bias_after_weighting)}
    monkeypatch.setattr(expert_op, "IMPLEMENTATIONS", biased)
    assert plain.failures(gptoss_jax.load(plain.folder, dtype="float32", kernels="expert_mlp=biased"))
