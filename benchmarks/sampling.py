"""Measures what drawing a token costs, option by option, at gpt-oss' vocabulary, beside a sort of the logits.

python -m benchmarks.sampling --rows 1
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from gptoss_jax.cli import command
from gptoss_jax.engine import sampling
from gptoss_jax.engine.sampling import Draw, Sampling
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.harmony import tokenizer

NAMED = tokenizer.ENDOFPROMPT + 1  # ids that name a token

OPTIONS = {
    "greedy": SamplingParams(temperature=0.0),
    "greedy, penalties": SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.1),
    "greedy, 5 top logprobs": SamplingParams(temperature=0.0, top_logprobs=5),
    "temperature": SamplingParams(),
    "temperature, min-p": SamplingParams(min_p=0.05),
    "temperature, top-k": SamplingParams(top_k=50),
    "temperature, top-k, top-p": SamplingParams(top_k=50, top_p=0.9),
}


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_integer("rows", 1, "Rows of the batch.", lower_bound=1)
    flags.DEFINE_integer("repeats", 15, "Draws timed, of which the median counts.", lower_bound=1)


def main(arguments: list[str]) -> None:
    """Prints a line for each option, then one JSON line."""
    del arguments
    rows, repeats = flags.FLAGS.rows, flags.FLAGS.repeats
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (rows, tokenizer.VOCAB_SIZE)), jnp.float32)
    result = {name: _milliseconds(_sample, logits, _batch(params, rows), repeats) for name, params in OPTIONS.items()}
    result["a sort, for comparison"] = _milliseconds(_sort, logits, (), repeats)
    for name, milliseconds in result.items():
        print(f"{name:26s} {milliseconds:8.2f} ms")
    machine = f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(json.dumps({"machine": machine, "rows": rows, "milliseconds": result}))


def _batch(params: SamplingParams, rows: int) -> Sampling:
    row = sampling.row(params, (1, 2, 3), tokenizer.VOCAB_SIZE, NAMED)
    return jax.tree.map(lambda x: jnp.asarray(np.stack([x] * rows)), row)


def _sample(logits: jax.Array, batch: Sampling, positions: jax.Array) -> Draw:
    return sampling.sample(logits, batch, positions, NAMED)


def _sort(logits: jax.Array, batch: tuple[()], positions: jax.Array) -> jax.Array:
    return jnp.sort(logits, axis=-1)


def _milliseconds(function: Callable[..., Any], logits: jax.Array, batch: Any, repeats: int) -> float:
    positions = np.zeros(logits.shape[0], np.int32)
    compiled = jax.jit(function).lower(logits, batch, positions).compile()
    seconds = []
    for i in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(compiled(logits, batch, positions + np.int32(i)))
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[1:])


if __name__ == "__main__":
    define_flags()
    command.run(main, "sampling")
