"""The training step: weights, an optimiser's state and a batch in; those after one update, and what it showed, out."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from gptoss_jax.checkpoints import opening
from gptoss_jax.errors import GptossError
from gptoss_jax.model import layers, transformer
from gptoss_jax.model import sharding as sharding_module
from gptoss_jax.model.adapters import LowRank
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.taps import Taps
from gptoss_jax.training import loss as losses
from gptoss_jax.training import optimizer as optimizers
from gptoss_jax.training.batch import Batch
from gptoss_jax.training.loss import Losses, Router
from gptoss_jax.training.options import TrainOptions
from gptoss_jax.training.trainable import TABLES, Adapters, FullWeights, Trained, UsedRows
from pallas_kernels.choice import Hardware


class State(NamedTuple):
    """All that changes from step to step, beside the place in the data."""

    step: Any  # int32 scalar: updates so far
    trained: Trained  # float32 arrays by path
    optimizer: Any  # optax's state


class StepReport(NamedTuple):
    """What one step showed, before its update."""

    loss: Float[Array, ""]  # mean cross entropy of the learned tokens, nats
    gradient_norm: Float[Array, ""]  # global, before clipping
    learning_rate: Float[Array, ""]
    learned: Float[Array, ""]  # tokens
    balance: Float[Array, ""]  # the load-balancing loss, 1 where all experts are used alike; unweighted
    router: Router


class Evaluation(NamedTuple):
    """Sums over the learned tokens of a batch, from weights as they are."""

    loss: float  # cross entropy, nats
    right: int  # tokens that were the likeliest
    learned: int

    def __add__(self, other: "Evaluation") -> "Evaluation":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Evaluation(self.loss + other.loss, self.right + other.right, self.learned + other.learned)


class Trainer:
    """Compiled steps over a checkpoint's weights.

    Attributes:
        config: the model's numbers.
        sharding: the mesh.
        options: what was asked for.
        total_steps: of the run, which the learning rate's schedule and `quantize_from` are shares of.
        kernels: which implementation of each op runs, and why, on one line.
        are_random: whether the checkpoint says that nobody trained it.
        source: what kind of folder the weights came from.
    """

    def __init__(
        self,
        weights: opening.StoredWeights,
        sharding: Sharding,
        options: TrainOptions,
        total_steps: int,
        kernels: str,
        rows: np.ndarray | None,
    ):
        """See `open`."""
        self.config, self.sharding, self.options, self.total_steps = weights.config, sharding, options, total_steps
        self.are_random, self.source = weights.are_random, weights.described
        policy = transformer.DTYPE_POLICIES[options.dtype]
        chosen, self.kernels = layers.choose_training_kernels(
            kernels,
            Hardware.of(sharding.mesh.devices.flat[0]),
            dense_experts=options.lora is None,
            expert_adapters=options.lora is not None and "experts" in options.lora.targets,
            num_experts=weights.config.num_experts,
            dtype=policy.activations,
        )
        self._model = transformer.declare(weights.config, sharding, chosen, policy)
        self._rows = None
        if rows is not None:
            read = weights.read(self._model.leaves, sharding)
            self._rows = UsedRows.of(rows, [np.asarray(table) for path, table in read if path in TABLES])
        if options.lora is None:
            self._trainable = FullWeights(self._model, weights, sharding, self._rows)
        else:
            self._trainable = Adapters(self._model, weights, sharding, options.lora)
        self._frozen = self._trainable.frozen

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        options: TrainOptions,
        *,
        total_steps: int,
        mesh: str | Path | Mesh | Sharding | None = None,
        kernels: str = "auto",
        rows: np.ndarray | None = None,
    ) -> "Trainer":
        """A trainer of the weights at `source`.

        Args:
            source: a checkpoint, or a folder of safetensors in any published format.
            options: what is trained, and how.
            total_steps: of the run.
            mesh: as for `gptoss_jax.load`.
            kernels: "auto", or names: see `layers.choose_training_kernels`.
            rows: with a compact vocabulary, the token ids in use, ascending: a batch then holds places in it.

        Raises:
            GptossError: whatever speaks against the weights, the mesh or these options together.
        """
        sharding = sharding_module.make(mesh)
        weights = opening.open_weights(Path(source))
        rows_at_once, left = divmod(options.batch_rows, options.accumulate)
        if left or rows_at_once % sharding.size("batch"):
            raise GptossError(
                f"batch of {options.batch_rows} rows, expected a multiple of {options.accumulate} accumulated parts "
                f"times {sharding.size('batch')} data shards"
            )
        if rows is not None and options.method != "full":
            raise GptossError("a compact vocabulary is for method full: an adapter's softmax is over all rows")
        if rows is not None and sharding.size("vocab") > 1:
            sharding = dataclasses.replace(sharding, rules={**sharding.rules, "vocab": ()})
        sharding.check(weights.config, slots=rows_at_once, pads=False)
        return cls(weights, sharding, options, total_steps, kernels, rows)

    # ---- state ----

    def init(self) -> State:
        """The state before the first step."""
        trained = self._trainable.initial(jax.random.key(self.options.seed))
        shardings = {path: self.sharding.named(self._trainable.axes(path)) for path in trained}
        trained = {path: jax.device_put(array, shardings[path]) for path, array in trained.items()}
        made = jax.jit(self._optimizer(trained).init)(trained)
        return jax.device_put(State(jnp.zeros((), jnp.int32), trained, made), self._state_shardings(trained, made))

    def _state_shardings(self, trained: Trained, optimizer: Any) -> State:
        """Moments lie where they are worked on, all else that is no weight on every device."""
        whole, working = self.sharding.named(()), self._working_shardings(trained)

        def of(path: Any, leaf: Any) -> Any:
            keys = [str(getattr(key, "key", "")) for key in path]
            name = next((key for key in keys if key in trained), None)
            same = name is not None and leaf.shape == trained[name].shape
            return working[name] if same and name is not None else whole

        of_trained = {path: self.sharding.named(self._trainable.axes(path)) for path in trained}
        return State(whole, of_trained, jax.tree_util.tree_map_with_path(of, optimizer))

    def _working_shardings(self, trained: Trained) -> dict[str, Any]:
        """How the optimiser has each of the weights, and its gradient: see `optimizer.spread`."""
        spread = functools.partial(optimizers.spread, self.options.optimizer, sharding=self.sharding)
        return {
            path: self.sharding.named(spread(path, array.shape, self._trainable.axes(path)))
            for path, array in trained.items()
        }

    def _optimizer(self, trained: Trained) -> optax.GradientTransformation:
        return optimizers.optimizer(self.options.optimizer, self.total_steps, trained)

    # ---- steps ----

    def step(self, state: State, batch: Batch) -> tuple[State, StepReport]:
        """One update by `batch`, [batch_rows, row_tokens]; `state` is used up."""
        quantize = self.is_quantized(int(state.step))
        return self._step(quantize)(self._frozen, state, self._put(batch, self.options.accumulate))

    def compiled_step(self, state: State, batch: Batch) -> jax.stages.Compiled:
        """What `step` runs, not run: it says how much memory it takes."""
        run = self._step(self.is_quantized(int(state.step)))
        return run.lower(self._frozen, state, self._put(batch, self.options.accumulate)).compile()

    def gradients(self, state: State, batch: Batch) -> Trained:
        """Of the mean loss of `batch` by each trained array, as `step` would clip and use them; `state` stays."""
        run = self._only_gradients(self.is_quantized(int(state.step)))
        return run(self._frozen, state, self._put(batch, self.options.accumulate))

    def is_quantized(self, step: int) -> bool:
        """Whether weights are rounded as a checkpoint holds them, at this step and from here on."""
        share = self.options.quantize_from
        return share is not None and step >= share * self.total_steps

    def evaluate(self, state: State, batch: Batch) -> Evaluation:
        """The loss of the learned tokens of `batch`, any number of rows that the data shards divide."""
        found = self._evaluate(self.is_quantized(int(state.step)))(self._frozen, state.trained, self._put(batch, 1))
        return Evaluation(float(found.total), int(found.right), int(found.learned))

    def _put(self, batch: Batch, parts: int) -> Batch:
        """On the mesh, [parts, rows, tokens]."""

        def put(array: Any) -> jax.Array:
            array = np.asarray(array)
            cut = array.reshape(parts, -1, array.shape[-1])
            return self.sharding.put(cut, (None, "batch", None))

        return jax.tree.map(put, batch)

    @functools.cache  # noqa: B019  (a trainer lives as long as its process)
    def _only_gradients(self, quantize: bool) -> Any:
        return jax.jit(lambda frozen, state, batch: self._gradients(frozen, state, batch, quantize)[0])

    @functools.cache  # noqa: B019
    def _step(self, quantize: bool) -> Any:
        def step(frozen: Trained, state: State, batch: Batch) -> tuple[State, StepReport]:
            gradients, sums, router, balance = self._gradients(frozen, state, batch, quantize)
            optimizer = self._optimizer(state.trained)
            working = self._working_shardings(state.trained)
            weights, gradients = lax.with_sharding_constraint((state.trained, gradients), (working, working))
            trained, made = optimizers.update(optimizer, gradients, state.optimizer, weights)
            report = StepReport(
                loss=sums.total / jnp.maximum(sums.learned, 1),
                gradient_norm=optax.tree.norm(gradients),
                learning_rate=self.learning_rate(state.step),
                learned=sums.learned,
                balance=balance,
                router=router,
            )
            after = State(state.step + 1, trained, made)
            return lax.with_sharding_constraint(after, self._state_shardings(trained, made)), report

        return jax.jit(step, donate_argnums=1)

    def learning_rate(self, step: Int32[Array, ""] | int) -> Float[Array, ""]:
        """At `step`, of Muon where it trains matrices."""
        asked = self.options.optimizer
        full = asked.matrix_learning_rate or asked.learning_rate
        return full * optimizers.schedule(asked, self.total_steps, step)

    @functools.cache  # noqa: B019
    def _evaluate(self, quantize: bool) -> Any:
        def evaluate(frozen: Trained, trained: Trained, batch: Batch) -> Losses:
            batch = jax.tree.map(lambda array: array[0], batch)
            params = self._trainable.params(frozen, trained, quantize=quantize, key=None)
            return self._losses(params, batch)[0]

        return jax.jit(evaluate)

    def _gradients(
        self, frozen: Trained, state: State, batch: Batch, quantize: bool
    ) -> tuple[Trained, Losses, Router, Float[Array, ""]]:
        """Of the mean loss over all parts of `batch`, gone through one by one."""
        trained, key = state.trained, jax.random.fold_in(jax.random.key(self.options.seed + 1), state.step)
        learned = jnp.maximum(batch.weights.sum(), 1)
        parts = batch.tokens.shape[0]

        def of_part(trained: Trained, part: Batch, key: Array) -> tuple[Float[Array, ""], Any]:
            params = self._trainable.params(frozen, trained, quantize=quantize, key=key)
            sums, router, balance = self._losses(params, part)
            return sums.total / learned + self.options.balance_loss * balance / parts, (sums, router, balance)

        def one(part: Batch, number: Any) -> Any:
            (_, shown), gradients = jax.value_and_grad(of_part, has_aux=True)(
                trained, part, jax.random.fold_in(key, number)
            )
            sums, router, balance = shown
            return gradients, sums, jax.tree.map(lambda x: x / parts, (router, balance))

        if parts == 1:
            gradients, sums, (router, balance) = one(jax.tree.map(lambda array: array[0], batch), 0)
            return gradients, sums, router, balance
        shapes = jax.eval_shape(one, jax.tree.map(lambda array: array[0], batch), 0)
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(so_far: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, so_far, one(*part)), None

        (gradients, sums, (router, balance)), _ = lax.scan(add, zero, (batch, jnp.arange(parts)))
        return gradients, sums, router, balance

    def _losses(self, params: transformer.Params, batch: Any) -> tuple[Losses, Router, Float[Array, ""]]:
        run = self._model.bind(params)
        places = [f"layers/{i}/router" for i in range(self.config.num_layers)]
        taps = Taps(places, self.config.num_layers)
        x = run.packed(batch.tokens, batch.places, taps, rematerialize=self.options.rematerialize)
        x = run.normed(x)
        table = run.unembedding.get_value()
        vocab_size, log_counts = self.config.vocab_size, None
        if self._rows is not None:
            vocab_size, log_counts = len(self._rows.ids), jnp.asarray(self._rows.log_counts())
        sums = losses.cross_entropy(
            lambda x: run.unembed(x, table), x, batch.targets, batch.weights, vocab_size, log_counts
        )
        found = {place: taps.found[place] for place in places}
        router, balance = losses.routing(found, batch.places.position >= 0, self.config.experts_per_token)
        return sums, router, balance

    # ---- results ----

    def trained_leaves(self, state: State) -> Any:
        """Method full: every leaf as the model declares it, (path, array on the host), rounded as a checkpoint's.

        Raises:
            GptossError: method lora, whose result is `trained_adapters`.
        """
        if not isinstance(self._trainable, FullWeights):
            raise GptossError("method lora trains adapters: the weights are as they were")
        return self._trainable.published(state.trained)

    def trained_adapters(self, state: State) -> dict[str, LowRank]:
        """Method lora: the factors on the host, float32, without the scale alpha / rank, by the matrix beside them.

        Raises:
            GptossError: method full, whose result is `trained_leaves`.
        """
        if not isinstance(self._trainable, Adapters):
            raise GptossError("method full trains the weights themselves: there are no adapters")
        return self._trainable.factors(state.trained)

    def frozen_leaves(self) -> dict[str, jax.Array]:
        """The weights that no step changes, as a checkpoint holds them."""
        return dict(self._frozen)
