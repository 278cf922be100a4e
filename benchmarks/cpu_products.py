"""Times the CPU's products with dense weights and with experts at gpt-oss-20b's sizes, against the machine's limits.

python -m benchmarks.cpu_products --rows 1,16,512

Each op goes over several copies of its weights in turn, more than any cache holds, as a model's layers do. The share is
of the longer of two times: bytes of weights over reading, operations over the float32 peak.
"""

import functools
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import flags
from numpy.typing import DTypeLike

import cpu_kernels
from benchmarks import cpu, true_width
from cpu_kernels.expert_mlp import expert_mlp
from cpu_kernels.linear import linear
from gptoss_jax.checkpoints import host_memory
from gptoss_jax.cli import command
from gptoss_jax.model.config import ModelConfig, read_config
from pallas_kernels.expert_mlp import ExpertWeights

MIB = 1 << 20


class Product(NamedTuple):
    """One call, the bytes of weights that it has to read, and its multiplications and additions."""

    name: str
    tokens: int
    run: Callable[[], float]  # seconds of the next call
    num_bytes: int
    operations: int


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each product with dense weights."""
    heads, kv_heads = (count * config.head_dim for count in (config.num_heads, config.num_kv_heads))
    return {
        "query": (heads, config.hidden_size),
        "key": (kv_heads, config.hidden_size),
        "output": (config.hidden_size, heads),
        "unembedding": (config.vocab_size, config.hidden_size),
    }


def dense(name: str, shape: tuple[int, int], tokens: int, dtype: DTypeLike) -> Product:
    """`linear` with bfloat16 or int8 weights of `shape`."""
    num_bytes = shape[0] * shape[1] * np.dtype(dtype).itemsize
    copies = max(1, flags.FLAGS.copies_mib * MIB // num_bytes)
    weights = [_weights(shape, dtype) for _ in range(copies)]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, shape[1])), jnp.bfloat16)
    run = _in_turn(jax.jit(linear), [(x, w) for w in weights])
    return Product(f"{name}, {np.dtype(dtype).name}", tokens, run, num_bytes, 2 * tokens * shape[0] * shape[1])


def experts(config: ModelConfig, tokens: int) -> Product:
    """`expert_mlp` of one layer; each token's experts are drawn evenly from all."""
    e, d, f, per_token = config.num_experts, config.hidden_size, config.intermediate_size, config.experts_per_token
    shapes = [(e, 2 * f, d // 32, 16), (e, 2 * f, d // 32), (e, 2 * f), (e, d, f // 32, 16), (e, d, f // 32), (e, d)]
    dtypes = 2 * [np.uint8, np.uint8, ml_dtypes.bfloat16]
    arrays: list[Any] = [_weights(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    weights = ExpertWeights(*arrays)
    rng = np.random.default_rng(tokens)
    x = jnp.asarray(rng.standard_normal((tokens, d)), jnp.bfloat16)
    shares = jnp.full((tokens, per_token), 1 / per_token, jnp.float32)
    calls, hit = [], []
    for _ in range(8):
        ids = np.stack([rng.permutation(e)[:per_token] for _ in range(tokens)]).astype(np.int32)
        calls.append((x, jnp.asarray(ids), shares, weights))
        hit.append(len(np.unique(ids)))
    one_expert = sum(w.nbytes for w in jax.tree.leaves(weights)) // e
    run = _in_turn(jax.jit(lambda *call: expert_mlp(*call, limit=config.swiglu_limit)), calls)
    operations = 2 * tokens * per_token * 3 * d * f
    return Product("experts, MXFP4", tokens, run, round(statistics.mean(hit) * one_expert), operations)


def _weights(shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Small normal numbers of any format, in huge pages: with subnormal ones the experts took twice their time."""
    content = host_memory.empty(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    content[:] = np.resize(np.random.default_rng(0).integers(57, 62, 4099, dtype=np.uint8), content.shape)
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


def products(config: ModelConfig, batches: list[int]) -> Iterator[Product]:
    """Every product, one after the other: together they would not fit."""
    for tokens in batches:
        for name, shape in dense_shapes(config).items():
            if name != "unembedding" or tokens <= 16:  # of a prompt, one token has logits
                yield dense(name, shape, tokens, ml_dtypes.bfloat16)
                yield dense(name, shape, tokens, np.int8)
        yield experts(config, tokens)


def _median_of_five(run: Callable[[], float]) -> float:
    return statistics.median(run() for _ in range(5))


def define_flags() -> None:
    """Defines this command's flags."""
    flags.DEFINE_string("config", str(true_width.CONFIG), "FILE: The config.json whose sizes are taken.")
    flags.DEFINE_list("rows", ["1", "16", "512"], "N,N,...: Tokens, a row of activations each.")
    flags.DEFINE_integer("copies_mib", 256, "MiB of copies of a product's dense weights, at least one.", lower_bound=1)
    flags.DEFINE_integer("rounds", 15, "Rounds of five calls and the limits.", lower_bound=1)


def main(arguments: list[str]) -> None:
    """Prints a line for each product, then one JSON line."""
    del arguments
    options = flags.FLAGS
    limits = {"read": cpu.reading("huge"), "multiply": cpu.multiplying()}
    results, figures = [], {}
    for product in products(read_config(Path(options.config)), [int(tokens) for tokens in options.rows]):
        figures = cpu.in_turns({"ours": functools.partial(_median_of_five, product.run), **limits}, options.rounds)
        rooflines = [
            max(product.num_bytes / read, product.operations / peak)
            for read, peak in zip(figures["read"], figures["multiply"], strict=True)
        ]
        seconds = statistics.median(figures["ours"])
        share = statistics.median(least / mine for least, mine in zip(rooflines, figures["ours"], strict=True))
        result = {
            "name": product.name,
            "tokens": product.tokens,
            "milliseconds": 1e3 * seconds,
            "bytes_per_second": product.num_bytes / seconds,
            "operations_per_second": product.operations / seconds,
            "share_of_roofline": share,
        }
        results.append(result)
        rates = product.num_bytes / seconds / 1e9, product.operations / seconds / 1e9
        print(
            f"{product.tokens:4} x {product.name:22} {1e3 * seconds:8.3f} ms "
            f"{rates[0]:6.1f} GB/s {rates[1]:6.1f} GFLOP/s {100 * share:4.0f} % of the roofline",
            flush=True,
        )
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, {cpu_kernels.instruction_sets()[0]}"
    )
    medians = {name: statistics.median(figures[name]) for name in limits}
    print(json.dumps({"machine": machine, **medians, "results": results}))


if __name__ == "__main__":
    define_flags()
    command.run(main, "cpu_products")
