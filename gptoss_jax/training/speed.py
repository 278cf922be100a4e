"""How fast a run trains: tokens per second, the time that is left, and the share of the machine's matrix rate.

Useful are the products that the mathematics asks for: those of the experts that the router picks, not of padding, and
of the unembedding only at tokens that are learned. What a program computes beside these makes the share smaller.
"""

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptoss_jax.model.config import ModelConfig

_DOT_SIZE, _DOT_REPEATS = 2048, 5


class Counts(NamedTuple):
    """What batches hold.

    Attributes:
        tokens: without padding.
        learned: tokens that are targets.
        keys_full: keys that all tokens together attend to, in a layer without a window.
        keys_window: the same in a layer with one.
    """

    tokens: int = 0
    learned: int = 0
    keys_full: int = 0
    keys_window: int = 0

    def __add__(self, other: tuple[Any, ...]) -> "Counts":
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def count(batch: Any, window: int) -> Counts:
    """The Counts of a `gptoss_jax.training.batch.Batch`."""
    position = np.asarray(batch.places.position)
    keys = position[position >= 0].astype(np.int64) + 1
    learned = int(np.count_nonzero(np.asarray(batch.weights)))
    return Counts(len(keys), learned, int(keys.sum()), int(np.minimum(keys, window).sum()))


def useful_flop(config: ModelConfig, counts: Counts, *, method: str, vocab_rows: int | None = None) -> float:
    """Floating-point operations of the products that a step on these tokens has to do, forward and backward.

    A product of n multiply-adds takes 2 n forward, and 2 n backward for each of its operands that needs a gradient:
    with "full" both do; with "lora" the frozen matrix does not, and the adapters' own products, a percent or so, are
    left out. Attention's products of queries and keys, and of weights and values, have two such operands either way.

    Args:
        config: the model.
        counts: tokens, and what they attend to.
        method: full or lora.
        vocab_rows: rows of the unembedding; all by default.
    """
    layers = config.num_layers
    with_window = sum(config.has_sliding_window(layer) for layer in range(layers))
    attention = 2 * config.head_dim * (config.num_heads + config.num_kv_heads) * config.hidden_size
    experts = config.experts_per_token * 3 * config.intermediate_size * config.hidden_size
    router = config.num_experts * config.hidden_size
    matrices = layers * (attention + experts + router) * counts.tokens
    matrices += (vocab_rows or config.vocab_size) * config.hidden_size * counts.learned
    keys = with_window * counts.keys_window + (layers - with_window) * counts.keys_full
    scores = 2 * config.num_heads * config.head_dim * keys
    return 2.0 * ((3 if method == "full" else 2) * matrices + 3 * scores)


def matrix_rate(devices: Sequence[Any] | None = None) -> float:
    """Floating-point operations per second of products of large float32 matrices, measured now: best of a few.

    Args:
        devices: each does one such product at the same time as the others; by default the first one that JAX has.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(devices or jax.devices()[:1]), ("one",))
    on_each = NamedSharding(mesh, PartitionSpec("one"))
    shape = (mesh.size, _DOT_SIZE, _DOT_SIZE)
    a = jax.jit(lambda: jnp.full(shape, 1e-3, jnp.float32), out_shardings=on_each)()
    products = jax.jit(jnp.matmul, out_shardings=on_each).lower(a, a).compile()
    seconds = []
    for _ in range(_DOT_REPEATS):
        began = time.perf_counter()
        products(a, a).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2.0 * mesh.size * _DOT_SIZE**3 / min(seconds)


class Pace:
    """The speed of this process's steps, compiling, validation and saving left out."""

    def __init__(
        self,
        config: ModelConfig,
        total_steps: int,
        *,
        method: str,
        rate: float | None = None,
        vocab_rows: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """A pace of no steps yet.

        Args:
            config: the model.
            total_steps: of the run.
            method: full or lora.
            rate: what the machine's products reach, FLOP/s, as `matrix_rate` measures it; None: no share is given.
            vocab_rows: rows of the unembedding; all by default.
            clock: seconds.
        """
        self._config, self._total, self._method, self._rate = config, total_steps, method, rate
        self._vocab_rows, self._clock = vocab_rows, clock
        self._counted, self._counts, self._flop = 0, Counts(), 0.0
        self._seconds, self._ended, self._done = 0.0, clock(), 0
        self._compiled: set[Hashable] = set()

    def start(self, done: int) -> None:
        """From now on steps count, of which `done` were done by earlier processes."""
        self._done, self._ended = done, self._clock()

    def add(self, batch: Any, program: Hashable = None) -> None:
        """One more step is done, on this batch; the first one by each program compiles it, and is in no rate."""
        began, self._ended = self._ended, self._clock()
        self._done += 1
        if program not in self._compiled:
            self._compiled.add(program)
            return
        self._counted, self._seconds = self._counted + 1, self._seconds + self._ended - began
        counts = count(batch, self._config.sliding_window)
        self._counts += counts
        self._flop += useful_flop(self._config, counts, method=self._method, vocab_rows=self._vocab_rows)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While the block runs, no time passes."""
        began = self._clock()
        yield
        self._ended += self._clock() - began

    @property
    def seconds(self) -> float:
        """Of the steps that count."""
        return self._seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens without padding; None: no steps count yet."""
        return self._counts.tokens / self.seconds if self.seconds > 0 and self._counts.tokens else None

    @property
    def flop_per_second(self) -> float | None:
        """Useful ones; None: no steps count yet."""
        return self._flop / self.seconds if self.seconds > 0 and self._flop else None

    @property
    def seconds_left(self) -> float | None:
        """Of the run, at this pace; None: no steps count yet."""
        return (self._total - self._done) * self.seconds / self._counted if self._counted else None

    def line(self) -> str:
        """For people."""
        if self.tokens_per_second is None or self.flop_per_second is None or self.seconds_left is None:
            return "compiling and measuring"
        share = f" ({self.flop_per_second / self._rate:.0%} of its matrix rate)" if self._rate else ""
        rate = f"{self.flop_per_second / 1e9:,.1f} useful GFLOP/s{share}"
        return f"{self.tokens_per_second:,.0f} tokens/s, {rate}, {duration(self.seconds_left)} left"

    def scalars(self) -> dict[str, float]:
        """For TensorBoard."""
        if self.tokens_per_second is None or self.flop_per_second is None:
            return {}
        return {"tokens_per_second": self.tokens_per_second, "useful_flop_per_second": self.flop_per_second}

    def summary(self) -> str:
        """What a run ends with: one line with all figures."""
        if self.tokens_per_second is None or self.flop_per_second is None:
            return "speed: too few steps to measure one"
        per_token = self._flop / self._counts.tokens
        line = (
            f"speed: {self.tokens_per_second:,.0f} tokens/s over {self._counted:,} steps, "
            f"{per_token / 1e6:,.2f} useful MFLOP a token, {self.flop_per_second / 1e9:,.1f} GFLOP/s"
        )
        if self._rate:
            share = self.flop_per_second / self._rate
            line += f": {share:.1%} of this machine's float32 matrix rate, {self._rate / 1e9:,.1f} GFLOP/s"
        return line


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min 5 s, 3 h 7 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, left = divmod(whole, 60)
    return f"{minutes} min {left} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
