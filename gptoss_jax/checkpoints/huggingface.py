"""The Hugging Face formats as tables: leaf <- tensor. Experts packed as MXFP4, or bfloat16 and transposed.

Source: transformers' modeling_gpt_oss.py and the published model.safetensors.index.json.
"""

from gptoss_jax.checkpoints.recipe import Recipe, recipes
from gptoss_jax.model.config import ModelConfig

_MODEL = (
    ("embedding", "model.embed_tokens.weight", "V D"),
    ("norm", "model.norm.weight", "D"),
    ("unembedding", "lm_head.weight", "V D"),
)
_LAYER = (
    ("attention/norm", "input_layernorm.weight", "D"),
    ("attention/q/weight", "self_attn.q_proj.weight", "NH D"),
    ("attention/q/bias", "self_attn.q_proj.bias", "NH"),
    ("attention/k/weight", "self_attn.k_proj.weight", "KH D"),
    ("attention/k/bias", "self_attn.k_proj.bias", "KH"),
    ("attention/v/weight", "self_attn.v_proj.weight", "KH D"),
    ("attention/v/bias", "self_attn.v_proj.bias", "KH"),
    ("attention/sinks", "self_attn.sinks", "N"),
    ("attention/out/weight", "self_attn.o_proj.weight", "D NH"),
    ("attention/out/bias", "self_attn.o_proj.bias", "D"),
    ("moe/norm", "post_attention_layernorm.weight", "D"),
    ("moe/router/weight", "mlp.router.weight", "E D"),
    ("moe/router/bias", "mlp.router.bias", "E"),
    ("moe/gate_up/bias", "mlp.experts.gate_up_proj_bias", "E 2F"),
    ("moe/down/bias", "mlp.experts.down_proj_bias", "E D"),
)
_MXFP4 = (
    ("moe/gate_up/blocks", "mlp.experts.gate_up_proj_blocks", "E 2F D/32 16"),
    ("moe/gate_up/scales", "mlp.experts.gate_up_proj_scales", "E 2F D/32"),
    ("moe/down/blocks", "mlp.experts.down_proj_blocks", "E D F/32 16"),
    ("moe/down/scales", "mlp.experts.down_proj_scales", "E D F/32"),
)
# [E, in, out]: the other way round than MXFP4's rows. Down is square at the published sizes: no shape shows which.
_BF16 = (
    ("moe/gate_up", "mlp.experts.gate_up_proj", "E D 2F"),
    ("moe/down", "mlp.experts.down_proj", "E F D"),
)


def mxfp4_recipes(config: ModelConfig) -> dict[str, Recipe]:
    """Leaf -> recipe where experts are stored as blocks and scales."""
    return recipes(config, _MODEL, _LAYER + _MXFP4, "model.layers")


def bf16_recipes(config: ModelConfig) -> dict[str, Recipe]:
    """Leaf -> recipe where experts are stored as bfloat16: each such tensor becomes two leaves."""
    found = recipes(config, _MODEL, _LAYER, "model.layers")
    for leaf, recipe in recipes(config, (), _BF16, "model.layers").items():
        found[f"{leaf}/blocks"] = recipe._replace(pack="blocks")
        found[f"{leaf}/scales"] = recipe._replace(pack="scales")
    return found
