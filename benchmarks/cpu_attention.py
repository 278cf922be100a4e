"""Times the CPU's attention beside the reference's, over pages at gpt-oss-20b's heads, against the machine's limits.

python -m benchmarks.cpu_attention --contexts 1024,16384 --chunk 128
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import cpu_kernels
from benchmarks import cpu, true_width
from gptoss_jax.cli import command
from gptoss_jax.model.config import read_config
from gptoss_jax.model.kv_cache import PAGE_TOKENS
from pallas_kernels.attention import IMPLEMENTATIONS, PagedKV

MODEL = read_config(true_width.CONFIG)


def attending(name: str, context_tokens: int, tokens: int) -> Callable[[], float]:
    """Attends with the last `tokens` of a bfloat16 context, on shuffled pages, by one implementation: seconds."""
    pages = -(-context_tokens // PAGE_TOKENS)
    keys = jax.random.split(jax.random.key(0), 3)
    stored = (pages, PAGE_TOKENS, MODEL.num_kv_heads, MODEL.head_dim)
    k, v = (jax.random.normal(key, stored, jnp.bfloat16) for key in keys[:2])
    q = jax.random.normal(keys[2], (1, tokens, MODEL.num_heads, MODEL.head_dim), jnp.bfloat16)
    table = jnp.asarray(np.random.default_rng(0).permutation(pages)[None], jnp.int32)
    positions = jnp.arange(context_tokens - tokens, context_tokens, dtype=jnp.int32)[None]
    arguments = (q, PagedKV(k, v, table), positions, jnp.zeros(MODEL.num_heads, jnp.bfloat16))
    compiled = jax.jit(IMPLEMENTATIONS[name]).lower(*arguments).compile()

    def attend() -> float:
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        return time.perf_counter() - began

    attend()
    return attend


def bytes_read(context_tokens: int) -> int:
    """Keys and values of a context, once."""
    return 2 * context_tokens * MODEL.num_kv_heads * MODEL.head_dim * 2


def operations(context_tokens: int, tokens: int) -> int:
    """Multiplications and additions of the last `tokens` with the keys that they see, and with those keys' values."""
    seen = sum(range(context_tokens - tokens + 1, context_tokens + 1))
    return 4 * seen * MODEL.num_heads * MODEL.head_dim


def measure(context_tokens: int, tokens: int, options: flags.FlagValues) -> dict[str, float]:
    """Medians over rounds in which ours, the reference and the limit take turns; the share is of a round's own limit.

    Rates and limits are in bytes per second for one token (decode), in operations per second for a chunk.
    """
    decode = tokens == 1
    limit = cpu.reading(options.pages) if decode else cpu.multiplying()
    names = {name: attending(name, context_tokens, tokens) for name in ("cpu", "reference")}
    figures = cpu.in_turns({**names, "limit": limit}, options.rounds)
    work = bytes_read(context_tokens) if decode else operations(context_tokens, tokens)
    rates = [work / seconds for seconds in figures["cpu"]]
    shares = [rate / most for rate, most in zip(rates, figures["limit"], strict=True)]
    return {
        "context": context_tokens,
        "tokens": tokens,
        "milliseconds": 1e3 * statistics.median(figures["cpu"]),
        "rate": statistics.median(rates),
        "best": max(rates),
        "limit": statistics.median(figures["limit"]),
        "share": statistics.median(shares),
        "times_reference": statistics.median(figures["reference"]) / statistics.median(figures["cpu"]),
    }


def define_flags() -> None:
    """Defines this command's flags."""
    flags.DEFINE_list("contexts", ["1024", "16384"], "TOKENS,...: contexts to measure.")
    flags.DEFINE_integer("chunk", 128, "Tokens of a prefill chunk at the end of each context.")
    flags.DEFINE_integer("rounds", 9, "Rounds in which everything takes its turn.")
    flags.DEFINE_enum("pages", "small", ["small", "huge"], "Memory pages of what decoding is compared with reading.")


def main(arguments: list[str]) -> None:
    """Prints a line for each context and kind, then one JSON line."""
    del arguments
    options = flags.FLAGS
    results = []
    for context in map(int, options.contexts):
        for tokens in (1, options.chunk):
            result = measure(context, tokens, options)
            results.append(result)
            unit, rate = "GB/s" if tokens == 1 else "GFLOP/s", result["rate"] / 1e9
            print(
                f"{tokens:5} of {context:7} tokens: {result['milliseconds']:9.3f} ms, {rate:6.1f} {unit}"
                f" (best {result['best'] / 1e9:.1f}), {result['share']:.2f} of {result['limit'] / 1e9:.1f},"
                f" {result['times_reference']:.1f} times the reference",
                flush=True,
            )
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {cpu_kernels.instruction_sets()[0]}, jax {jax.__version__}"
    )
    print(json.dumps({"machine": machine, "results": results}))


if __name__ == "__main__":
    define_flags()
    command.run(main, "cpu_attention")
