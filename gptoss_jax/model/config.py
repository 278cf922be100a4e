"""The numbers that the weights fix, read from a checkpoint's own config.json, and what follows from them in bytes.

Knows no arrays, no devices and no files but config.json. Two spellings are published: Hugging Face's and the one in
OpenAI's `original/` folder. Either is read; a key that is unknown, missing, or set to something this model family does
not do is refused, all of them in one message.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.errors import GptossError

MXFP4_BLOCK = 32  # weights that share one E8M0 scale (OCP Microscaling Formats v1.0, section 5.3)
NAMED_TOKEN_IDS = 200_019  # o200k_harmony names the ids below; the published embedding has 201,088 rows
STOP_IDS = (200_002, 200_012, 199_999)  # <|return|>, <|call|>, <|endoftext|>; never <|end|> (200,007)


class ConfigError(GptossError):
    """A config.json that this model family cannot be."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of one gpt-oss model. Every number comes from its config.json.

    Attributes:
        num_layers: L; layers 0, 2, 4, ... have a sliding window, the odd ones attend to everything before a token.
        hidden_size: D, width of the residual stream.
        num_heads: N query heads.
        num_kv_heads: K key/value heads; query head n reads key/value head n // (N / K).
        head_dim: H, width of one head.
        num_experts: E.
        experts_per_token: X, experts that the router picks for a token.
        intermediate_size: F, width inside one expert.
        vocab_size: V, rows of the embedding and of the unembedding.
        sliding_window: keys that a sliding-window layer sees, the query's own included.
        swiglu_limit: clamp of the SwiGLU inputs.
        rms_norm_eps: epsilon inside RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling_factor: YaRN's s.
        rope_beta_fast: YaRN's beta (rotations above which a dimension is extrapolated), `ntk_beta` at OpenAI.
        rope_beta_slow: YaRN's alpha (rotations below which a dimension is interpolated), `ntk_alpha` at OpenAI.
        initial_context_length: tokens of context before YaRN's stretching.
        max_context_tokens: tokens of context that the model promises.
        stop_ids: token ids that end the assistant's turn.
        pad_id: token id that fills unused places.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    vocab_size: int
    sliding_window: int
    swiglu_limit: float
    rms_norm_eps: float
    rope_theta: float
    rope_scaling_factor: float
    rope_beta_fast: float
    rope_beta_slow: float
    initial_context_length: int
    max_context_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int

    def __post_init__(self):
        faults = [
            f"{field.name} is {value!r}, expected a number above 0"
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), (int, float)) and field.name != "pad_id" and not value > 0
        ]
        if not faults:
            faults = self._shape_faults()
        if faults:
            raise ConfigError("; ".join(faults))

    def _shape_faults(self) -> list[str]:
        faults = []
        if self.num_heads % self.num_kv_heads:
            faults.append(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            faults.append(f"head_dim {self.head_dim} is odd, but rotary embedding turns pairs")
        if self.experts_per_token > self.num_experts:
            faults.append(f"experts_per_token {self.experts_per_token} exceeds num_experts {self.num_experts}")
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % MXFP4_BLOCK:
                faults.append(f"{name} {getattr(self, name)} is not a multiple of the MXFP4 block of {MXFP4_BLOCK}")
        for stop in (*self.stop_ids, self.pad_id):
            if not 0 <= stop < self.vocab_size:
                faults.append(f"special token id {stop} is outside the vocabulary of {self.vocab_size}")
        return faults

    def has_sliding_window(self, layer: int) -> bool:
        """Whether `layer` sees only the last `sliding_window` keys: the even layers, counted from 0."""
        return layer % 2 == 0

    @property
    def num_token_ids(self) -> int:
        """Ids that name a token; the embedding's rows from here on are padding."""
        return min(self.vocab_size, NAMED_TOKEN_IDS)

    @property
    def layer_types(self) -> list[str]:
        """Hugging Face's name for each layer's attention."""
        return ["sliding_attention" if self.has_sliding_window(i) else "full_attention" for i in range(self.num_layers)]

    # ---- the cost model: what one decoding step must at least read ----

    @property
    def attention_bytes(self) -> int:
        """Bytes of all attention projections, bfloat16."""
        per_layer = 2 * self.head_dim * (self.num_heads + self.num_kv_heads) * self.hidden_size
        return 2 * per_layer * self.num_layers

    @property
    def unembedding_bytes(self) -> int:
        """Bytes of the unembedding, bfloat16; the embedding is as large."""
        return 2 * self.vocab_size * self.hidden_size

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of one layer: packed MXFP4 codes and scales, biases left out."""
        weights = 3 * self.intermediate_size * self.hidden_size
        return weights // 2 + weights // MXFP4_BLOCK

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole model's matrices as stored (norms, biases, sinks and routers left out)."""
        experts = self.num_layers * self.num_experts * self.expert_bytes
        return experts + self.attention_bytes + 2 * self.unembedding_bytes

    def decode_bytes(self, slots: int, context_tokens: int, cache_itemsize: int = 2, dense_itemsize: int = 2) -> int:
        """Bytes that one decoding step of `slots` slots must read at least, each with `context_tokens` in the cache.

        Counts the experts expected to be hit when every token draws its X experts evenly: E (1 - (1 - X/E)^slots).
        """
        missed = (1 - self.experts_per_token / self.num_experts) ** slots
        experts = self.num_layers * self.num_experts * (1 - missed) * self.expert_bytes
        cache = slots * self.cache_bytes(context_tokens, cache_itemsize)
        dense = (self.attention_bytes + self.unembedding_bytes) // 2 * dense_itemsize
        return math.ceil(experts) + dense + cache

    def cache_bytes(self, context_tokens: int, itemsize: int = 2) -> int:
        """Bytes of keys and values that one sequence of `context_tokens` occupies.

        Layers with a sliding window hold a window of tokens at most.
        """
        with_window = sum(self.has_sliding_window(i) for i in range(self.num_layers))
        full = self.num_layers - with_window
        held = full * context_tokens + with_window * min(context_tokens, self.sliding_window)
        return 2 * held * self.num_kv_heads * self.head_dim * itemsize


# ---- reading and writing config.json ----

# Hugging Face key -> field. rope_scaling's own keys are handled beside it.
_HUGGINGFACE = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "swiglu_limit": "swiglu_limit",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_position_embeddings": "max_context_tokens",
}
_HUGGINGFACE_ROPE = {
    "factor": "rope_scaling_factor",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "original_max_position_embeddings": "initial_context_length",
}
# Keys whose value this model family fixes: anything else is another model.
_HUGGINGFACE_FIXED = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
# Keys that say nothing about the forward pass (training, bookkeeping, or repeated elsewhere).
_HUGGINGFACE_IGNORED = frozenset(
    """architectures attention_dropout bos_token_id dtype torch_dtype experts_per_token initial_context_length
    initializer_range output_router_logits quantization_config router_aux_loss_coef transformers_version use_cache
    unsloth_fixed unsloth_version _name_or_path""".split()
)
_OPENAI = {
    "num_hidden_layers": "num_layers",
    "num_experts": "num_experts",
    "experts_per_token": "experts_per_token",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "swiglu_limit": "swiglu_limit",
    "head_dim": "head_dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "sliding_window": "sliding_window",
    "initial_context_length": "initial_context_length",
    "rope_theta": "rope_theta",
    "rope_scaling_factor": "rope_scaling_factor",
    "rope_ntk_alpha": "rope_beta_slow",
    "rope_ntk_beta": "rope_beta_fast",
}
_OPENAI_RMS_NORM_EPS = 1e-5  # a literal in openai/gpt-oss torch/model.py, not a key of its config


