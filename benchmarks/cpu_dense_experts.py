"""Times training's experts with dense float32 weights on a CPU, forward and with the gradient, by implementation.

python -m benchmarks.cpu_dense_experts --tokens 4096 --hidden 128 --inner 128 --experts 8 --top-k 4

The share is of the float32 matrix rate that is reached here, and counts useful operations only: those of the experts
that tokens are assigned to, three times the forward's for a step; neither idle experts nor what the gradient computes
again.
"""

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import cpu_kernels
from benchmarks import cpu
from gptoss_jax.cli import command
from pallas_kernels.expert_mlp import DENSE_IMPLEMENTATIONS, ExpertWeights

LIMIT = 7.0


def arguments_of(tokens: int, hidden: int, inner: int, experts: int, top_k: int) -> tuple[Any, ...]:
    """x, expert ids, routing weights and weights; each token's experts are drawn evenly from all."""
    rng = np.random.default_rng(0)

    def normal(*sizes: int) -> jax.Array:
        return jnp.asarray(0.1 * rng.standard_normal(sizes), jnp.float32)

    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
    gate_up, down = normal(experts, 2 * inner, hidden), normal(experts, hidden, inner)
    weights = ExpertWeights(gate_up, None, normal(experts, 2 * inner), down, None, normal(experts, hidden))
    return normal(tokens, hidden), jnp.asarray(ids, jnp.int32), normal(tokens, top_k), weights


def _seconds(run: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Of the best of three calls."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _step(run: Any, x: Any, ids: Any, routing_weights: Any, weights: Any) -> Any:
    """Forward, and the gradient to all that learns."""
    y, pull = jax.vjp(lambda x, shares, w: run(x, ids, shares, w, limit=LIMIT), x, routing_weights, weights)
    return y, pull(y)


def runners(names: list[str], arguments: tuple[Any, ...]) -> dict[str, Callable[[], float]]:
    """Seconds of a forward pass and of a step, by implementation."""
    found = {}
    for name in names:
        run = DENSE_IMPLEMENTATIONS[name].run
        forward, step = jax.jit(functools.partial(run, limit=LIMIT)), jax.jit(functools.partial(_step, run))
        for what, compiled in (("forward", forward), ("step", step)):
            jax.block_until_ready(compiled(*arguments))
            found[f"{name}, {what}"] = functools.partial(_seconds, compiled, arguments)
    return found


def define_flags() -> None:
    """Defines this command's flags."""
    flags.DEFINE_list("names", ["cpu-dense", "all-experts"], "NAME,NAME,...: Implementations.")
    sizes = {"tokens": (4096, "Tokens"), "hidden": (128, "Hidden size"), "inner": (128, "The experts' hidden size")}
    sizes |= {"experts": (8, "Experts"), "top_k": (4, "Experts of a token"), "rounds": (10, "Rounds of three calls")}
    for name, (default, meaning) in sizes.items():
        flags.DEFINE_integer(name, default, f"N: {meaning}.", lower_bound=1)


def main(arguments: list[str]) -> None:
    """Prints a line for each implementation's pass, then one JSON line."""
    del arguments
    options = flags.FLAGS
    sizes = options.tokens, options.hidden, options.inner, options.experts, options.top_k
    figures = cpu.in_turns(
        {"multiply": cpu.multiplying(), **runners(options.names, arguments_of(*sizes))}, options.rounds
    )
    peaks, results = figures.pop("multiply"), []
    for name, seconds in figures.items():
        operations = 6 * options.tokens * options.top_k * options.hidden * options.inner
        operations *= 3 if name.endswith("step") else 1
        share = statistics.median(operations / mine / peak for mine, peak in zip(seconds, peaks, strict=True))
        middle = statistics.median(seconds)
        results.append({"name": name, "milliseconds": 1e3 * middle, "share_of_matrix_rate": share})
        print(
            f"{name:24} {1e3 * middle:8.2f} ms {operations / middle / 1e9:6.0f} GFLOP/s {100 * share:4.0f} %",
            flush=True,
        )
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, {cpu_kernels.instruction_sets()[0]}"
    )
    print(json.dumps({"machine": machine, "multiply": statistics.median(peaks), "results": results}))


if __name__ == "__main__":
    define_flags()
    command.run(main, "cpu_dense_experts")
