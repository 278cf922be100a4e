"""How one declared leaf is made from one stored tensor, and the other way: what the tables of all formats consist of.

Shapes are written in letters, so that a table can be held against the published model's description.
"""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.config_ranges import MXFP4_BLOCK

_ITEMSIZES = {"BF16": 2, "U8": 1}


class Recipe(NamedTuple):
    """One leaf's origin.

    Attributes:
        tensor: name as stored.
        shape: of the stored tensor.
        dtype: of the stored tensor, in safetensors' spelling.
        rows: first and last but one row that the leaf takes; all rows where None.
        pack: which half of the MXFP4 form the leaf is, where the tensor is bfloat16 [E, in, out]; else "".
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    rows: tuple[int, int] | None = None
    pack: Literal["", "blocks", "scales"] = ""

    @property
    def leaf_offset_bytes(self) -> int:
        """Where the leaf's bytes lie in those of the tensor, if they are not packed: the inverse of `rows`."""
        row_bytes = math.prod(self.shape[1:]) * _ITEMSIZES[self.dtype]
        return self.rows[0] * row_bytes if self.rows else 0

    @property
    def leaf_bytes(self) -> int:
        """Bytes of the leaf."""
        rows = self.rows[1] - self.rows[0] if self.rows else self.shape[0]
        elements = rows * math.prod(self.shape[1:])
        packed = {"blocks": elements // 2, "scales": elements // MXFP4_BLOCK}
        return packed.get(self.pack, elements * _ITEMSIZES[self.dtype])

    @property
    def leaf_dtype(self) -> str:
        """The leaf's number format, as a manifest names it."""
        return "uint8" if self.pack or self.dtype == "U8" else "bfloat16"


Row = tuple[str, str, str]  # leaf, tensor, the tensor's shape in letters


def sizes(config: ModelConfig) -> dict[str, int]:
    """The letters of the tables' shapes."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "V": config.vocab_size,
        "D": hidden,
        "D/32": hidden // MXFP4_BLOCK,
        "F": inner,
        "F/32": inner // MXFP4_BLOCK,
        "2F": 2 * inner,
        "E": config.num_experts,
        "N": config.num_heads,
        "NH": queries,
        "KH": keys,
        "NH+2KH": queries + 2 * keys,
        "16": MXFP4_BLOCK // 2,
    }


def recipes(config: ModelConfig, model: Iterable[Row], layer: Iterable[Row], prefix: str) -> dict[str, Recipe]:
    """Leaf -> recipe, from the tables of what a model has once and of what each layer has (tensors under `prefix`)."""
    letters = sizes(config)
    table = list(model)
    for i in range(config.num_layers):
        table += [(f"layers/{i}/{leaf}", f"{prefix}.{i}.{tensor}", shape) for leaf, tensor, shape in layer]
    return {
        leaf: Recipe(tensor, tuple(letters[letter] for letter in shape.split()), _dtype(tensor))
        for leaf, tensor, shape in table
    }


def _dtype(tensor: str) -> str:
    return "U8" if tensor.endswith(("blocks", "scales")) else "BF16"