def read_config(path: Path) -> ModelConfig:
    """The model that `path` (a config.json) describes.

    Raises:
        ConfigError: the file is absent, is not JSON, or has keys that are unknown, missing or of another model.
    """
    try:
        raw = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a checkpoint's folder holds its config.json") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # json's errors, and a number of more digits than Python reads
        raise ConfigError(f"{path}: not JSON ({error})") from None
    try:
        return parse_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(raw: Any) -> ModelConfig:
    """The model that `raw`, a parsed config.json in either published spelling, describes."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"expected an object of keys and values, got {type(raw).__name__}")
    return _from_openai(raw) if "rope_ntk_beta" in raw else _from_huggingface(raw)


def _from_openai(raw: Mapping[str, Any]) -> ModelConfig:
    faults = _unknown(raw, _OPENAI) + _missing(raw, _OPENAI)
    if faults:
        raise ConfigError("; ".join(faults))
    values = _typed({field: raw[key] for key, field in _OPENAI.items()})
    stop_ids, pad_id = _special_ids(raw["vocab_size"], None, None)
    return ModelConfig(
        **values,
        rms_norm_eps=_OPENAI_RMS_NORM_EPS,
        max_context_tokens=round(values["initial_context_length"] * values["rope_scaling_factor"]),
        stop_ids=stop_ids,
        pad_id=pad_id,
    )


def _from_huggingface(raw: Mapping[str, Any]) -> ModelConfig:
    rope_key = "rope_parameters" if "rope_parameters" in raw else "rope_scaling"
    rope = raw.get(rope_key) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{rope_key} is {rope!r}, expected an object of keys and values")
    flat = {k: v for k, v in raw.items() if k != rope_key}
    if "rope_theta" in rope:  # transformers 5 moved it there
        flat["rope_theta"] = rope["rope_theta"]
    known = _HUGGINGFACE | _HUGGINGFACE_FIXED | dict.fromkeys(("layer_types", "eos_token_id", "pad_token_id"))
    faults = _unknown(flat, known | dict.fromkeys(_HUGGINGFACE_IGNORED))
    faults += _missing(flat, _HUGGINGFACE) + _missing(rope, _HUGGINGFACE_ROPE, f"{rope_key}.")
    faults += [
        f"{key} is {flat[key]!r}, expected {want!r}"
        for key, want in _HUGGINGFACE_FIXED.items()
        if key in flat and flat[key] != want
    ]
    faults += _rope_faults(rope, rope_key)
    if faults:
        raise ConfigError("; ".join(faults))
    values = _typed(
        {field: flat[key] for key, field in _HUGGINGFACE.items()}
        | {field: rope[key] for key, field in _HUGGINGFACE_ROPE.items()}
    )
    stop_ids, pad_id = _special_ids(flat["vocab_size"], flat.get("eos_token_id"), flat.get("pad_token_id"))
    config = ModelConfig(**values, stop_ids=stop_ids, pad_id=pad_id)
    if flat.get("layer_types", config.layer_types) != config.layer_types:
        raise ConfigError(
            f"layer_types is {flat['layer_types']!r}, expected {config.num_layers}, sliding_attention on the even ones"
        )
    return config


def _rope_faults(rope: Mapping[str, Any], name: str) -> list[str]:
    fixed = {"rope_type": "yarn", "truncate": False}
    known = _HUGGINGFACE_ROPE | fixed | {"rope_theta": None}
    return _unknown(rope, known, f"{name}.") + [
        f"{name}.{key} is {rope.get(key)!r}, expected {want!r}" for key, want in fixed.items() if rope.get(key) != want
    ]


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as their fields' types: JSON writes 7 for 7.0, but 2880.5 heads or "2880" are mistakes."""
    types = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    faults = [
        f"{name} is {value!r}, expected {'a whole number' if types[name] is int else 'a number'}"
        for name, value in values.items()
        if isinstance(value, bool)
        or not isinstance(value, int if types[name] is int else (int, float))
        or not math.isfinite(value)
    ]
    if faults:
        raise ConfigError("; ".join(faults))
    return {name: float(value) if types[name] is float else value for name, value in values.items()}


