"""The top_k experts' MLPs, of packed MXFP4 or dense weights: what the operation takes and promises, who can do it.

A back end is one file beside this one, or in cpu_kernels, with a function of the same signature, and one entry in
`IMPLEMENTATIONS`.
"""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

import cpu_kernels
from cpu_kernels.dense_experts import expert_mlp as cpu_dense_expert_mlp
from cpu_kernels.expert_mlp import expert_mlp as cpu_expert_mlp
from pallas_kernels.choice import Choice, Hardware, Implementations, best, by_name
from pallas_kernels.expert_mlp import reference
from pallas_kernels.expert_mlp.gradient import differentiable
from pallas_kernels.expert_mlp.weights import (
    AS_PUBLISHED,
    PUBLISHED,
    Adapter,
    ExpertWeights,
    Rearrangement,
    WeightLayout,
    is_dense,
    is_trainable,
    packed,
    packed_axes,
    published,
)


@runtime_checkable
class RunExperts(Protocol):
    """What an implementation does.

    Takes x [T, D], the experts that each token is assigned to and their routing weights, [T, X], and the layer's
    `ExpertWeights`, in the implementation's weight layout. Gives sum_x weight_x * (down(swiglu(gate_up(x))) +
    down_bias), float32 [T, D]. Matrix products take operands of x's dtype and accumulate in float32. An assignment
    outside [0, E) is skipped: padding has such, and so have experts that live on another device.

    Raises:
        NotImplementedError: the weights have adapters, or are dense, and the implementation does not know such.
    """

    def __call__(  # noqa: D102
        self,
        x: Float[Array, "T D"],
        expert_ids: Int32[Array, "T X"],
        routing_weights: Float[Array, "T X"],
        weights: ExpertWeights,
        *,
        limit: float,
    ) -> Float[Array, "T D"]: ...


class ExpertMlp(NamedTuple):
    """One implementation, and how it wants the weights to lie."""

    run: RunExperts
    layout: WeightLayout = PUBLISHED


def _with_gradient(run: RunExperts, layout: WeightLayout = PUBLISHED) -> ExpertMlp:
    return ExpertMlp(differentiable(run, layout), layout)


def _for_device(run: RunExperts, layout: WeightLayout) -> ExpertMlp:
    """A kernel that all layers of a program share: lowering it takes Python half a second."""
    return _with_gradient(jax.jit(run, static_argnames="limit"), layout)


def _reference() -> ExpertMlp:
    return _with_gradient(reference.expert_mlp)


def _all_experts() -> ExpertMlp:
    from pallas_kernels.expert_mlp import dense

    return ExpertMlp(dense.expert_mlp)  # JAX derives its gradient


def _cpu_dense() -> ExpertMlp:
    return ExpertMlp(cpu_dense_expert_mlp)


def _cpu() -> ExpertMlp:
    return _with_gradient(cpu_expert_mlp)


def _gpu() -> ExpertMlp:
    from pallas_kernels.expert_mlp import gpu

    return _for_device(gpu.expert_mlp, gpu.LAYOUT)


def _gpu_interpreted() -> ExpertMlp:
    from pallas_kernels.expert_mlp import gpu
    from pallas_kernels.interpreter import ZERO_FILLING

    return _with_gradient(functools.partial(gpu.expert_mlp, interpret=ZERO_FILLING), gpu.LAYOUT)


def _tpu(device: str = "TPU") -> ExpertMlp:
    """The form for a device of this name; for "TPU" the one that runs on all."""
    from pallas_kernels.expert_mlp import tpu, tpu_forms

    form = tpu_forms.form_for(device)
    return _for_device(functools.partial(tpu.expert_mlp, form=form), form.layout)


def _tpu_interpreted() -> ExpertMlp:
    from pallas_kernels.expert_mlp import tpu, tpu_forms
    from pallas_kernels.interpreter import InterpretTPUParams

    form = tpu_forms.FORMS["words, by selection"]
    return _with_gradient(functools.partial(tpu.expert_mlp, form=form, interpret=InterpretTPUParams()), form.layout)


IMPLEMENTATIONS = Implementations[ExpertMlp](
    {
        "reference": _reference,
        "cpu": _cpu,
        "gpu": _gpu,
        "gpu-interpreted": _gpu_interpreted,
        "tpu": _tpu,
        "tpu-interpreted": _tpu_interpreted,
    }
)


DENSE_IMPLEMENTATIONS = Implementations[ExpertMlp](
    {"reference": _reference, "all-experts": _all_experts, "cpu-dense": _cpu_dense}
)
"""Those that take dense weights, as published, with gradients to them too."""

CPU_ARITHMETIC = "bfloat16 as int16 blocks"
"""What the kernel for CPUs multiplies; float32 activations stay what they are."""

FEW_EXPERTS = 16
"""Up to so many, computing all of them in two large products is faster than sorting tokens by expert."""


def choose(name: str, hardware: Hardware) -> Choice:
    """The implementation called `name`, or for "auto" the best on `hardware`.

    Raises:
        KernelError: no implementation has that name, or it cannot run here.
    """
    if name == "auto":
        otherwise = Choice("reference", IMPLEMENTATIONS["reference"], "portable jnp")
        choice = best(IMPLEMENTATIONS, hardware, otherwise)
    else:
        choice = by_name("expert_mlp", IMPLEMENTATIONS, name, hardware)
    if choice.name == "cpu":
        return choice._replace(reason=f"{choice.reason}, {CPU_ARITHMETIC}")
    return choice._replace(implementation=_tpu(hardware.name)) if choice.name == "tpu" else choice


def choose_with_adapters(name: str, hardware: Hardware) -> Choice:
    """As `choose`, of those that know adapters; for "auto" the portable one, since no kernel does.

    Raises:
        KernelError: no implementation has that name, or it cannot run here.
    """
    if name == "auto":
        return Choice("reference", IMPLEMENTATIONS["reference"], "portable jnp, which knows adapters")
    return by_name("expert_mlp", IMPLEMENTATIONS, name, hardware)


def choose_for_training(
    hardware: Hardware, *, dense: bool, num_experts: int, adapters: bool, dtype: DTypeLike = jnp.float32
) -> Choice:
    """The best implementation on `hardware` with gradients to what is trained.

    Args:
        hardware: what it will run on.
        dense: whether the experts are dense floats, and not packed MXFP4.
        num_experts: how many a layer has.
        adapters: whether they have adapters.
        dtype: the activations'.
    """
    if not dense and not adapters:
        return choose("auto", hardware)
    on_cpu = dense and not adapters and hardware.platform == "cpu" and dtype == jnp.float32
    if on_cpu and not cpu_kernels.why_not():
        reason = f"C++ for {cpu_kernels.instruction_sets()[0]}"
        return Choice("cpu-dense", DENSE_IMPLEMENTATIONS["cpu-dense"], reason)
    if dense and num_experts <= FEW_EXPERTS:
        return Choice("all-experts", DENSE_IMPLEMENTATIONS["all-experts"], f"all {num_experts} experts in two products")
    return Choice("reference", IMPLEMENTATIONS["reference"], "portable jnp, the one that trains these")


__all__ = [
    "AS_PUBLISHED",
    "DENSE_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "Adapter",
    "ExpertMlp",
    "ExpertWeights",
    "Rearrangement",
    "RunExperts",
    "WeightLayout",
    "choose",
    "choose_for_training",
    "choose_with_adapters",
    "is_dense",
    "is_trainable",
    "packed",
    "packed_axes",
    "published",
]
