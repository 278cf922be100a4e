"""What the numbers of a config may be: a range for each, and what holds between them.

Checked before anything is built of them. Knows no spelling of any file.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from gptoss_jax.errors import short

MXFP4_BLOCK = 32  # weights that share one E8M0 scale (OCP Microscaling Formats v1.0, section 5.3)
MAX_STOP_IDS = 8  # that an engine holds for a request

# Field -> lowest and highest value: what memory and the number formats allow, far beyond what was ever published.
RANGES: Mapping[str, tuple[int | float, int | float]] = {
    "num_layers": (1, 1024),
    "hidden_size": (MXFP4_BLOCK, 1 << 16),
    "num_heads": (1, 4096),
    "num_kv_heads": (1, 4096),
    "head_dim": (2, 1024),
    "num_experts": (1, 4096),
    "experts_per_token": (1, 4096),
    "intermediate_size": (MXFP4_BLOCK, 1 << 16),
    "vocab_size": (2, 1 << 22),
    "sliding_window": (1, 1 << 24),
    "swiglu_limit": (1e-3, 1e12),
    "rms_norm_eps": (1e-12, 0.1),
    "rope_theta": (10.0, 1e12),  # its logarithm divides
    "rope_scaling_factor": (1.0, 1e4),
    "rope_beta_fast": (1e-3, 1e6),
    "rope_beta_slow": (1e-3, 1e6),
    "initial_context_length": (1, 1 << 24),
    "max_context_tokens": (2, 1 << 24),  # float32, in which positions are turned into angles, holds no more exactly
}
LEAST_BETA_RATIO = 1.01  # fast over slow: YaRN divides by the logarithm of it


def number_faults(values: Mapping[str, Any], spelled: Mapping[str, str] = {}) -> Iterator[str]:
    """What is wrong with the numbers of a config, each by itself and then together; nothing if it is a model.

    Args:
        values: by field of ModelConfig; stop_ids and pad_id may be left out.
        spelled: fields -> how the file calls them, where that differs.
    """
    wrong = [_range_fault(values[name], name, spelled) for name in RANGES]
    if any(wrong):
        yield from filter(None, wrong)
    else:
        yield from _shape_faults(values, spelled)
        yield from _special_id_faults(values)


def _range_fault(value: Any, name: str, spelled: Mapping[str, str]) -> str:
    low, high = RANGES[name]
    whole = isinstance(low, int)
    if (type(value) is int or (type(value) is float and not whole)) and low <= value <= high:
        return ""
    limits = f"{low:,} to {high:,}" if whole else f"{low:g} to {high:g}"
    kind = "a whole number" if whole else "a number"
    return f"{spelled.get(name, name)} is {short(value)}, expected {kind} from {limits}"


def _shape_faults(values: Mapping[str, Any], spelled: Mapping[str, str]) -> Iterator[str]:
    def at(name: str) -> str:
        return f"{spelled.get(name, name)} {values[name]}"

    if values["num_heads"] % values["num_kv_heads"]:
        yield f"{at('num_heads')} is not a multiple of {at('num_kv_heads')}"
    if values["head_dim"] % 2:
        yield f"{at('head_dim')} is odd, but rotary embedding turns pairs"
    if values["experts_per_token"] > values["num_experts"]:
        yield f"{at('experts_per_token')} exceeds {at('num_experts')}"
    for name in ("hidden_size", "intermediate_size"):
        if values[name] % MXFP4_BLOCK:
            yield f"{at(name)} is not a multiple of the MXFP4 block of {MXFP4_BLOCK}"
    if values["rope_beta_fast"] < LEAST_BETA_RATIO * values["rope_beta_slow"]:
        yield f"{at('rope_beta_fast')} is not above {at('rope_beta_slow')} by 1 % at least"


def _special_id_faults(values: Mapping[str, Any]) -> Iterator[str]:
    stop_ids, pad_id, vocab_size = values.get("stop_ids", ()), values.get("pad_id", 0), values["vocab_size"]
    if len(stop_ids) > MAX_STOP_IDS:
        yield f"{len(stop_ids):,} ids end an answer, expected at most {MAX_STOP_IDS}"
    for token in (*stop_ids[:MAX_STOP_IDS], pad_id):
        if type(token) is not int or not 0 <= token < vocab_size:
            yield f"special token id {short(token)} is outside the vocabulary of {vocab_size}"
