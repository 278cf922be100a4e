"""Measures what deterministic engines pay: a decoding step row by row against all rows in a batch, time and memory.

    python -m benchmarks.row_by_row --layers 2

At the 20b's width, on random routers and embeddings (each row chooses experts of its own) and other weights of zero.
"""

import functools
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

from gptoss_jax.cli import command
from gptoss_jax.engine import sampling
from gptoss_jax.engine.programs import Programs, RowState
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model import kv_cache, layers, sharding
from gptoss_jax.model.config import ModelConfig, parse_config
from gptoss_jax.model.kv_cache import KVCache
from gptoss_jax.model.transformer import DTYPE_POLICIES, Params, declare, nest
from pallas_kernels.choice import Hardware

CONFIG = Path(__file__).parents[1] / "configs" / "gpt-oss-20b.json"
CONTEXT_TOKENS = 4096


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_integer("layers", 2, "Layers, an even number.", lower_bound=2)
    flags.DEFINE_list("rows", ["1", "4", "8"], "N,N,...: Batches.")
    flags.DEFINE_integer("steps", 3, "Steps timed, of which the median counts.", lower_bound=1)


def main(arguments: list[str]) -> None:
    """Prints a line for each batch, then one JSON line."""
    del arguments
    options = flags.FLAGS
    raw = json.loads(CONFIG.read_text())
    types = (raw["layer_types"][:2] * options.layers)[: options.layers]
    config = parse_config(raw | {"num_hidden_layers": options.layers, "layer_types": types})
    kernels, _ = layers.choose_kernels("auto", Hardware.of(jax.devices()[0]))
    model = declare(config, sharding.make(), kernels)
    params = _params({path: (leaf.shape, leaf.dtype) for path, leaf in model.leaves.items()})
    results: dict[str, Any] = {}
    for rows in map(int, options.rows):
        for name, one_by_one in (("row by row", True), ("batched", False)):
            programs = Programs(model, config, sharding.make(), one_by_one, one_by_one)
            result = measure(programs, params, rows, options.steps)
            results[f"{rows} rows, {name}"] = result
            milliseconds, mebibytes = 1e3 * result["step_seconds"], result["temporary_bytes"] / 2**20
            print(
                f"{rows:3d} rows, {name:10s} step {milliseconds:9.1f} ms, temporaries {mebibytes:7.1f} MiB", flush=True
            )
    machine = f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(json.dumps({"machine": machine, "layers": options.layers, **results}))


def measure(programs: Programs, params: Params, rows: int, steps: int) -> dict[str, float]:
    """Seconds of the median step, and bytes that it needs beside its arguments."""
    cache, state = _start(programs.config, rows)
    decode = jax.jit(programs.decode, donate_argnums=(1, 2))
    compiled = decode.lower(params, cache, state, np.int32(1)).compile()
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        draws, cache, state = jax.block_until_ready(compiled(params, cache, state, np.int32(1)))
        seconds.append(time.perf_counter() - began)
    assert (np.asarray(draws.token)[:, 0] >= 0).all()
    return {
        "step_seconds": round(statistics.median(seconds[1:]), 4),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def _params(leaves: dict[str, tuple[tuple[int, ...], jnp.dtype]]) -> Params:
    def make(path: str, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        if "router/weight" in path or path == "embedding":
            return jax.random.normal(jax.random.key(len(path)), shape, dtype)
        return jnp.full(shape, "norm" in path, dtype)

    return nest({path: make(path, shape, dtype) for path, (shape, dtype) in leaves.items()})


def _start(config: ModelConfig, rows: int) -> tuple[KVCache, RowState]:
    """Rows that draw tokens of their own, each with pages of its own."""
    pages = kv_cache.num_pages(CONTEXT_TOKENS)
    shape = {"rows": rows, "pages": rows * pages, "max_context_tokens": CONTEXT_TOKENS}
    cache = jax.jit(functools.partial(kv_cache.empty, config, **shape, dtype=DTYPE_POLICIES["bfloat16"].cache))()
    table = jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
    params = [SamplingParams(seed=seed) for seed in range(rows)]
    drawn = [sampling.row(p, (), config.vocab_size, config.num_token_ids) for p in params]
    one = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *drawn)
    token = jnp.arange(rows, dtype=jnp.int32) * 1000
    remaining, stop_ids = jnp.full(rows, 1000, jnp.int32), jnp.full((rows, 8), -2, jnp.int32)
    return cache._replace(page_table=table), RowState(token, remaining, stop_ids, one)


if __name__ == "__main__":
    define_flags()
    command.run(main, "row_by_row")
