"""Times the CPU's attention beside the reference's, over pages at gpt-oss-20b's heads, against the machine's limits.

    python -m benchmarks.cpu_attention --contexts 1024,16384 --chunk 128
    python -m benchmarks.cpu_attention --contexts 16384,131072 --chunk 0 --instruction-sets avx512,avx2 --pages huge

Keys and values lie in a pool as large as what the limit reads, of which each call attends to another part, so that no
cache holds them from call to call.
"""

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import cpu_kernels
from benchmarks import cpu, true_width
from gptoss_jax.checkpoints import host_memory
from gptoss_jax.cli import command
from gptoss_jax.model.config import read_config
from gptoss_jax.model.kv_cache import PAGE_TOKENS
from pallas_kernels.attention import IMPLEMENTATIONS, PagedKV

MODEL = read_config(true_width.CONFIG)


def pool(pages: int, memory_pages: str, seed: int) -> jax.Array:
    """bfloat16 [P, S, K, H], one page of random numbers again and again, in memory pages "huge" or "small"."""
    shape = (pages, PAGE_TOKENS, MODEL.num_kv_heads, MODEL.head_dim)
    page = np.random.default_rng(seed).standard_normal(shape[1:]).astype(jnp.bfloat16)
    num_bytes = pages * page.nbytes
    memory = host_memory.empty(num_bytes) if memory_pages == "huge" else cpu.small_pages(num_bytes)
    filled = memory.view(jnp.bfloat16).reshape(shape)
    filled[:] = page
    return jax.device_put(filled)


def calls(context_tokens: int, tokens: int, memory_pages: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of attention with the last `tokens` of a context on shuffled pages, each time on other ones."""
    pages = -(-context_tokens // PAGE_TOKENS)
    parts = -(-cpu.READ_BYTES // bytes_read(context_tokens))
    k, v = (pool(parts * pages, memory_pages, seed) for seed in (0, 1))
    q = jax.random.normal(jax.random.key(0), (1, tokens, MODEL.num_heads, MODEL.head_dim), jnp.bfloat16)
    shuffled = np.random.default_rng(0).permutation(parts * pages).astype(np.int32)
    positions = jnp.arange(context_tokens - tokens, context_tokens, dtype=jnp.int32)[None]
    sinks = jnp.zeros(MODEL.num_heads, jnp.bfloat16)
    tables = [jnp.asarray(table[None]) for table in np.split(shuffled, parts)]
    return itertools.cycle([(q, PagedKV(k, v, table), positions, sinks) for table in tables])


def attending(name: str, each: Iterator[tuple[Any, ...]]) -> Callable[[], float]:
    """Attends by one implementation: seconds, of the best of as many calls as the limit takes the best of."""
    compiled = jax.jit(IMPLEMENTATIONS[name]).lower(*next(each)).compile()

    def attend_once() -> float:
        arguments = next(each)
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        return time.perf_counter() - began

    attend_once()
    return lambda: min(attend_once() for _ in range(cpu.LIMIT_TRIES))


def on(instruction_set: str, attend: Callable[[], float]) -> Callable[[], float]:
    """The same by one instruction set of the C++ kernels."""

    def attend_so() -> float:
        with cpu_kernels.instruction_set(instruction_set):
            return attend()

    return attend_so


def bytes_read(context_tokens: int) -> int:
    """Keys and values of a context, once."""
    return 2 * context_tokens * MODEL.num_kv_heads * MODEL.head_dim * 2


def operations(context_tokens: int, tokens: int) -> int:
    """Multiplications and additions of the last `tokens` with the keys that they see, and with those keys' values."""
    seen = sum(range(context_tokens - tokens + 1, context_tokens + 1))
    return 4 * seen * MODEL.num_heads * MODEL.head_dim


def measure(context_tokens: int, tokens: int, options: flags.FlagValues) -> list[dict[str, Any]]:
    """Medians over rounds in which ours, the reference and the limit take turns; the share is of a round's own limit.

    Rates and limits are in bytes per second for one token (decode), in operations per second for a chunk.
    """
    decode = tokens == 1
    each = calls(context_tokens, tokens, options.pages)
    ours, reference = attending("cpu", each), attending("reference", each)
    runners = {name: on(name, ours) for name in sets(options)}
    limit = cpu.reading(options.pages) if decode else cpu.multiplying()
    figures = cpu.in_turns({**runners, "reference": reference, "limit": limit}, options.rounds)
    work = bytes_read(context_tokens) if decode else operations(context_tokens, tokens)
    return [
        {"context": context_tokens, "tokens": tokens, "instruction_set": name, **_medians(work, figures, name)}
        for name in runners
    ]


def _medians(work: int, figures: dict[str, list[float]], name: str) -> dict[str, float]:
    rates = [work / seconds for seconds in figures[name]]
    shares = [rate / most for rate, most in zip(rates, figures["limit"], strict=True)]
    return {
        "milliseconds": 1e3 * statistics.median(figures[name]),
        "rate": statistics.median(rates),
        "best": max(rates),
        "limit": statistics.median(figures["limit"]),
        "share": statistics.median(shares),
        "times_reference": statistics.median(figures["reference"]) / statistics.median(figures[name]),
    }


def sets(options: flags.FlagValues) -> list[str]:
    """The instruction sets to measure.

    Raises:
        GptossError: this machine does not have one.
    """
    cpu.check_instruction_sets("--instruction-sets", options.instruction_sets)
    return options.instruction_sets or [cpu_kernels.instruction_sets()[0]]


def define_flags() -> None:
    """Defines this command's flags."""
    flags.DEFINE_list("contexts", ["1024", "16384"], "TOKENS,...: contexts to measure.")
    flags.DEFINE_integer("chunk", 128, "Tokens of a prefill chunk at the end of each context; 0: decoding alone.")
    flags.DEFINE_integer("rounds", 9, "Rounds in which everything takes its turn.")
    flags.DEFINE_list("instruction_sets", [], "NAME,...: Instruction sets to measure; the best one if not given.")
    flags.DEFINE_enum("pages", "small", ["small", "huge"], "Memory pages of the keys, and of what is read.")


def main(arguments: list[str]) -> None:
    """Prints a line for each context and kind, then one JSON line."""
    del arguments
    options = flags.FLAGS
    results = []
    for context in map(int, options.contexts):
        for tokens in filter(None, (1, options.chunk)):
            measured = measure(context, tokens, options)
            results += measured
            for result in measured:
                _show(result)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    print(json.dumps({"machine": machine, "results": results}))


def _show(result: dict[str, Any]) -> None:
    unit = "GB/s" if result["tokens"] == 1 else "GFLOP/s"
    print(
        f"{result['tokens']:5} of {result['context']:7} tokens, {result['instruction_set']:10}:"
        f" {result['milliseconds']:9.3f} ms, {result['rate'] / 1e9:6.1f} {unit} (best {result['best'] / 1e9:.1f}),"
        f" {result['share']:.2f} of {result['limit'] / 1e9:.1f}, {result['times_reference']:.1f} times the reference",
        flush=True,
    )


if __name__ == "__main__":
    define_flags()
    command.run(main, "cpu_attention")
