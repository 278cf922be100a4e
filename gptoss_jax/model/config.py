"""The numbers that the weights fix, read from a checkpoint's own config.json, and what follows from them in bytes.

Knows no arrays, no devices and no files but config.json. Two spellings are published: Hugging Face's and the one in
OpenAI's `original/` folder (`config_keys.py` has both). Either is read; a key that is unknown, missing, or set to
something this model family does not do is refused, all of them in one message; the config of another family by that
alone.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.errors import GptossError, one_line, short, shortened
from gptoss_jax.files import FileError, read_json
from gptoss_jax.model import config_keys as keys
from gptoss_jax.model.config_ranges import MXFP4_BLOCK, RANGES, number_faults

NAMED_TOKEN_IDS = 200_019  # o200k_harmony names the ids below; the published embedding has 201,088 rows
STOP_IDS = (200_002, 200_012, 199_999)  # <|return|>, <|call|>, <|endoftext|>; never <|end|> (200,007)
_NAMED = 5  # of unknown keys


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
        if faults := list(number_faults(vars(self))):
            raise ConfigError("; ".join(faults))

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


def read_config(path: str | Path) -> ModelConfig:
    """The model that `path` (a config.json) describes.

    Raises:
        ConfigError: the file is absent, is not JSON, or has keys that are unknown, missing or of another model.
    """
    try:
        return parse_config(read_json(path))
    except FileError as error:
        absent = "" if os.path.lexists(path) else "; a checkpoint's folder holds its config.json"
        raise ConfigError(f"{error}{absent}") from None
    except ConfigError as error:
        raise ConfigError(one_line(f"{path}: {error}")) from None


def parse_config(raw: Any) -> ModelConfig:
    """The model that `raw`, a parsed config.json in either published spelling, describes.

    Raises:
        ConfigError: it is of another family, which is then all that is said; or what else is wrong with it.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"expected an object of keys and values, got {type(raw).__name__}")
    if stranger := _other_family(raw):
        raise ConfigError(stranger)
    said = {key: value for key, value in raw.items() if value is not None}  # null is how transformers says nothing
    return _from_openai(said) if any(key in said for key in keys.OPENAI_ONLY) else _from_huggingface(said)


def _other_family(raw: Mapping[str, Any]) -> str:
    """What says that a config is another model family's; "" if nothing does."""
    wanted, found = keys.HUGGINGFACE_FIXED["model_type"], raw.get("model_type")
    if found is not None:
        same = found == wanted
        return "" if same else f"model_type is {short(found)}, expected {wanted!r}: another model family, not read here"
    names = raw.get("architectures")
    if isinstance(names, list) and names and not any(str(name).startswith("GptOss") for name in names):
        return f"architectures is {short(names)}, expected GptOssForCausalLM: another model family, not read here"
    return ""


def _from_openai(raw: Mapping[str, Any]) -> ModelConfig:
    _raise(_key_faults(raw, keys.OPENAI, keys.OPENAI))
    values = {field: raw[key] for key, field in keys.OPENAI.items()} | {"rms_norm_eps": keys.OPENAI_RMS_NORM_EPS}
    spelled = {field: key for key, field in keys.OPENAI.items()}
    least = {"max_context_tokens": RANGES["max_context_tokens"][0]}
    _raise(number_faults(values | least, spelled))  # before two of them are multiplied
    longest = round(values["initial_context_length"] * values["rope_scaling_factor"])
    return _model(values | {"max_context_tokens": longest}, spelled, None, None)


def _from_huggingface(raw: Mapping[str, Any]) -> ModelConfig:
    rope_key = "rope_parameters" if "rope_parameters" in raw else "rope_scaling"

    def as_written(fault: str) -> str:
        return fault.replace("rope.", f"{rope_key}.")

    flat = _flattened(raw, rope_key)
    fields = keys.HUGGINGFACE | {f"rope.{key}": field for key, field in keys.HUGGINGFACE_ROPE.items()}
    faults = [*_key_faults(flat, {*fields, *keys.HUGGINGFACE_OTHERS}, fields), *_fixed_faults(flat)]
    _raise(map(as_written, [*faults, *_repeated_faults(flat), *_quantization_faults(flat)]))
    values = {field: flat[key] for key, field in fields.items()}
    spelled = {field: as_written(key) for key, field in fields.items()}
    config = _model(values, spelled, flat.get("eos_token_id"), flat.get("pad_token_id"))
    _raise(map(as_written, _derived_faults(flat, config)))
    return config


def _flattened(raw: Mapping[str, Any], rope_key: str) -> dict[str, Any]:
    """The keys of a config and, after `rope.`, those of what it says of rotary embedding."""
    rope = raw.get(rope_key, {})
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{rope_key} is {short(rope)}, expected an object of keys and values")
    if strange := [key for key in raw if key.startswith("rope.")]:
        raise ConfigError(f"unknown key {shortened(strange[0])}")
    if raw.get("rope_scaling", rope) != rope:
        raise ConfigError("rope_scaling and rope_parameters say different things: delete the one that is wrong")
    flat = {key: value for key, value in raw.items() if key not in (rope_key, "rope_scaling")}
    flat |= {f"rope.{key}": value for key, value in rope.items() if value is not None}
    if "rope.rope_theta" in flat:  # transformers 5 moved it there
        flat.setdefault("rope_theta", flat["rope.rope_theta"])
    return flat


