"""The optimiser and its schedule, of optax: AdamW, or Muon for matrices beside Adam for all else.

Beside Muon, Adam has Nesterov's momentum as Muon has it (Dozat, 2016): so optax joins the two.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

from gptoss_jax.model.sharding import Axes, Sharding
from gptoss_jax.training.options import OptimizerOptions

BETA1, BETA2 = 0.9, 0.95  # of Adam's moments

MATRICES = {
    "attention/q/weight": MuonDimensionNumbers(reduction_axis=(2,), output_axis=(0, 1)),
    "attention/k/weight": MuonDimensionNumbers(reduction_axis=(2,), output_axis=(0, 1)),
    "attention/v/weight": MuonDimensionNumbers(reduction_axis=(2,), output_axis=(0, 1)),
    "attention/out/weight": MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=(0,)),
    "moe/gate_up/weight": MuonDimensionNumbers(reduction_axis=(2,), output_axis=(1,)),
    "moe/down/weight": MuonDimensionNumbers(reduction_axis=(2,), output_axis=(1,)),
}
"""The weights that Muon trains, by the end of their paths, as matrices: one an expert."""

NEVER_DECAYED = ("bias", "norm", "sinks")
"""The ends of paths of weights that weight decay leaves alone: they scale and shift, and are no matrices."""


def schedule(options: OptimizerOptions, total_steps: int, step: Any) -> Float[Array, ""]:
    """Share of the full learning rate at `step`, from 0: a linear warm-up, flat, then linear down to the run's end."""
    warmup = max(1, round(options.warmup * total_steps))
    decay = max(1, total_steps - math.floor(options.decay_from * total_steps))
    step = jnp.asarray(step, jnp.float32)
    return jnp.clip(jnp.minimum((step + 1) / warmup, (total_steps - step) / decay), 0, 1)


def optimizer(options: OptimizerOptions, total_steps: int, trained: Mapping[str, Any]) -> optax.GradientTransformation:
    """What turns gradients of `trained`, by path, into updates; gradients are clipped by their global norm first."""

    def rate(full: float) -> optax.Schedule:
        return lambda count: full * schedule(options, total_steps, count)

    clip = optax.clip_by_global_norm(options.clip) if options.clip else optax.identity()
    decay, decays = options.weight_decay, {path: not path.endswith(NEVER_DECAYED) for path in trained}
    if options.matrix_learning_rate is None:
        adam = optax.adamw(rate(options.learning_rate), b1=BETA1, b2=BETA2, weight_decay=decay, mask=decays)
        return optax.chain(clip, adam)
    matrices: Any = {path: _matrix(path) for path in trained}
    muon = optax.contrib.muon(
        rate(options.matrix_learning_rate),
        weight_decay=decay,
        adam_b1=BETA1,
        adam_b2=BETA2,
        adam_learning_rate=rate(options.learning_rate),
        muon_weight_dimension_numbers=matrices,
    )
    # what `muon` leaves to Adam it would decay whole, norms and biases too
    decays = {path: decays[path] and matrices[path] is None for path in trained}
    others = optax.add_decayed_weights(lambda count: -decay * rate(options.learning_rate)(count), decays)
    return optax.chain(clip, muon, others) if decay else optax.chain(clip, muon)


def _matrix(path: str) -> MuonDimensionNumbers | None:
    return next((numbers for end, numbers in MATRICES.items() if path.endswith(end)), None)


def spread(options: OptimizerOptions, path: str, shape: tuple[int, ...], axes: Axes, sharding: Sharding) -> Axes:
    """The logical axes by which a weight's moments, and the work on them, lie on the mesh.

    They are the weight's own `axes`, and the data shards cut the first that nothing else cuts: of what all of them
    would do alike each does its share (ZeRO, Rajbhandari et al. 2020, its first stage). Muon's matrices stay whole,
    and so does a weight of which data shards have parts of their own.
    """
    cut_already = set(sharding.cut("batch")) & set(sharding.cut(*filter(None, axes)))
    shards = 1 if cut_already else sharding.size("batch")
    matrix = _matrix(path) if options.matrix_learning_rate is not None else None
    whole = jax.tree.leaves(matrix)  # the axes of one of Muon's matrices
    for place, (length, logical) in enumerate(zip(shape, axes, strict=True)):
        is_cut = logical is not None and sharding.size(logical) > 1
        if shards > 1 and place not in whole and not is_cut and length % shards == 0:
            return (*axes[:place], "batch", *axes[place + 1 :])
    return axes


def update(transformation: optax.GradientTransformation, gradients: Any, state: Any, trained: Any) -> tuple[Any, Any]:
    """The trained weights after one update, and the optimiser's state then."""
    with jax.numpy_dtype_promotion("standard"):  # as optax is written
        updates, state = transformation.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state
