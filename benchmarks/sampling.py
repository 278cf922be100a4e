"""Measures what drawing a token costs, option by option, at gpt-oss' vocabulary, beside a sort of the logits.

python -m benchmarks.sampling --rows 1
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import true_width, under_load
from gptoss_jax.cli import command
from gptoss_jax.engine import sampling
from gptoss_jax.engine.programs import SlotOptions, SlotState
from gptoss_jax.engine.sampling import Draw
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model.config import read_config

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
    flags.DEFINE_string("config", str(true_width.CONFIG), "FILE: The config.json whose vocabulary is drawn from.")
    flags.DEFINE_integer("rows", 1, "Slots of the batch.", lower_bound=1)
    flags.DEFINE_integer("repeats", 15, "Draws timed, of which the median counts.", lower_bound=1)


def main(arguments: list[str]) -> None:
    """Prints a line for each option, then one JSON line."""
    del arguments
    slots, repeats, config = flags.FLAGS.rows, flags.FLAGS.repeats, read_config(Path(flags.FLAGS.config))
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (slots, config.vocab_size)), jnp.float32)

    def sample(logits: jax.Array, drawing: tuple[SlotOptions, SlotState], positions: jax.Array) -> Draw:
        options, state = drawing
        return sampling.sample(logits, options.sampling, state.drawn, positions, config.num_token_ids)

    def sort(logits: jax.Array, drawing: tuple[()], positions: jax.Array) -> jax.Array:
        return jnp.sort(logits, axis=-1)

    result = {
        name: _milliseconds(sample, logits, under_load.drawing(config, [params] * slots), repeats)
        for name, params in OPTIONS.items()
    }
    result["a sort, for comparison"] = _milliseconds(sort, logits, (), repeats)
    for name, milliseconds in result.items():
        print(f"{name:26s} {milliseconds:8.2f} ms")
    machine = f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(json.dumps({"machine": machine, "slots": slots, "milliseconds": result}))


def _milliseconds(function: Callable[..., Any], logits: jax.Array, drawing: Any, repeats: int) -> float:
    positions = np.zeros(logits.shape[0], np.int32)
    compiled = jax.jit(function).lower(logits, drawing, positions).compile()
    seconds = []
    for i in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(compiled(logits, drawing, positions + np.int32(i)))
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[1:])


if __name__ == "__main__":
    define_flags()
    command.run(main, "sampling")
