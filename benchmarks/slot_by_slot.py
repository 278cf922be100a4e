"""Measures what deterministic engines pay: a decoding step slot by slot against all slots in a batch, time and memory.

    python -m benchmarks.slot_by_slot --layers 2

At the 20b's width, on random routers and embeddings (each slot has experts of its own) and other weights of zero.
"""

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import true_width, under_load
from gptoss_jax.cli import command
from gptoss_jax.engine.programs import Forms, ModelStep
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model import layers, sharding
from gptoss_jax.model.config import ModelConfig, parse_config
from gptoss_jax.model.transformer import Params, declare, nest
from gptoss_jax.runtime.program_memory import program_memory
from pallas_kernels.choice import Hardware

CONTEXT_TOKENS = 4096


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_string("config", str(true_width.CONFIG), "FILE: The config.json that is cut down.")
    flags.DEFINE_integer("layers", 2, "Layers, an even number.", lower_bound=2)
    flags.DEFINE_list("rows", ["1", "4", "8"], "N,N,...: Slots of a batch.")
    flags.DEFINE_integer("steps", 3, "Steps timed, of which the median counts.", lower_bound=1)


def main(arguments: list[str]) -> None:
    """Prints a line for each batch, then one JSON line."""
    del arguments
    options = flags.FLAGS
    config = parse_config(true_width.raw_config(options.layers, Path(options.config)))
    kernels, _ = layers.choose_kernels("auto", Hardware.of(jax.devices()[0]))
    model = declare(config, sharding.make(), kernels)
    params = _params({path: (leaf.shape, leaf.dtype) for path, leaf in model.leaves.items()})
    results: dict[str, Any] = {}
    for slots in map(int, options.rows):
        for name, one_by_one in (("slot by slot", True), ("batched", False)):
            forms = under_load.forms(ModelStep(model, config, sharding.make()), slot_by_slot=one_by_one)
            result = measure(forms, config, params, slots, options.steps)
            results[f"{slots} slots, {name}"] = result
            milliseconds, mebibytes = 1e3 * result["step_seconds"], result["temporary_bytes"] / 2**20
            print(
                f"{slots:3d} slots, {name:12s} step {milliseconds:9.1f} ms, temporaries {mebibytes:7.1f} MiB",
                flush=True,
            )
    machine = f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(json.dumps({"machine": machine, "layers": options.layers, **results}))


def measure(forms: Forms, config: ModelConfig, params: Params, slots: int, steps: int) -> dict[str, float]:
    """Seconds of the median step, and bytes that it needs beside its arguments."""
    load = under_load.start(config, [SamplingParams(seed=seed) for seed in range(slots)], 0, CONTEXT_TOKENS)
    compiled = under_load.decode_program(forms).lower(params, *load, np.int32(1)).compile()
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        draws, cache, state = jax.block_until_ready(compiled(params, *load, np.int32(1)))
        seconds.append(time.perf_counter() - began)
        assert (np.asarray(draws.token)[:, 0] >= 0).all()
        load = load._replace(cache=cache, state=state)
    return {
        "step_seconds": round(statistics.median(seconds[1:]), 4),
        "temporary_bytes": program_memory(compiled).temporary_bytes,
    }


def _params(leaves: dict[str, tuple[tuple[int, ...], jnp.dtype]]) -> Params:
    def make(path: str, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        if "router/weight" in path or path == "embedding":
            return jax.random.normal(jax.random.key(len(path)), shape, dtype)
        return jnp.full(shape, "norm" in path, dtype)

    return nest({path: make(path, shape, dtype) for path, (shape, dtype) in leaves.items()})


if __name__ == "__main__":
    define_flags()
    command.run(main, "slot_by_slot")