def _unknown(raw: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [f"unknown key {prefix}{key}" for key in sorted(raw.keys() - known.keys())]


def _missing(raw: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [f"missing key {prefix}{key}" for key in sorted(wanted.keys() - raw.keys())]


def _special_ids(vocab_size: int, eos: Any, pad: Any) -> tuple[tuple[int, ...], int]:
    """Stop and pad ids: harmony's where the vocabulary has them, else what the config says.

    The published config.json lists only <|return|> as eos; a tool call ends the turn as well. OpenAI's config lists
    none, so a smaller vocabulary in its format stops at no token.
    """
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for name, ids in (("eos_token_id", listed), ("pad_token_id", [] if pad is None else [pad])):
        if not all(isinstance(token, int) for token in ids):
            raise ConfigError(f"{name} is {ids!r}, expected token ids")
    if vocab_size > max(STOP_IDS):
        return STOP_IDS, pad if pad is not None else 199_999
    return tuple(listed), pad if pad is not None else vocab_size - 1


def to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """`config` as a config.json in Hugging Face's spelling: `parse_config` reads back the same model."""
    return {
        "architectures": ["GptOssForCausalLM"],
        **_HUGGINGFACE_FIXED,
        **{key: getattr(config, field) for key, field in _HUGGINGFACE.items()},
        "layer_types": config.layer_types,
        "eos_token_id": list(config.stop_ids),
        "pad_token_id": config.pad_id,
        "rope_scaling": {
            "rope_type": "yarn",
            "truncate": False,
            **{key: getattr(config, field) for key, field in _HUGGINGFACE_ROPE.items()},
        },
    }
