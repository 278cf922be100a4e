"""Times the CPU's products with dense weights and with experts at gpt-oss-20b's sizes, against the machine's limits.

python -m benchmarks.cpu_products --rows 1,16,512

Each op takes its turn over several copies of its weights, more than any cache holds, as a model's layers do. The floor
is the longer of its two: bytes of weights over reading, operations over the float32 peak.
"""

import functools
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import flags

import cpu_kernels
from benchmarks import cpu, true_width
from cpu_kernels.expert_mlp import expert_mlp
from cpu_kernels.linear import linear
from gptoss_jax.checkpoints import host_memory
from gptoss_jax.cli import command
from gptoss_jax.model.config import read_config
from pallas_kernels.expert_mlp import ExpertWeights

MODEL = read_config(true_width.CONFIG)
BYTES_OF_COPIES = 1 << 28
DENSE = {  # outputs, inputs
    "query": (MODEL.num_heads * MODEL.head_dim, MODEL.hidden_size),
    "key": (MODEL.num_kv_heads * MODEL.head_dim, MODEL.hidden_size),
    "output": (MODEL.hidden_size, MODEL.num_heads * MODEL.head_dim),
    "unembedding": (MODEL.vocab_size, MODEL.hidden_size),
}


class Product(NamedTuple):
    """One call, the bytes of weights that it has to read, and its multiplications and additions."""

    name: str
    rows: int
    run: Callable[[], float]  # seconds of the next call
    num_bytes: int
    operations: int


def dense(name: str, rows: int, dtype: np.dtype) -> Product:
    """`linear` with bfloat16 or int8 weights."""
    shape = DENSE[name]
    num_bytes = shape[0] * shape[1] * np.dtype(dtype).itemsize
    weights = [_weights(shape, dtype) for _ in range(max(1, BYTES_OF_COPIES // num_bytes))]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, shape[1])), jnp.bfloat16)
    run = _in_turn(jax.jit(linear), [(x, w) for w in weights])
    return Product(f"{name}, {np.dtype(dtype).name}", rows, run, num_bytes, 2 * rows * shape[0] * shape[1])


def experts(rows: int) -> Product:
    """`expert_mlp` of one layer, each row choosing evenly among the experts."""
    e, d, f = MODEL.num_experts, MODEL.hidden_size, MODEL.intermediate_size
    shapes = [(e, 2 * f, d // 32, 16), (e, 2 * f, d // 32), (e, 2 * f), (e, d, f // 32, 16), (e, d, f // 32), (e, d)]
    dtypes = 2 * [np.uint8, np.uint8, ml_dtypes.bfloat16]
    arrays: Any = [_weights(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    weights = ExpertWeights(*arrays)
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, d)), jnp.bfloat16)
    shares = jnp.full((rows, MODEL.experts_per_token), 0.25, jnp.float32)
    calls, hit = [], []
    for _ in range(8):
        ids = np.stack([rng.permutation(e)[: MODEL.experts_per_token] for _ in range(rows)]).astype(np.int32)
        calls.append((x, jnp.asarray(ids), shares, weights))
        hit.append(len(np.unique(ids)))
    one_expert = sum(w.nbytes for w in jax.tree.leaves(weights)) // e
    run = _in_turn(jax.jit(lambda *call: expert_mlp(*call, limit=MODEL.swiglu_limit)), calls)
    operations = 2 * rows * MODEL.experts_per_token * 3 * d * f
    return Product("experts, MXFP4", rows, run, round(statistics.mean(hit) * one_expert), operations)


def _weights(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Small numbers of either format, in huge pages: time depends on no value."""
    content = host_memory.empty(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    content[:] = np.resize(np.random.default_rng(0).integers(1, 60, 4099, dtype=np.uint8), content.shape)
    return jax.device_put(content.view(dtype).reshape(shape))


def _in_turn(compiled: Callable[..., jax.Array], calls: list[tuple]) -> Callable[[], float]:
    jax.block_until_ready([compiled(*call) for call in calls])
    upcoming = itertools.cycle(calls)

    def run() -> float:
        call = next(upcoming)
        began = time.perf_counter()
        compiled(*call).block_until_ready()
        return time.perf_counter() - began

    return run


def products(all_rows: list[int]) -> Iterator[Product]:
    """Every product, one after the other: together they would not fit."""
    for rows in all_rows:
        for name in DENSE:
            if name != "unembedding" or rows <= 16:  # of a prompt, one row has logits
                yield dense(name, rows, ml_dtypes.bfloat16)
                yield dense(name, rows, np.int8)
        yield experts(rows)


def _median_of_five(run: Callable[[], float]) -> float:
    return statistics.median(run() for _ in range(5))


def define_flags() -> None:
    """Defines this command's flags."""
    flags.DEFINE_list("rows", ["1", "16", "512"], "N,N,...: Rows of activations.")
    flags.DEFINE_integer("rounds", 15, "Rounds of five calls and the limits.", lower_bound=1)


def main(arguments: list[str]) -> None:
    """Prints a line for each product, then one JSON line."""
    del arguments
    options = flags.FLAGS
    limits = {"read": cpu.reading("huge"), "multiply": cpu.multiplying()}
    results = []
    for product in products([int(rows) for rows in options.rows]):
        figures = cpu.in_turns({"ours": functools.partial(_median_of_five, product.run), **limits}, options.rounds)
        floors = [
            max(product.num_bytes / read, product.operations / peak)
            for read, peak in zip(figures["read"], figures["multiply"], strict=True)
        ]
        seconds = statistics.median(figures["ours"])
        share = statistics.median(floor / mine for floor, mine in zip(floors, figures["ours"], strict=True))
        result = {
            **{"name": product.name, "rows": product.rows, "milliseconds": 1e3 * seconds},
            **{"bytes_per_second": product.num_bytes / seconds, "operations_per_second": product.operations / seconds},
            "share_of_floor": share,
        }
        results.append(result)
        rates = product.num_bytes / seconds / 1e9, product.operations / seconds / 1e9
        print(
            f"{product.rows:4} x {product.name:22} {1e3 * seconds:8.3f} ms "
            f"{rates[0]:6.1f} GB/s {rates[1]:6.1f} GFLOP/s {100 * share:4.0f} % of the floor",
            flush=True,
        )
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, {cpu_kernels.instruction_sets()[0]}"
    )
    medians = {name: statistics.median(figures[name]) for name in limits}
    print(json.dumps({"machine": machine, **medians, "results": results}))


def cli() -> None:
    """The command."""
    define_flags()
    command.run(main, "cpu_products")


if __name__ == "__main__":
    cli()
