"""What attention and experts are both made of: kernels, weights, RMSNorm, linear maps, weights of eight bits."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int8, Int32, Real

from gptoss_jax.errors import GptossError
from gptoss_jax.model.exchange import Exchange
from gptoss_jax.model.invariant_sum import invariant_sum
from gptoss_jax.model.sharding import Axes, Sharding
from pallas_kernels import attention as attention_op
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels import linear as linear_op
from pallas_kernels import placement as placement_op
from pallas_kernels.choice import Choice, Hardware, KernelError, by_name

BFLOAT16 = jnp.dtype(jnp.bfloat16)


class Kernels(NamedTuple):
    """The implementation of each op that a model runs with."""

    attention: attention_op.Attend = attention_op.IMPLEMENTATIONS["reference"]
    expert_mlp: expert_op.ExpertMlp = expert_op.IMPLEMENTATIONS["reference"]
    linear: linear_op.Linear = linear_op.IMPLEMENTATIONS["reference"]
    packed_attention: attention_op.AttendPacked = attention_op.PACKED["reference"]  # of rows of training
    few_launches: bool = False  # whether a token's launches cost as much as its bytes: on GPUs, not on CPUs
    place: placement_op.Place | None = None  # what rotates and stores a decoded token; None: step by step
    exchange: Exchange | None = None  # how tokens meet the experts of other devices; None: as the mesh says

    @property
    def batch_invariant(self) -> bool:
        """Whether the bits that these give for a token depend on no other token of the batch, nor on its size."""
        return self[:3] == tuple(op.IMPLEMENTATIONS["cpu"] for op in (attention_op, expert_op, linear_op))


def choose_kernels(
    names: str, hardware: Hardware, dtype: jnp.dtype = BFLOAT16, *, expert_adapters: bool = False
) -> tuple[Kernels, str]:
    """Each op's implementation on `hardware`, and one line that says which and why.

    Args:
        names: one name for every op ("auto", "reference"), or "attention=NAME,linear=NAME" (left out: auto).
        hardware: what the devices are.
        dtype: of the activations.
        expert_adapters: whether the experts have adapters, which few implementations know.

    Raises:
        GptossError: `names` is no text, or no op or no implementation has that name.
    """
    attention = functools.partial(attention_op.choose, dtype=dtype)
    experts = expert_op.choose_with_adapters if expert_adapters else expert_op.choose
    ops = {"attention": attention, "expert_mlp": experts, "linear": linear_op.choose}
    chosen, line = _chosen(names, hardware, ops)
    # Written for the same devices as the attention that reads what it stores.
    place = placement_op.IMPLEMENTATIONS.get(chosen["attention"].name)
    few_launches = hardware.platform == "gpu" or place is not None
    return Kernels(**_implementations(chosen), few_launches=few_launches, place=place), line


def _implementations(chosen: Mapping[str, Choice]) -> dict[str, Any]:
    return {op: choice.implementation for op, choice in chosen.items()}


def _chosen(names: str, hardware: Hardware, ops: Mapping[str, Callable[..., Choice]]) -> tuple[dict[str, Choice], str]:
    """The choice for each of `ops` that `names` asks for, and the line that says so."""
    if not isinstance(names, str):
        raise GptossError(f"kernels is {names!r}, expected a name, or names as attention=NAME,linear=NAME")
    pairs = [part.split("=", 1) for part in names.split(",")] if "=" in names else [(op, names) for op in ops]
    asked = {pair[0]: pair[-1] for pair in pairs}
    if len(asked) < len(pairs):
        raise GptossError(f"kernels {names!r} names an op twice")
    for op in asked.keys() - ops.keys():
        raise GptossError(f"kernels {names!r}: unknown op {op!r}, expected {', '.join(ops)}")
    try:
        chosen = {op: choose(asked.get(op, "auto"), hardware) for op, choose in ops.items()}
    except KernelError as error:
        raise GptossError(str(error)) from None
    line = ", ".join(f"{op}: {choice.name} ({choice.reason})" for op, choice in chosen.items())
    return chosen, f"kernels {line}"


def choose_training_kernels(
    names: str, hardware: Hardware, *, dense_experts: bool, expert_adapters: bool, num_experts: int, dtype: jnp.dtype
) -> tuple[Kernels, str]:
    """As `choose_kernels`, of what a training step runs on packed rows; plain products are XLA's there.

    Args:
        names: "auto", "reference", or "packed_attention=NAME,expert_mlp=NAME" (left out: auto).
        hardware: what the devices are.
        dense_experts: whether the experts are trained themselves, and so are no packed bytes.
        expert_adapters: whether they have adapters.
        num_experts: of a layer.
        dtype: of the activations.

    Raises:
        GptossError: no op or no implementation has that name.
    """

    def experts(name: str, hardware: Hardware) -> Choice:
        if name != "auto":
            dense = name in expert_op.DENSE_IMPLEMENTATIONS
            known = expert_op.DENSE_IMPLEMENTATIONS if dense else expert_op.IMPLEMENTATIONS
            return by_name("expert_mlp", known, name, hardware)
        return expert_op.choose_for_training(
            hardware, dense=dense_experts, num_experts=num_experts, adapters=expert_adapters, dtype=dtype
        )

    attention = functools.partial(attention_op.choose_packed, dtype=dtype)
    chosen, line = _chosen(names, hardware, {"packed_attention": attention, "expert_mlp": experts})
    return Kernels(**_implementations(chosen)), line


Shape = tuple[int, ...]


class Dense8(NamedTuple):
    """A product's weights in eight bits, as `quantize` makes them: values * scales, a scale for each output.

    Stands in the tree of weights where the bfloat16 array stood.
    """

    values: Int8[Array, "..."]  # [*out, *in]
    scales: Float[Array, "..."]  # [*out], float32


def quantize(w: Float[Array, "..."], num_inputs: int) -> Dense8:
    """The nearest multiples of 1/127 of each output's largest weight; `num_inputs` axes at the end are summed over."""
    axes = tuple(range(w.ndim - num_inputs, w.ndim))
    w = w.astype(jnp.float32)
    scales = jnp.max(jnp.abs(w), axis=axes) / 127
    steps = w / jnp.expand_dims(jnp.where(scales > 0, scales, 1), axes)
    return Dense8(jnp.round(steps).astype(jnp.int8), scales)


