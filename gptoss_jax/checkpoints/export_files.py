"""The small files of a published folder, made from a model's numbers as transformers and openai/gpt-oss read them.

Keys are those of openai/gpt-oss-20b's files. Of transformers 4.55 to 5.24 each version reads this config.json: 4 knows
`rope_scaling` and `rope_theta` only, and 5 takes them for its own `rope_parameters`.
"""

import json
from collections.abc import Iterable
from typing import Any

from gptoss_jax.checkpoints.safetensors_writer import Tensor
from gptoss_jax.model import config_keys
from gptoss_jax.model.config import NAMED_TOKEN_IDS, STOP_IDS, ModelConfig, parse_config, to_huggingface

_RETURN, _CALL, _END_OF_TEXT = STOP_IDS
_START_OF_TEXT = 199_998  # of o200k_harmony; nothing is begun with it, and the published file names it
_MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
# What transformers asks for in training and generation only, as published.
_BESIDE = {
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "initializer_range": 0.02,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.9,
    "use_cache": True,
}
_OPENAI_DTYPES = {"blocks": "FP4", "scales": "UE8"}  # by a tensor's last name; others are BF16


def to_json(content: Any) -> bytes:
    """The bytes of a JSON file, as transformers writes them."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def huggingface_config(config: ModelConfig, *, is_packed: bool) -> dict[str, Any]:
    """The content of config.json in Hugging Face's spelling; `parse_config` reads back the same model.

    Args:
        config: the model.
        is_packed: whether its experts are MXFP4: transformers reads them as blocks and scales then.
    """
    written = to_huggingface(config) | _BESIDE
    written |= {
        "eos_token_id": _eos(config),
        "experts_per_token": config.experts_per_token,
        "initial_context_length": config.initial_context_length,
    }
    if is_packed:
        written["quantization_config"] = _MXFP4
    return dict(sorted(written.items()))


def _eos(config: ModelConfig) -> int | list[int] | None:
    """As published the one that ends an answer; generation_config.json has them all."""
    if config.vocab_size >= NAMED_TOKEN_IDS:
        return _RETURN
    return config.stop_ids[0] if len(config.stop_ids) == 1 else list(config.stop_ids) or None


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """The content of generation_config.json, as published; of a smaller vocabulary, its own ends."""
    is_whole = config.vocab_size >= NAMED_TOKEN_IDS
    return {
        **({"bos_token_id": _START_OF_TEXT} if is_whole else {}),
        "do_sample": True,
        "eos_token_id": [_RETURN, _END_OF_TEXT, _CALL] if is_whole else list(config.stop_ids),
        "pad_token_id": config.pad_id,
    }


def openai_config(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json in the spelling of OpenAI's `original/`."""
    return {key: getattr(config, field) for key, field in config_keys.OPENAI.items()}


def lost_in_openai(config: ModelConfig) -> list[str]:
    """A line for each number of the model that OpenAI's config.json has no key for, and that would be another there."""
    read = parse_config(openai_config(config))
    return [
        f"{field} is {getattr(config, field)}, and {getattr(read, field)} there"
        for field in ("rms_norm_eps", "max_context_tokens", "stop_ids", "pad_id")
        if getattr(config, field) != getattr(read, field)
    ]


def openai_dtypes(tensors: Iterable[Tensor]) -> dict[str, str]:
    """The content of dtypes.json."""
    return {name: _OPENAI_DTYPES.get(name.rsplit(".", 1)[-1], "BF16") for name in sorted(t.name for t in tensors)}
