"""Measures whether layers should be unrolled or scanned: seconds to compile, seconds per decoding step, memory.

    python -m benchmarks.unrolled_or_scanned --layers 8 --experts 8

Both run the very modules of the model, at gpt-oss' width, one slot, on weights of zeros. The scan goes over pairs of
layers (one sliding, one full), whose weights and caches are stacked, as a scan needs them.
"""

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from benchmarks import true_width
from gptoss_jax.cli import command
from gptoss_jax.model import kv_cache, layers, rope, sharding
from gptoss_jax.model.attention import Positions
from gptoss_jax.model.config import ModelConfig, parse_config
from gptoss_jax.model.taps import Taps
from gptoss_jax.model.transformer import DTYPE_POLICIES, Layer
from gptoss_jax.runtime.program_memory import program_memory
from pallas_kernels.choice import Hardware

CONTEXT_TOKENS = 1024


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_string("config", str(true_width.CONFIG), "FILE: The config.json that is cut down.")
    flags.DEFINE_integer("layers", 8, "Layers, an even number.", lower_bound=2)
    flags.DEFINE_integer("experts", 8, "Experts of a layer (their number does not change a step's work).")
    flags.DEFINE_integer("steps", 5, "Steps timed, of which the median counts.")


def main(arguments: list[str]) -> None:
    """Prints a line for each form, then one JSON line."""
    del arguments
    options = flags.FLAGS
    results = {
        name: measure(build(options.layers, options.experts), options.steps)
        for name, build in (("unrolled", unrolled), ("scanned", scanned))
    }
    for name, result in results.items():
        print(
            f"{name:9s} compile {result['compile_seconds']:6.1f} s, step {result['step_seconds'] * 1e3:8.1f} ms, "
            f"temporaries {result['temporary_bytes'] / 2**20:8.1f} MiB"
        )
    machine = f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(json.dumps({"machine": machine, "layers": options.layers, "experts": options.experts, **results}))


def measure(case: tuple[Callable[..., Any], Any], steps: int) -> dict[str, float]:
    """Seconds to compile, the median step, and bytes that the step needs beside its arguments and results."""
    function, arguments = case
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - began
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - began)
    return {
        "compile_seconds": round(compile_seconds, 2),
        "step_seconds": round(statistics.median(seconds[1:]), 4),
        "temporary_bytes": program_memory(compiled).temporary_bytes,
    }


def _config(layers: int, experts: int) -> ModelConfig:
    raw = true_width.raw_config(layers, Path(flags.FLAGS.config))
    return parse_config(raw | {"num_local_experts": experts})


def _layers(config: ModelConfig, count: int) -> tuple[Any, Any]:
    """Graph and abstract weights of the first `count` layers."""
    kernels, _ = layers.choose_kernels("auto", Hardware.of(jax.devices()[0]))
    policy = DTYPE_POLICIES["bfloat16"]
    modules = nnx.List([Layer(config, i, sharding.make(), kernels, policy) for i in range(count)])
    graph, state = nnx.split(modules)
    return graph, nnx.to_pure_dict(state)


def _start(config: ModelConfig) -> tuple[jax.Array, Positions, kv_cache.KVCache]:
    """One token at the end of the context."""
    pages = kv_cache.num_pages(CONTEXT_TOKENS)
    make = functools.partial(
        kv_cache.empty, config, slots=1, pages=pages, max_context_tokens=CONTEXT_TOKENS, dtype=jnp.dtype(jnp.bfloat16)
    )
    of_tokens = jnp.array([[CONTEXT_TOKENS - 1]], jnp.int32)
    x = jnp.ones((1, 1, config.hidden_size), jnp.float32)
    return x, Positions(of_tokens, *rope.rotation(config, of_tokens)), make()


def unrolled(layers: int, experts: int) -> tuple[Callable[..., Any], Any]:
    """A step through all layers, one after the other, and its arguments."""
    config = _config(layers, experts)
    graph, abstract = _layers(config, layers)
    x, positions, cache = _start(config)

    def run(params, x, positions, cache):
        for layer in nnx.merge(graph, params):
            x, cache = layer(x, positions, cache, Taps((), config.num_layers).of_layer(0))
        return x, cache

    return run, (_zeros(abstract), x, positions, cache)


def scanned(layers: int, experts: int) -> tuple[Callable[..., Any], Any]:
    """The same as a scan over pairs of layers."""
    config = _config(layers, experts)
    graph, abstract = _layers(config, 2)
    pairs = layers // 2
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((pairs, *leaf.shape), leaf.dtype), abstract)
    x, positions, cache = _start(_config(2, experts))
    caches = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (pairs, *leaf.shape)), cache)

    def run(params, x, positions, caches):
        def pair(x, inputs):
            params, cache = inputs
            for layer in nnx.merge(graph, params):
                x, cache = layer(x, positions, cache, Taps((), config.num_layers).of_layer(0))
            return x, cache

        return jax.lax.scan(pair, x, (params, caches))

    return run, (_zeros(stacked), x, positions, caches)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


if __name__ == "__main__":
    define_flags()
    command.run(main, "unrolled_or_scanned")