def _key_faults(raw: Mapping[str, Any], known: Iterable[str], wanted: Iterable[str]) -> Iterator[str]:
    if unknown := sorted(raw.keys() - set(known)):
        named = ", ".join(shortened(key, 60) for key in unknown[:_NAMED])
        more = f" and {len(unknown) - _NAMED:,} more" if len(unknown) > _NAMED else ""
        each = "those that say" if len(unknown) > 1 else "it if it says"
        yield f"unknown key{'s' * (len(unknown) > 1)} {named}{more} (delete {each} nothing about what is computed)"
    yield from (f"missing key {key}" for key in sorted(set(wanted) - raw.keys()))


def _fixed_faults(flat: Mapping[str, Any]) -> Iterator[str]:
    """Values that this model family does not have."""
    needed = {f"rope.{key}": want for key, want in keys.ROPE_FIXED.items()}  # transformers' own defaults are others
    for key, want in {**keys.HUGGINGFACE_FIXED, **keys.HUGGINGFACE_ALSO_FIXED, **needed}.items():
        found = flat.get(key)
        if (key in flat or key in needed) and (found != want or isinstance(found, bool) != isinstance(want, bool)):
            yield f"{key} is {short(found)}, expected {'no such key' if want is None else repr(want)}"


def _repeated_faults(flat: Mapping[str, Any]) -> Iterator[str]:
    for key, other in keys.HUGGINGFACE_REPEATED.items():
        if key in flat and other in flat and flat[key] != flat[other]:
            repeated = f"{key} is {short(flat[key])}, but {other} is {short(flat[other])}"
            yield f"{repeated}: expected the same number (delete {key} if it is the wrong one)"


def _quantization_faults(flat: Mapping[str, Any]) -> Iterator[str]:
    advice = "weights that other tools quantised are not read; take the model as OpenAI published it, or in bfloat16"
    for key in keys.QUANTIZATION:
        found = flat.get(key, {"quant_method": "mxfp4"})
        method = found.get("quant_method", found) if isinstance(found, Mapping) else found
        if method != "mxfp4":
            yield f"{key}.quant_method is {short(method)}, expected 'mxfp4': {advice}"


def _derived_faults(flat: Mapping[str, Any], config: ModelConfig) -> Iterator[str]:
    """Values that follow from the numbers, and are given all the same."""
    if flat.get("layer_types", config.layer_types) != config.layer_types:
        expected = f"{config.num_layers}, sliding_attention on the even ones"
        yield f"layer_types is {short(flat['layer_types'])}, expected {expected}"
    factor = 0.1 * math.log(config.rope_scaling_factor) + 1
    given = flat.get("rope.attention_factor", factor)
    if type(given) not in (int, float) or not math.isclose(given, factor, rel_tol=1e-6):
        yield f"rope.attention_factor is {short(given)}, expected {factor:.7f}, which follows from the factor"


def _model(values: Mapping[str, Any], spelled: Mapping[str, str], eos: Any, pad: Any) -> ModelConfig:
    """The model of these numbers, by field, and of the ids that config.json names as ends and padding."""
    _raise(number_faults(values, spelled))
    stop_ids, pad_id = _special_ids(values["vocab_size"], eos, pad)
    as_fields: dict[str, Any] = {
        name: float(value) if isinstance(RANGES[name][0], float) else value for name, value in values.items()
    }
    return ModelConfig(**as_fields, stop_ids=stop_ids, pad_id=pad_id)


def _special_ids(vocab_size: int, eos: Any, pad: Any) -> tuple[tuple[int, ...], int]:
    """Stop and pad ids: harmony's where the vocabulary has them, else what the config says.

    The published config.json lists only <|return|> as eos; a tool call ends the turn as well. OpenAI's config lists
    none, so a smaller vocabulary in its format stops at no token.
    """
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for name, ids in (("eos_token_id", listed), ("pad_token_id", [] if pad is None else [pad])):
        if not all(type(token) is int for token in ids):
            raise ConfigError(f"{name} is {short(ids)}, expected token ids")
    if vocab_size > max(STOP_IDS):
        return STOP_IDS, pad if pad is not None else 199_999
    return tuple(listed), pad if pad is not None else vocab_size - 1


def _raise(faults: Iterable[str]) -> None:
    if found := list(faults):
        raise ConfigError("; ".join(found))


def to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """`config` as a config.json in Hugging Face's spelling: `parse_config` reads back the same model."""
    return {
        "architectures": ["GptOssForCausalLM"],
        **keys.HUGGINGFACE_FIXED,
        **{key: getattr(config, field) for key, field in keys.HUGGINGFACE.items()},
        "layer_types": config.layer_types,
        "eos_token_id": list(config.stop_ids),
        "pad_token_id": config.pad_id,
        "rope_scaling": {
            **keys.ROPE_FIXED,
            **{key: getattr(config, field) for key, field in keys.HUGGINGFACE_ROPE.items()},
        },
    }
