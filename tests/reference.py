"""The whole of gpt-oss in float64 NumPy, to be read beside the papers; every other path is compared with it.

Shares no code with the product and takes the tensors under their names in the Hugging Face MXFP4 format.
Formulas: openai/gpt-oss, gpt_oss/torch/model.py, and weights.py for MXFP4; YaRN: arXiv:2309.00071, section 3.
Letters: T tokens, D hidden, N query heads, K key/value heads, G = N / K, H head size, F inside an expert,
X experts that a token chooses, V vocabulary.
"""

from collections.abc import Iterator, Mapping

import ml_dtypes  # noqa: F401  registers bfloat16, so that .astype reads it
import numpy as np

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
QUERY_BLOCK = 64  # queries attended at a time: bounds memory, changes nothing


def forward(tensors: Mapping, config: dict, token_ids, positions=None) -> np.ndarray:
    """Logits [len(positions), V] of one sequence, at all its positions if none are given."""
    *_, x = residuals(tensors, config, token_ids)
    x = x if positions is None else x[np.asarray(positions)]
    x = rms_norm(x, tensors["model.norm.weight"], config)
    return x @ tensors["lm_head.weight"].astype(np.float64).T


def residuals(tensors: Mapping, config: dict, token_ids) -> Iterator[np.ndarray]:
    """The residual stream [T, D]: after the embedding, then after each layer."""
    x = tensors["model.embed_tokens.weight"][np.asarray(token_ids)].astype(np.float64)
    yield x
    for layer in range(config["num_hidden_layers"]):
        weights = layer_weights(tensors, layer)
        x = x + attention_layer(x, weights, config, sliding=layer % 2 == 0)
        x = x + moe_layer(x, weights, config)
        yield x


def layer_weights(tensors: Mapping, layer: int) -> dict:
    """One layer's tensors, their names cut after `model.layers.N.`."""
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def linear(x, weights, name):
    """An affine map with its bias."""
    return x @ weights[f"{name}.weight"].astype(np.float64).T + weights[f"{name}.bias"].astype(np.float64)


def rms_norm(x, scale, config):
    """Divided by the root mean square, then scaled."""
    rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config["rms_norm_eps"])
    return x / rms * scale.astype(np.float64)


# ---- attention ----


def yarn_range(config: dict) -> tuple[float, float]:
    """The pairs of dimensions between which YaRN blends; neither number is rounded.

    Pairs below the first turn beta_fast times or more in the original context and are left as they are; those
    above the second turn beta_slow times or less and are interpolated.
    """
    scaling, pairs = config["rope_scaling"], config["head_dim"] / 2

    def pair_that_turns(times):
        tokens_per_turn = scaling["original_max_position_embeddings"] / times
        return float(pairs * np.log(tokens_per_turn / (2 * np.pi)) / np.log(config["rope_theta"]))

    return pair_that_turns(scaling["beta_fast"]), pair_that_turns(scaling["beta_slow"])


