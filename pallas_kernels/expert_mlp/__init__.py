"""The top_k experts' MLPs, from packed MXFP4: what the operation takes and promises, and who can do it.

A back end is one file beside this one, or in cpu_kernels, with a function of the same signature, and one entry in
`IMPLEMENTATIONS`.
"""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from cpu_kernels.expert_mlp import expert_mlp as cpu_expert_mlp
from pallas_kernels.choice import Choice, Hardware, best, by_name
from pallas_kernels.expert_mlp import gpu, reference, tpu
from pallas_kernels.expert_mlp.gradient import differentiable
from pallas_kernels.expert_mlp.tpu_forms import FORMS, Form, form_for
from pallas_kernels.expert_mlp.weights import (
    AS_PUBLISHED,
    PUBLISHED,
    Adapter,
    ExpertWeights,
    Rearrangement,
    WeightLayout,
    packed,
    packed_axes,
    published,
)
from pallas_kernels.interpreter import InterpretGPUParams


@runtime_checkable
class RunExperts(Protocol):
    """What an implementation does.

    Takes x [T, D], the experts that each token is assigned to and their routing weights, [T, X], and the layer's
    `ExpertWeights`, in the implementation's weight layout. Gives sum_x weight_x * (down(swiglu(gate_up(x))) +
    down_bias), float32 [T, D]. Matrix products take operands of x's dtype and accumulate in float32. An assignment
    outside [0, E) is skipped: padding has such, and so have experts that live on another device.

    Raises:
        NotImplementedError: the weights have adapters, and the implementation does not know them.
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


# TMA fills with zeros what lies beyond an array; in JAX 0.10 the interpreter does so by this setting only.
GPU_INTERPRETER = InterpretGPUParams(
    out_of_bounds_reads="uninitialized", uninitialized_memory="zero", num_tma_threads_per_device=16
)


def _for_device(run: RunExperts, layout: WeightLayout) -> ExpertMlp:
    """A kernel that all layers of a program share: lowering it takes Python half a second."""
    return _with_gradient(jax.jit(run, static_argnames="limit"), layout)


def _on_tpu(form: Form) -> ExpertMlp:
    return _for_device(functools.partial(tpu.expert_mlp, form=form), form.layout)


def _interpreted(run: Any, layout: WeightLayout, interpreter: Any) -> ExpertMlp:
    return _with_gradient(functools.partial(run, interpret=interpreter), layout)


TPU_INTERPRETED = FORMS["words, by selection"]


IMPLEMENTATIONS: dict[str, ExpertMlp] = {
    "reference": _with_gradient(reference.expert_mlp),
    "cpu": _with_gradient(cpu_expert_mlp),
    "gpu": _for_device(gpu.expert_mlp, gpu.LAYOUT),
    "gpu-interpreted": _interpreted(gpu.expert_mlp, gpu.LAYOUT, GPU_INTERPRETER),
    "tpu": _on_tpu(form_for("TPU")),  # what runs on all; `choose` takes the generation's own
    "tpu-interpreted": _interpreted(
        functools.partial(tpu.expert_mlp, form=TPU_INTERPRETED), TPU_INTERPRETED.layout, pltpu.InterpretParams()
    ),
}


def choose(name: str, hardware: Hardware) -> Choice:
    """The implementation called `name`, or for "auto" the best on `hardware`.

    Raises:
        KernelError: no implementation has that name, or it cannot run here.
    """
    implementations = IMPLEMENTATIONS
    if hardware.platform == "tpu":
        implementations = {**IMPLEMENTATIONS, "tpu": _on_tpu(form_for(hardware.name))}
    if name == "auto":
        otherwise = Choice("reference", implementations["reference"], "portable jnp")
        return best(implementations, hardware, otherwise)
    return by_name("expert_mlp", implementations, name, hardware)


__all__ = [
    "AS_PUBLISHED",
    "IMPLEMENTATIONS",
    "Adapter",
    "ExpertMlp",
    "ExpertWeights",
    "Rearrangement",
    "RunExperts",
    "WeightLayout",
    "choose",
    "packed",
    "packed_axes",
    "published",
]
