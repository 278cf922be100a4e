"""The format of OpenAI's `original/` folder as a table: leaf <- tensor. Queries, keys and values are stored as one.

Source: openai/gpt-oss, gpt_oss/torch/model.py and weights.py.
"""

from gptoss_jax.checkpoints.recipe import Recipe, recipes, sizes
from gptoss_jax.model.config import ModelConfig

_MODEL = (
    ("embedding", "embedding.weight", "V D"),
    ("norm", "norm.scale", "D"),
    ("unembedding", "unembedding.weight", "V D"),
)
_LAYER = (
    ("attention/norm", "attn.norm.scale", "D"),
    ("attention/q/weight", "attn.qkv.weight", "NH+2KH D"),
    ("attention/q/bias", "attn.qkv.bias", "NH+2KH"),
    ("attention/k/weight", "attn.qkv.weight", "NH+2KH D"),
    ("attention/k/bias", "attn.qkv.bias", "NH+2KH"),
    ("attention/v/weight", "attn.qkv.weight", "NH+2KH D"),
    ("attention/v/bias", "attn.qkv.bias", "NH+2KH"),
    ("attention/sinks", "attn.sinks", "N"),
    ("attention/out/weight", "attn.out.weight", "D NH"),
    ("attention/out/bias", "attn.out.bias", "D"),
    ("moe/norm", "mlp.norm.scale", "D"),
    ("moe/router/weight", "mlp.gate.weight", "E D"),
    ("moe/router/bias", "mlp.gate.bias", "E"),
    ("moe/gate_up/blocks", "mlp.mlp1_weight.blocks", "E 2F D/32 16"),
    ("moe/gate_up/scales", "mlp.mlp1_weight.scales", "E 2F D/32"),
    ("moe/gate_up/bias", "mlp.mlp1_bias", "E 2F"),
    ("moe/down/blocks", "mlp.mlp2_weight.blocks", "E D F/32 16"),
    ("moe/down/scales", "mlp.mlp2_weight.scales", "E D F/32"),
    ("moe/down/bias", "mlp.mlp2_bias", "E D"),
)


def original_recipes(config: ModelConfig) -> dict[str, Recipe]:
    """Leaf -> recipe; q, k and v are rows of the fused tensor, in this order."""
    letters = sizes(config)
    q, kv = letters["NH"], letters["KH"]
    parts = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    return {
        leaf: recipe._replace(rows=parts[leaf.split("/")[-2]]) if ".attn.qkv." in recipe.tensor else recipe
        for leaf, recipe in recipes(config, _MODEL, _LAYER, "block").items()
    }