def yarn(config: dict) -> tuple[np.ndarray, float]:
    """Inverse frequencies [H / 2], and the concentration: it multiplies cosine and sine at every length."""
    factor = config["rope_scaling"]["factor"]
    low, high = yarn_range(config)
    i = np.arange(config["head_dim"] // 2)
    extrapolated = config["rope_theta"] ** (-2 * i / config["head_dim"])
    ramp = np.clip((i - low) / (high - low), 0, 1)
    return ramp * extrapolated / factor + (1 - ramp) * extrapolated, 0.1 * np.log(factor) + 1


def rotate(x, config):
    """Turns element i of each head against element i + H / 2. x is [T, heads, H], token t at position t."""
    frequencies, concentration = yarn(config)
    angle = np.arange(len(x))[:, None, None] * frequencies
    cos, sin = np.cos(angle) * concentration, np.sin(angle) * concentration
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention_layer(x, weights: Mapping, config: dict, sliding: bool) -> np.ndarray:
    """What the attention block adds to the residual x [T, D], its RMSNorm included."""
    (tokens, _), kv_heads, head = x.shape, config["num_key_value_heads"], config["head_dim"]
    x = rms_norm(x, weights["input_layernorm.weight"], config)
    q, k, v = (linear(x, weights, f"self_attn.{c}_proj").reshape(tokens, -1, head) for c in "qkv")
    q, k = rotate(q, config), rotate(k, config)
    q = q.reshape(tokens, kv_heads, -1, head).transpose(1, 2, 0, 3)  # K G T H: head n reads kv head n // G
    k, v = k.transpose(1, 2, 0)[:, None], v.transpose(1, 0, 2)[:, None]  # K 1 H T, K 1 T H
    q = q / np.sqrt(head)
    sinks = weights["self_attn.sinks"].astype(np.float64).reshape(kv_heads, -1, 1, 1)
    window = config["sliding_window"] if sliding else tokens
    out = np.empty((tokens, q.shape[1] * kv_heads * head))
    for start in range(0, tokens, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, tokens)
        first = max(0, start - window + 1)  # a query sees the `window` latest keys, its own among them
        distance = np.arange(start, stop)[:, None] - np.arange(first, stop)
        scores = q[:, :, start:stop] @ k[..., first:stop]
        scores[:, :, (distance < 0) | (distance >= window)] = -np.inf
        top = np.maximum(scores.max(axis=-1, keepdims=True), sinks)
        scores -= top  # in place, since fresh arrays would cost more than the arithmetic
        shares = np.exp(scores, out=scores)
        sink_share = np.exp(sinks - top)  # takes part in the sum, and has no value
        heads = shares @ v[:, :, first:stop] / (shares.sum(axis=-1, keepdims=True) + sink_share)
        out[start:stop] = heads.transpose(2, 0, 1, 3).reshape(stop - start, -1)
    return linear(out, weights, "self_attn.o_proj")


# ---- mixture of experts ----


def mxfp4(blocks, scales) -> np.ndarray:
    """Weights [rows, in] of blocks [rows, in / 32, 16], low nibble first, and scales [rows, in / 32]."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    return (FP4[codes] * 2.0 ** (scales.astype(int)[..., None] - 127)).reshape(*scales.shape[:-1], -1)


def swiglu(x, limit: float) -> np.ndarray:
    """x is [.., 2F], gate and linear part interleaved; the gate is clamped from above only."""
    gate, up = np.minimum(x[..., 0::2], limit), np.clip(x[..., 1::2], -limit, limit)
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


def route(x, weights: Mapping, config: dict) -> tuple[np.ndarray, np.ndarray]:
    """The chosen experts [T, X] of normed x, best first, and their shares: softmax over the chosen logits."""
    logits = linear(x, weights, "mlp.router")
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, : config["num_experts_per_tok"]]
    best = np.take_along_axis(logits, chosen, axis=-1)
    shares = np.exp(best - best[:, :1])
    return chosen, shares / shares.sum(axis=-1, keepdims=True)


def expert_matrix(weights: Mapping, name: str, expert: int) -> np.ndarray:
    """Weights [out, in] of MXFP4 bytes; or of numbers, as training has them under the name of the blocks."""
    blocks = weights[f"{name}_blocks"][expert]
    if blocks.dtype != np.uint8:
        return blocks.astype(np.float64)
    return mxfp4(blocks, weights[f"{name}_scales"][expert])


def expert_layer(x, weights: Mapping, config: dict, expert: int) -> np.ndarray:
    """One expert applied to normed x [T, D]; only this expert is dequantised."""

    def affine(x, name):
        matrix = expert_matrix(weights, name, expert)
        return x @ matrix.T + weights[f"{name}_bias"][expert].astype(np.float64)

    inner = swiglu(affine(x, "mlp.experts.gate_up_proj"), config["swiglu_limit"])
    return affine(inner, "mlp.experts.down_proj")


def moe_layer(x, weights: Mapping, config: dict) -> np.ndarray:
    """What the mixture of experts adds to the residual x [T, D], its RMSNorm included."""
    x = rms_norm(x, weights["post_attention_layernorm.weight"], config)
    chosen, shares = route(x, weights, config)
    out = np.zeros_like(x)
    for expert in np.unique(chosen):
        token, slot = np.nonzero(chosen == expert)  # an expert is chosen at most once by a token
        out[token] += shares[token, slot, None] * expert_layer(x[token], weights, config, expert)
    return out
