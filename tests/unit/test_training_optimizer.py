"""The optimiser: its schedule at the corners, Muon for matrices and Adam for the rest, decay, clipping."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.model import sharding
from gptoss_jax.training import optimizer
from gptoss_jax.training.options import MUON_MATRIX_RATE, OptimizerOptions

MATRICES = {  # path -> shape, and the same as a stack of matrices [.., out, in]
    "layers/0/attention/q/weight": ((6, 8, 24), (48, 24)),
    "layers/0/attention/out/weight": ((24, 6, 8), (24, 48)),
    "layers/1/moe/gate_up/weight": ((3, 40, 24), (3, 40, 24)),
    "layers/1/moe/down/weight": ((3, 24, 20), (3, 24, 20)),
}
OTHERS = {
    "embedding": (32, 24),
    "unembedding": (32, 24),
    "norm": (24,),
    "layers/0/attention/q/bias": (6, 8),
    "layers/0/attention/sinks": (6,),
    "layers/1/moe/router/weight": (3, 24),
    "layers/1/moe/gate_up/bias": (3, 40),
}


def _draw(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {path: shape for path, (shape, _) in MATRICES.items()} | OTHERS
    return {path: jnp.asarray(rng.standard_normal(shape), jnp.float32) for path, shape in shapes.items()}


@functools.cache
def _changes(options: OptimizerOptions) -> dict[str, np.ndarray]:
    """What the first step adds to each weight."""
    trained = _draw(0)
    made = optimizer.optimizer(options, 10, trained)

    @jax.jit
    def step(trained, gradients):
        return optimizer.update(made, gradients, made.init(trained), trained)[0]

    after = step(trained, _draw(1))
    return {path: np.asarray(after[path] - trained[path]) for path in trained}


def _flat(**changes: Any) -> OptimizerOptions:
    """A rate that is the same at every step."""
    flat: dict[str, Any] = {"warmup": 0.0, "decay_from": 1.0, "clip": 0.0, "learning_rate": 0.01}
    return OptimizerOptions(**(flat | changes))


@pytest.mark.parametrize(
    ("warmup", "decay_from", "shares"),
    [
        (0.0, 1.0, {0: 1, 1: 1, 99: 1}),
        (0.1, 1.0, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 99: 1}),
        (0.0, 0.0, {0: 1, 50: 0.5, 99: 0.01, 100: 0, 101: 0}),
        (0.0, 0.8, {0: 1, 80: 1, 90: 0.5, 99: 0.05}),
        (0.03, 0.5, {0: 1 / 3, 2: 1, 50: 1, 75: 0.5}),
        (1.0, 0.0, {0: 0.01, 49: 0.5, 50: 0.5, 99: 0.01}),
    ],
)
def test_the_schedule_at_its_corners(warmup, decay_from, shares):
    """Guards the first step, which must move, and the last, which must not be the one after the run's end."""
    options = OptimizerOptions(warmup=warmup, decay_from=decay_from)
    for step, share in shares.items():
        assert float(optimizer.schedule(options, 100, step)) == pytest.approx(share, abs=1e-6), step


def test_a_run_of_one_step_learns():
    """Guards --steps 1: neither warm-up nor decay may take all of it."""
    assert float(optimizer.schedule(OptimizerOptions(), 1, 0)) == 1


@pytest.fixture(scope="module")
def first_steps():
    """What the first step adds, by the optimiser's name and weight decay."""
    for name in ("adamw", "muon"):  # compiled here, since a case has little time
        for decay in (0.0, 0.5):
            _changes(_flat(name=name, weight_decay=decay))
    return lambda name, decay=0.0: _changes(_flat(name=name, weight_decay=decay))


def test_muon_moves_matrices_orthogonally(first_steps):
    """Guards the axes of each matrix: all singular values of what is added are near the rate."""
    changes = first_steps("muon")
    for path, (_, matrix) in MATRICES.items():
        out, inputs = matrix[-2:]
        scale = MUON_MATRIX_RATE * max(1, out / inputs) ** 0.5  # as Muon scales its updates
        values = np.linalg.svd(changes[path].reshape(matrix), compute_uv=False) / scale
        assert 0.6 < values.min() and values.max() < 1.3, path


@pytest.mark.parametrize("muon", [False, True])
def test_adam_moves_all_else_by_its_rate(muon, first_steps):
    """Guards which weights Muon leaves to Adam, and their own rate: the first step is the gradient's sign.

    With Muon, Adam has Nesterov's momentum too: at the first step 0.9 / 1.9 more of the gradient.
    """
    changes, gradients = first_steps("muon" if muon else "adamw"), _draw(1)
    step = 0.01 * (1 + 0.9 / 1.9 if muon else 1)
    for path in OTHERS if muon else OTHERS | MATRICES:
        np.testing.assert_allclose(changes[path], -step * np.sign(gradients[path]), rtol=1e-3, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_takes_a_share_of_each_weight(name, first_steps):
    """Guards decoupled decay, of rate times weight, for both kinds of matrices, and norms and biases against any."""
    without, decayed = first_steps(name), first_steps(name, 0.5)
    weights = _draw(0)
    for path, change in decayed.items():
        rate = MUON_MATRIX_RATE if name == "muon" and path in MATRICES else 0.01
        rate = 0 if path.endswith(optimizer.NEVER_DECAYED) else rate
        np.testing.assert_allclose(change - without[path], -0.5 * rate * weights[path], rtol=1e-3, atol=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
    """Guards clipping before the moments: where the norm is too large, all gradients shrink alike, and else none."""
    trained, gradients = ({path: _draw(seed)[path] for path in ("embedding", "norm")} for seed in (0, 1))
    norm = float(np.sqrt(sum(float((g**2).sum()) for g in gradients.values())))
    made = optimizer.optimizer(_flat(clip=norm / 4), 10, trained)
    start = made.init(trained)
    step = jax.jit(lambda gradients: optimizer.update(made, gradients, start, trained)[1])
    for factor, expected in ((1.0, 1 / 4), (1 / 8, 1 / 8)):
        scaled = {path: factor * gradient for path, gradient in gradients.items()}
        moments = optax.tree.get(step(scaled), "mu")
        for path, gradient in gradients.items():
            np.testing.assert_allclose(moments[path], (1 - optimizer.BETA1) * expected * gradient, rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "shape", "axes", "expected"),
    [
        ("embedding", (512, 24), ("vocab", None), ("vocab", "batch")),  # the tensor axis has cut the rows
        ("norm", (24,), (None,), ("batch",)),
        ("norm", (25,), (None,), (None,)),  # cannot be halved
        ("layers/0/moe/down/weight", (8, 24, 32), ("experts", None, "expert_hidden"), ("batch", None, "expert_hidden")),
        (
            "layers/0/moe/down/weight",
            (7, 24, 32),
            ("experts", None, "expert_hidden"),
            None,
        ),  # Muon: no part of a matrix
        ("layers/0/attention/out/weight", (24, 6, 8), (None, "heads", None), None),
    ],
)
def test_data_shards_share_the_optimisers_work(path, shape, axes, expected):
    """Guards memory and time of data parallel training, and Muon against a matrix that is cut."""
    cut, muon = sharding.make("data=2,tensor=2"), OptimizerOptions("muon")
    assert optimizer.spread(muon, path, shape, axes, cut) == (expected or axes)
    assert optimizer.spread(muon, path, shape, axes, sharding.make("tensor=2")) == axes
    assert "batch" in optimizer.spread(OptimizerOptions(), path, (*shape[:-1], 64), axes, cut)  # Adam has no matrices
