"""What the model's kernels do inside, which no compiled program says: products, and bytes that have to be read.

A lower bound: of the experts' weights those that are expected to be hit when tokens draw experts evenly, of keys and
values those that the last tokens of a full context see.
"""

from gptoss_jax.hlo.operations import Operation
from gptoss_jax.model import keys
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.runtime.lowering import StepShape

_PACKED = ("u8", "u32", "s4", "u4", "f4e2m1fn", "s8")  # dtypes of MXFP4 blocks and scales
_CACHE_ITEMSIZE = 2


def with_kernels(
    operations: list[Operation], config: ModelConfig, sharding: Sharding, shape: StepShape
) -> list[Operation]:
    """`operations`, with what kernels for attention and experts do in place of 0 products and all their operands."""
    return [_of_kernel(each, config, sharding, shape) if each.kind == "kernel" else each for each in operations]


def _of_kernel(kernel: Operation, config: ModelConfig, sharding: Sharding, shape: StepShape) -> Operation:
    if kernel.scope.layer is None or kernel.name == "linear":
        return kernel
    if kernel.scope.part == "experts":
        return _experts(kernel, config, sharding, shape)
    if "attention" in kernel.name:
        return _attention(kernel, config, sharding, shape)
    return kernel


def _experts(kernel: Operation, config: ModelConfig, sharding: Sharding, shape: StepShape) -> Operation:
    """Both matrices of the experts, or one of them where a kernel computes one."""
    tokens = shape.slots // sharding.size("batch") * shape.width
    shards = sharding.size("experts") * sharding.size("expert_hidden")
    matrices = {"expert_gate_up": 2, "expert_down": 1}.get(kernel.name, 3)
    products = matrices * config.intermediate_size * config.hidden_size
    share = config.experts_per_token / config.num_experts
    held = sum(array.num_bytes for array in kernel.operands if array.dtype in _PACKED and len(array.shape) > 1)
    missed = (1 - share) ** tokens
    return kernel._replace(
        flops=2.0 * tokens * config.experts_per_token * products / shards, bytes=kernel.bytes - held * missed
    )


def _attention(kernel: Operation, config: ModelConfig, sharding: Sharding, shape: StepShape) -> Operation:
    layer, heads = kernel.scope.layer, sharding.size("heads")
    assert layer is not None, "asked for in `_of_kernel`"
    slots = shape.slots // sharding.size("batch")
    seen = keys.seen(config, layer, shape.context_tokens, shape.width)
    read = keys.read(config, layer, shape.context_tokens, shape.width)
    token_bytes = 2 * _CACHE_ITEMSIZE * config.num_kv_heads * config.head_dim // heads
    results = sum(array.num_bytes for array in kernel.instruction.arrays)
    queries = _CACHE_ITEMSIZE * slots * shape.width * config.num_heads * config.head_dim // heads
    return kernel._replace(
        flops=4.0 * slots * seen * config.num_heads * config.head_dim / heads,
        bytes=float(slots * read * token_bytes + queries + results),
    )
