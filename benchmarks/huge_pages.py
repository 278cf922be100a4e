"""Measures what pages of 2 MiB are worth: the unembedding's product, its weights over small pages and over huge ones.

python -m benchmarks.huge_pages
"""

import json
import mmap
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from gptoss_jax.checkpoints import host_memory
from gptoss_jax.cli import command
from pallas_kernels import linear
from pallas_kernels.choice import Hardware

INPUTS = 2880  # of the 20b's unembedding


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_integer("outputs", 201_088, "Rows of the weights.", lower_bound=1)
    flags.DEFINE_integer("repeats", 10, "Products timed, of which the fastest counts.", lower_bound=1)


def main(arguments: list[str]) -> None:
    """Prints a line for each kind of page, then one JSON line."""
    del arguments
    size = flags.FLAGS.outputs * INPUTS * 2
    memories = {
        "4 KiB": np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8),
        "2 MiB": host_memory.empty(size),
    }
    choice = linear.choose("auto", Hardware.of(jax.devices("cpu")[0]))
    product = jax.jit(choice.implementation)
    x = jnp.ones((1, INPUTS), jnp.bfloat16)
    result = {}
    weights = {name: _weights(memory) for name, memory in memories.items()}
    for _ in range(flags.FLAGS.repeats):  # one after the other in each round, as neighbours on the machine come and go
        for name, w in weights.items():
            product(x, w).block_until_ready()
            began = time.perf_counter()
            product(x, w).block_until_ready()
            result[name] = max(result.get(name, 0.0), size / (time.perf_counter() - began) / 1e9)
    for name, rate in result.items():
        print(f"{name}: {rate:5.1f} GB/s")
    machine = f"{platform.machine()}, linear: {choice.name} ({choice.reason})"
    print(json.dumps({"machine": machine, "gb_per_second": result}))


def _weights(memory: np.ndarray) -> jax.Array:
    memory.view(np.uint16).fill(0x3F80)  # ones, each page touched
    return jax.device_put(memory.view(jnp.bfloat16).reshape(-1, INPUTS), jax.devices("cpu")[0])


if __name__ == "__main__":
    define_flags()
    command.run(main, "huge_pages")