class Joined(NamedTuple):
    """The query, key and value projections as one: of each key/value head its query heads, its key, its value.

    Stands in the tree of weights where the query's weight stood; the others are `ELSEWHERE`. A mesh cuts it as it cuts
    heads.
    """

    weight: Any  # [K, G + 2, H, D], or `Dense8` of that
    bias: Float[Array, "K G2 H"]


class Elsewhere(NamedTuple):
    """In the place of a weight that is part of another."""


ELSEWHERE = Elsewhere()


class Dropout(NamedTuple):
    """Of an adapter's inputs: each is 0 with probability `rate`, and the others grow by 1 / (1 - rate)."""

    key: Array
    rate: float

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x after it."""
        kept = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros_like(x))


class Adapted(NamedTuple):
    """A weight W with a product of low rank R beside it: W x + b (a x) (LoRA, Hu et al., arXiv:2106.09685).

    Stands in the tree of weights where W stood: of a `Product` with a [R, *in] and b [*out, R], of an expert matrix's
    blocks with a [E, R, in] and b [E, out, R]. The scale alpha / R is part of b.
    """

    base: Any
    a: Float[Array, "..."]
    b: Float[Array, "..."]
    dropout: Dropout | None = None


def weight(shape: Shape, axes: Axes, dtype: jnp.dtype = BFLOAT16, *, num_inputs: int = 0) -> nnx.Param:
    """A declaration: shape, dtype as stored, logical axes. Allocates nothing.

    `num_inputs`: of a product's weights that may be `quantize`d, the axes at the end that it sums over; else 0.
    """
    if len(shape) != len(axes):
        raise GptossError(f"a weight of shape {shape} cannot have the axes {axes}")
    declared = jax.ShapeDtypeStruct(shape, dtype)
    return nnx.Param(declared, axes=axes, num_inputs=num_inputs)  # pyright: ignore[reportArgumentType]


def embed(table: Float[Array, "V D"], tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
    """Each token's row. The barrier ties the table to the tokens: XLA:CPU would lift a float32 copy out of a loop."""
    table, tokens = lax.optimization_barrier((table, tokens))
    return table[tokens]


def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*rows D"]:
    """x / rms(x) * scale, all in float32 (the scale is multiplied before any cast)."""
    x = x.astype(jnp.float32)
    mean = invariant_sum(x * x)[..., None] / x.shape[-1]
    return x * lax.rsqrt(mean + eps) * scale.astype(jnp.float32)


class Linear(nnx.Module):
    """y = x W^T + b over several axes: W is [*out, *in], as published; y is float32 [B, T, *out]."""

    def __init__(
        self,
        out: Shape,
        out_axes: Axes,
        inputs: Shape,
        in_axes: Axes,
        sharding: Sharding,
        kernel: linear_op.Linear,
        *,
        exact: bool = False,
    ):
        """`exact`: the weights are never `quantize`d."""
        self.product = Product(out_axes, in_axes, sharding, kernel)
        self.weight = weight(out + inputs, out_axes + in_axes, num_inputs=0 if exact else len(inputs))
        self.bias = weight(out, out_axes)

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """y; the matrix product takes operands of x's dtype."""
        return self.product(x, self.weight.get_value()) + self.bias[...].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Product:
    """x W^T over several axes, on every device its own shard: W is [*out, *in], its axes named logically."""

    out_axes: Axes
    in_axes: Axes
    sharding: Sharding
    kernel: linear_op.Linear

    def __call__(self, x: Float[Array, "B T ..."], w: Real[Array, "..."] | Dense8 | Adapted) -> Float[Array, "B T ..."]:
        """The product of x [B, T, *in], float32 [B, T, *out]."""
        if isinstance(w, Adapted):
            return self(x, w.base) + self._low_rank(x, w)
        if isinstance(w, Dense8):  # scaled after the sum: the products are of whole numbers
            return self(x, w.values) * w.scales
        tokens = ("batch", None)
        run = self.sharding.map(
            self._run_local,
            in_axes=(tokens + self.in_axes, self.out_axes + self.in_axes),
            out_axes=tokens + self.out_axes,
        )
        return run(x, w)

    def _low_rank(self, x: Float[Array, "B T ..."], w: Adapted) -> Float[Array, "B T ..."]:
        """What an adapter adds: a product down to its rank, which is on every device, and one up from there."""
        down = dataclasses.replace(self, out_axes=(None,))
        up = dataclasses.replace(self, in_axes=(None,))
        x = x if w.dropout is None else w.dropout(x)
        return up(down(x, w.a).astype(x.dtype), w.b)

    def _run_local(self, x: Float[Array, "B T ..."], w: Real[Array, "..."]) -> Float[Array, "B T ..."]:
        tokens, out = x.shape[:2], w.shape[: len(self.out_axes)]
        inputs = math.prod(w.shape[len(self.out_axes) :])
        y = self.kernel(x.reshape(-1, inputs), w.reshape(-1, inputs)).reshape(*tokens, *out)
        return self.sharding.sum_over(y, *filter(None, self.in_axes))  # each device summed over its own inputs
