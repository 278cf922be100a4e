"""A trainer of eight numbers and its data: what the run around a training step does, without a model."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.training.batch import Batch
from gptoss_jax.training.packing import Position
from pallas_kernels.attention.packed import Places

LAYERS, EXPERTS = 3, 5


class State(NamedTuple):
    """As the real one: everything that a resume needs beside the data's position."""

    step: Any
    trained: dict[str, Any]
    optimizer: Any


class Router(NamedTuple):
    load: Any
    entropy: Any


class Report(NamedTuple):
    loss: Any
    gradient_norm: Any
    learning_rate: Any
    learned: Any
    balance: Any
    router: Router


class Evaluation(NamedTuple):
    loss: Any
    right: Any
    learned: Any


class FakeTrainer:
    """Draws its weights towards the mean token of each batch, with momentum, and noise of (seed, step).

    Attributes:
        broken_at: step, from 1, whose loss is no number; 0: none.
        steps: how many were computed here.
    """

    def __init__(self, broken_at: int = 0):
        self.broken_at, self.steps = broken_at, 0

    def init(self) -> State:
        return State(jnp.zeros((), jnp.int32), {"layers/0/w": jnp.ones(8)}, ({"w": jnp.zeros(8)}, jnp.zeros(())))

    def step(self, state: State, batch: Batch) -> tuple[State, Report]:
        self.steps += 1
        state, loss = _step(state, jnp.asarray(batch.tokens, jnp.float32).mean())
        loss = np.nan if int(state.step) == self.broken_at else loss
        load = np.full((LAYERS, EXPERTS), 1 / EXPERTS, np.float32)
        router = Router(load, np.full(LAYERS, np.log(EXPERTS), np.float32))
        return state, Report(loss, loss, 0.1, np.int32(batch.weights.sum()), 1.0, router)

    def is_quantized(self, step: int) -> bool:
        return False

    def evaluate(self, state: State, batch: Batch) -> Evaluation:
        return Evaluation(2 * jnp.abs(state.trained["layers/0/w"]).sum(), 3, 4)


@jax.jit
def _step(state: State, target: Any) -> tuple[State, Any]:
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), state.step), (8,))
    w = state.trained["layers/0/w"]
    momentum = 0.9 * state.optimizer[0]["w"] + (w - target) + 0.01 * noise
    loss = jnp.square(w - target).mean()
    return State(state.step + 1, {"layers/0/w": w - 0.01 * momentum}, ({"w": momentum}, loss)), loss


class FakeData:
    """Batches of two rows of seven tokens, each step's from its place alone; an epoch is four batches."""

    def take(self, position: Position) -> tuple[Batch, Position]:
        epoch, row = position
        return _batch(4 * epoch + row), Position(epoch, row + 1) if row < 3 else Position(epoch + 1, 0)

    def places(self, position: Position) -> Sequence[str]:
        line = 4 * position.epoch + position.row + 1
        return [f"data.jsonl, line {line}", f"data.jsonl, line {line + 1}; data.jsonl, line {line + 2}"]

    def validation(self) -> Iterator[Batch]:
        yield from (_batch(1000), _batch(1001))


def _batch(seed: int) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 9, (2, 7)).astype(np.int32)
    position = np.tile(np.arange(7, dtype=np.int32), (2, 1))
    zeros = np.zeros_like(tokens)
    places: Any = Places  # of NumPy arrays
    return Batch(tokens, places(position, zeros, zeros), zeros, np.ones((2, 7), np.float32))
