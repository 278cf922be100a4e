"""The whole transformer on one screen: what it declares, and one step of it as a pure function.

Flax NNX declares: every weight says its shape, dtype and logical axes once, and nothing is allocated. What runs is
`step`, a pure function of a plain nested dict of weights, tokens and a cache; jit it, shard it, differentiate it.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from gptoss_jax.model import experts, layers, rope
from gptoss_jax.model.attention import Attention, Positions
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.experts import MixtureOfExperts
from gptoss_jax.model.kv_cache import KVCache
from gptoss_jax.model.layers import Kernels
from gptoss_jax.model.rematerialize import rematerialized
from gptoss_jax.model.sharding import Axes, Sharding
from gptoss_jax.model.taps import Tap, Taps
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels.attention import Places


class DtypePolicy(NamedTuple):
    """Which number format holds what. Weights stay as stored (bfloat16, MXFP4) under every policy.

    Always float32, for the reason beside it: the inside of RMSNorm (as the reference), matrix product sums (what
    tensor cores give), YaRN angles (bfloat16 positions break beyond 256), router logits (rounding flips experts),
    softmax and logits (cheap, and the reference's bfloat16 here is its largest error).
    """

    residual: jnp.dtype  # the stream that every layer adds to: float32 costs nothing and halves the rounding error
    activations: jnp.dtype  # operands of matrix products, queries, keys and values
    cache: jnp.dtype  # keys and values at rest


_BFLOAT16, _FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
DTYPE_POLICIES = {
    "bfloat16": DtypePolicy(residual=_FLOAT32, activations=_BFLOAT16, cache=_BFLOAT16),
    "float32": DtypePolicy(residual=_FLOAT32, activations=_FLOAT32, cache=_FLOAT32),
}


class Layer(nnx.Module):
    """Attention, then experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, sharding: Sharding, kernels: Kernels, policy: DtypePolicy):
        self.attention = Attention(config, layer, sharding, kernels, policy.activations)
        self.moe = MixtureOfExperts(config, sharding, kernels, policy.activations)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Positions, cache: KVCache | None, tap: Tap
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The residual stream after this layer, and the cache, if there is one, with its keys and values."""
        with jax.named_scope("attention"):
            added, cache = self.attention(x, positions, cache, tap)
            x = x + added.astype(x.dtype)
        with jax.named_scope("experts"):
            x = x + self.moe(x, positions.of_tokens >= 0, tap).astype(x.dtype)
        tap("residual", x)
        return x, cache


class Transformer(nnx.Module):
    """gpt-oss. Layers are unrolled: docs/lab_notes.md has the measurement against a scan."""

    def __init__(self, config: ModelConfig, sharding: Sharding, kernels: Kernels, policy: DtypePolicy):
        self.config, self.sharding, self.policy = config, sharding, policy
        self.embedding = layers.weight((config.vocab_size, config.hidden_size), ("vocab", None))
        self.layers = nnx.List([Layer(config, i, sharding, kernels, policy) for i in range(config.num_layers)])
        self.norm = layers.weight((config.hidden_size,), (None,))
        self.unembedding = layers.weight((config.vocab_size, config.hidden_size), ("vocab", None), num_inputs=1)
        self.unembed = layers.Product(("vocab",), (None,), sharding, kernels.linear)

    def __call__(
        self, tokens: Int32[Array, "B T"], counts: Int32[Array, "B"], cache: KVCache | None, taps: Taps
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Runs `counts` tokens of each sequence after what `cache` holds; gives the final residual stream."""
        ordinal = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        start = 0 if cache is None else cache.lengths[:, None]
        of_tokens = jnp.where(ordinal < counts[:, None], start + ordinal, -1)
        positions = Positions(of_tokens, *rope.rotation(self.config, of_tokens))
        x = self._embedded(tokens)
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x = self.sharding.constrain(x, ("batch", None, None))
                x, cache = layer(x, positions, cache, taps.of_layer(i))
        return x, None if cache is None else cache._replace(lengths=cache.lengths + counts)

    def packed(
        self, tokens: Int32[Array, "B T"], places: Places, taps: Taps, *, rematerialize: bool = False
    ) -> Float[Array, "B T D"]:
        """The final residual stream of rows that several sequences share, as training runs them.

        `rematerialize`: a layer's activations are computed once more for its gradient, and not kept.
        """
        positions = Positions(places.position, *rope.rotation(self.config, places.position), places)
        x = self._embedded(tokens)
        for i, layer in enumerate(self.layers):

            def run(x: Float[Array, "B T D"], i: int = i, layer: Any = layer) -> tuple[Any, Any]:
                found = taps.anew()
                with jax.named_scope(f"layer_{i}"):
                    x = self.sharding.constrain(x, ("batch", None, None))
                    return layer(x, positions, None, found.of_layer(i))[0], found.found

            x, found = rematerialized(run, x) if rematerialize else run(x)
            taps.found.update(found)
        return x

    def _embedded(self, tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        return layers.embed(self.embedding[...], tokens).astype(self.policy.residual)

    def normed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the unembedding multiplies, from the final residual stream."""
        return layers.rms_norm(x, self.norm[...], self.config.rms_norm_eps).astype(self.policy.activations)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits from the final residual stream, float32."""
        with jax.named_scope("unembedding"):
            return self.unembed(self.normed(x), self.unembedding.get_value())


# ---- the declaration, as others read it ----

Params = dict[Any, Any]  # a nested dict of arrays; layers are keyed by their number


class Leaf(NamedTuple):
    """One declared weight."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: Axes
    num_inputs: int = 0  # see `layers.weight`


class Model(NamedTuple):
    """A graph that `step` runs, and the weights that it declares."""

    graph: nnx.GraphDef
    leaves: dict[str, Leaf]  # by path, as in "layers/0/attention/q/weight"
    batch_invariant: bool  # see `Kernels.batch_invariant`

    def bind(self, params: Params) -> Transformer:
        """The module with `params` in it, for use inside a jitted function."""
        return nnx.merge(self.graph, params)

    def rearrangements(self, layout: expert_op.WeightLayout) -> dict[str, expert_op.Rearrangement]:
        """What `layout` does to each leaf."""
        ways: dict[str, expert_op.Rearrangement] = dict(zip(experts.PACKED, layout, strict=True))
        return {path: ways.get(path.rpartition("/moe/")[2], expert_op.AS_PUBLISHED) for path in self.leaves}


def declare(
    config: ModelConfig,
    sharding: Sharding,
    kernels: Kernels | None = None,
    policy: DtypePolicy = DTYPE_POLICIES["bfloat16"],
) -> Model:
    """The model that `config` describes, without weights."""
    kernels = kernels or Kernels()
    graph, state = nnx.split(Transformer(config, sharding, kernels, policy))
    leaves = {
        "/".join(map(str, path)): Leaf(
            *(param.get_value().shape, param.get_value().dtype), *map(param.get_metadata, ("axes", "num_inputs"))
        )
        for path, param in nnx.to_flat_state(state)
    }
    return Model(graph, leaves, kernels.batch_invariant)


def nest(leaves: dict[str, Any]) -> Params:
    """Leaves by path -> the nested dict that the model takes (layer numbers as integers)."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, name = (int(key) if key.isdigit() else key for key in path.split("/"))
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def step(
    model: Model, params: Params, tokens: Int32[Array, "B T"], counts: Int32[Array, "B"], cache: KVCache
) -> tuple[Float[Array, "B V"], KVCache]:
    """One prefill chunk or decoding step: the logits that follow each sequence's last token, and the cache then."""
    transformer = model.bind(params)
    x, after = _run(transformer, tokens, counts, cache)
    last = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
    return transformer.logits(last)[:, 0], after


def all_logits(
    model: Model, params: Params, tokens: Int32[Array, "B T"], counts: Int32[Array, "B"], cache: KVCache
) -> tuple[Float[Array, "B T V"], KVCache]:
    """As `step`, but the logits that follow every token (teacher forcing)."""
    transformer = model.bind(params)
    x, after = _run(transformer, tokens, counts, cache)
    return transformer.logits(x), after


def _run(
    transformer: Transformer, tokens: Int32[Array, "B T"], counts: Int32[Array, "B"], cache: KVCache
) -> tuple[Float[Array, "B T D"], KVCache]:
    x, after = transformer(tokens, counts, cache, Taps((), transformer.config.num_layers))
    assert after is not None, "given a cache, a transformer gives one"
    return x, after


def forward(
    model: Model,
    params: Params,
    tokens: Int32[Array, "B T"],
    *,
    counts: Int32[Array, "B"] | None = None,
    taps: Iterable[str] = (),
) -> tuple[Float[Array, "B T V"], dict[str, Float[Array, "..."]]]:
    """Whole sequences from position 0, without a cache: for training and analysis.

    Args:
        model: the declaration.
        params: its weights.
        tokens: B sequences of T tokens.
        counts: tokens of each that are there; the others are padding, and theirs is no sense. None: all.
        taps: names of activations to give, of `taps.PLACES`: "layers/0/router".

    Returns:
        The logits that follow each token, float32, and the activations by name.

    Raises:
        GptossError: a tap that this model does not have.
    """
    transformer = model.bind(params)
    collected = Taps(taps, transformer.config.num_layers)
    counts = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32) if counts is None else counts
    x, _ = transformer(tokens, counts, None, collected)
    return transformer.logits(x), collected.found
