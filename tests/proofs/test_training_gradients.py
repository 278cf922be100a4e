"""Gradients of the training step: float64 differences of the reference, and the same numbers on every mesh."""

import json
from typing import NamedTuple

import jax
import numpy as np
import pytest

from converters.random_checkpoint import with_vocab_size
from gptoss_jax.model import sharding
from gptoss_jax.model.mesh import RULES, MeshShape
from tests import trainings
from tests.gate import TinyModel
from tests.goldens.make import ROOT

STEP = 1e-5  # of a difference in float64: its own error is about 1e-9 of the slope
TOLERANCE = 1e-4  # of a gradient's norm: the step computes in float32


@pytest.fixture(scope="module")
def model():
    """The model of the trainings, as tensors."""
    return TinyModel(trainings.CONFIG)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The same as a checkpoint."""
    return model.write(tmp_path_factory.mktemp("gradients"))


def _started(trainer):
    """The first state; of adapters with factors b that are not 0, so that those beside them learn too."""
    state = trainer.init()
    rng = np.random.default_rng(8)
    trained = {
        path: jax.device_put((0.05 * rng.standard_normal(array.shape)).astype(np.float32), array.sharding)
        if path.endswith("/b")
        else array
        for path, array in state.trained.items()
    }
    return state._replace(trained=trained)


def _assert_slopes(gradients, loss_moved):
    """Each gradient's slope along a drawn direction is the difference of losses there: loss_moved(path, direction)."""
    rng = np.random.default_rng(9)
    off = {}
    for path, gradient in gradients.items():
        gradient = np.asarray(gradient, np.float64)
        assert np.any(gradient), f"{path} learns nothing"
        direction = rng.standard_normal(gradient.shape)  # the slope along it is about the gradient's norm
        slope = (loss_moved(path, STEP * direction) - loss_moved(path, -STEP * direction)) / (2 * STEP)
        off[path] = abs(slope - (gradient * direction).sum()) / np.linalg.norm(gradient)
    assert {path: error for path, error in off.items() if error > TOLERANCE} == {}


def test_full_gradients_are_those_of_float64_differences(model, folder):
    """Guards every weight's gradient, and packing: shared heads, windows, padding change nothing that is learned."""
    of = trainings.conversations()
    trainer = trainings.trainer(folder)
    state = trainer.init()
    gradients = trainer.gradients(state, trainings.batch(of))
    assert len(gradients) == 2 * 17 + 3
    tensors = trainings.as_float64(model.tensors)

    def loss_moved(path, direction):
        name = trainings.published_name(path)
        moved = tensors[name] + direction.reshape(tensors[name].shape)
        return trainings.mean_loss({**tensors, name: moved}, model.config, of)

    _assert_slopes(gradients, loss_moved)


def test_adapters_gradients_are_those_of_float64_differences(model, folder):
    """Guards the factors of all four targets, beside packed experts, and their scale."""
    of = trainings.conversations()
    trainer = trainings.trainer(folder, "lora")
    state = _started(trainer)
    gradients = trainer.gradients(state, trainings.batch(of))
    assert len(gradients) == 2 * (2 * 7 + 1)
    tensors = trainings.as_float64(model.tensors)
    factors = {path: np.asarray(array, np.float64) for path, array in state.trained.items()}
    adapted = trainings.with_adapters(tensors, factors)

    def loss_moved(path, direction):
        target = path[:-2]
        moved = {f"{target}/{factor}": factors[f"{target}/{factor}"] for factor in "ab"}
        moved[path] = moved[path] + direction
        name = trainings.adapted_name(target)
        return trainings.mean_loss(adapted | trainings.with_adapters({name: tensors[name]}, moved), model.config, of)

    _assert_slopes(gradients, loss_moved)


# ---- meshes ----

SHARDABLE = with_vocab_size(json.loads((ROOT / "configs" / "small.json").read_text()), 512) | {"sliding_window": 9}
SHARDABLE |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
OVER_DATA = {**RULES, "experts": ("data",)}  # batch shards share experts
MESHES = {
    "full": [
        MeshShape({"data": 2}, RULES),
        MeshShape({"expert": 4, "tensor": 2}, RULES),
        MeshShape({"data": 2, "expert": 2, "tensor": 2}, RULES, "all_to_all"),
        MeshShape({"data": 4}, OVER_DATA, "gather"),
    ],
    "lora": [
        MeshShape({"data": 2, "expert": 2, "tensor": 2}, RULES),
        MeshShape({"data": 4}, OVER_DATA, "all_to_all"),
    ],
}
STEPS = 3


class Run(NamedTuple):
    """What three steps show and leave."""

    gradients: dict[str, np.ndarray]
    losses: list[float]
    trained: dict[str, np.ndarray]


def _run(folder, method, mesh) -> Run:
    again = mesh is not None and "expert" in mesh.axes  # layers are computed again
    laid_out = mesh and sharding.make(mesh)
    trainer = trainings.trainer(folder, method, mesh=laid_out, balance_loss=0.01, rematerialize=again)
    state = _started(trainer)
    batch = trainings.batch(trainings.conversations(seed=4))
    losses, gradients = [], {}
    for _ in range(STEPS):
        state, report = trainer.step(state, batch)
        losses.append(float(report.loss))
        gradients = gradients or trainings.first_gradients(state)
    return Run(gradients, losses, jax.tree.map(np.asarray, state.trained))


@pytest.mark.parametrize("method", MESHES)
def test_a_mesh_trains_as_one_device_does(method, tmp_path):
    """Guards collectives in the backward pass: a gradient counted twice, or not summed over devices.

    Tokens are summed over experts' devices, gathered for them and sent to them.
    Some meshes compute layers again for their gradients, which one device here does not.
    """
    folder = TinyModel(SHARDABLE).write(tmp_path)
    one = _run(folder, method, None)
    assert one.losses[-1] < one.losses[0]
    for mesh in MESHES[method]:
        _assert_same(_run(folder, method, mesh), one)


def _assert_same(sharded: Run, one: Run) -> None:
    np.testing.assert_allclose(sharded.losses, one.losses, rtol=1e-5)
    for path, expected in one.gradients.items():
        off = np.linalg.norm(sharded.gradients[path] - expected) / np.linalg.norm(expected)
        assert off <= 1e-4, path
        # Adam may move a weight whose gradient is nearly 0 by up to a whole step of 1e-3, either way
        apart = sharded.trained[path] - one.trained[path]
        assert np.sqrt(np.mean(apart**2)) <= 2e-5, path
