"""Times the CPU's attention over packed rows, and its gradient, beside the reference's, by the conversations' length.

python -m benchmarks.cpu_packed_attention --rows 16 --tokens 256 --heads 8 --kv-heads 4 --head-size 32
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import cpu_kernels
from benchmarks import cpu
from gptoss_jax.cli import command
from gptoss_jax.errors import GptossError
from pallas_kernels.attention import PACKED, Places
from pallas_kernels.attention.packed import visible

PRODUCTS = {"forward": 2, "gradient": 7}  # of a query's and a key's heads; a gradient has its own forward pass


class Case(NamedTuple):
    """Rows full of conversations of one length, and the window."""

    rows: int
    tokens: int
    conversation: int
    window: int | None

    def places(self) -> Places:
        """Where their tokens stand."""
        position = np.tile(np.arange(self.tokens) % self.conversation, (self.rows, 1))
        first = np.arange(self.tokens) - position
        return Places(*(jnp.asarray(array, jnp.int32) for array in (position, first, np.zeros_like(position))))


def random_arrays(case: Case, options: flags.FlagValues) -> tuple[jax.Array, ...]:
    """q, k, v and sinks."""
    heads, kv_heads, size = options.heads, options.kv_heads, options.head_size
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(case.rows, case.tokens, number, size) for number in (heads, kv_heads, kv_heads)]
    arrays = (jax.random.normal(key, shape, options.dtype) for key, shape in zip(keys, shapes, strict=True))
    return (*arrays, jnp.zeros(heads, options.dtype))


def attending(name: str, what: str, case: Case, arrays: tuple[jax.Array, ...]) -> Callable[[], float]:
    """A pass by one implementation, "forward" or "gradient": seconds."""
    places = case.places()

    def forward(*arrays: jax.Array) -> jax.Array:
        q, k, v, sinks = arrays
        return PACKED[name](q, k, v, places, sinks, window=case.window)

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(forward(*arrays) ** 2)

    run = jax.jit(forward if what == "forward" else jax.grad(loss, (0, 1, 2, 3))).lower(*arrays).compile()

    def attend() -> float:
        began = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        return time.perf_counter() - began

    attend()
    return attend


def measure(what: str, case: Case, options: flags.FlagValues) -> dict[str, Any]:
    """Medians over rounds in which both take turns; the rate counts keys that are seen."""
    arrays = random_arrays(case, options)
    figures = cpu.in_turns({name: attending(name, what, case, arrays) for name in ("cpu", "reference")}, options.rounds)
    seen = int(np.asarray(visible(case.places(), case.window)).sum()) * options.heads * options.head_size
    seconds = statistics.median(figures["cpu"])
    return {
        **case._asdict(),
        "pass": what,
        "milliseconds": 1e3 * seconds,
        "rate": 2 * PRODUCTS[what] * seen / seconds,
        "times_reference": statistics.median(figures["reference"]) / seconds,
    }


def cases(options: flags.FlagValues) -> list[Case]:
    """Each length of conversations, with and without the window.

    Raises:
        GptossError: a number is not positive, or a length is not one.
    """
    try:
        lengths = [int(length) for length in options.conversations or [options.tokens]]
    except ValueError:
        raise GptossError(f"--conversations {','.join(options.conversations)}: expected whole numbers") from None
    if min(options.rows, options.tokens, options.window, *lengths) < 1 or options.heads % options.kv_heads:
        raise GptossError("expected sizes of at least 1, and --kv-heads that divides --heads")
    return [Case(options.rows, options.tokens, n, window) for n in lengths for window in (None, options.window)]


def define_flags() -> None:
    """Defines this command's flags."""
    for name, default, what in (
        ("rows", 16, "Rows of a batch."),
        ("tokens", 256, "Tokens of a row."),
        ("heads", 8, "Query heads."),
        ("kv-heads", 4, "Key/value heads."),
        ("head-size", 32, "Size of a head."),
        ("window", 128, "The sliding window, beside none."),
        ("rounds", 9, "Rounds in which both take their turn."),
    ):
        flags.DEFINE_integer(name.replace("-", "_"), default, what)
    flags.DEFINE_list("conversations", [], "TOKENS,...: lengths of a row's conversations; by default one fills it.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of queries, keys, values and sinks.")


def main(arguments: list[str]) -> None:
    """Prints a line for each case and pass, then one JSON line."""
    del arguments
    results = []
    for case in cases(flags.FLAGS):
        for what in PRODUCTS:
            result = measure(what, case, flags.FLAGS)
            results.append(result)
            print(
                f"conversations of {case.conversation:6}, window {case.window or 'none':>4}, {what:8}:"
                f" {result['milliseconds']:9.3f} ms, {result['rate'] / 1e9:6.1f} GFLOP/s,"
                f" {result['times_reference']:.1f} times the reference",
                flush=True,
            )
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {cpu_kernels.instruction_sets()[0]}, jax {jax.__version__}"
    )
    print(json.dumps({"machine": machine, "results": results}))


if __name__ == "__main__":
    define_flags()
    command.run(main, "cpu_packed_attention")
