"""Measures the kernels and whole models on one GPU against what its memory and its tensor cores allow.

    python -m benchmarks.gpu --out results.json

Needs jax with CUDA, flax, jaxtyping, absl and this repository, and no files: random weights of the true shapes are made
on the device. First each kernel is held against float32 arithmetic on random data; then each op is timed against its
roofline (bytes / copying or operations / multiplying, whichever is longer; both limits are measured in the same run),
repeated within one program so that launching from Python does not count; then whole models decode and prefill. What the
time (--minutes) or the memory (--memory-gib) does not allow is left out, and named. Transformers is timed beside where
torch sees the GPU. A table, then one JSON line.
"""

import concurrent.futures
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from benchmarks import under_load
from benchmarks.peers import Transformers
from benchmarks.under_load import Load
from gptoss_jax import whole_files
from gptoss_jax.cli import command
from gptoss_jax.engine.programs import MAX_STEPS_PER_DISPATCH, Chunks, Forms, ModelStep
from gptoss_jax.errors import GptossError
from gptoss_jax.model import kv_cache, layers, sharding
from gptoss_jax.model.config import ModelConfig, read_config
from gptoss_jax.model.kv_cache import PAGE_TOKENS
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.transformer import Leaf, Model, declare, nest
from pallas_kernels import attention as attention_op
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels.choice import Hardware

CONFIGS = Path(__file__).parents[1] / "configs"
LIMIT = 7.0  # of the SwiGLU
BF16_ERROR = 2e-2  # ||out - expected|| / ||expected|| of bfloat16 operands; a wrong kernel is off by far more
GIB = 1 << 30
RESERVE_GIB = 6  # of the device's memory, for temporaries and what XLA keeps


class Limits(NamedTuple):
    """What the device can do, measured."""

    copied_bytes_per_second: float  # read and written
    bfloat16_operations_per_second: float


class Timing(NamedTuple):
    """One op's time, and the work that its roofline follows from."""

    op: str
    seconds: float
    bytes: int
    operations: int

    def report(self, limits: Limits) -> dict[str, Any]:
        """With the times that bytes and operations take at the limits, and the longer one's share of the time."""
        moving = self.bytes / limits.copied_bytes_per_second
        computing = self.operations / limits.bfloat16_operations_per_second
        return {
            **self._asdict(),
            "seconds_of_bytes": moving,
            "seconds_of_operations": computing,
            "share_of_roofline": max(moving, computing) / self.seconds,
        }


# ---- time ----


def per_call(step: Callable[..., Any], carry: Any, others: Any, calls: int) -> float:
    """Seconds of one `step(i, carry, others) -> carry`, repeated on the device: a slope over the number of calls."""

    @jax.jit
    def repeat(count, carry, others):
        return lax.fori_loop(0, count, lambda i, c: step(i, c, others), carry)

    def seconds(count: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(repeat(count, carry, others))
        return time.perf_counter() - began

    seconds(1)  # compiles
    slopes = [(seconds(3 * calls) - seconds(calls)) / (2 * calls) for _ in range(3)]
    return statistics.median(slopes)


def measure_limits(elements: int, side: int, calls: int) -> Limits:
    """Copies a large array, and multiplies random bfloat16 matrices."""
    x = jax.random.normal(jax.random.key(0), (elements,), jnp.bfloat16)
    copying = per_call(lambda i, x, _: -x, x, (), calls)
    a, b = (jax.random.normal(jax.random.key(k), (side, side), jnp.bfloat16) for k in (1, 2))

    def multiply(i, a, b):
        return jnp.dot(a, b, preferred_element_type=jnp.float32).astype(jnp.bfloat16) * jnp.bfloat16(side**-0.5)

    return Limits(2 * x.nbytes / copying, 2 * side**3 / per_call(multiply, a, b, calls))


# ---- random weights, made on the device ----


def random_params(config: ModelConfig, declared: Model, laid_out: Sharding, layout: expert_op.WeightLayout) -> Any:
    """Weights of the declared shapes in `layout`: codes uniform, scales near 2^-6, dense weights normal / 50."""
    ways = declared.rearrangements(layout)

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))  # one program for all layers
    def make(name: str, leaf: Leaf, way: expert_op.Rearrangement, seed: jax.Array) -> jax.Array:
        key = jax.random.key(seed)
        if name == "scales":
            return way.pack(jax.random.randint(key, leaf.shape, 119, 123, jnp.int32).astype(jnp.uint8))
        if leaf.dtype == jnp.uint8:
            return way.pack(jax.random.bits(key, leaf.shape, jnp.uint8))
        if name == "norm":
            return jnp.ones(leaf.shape, leaf.dtype)
        return way.pack(jax.random.normal(key, leaf.shape, leaf.dtype) * leaf.dtype.type(0.02))

    return nest(
        {
            path: make(path.rpartition("/")[2], leaf, ways[path], jnp.uint32(seed))
            for seed, (path, leaf) in enumerate(declared.leaves.items())
        }
    )


# ---- ops ----


class Experts(NamedTuple):
    """One layer's expert op, and weights for it."""

    implementation: expert_op.ExpertMlp
    weights: expert_op.ExpertWeights  # in the implementation's weight layout
    config: ModelConfig

    def arguments(self, tokens: int, seed: int, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x, expert ids, routing weights: each token's experts are drawn evenly."""
        config, keys = self.config, jax.random.split(jax.random.key(seed), 3)
        x = jax.random.normal(keys[0], (tokens, config.hidden_size), jnp.float32).astype(dtype)
        scores = jax.random.uniform(keys[1], (tokens, config.num_experts))
        ids = lax.top_k(scores, config.experts_per_token)[1].astype(jnp.int32)
        return x, ids, jax.nn.softmax(jax.random.normal(keys[2], ids.shape, jnp.float32))

    def error(self, tokens: int) -> float:
        """Relative error against the reference in float32, on fresh data."""
        x, ids, shares = self.arguments(tokens, seed=time.time_ns() % 2**31)
        found = jax.jit(functools.partial(self.implementation.run, limit=LIMIT))(x, ids, shares, self.weights)
        published = jax.jit(functools.partial(expert_op.published, self.implementation.layout))(self.weights)
        run = jax.jit(functools.partial(expert_op.IMPLEMENTATIONS["reference"].run, limit=LIMIT))
        return relative_error(found, run(x.astype(jnp.float32), ids, shares, published))

    def time(self, tokens: int, calls: int) -> Timing:
        """Other experts in each call, so that no cache holds them."""
        x, ids, shares = self.arguments(tokens, seed=tokens)
        experts, top_k = self.config.num_experts, self.config.experts_per_token

        def step(i, x, others):
            shares, weights = others
            y = self.implementation.run(x, (ids + top_k * i) % experts, shares, weights, limit=LIMIT)
            return (x + (y * 1e-6).astype(x.dtype)) * x.dtype.type(0.999)

        seconds = per_call(step, x, (shares, self.weights), calls)
        touched = len(np.unique(np.asarray(ids)))
        expert = 3 * self.config.hidden_size * self.config.intermediate_size
        num_bytes = touched * self.config.expert_bytes + 6 * x.size
        return Timing(f"expert_mlp, {tokens} tokens", seconds, num_bytes, 2 * ids.size * expert)


def attention_error(attend: attention_op.Attend, config: ModelConfig, sequences: int, tokens: int) -> float:
    """Relative error of both forms against the reference in float32, the larger one."""
    q, paged, ring, positions, sinks = _attention_arguments(
        config, sequences, tokens, context_tokens=3 * config.sliding_window + 5
    )
    run, judge = (jax.jit(_of_stored(op)) for op in (attend, attention_op.IMPLEMENTATIONS["reference"]))
    errors = []
    for kv in (paged, ring):
        exact_q, exact_kv = jax.tree.map(_in_float32, (q, kv))
        expected = judge(exact_q, exact_kv, positions, sinks)
        errors += map(relative_error, run(q, kv, positions, sinks), expected)
    return max(errors)


def _of_stored(attend: attention_op.Attend) -> attention_op.Attend:
    """`attend` of keys and values as the cache stores them: [., ., K H]."""

    def run(q: Any, kv: Any, positions: Any, sinks: Any) -> attention_op.Attended:
        by_heads = (kv_cache.by_heads(stored, stored.shape[2] // q.shape[3]) for stored in kv[:2])
        return attend(q, type(kv)(*by_heads, *kv[2:]), positions, sinks)

    return run


def _in_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _attention_arguments(config: ModelConfig, sequences: int, tokens: int, context_tokens: int) -> tuple[Any, ...]:
    """q, pages and a ring of random numbers as they are stored, positions, sinks."""
    capacity, seed = context_tokens + tokens, time.time_ns() % 2**31
    pages, heads = sequences * kv_cache.num_pages(capacity), (config.num_kv_heads, config.head_dim)
    width = heads[0] * heads[1]

    def draw(key: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)

    q = draw(seed, sequences, tokens, config.num_heads, config.head_dim)
    table = jax.random.permutation(jax.random.key(0), pages).astype(jnp.int32).reshape(sequences, -1)
    paged = attention_op.PagedKV(draw(1, pages, PAGE_TOKENS, width), draw(2, pages, PAGE_TOKENS, width), table)
    k, v = (draw(key, sequences, config.sliding_window, width) for key in (3, 4))
    k_new, v_new = (draw(key, sequences, tokens, *heads) for key in (5, 6))
    ring = attention_op.RingKV(k, v, k_new, v_new, jnp.full(sequences, context_tokens, jnp.int32))
    positions = jnp.broadcast_to(context_tokens + jnp.arange(tokens, dtype=jnp.int32), (sequences, tokens))
    return q, paged, ring, positions, draw(9, config.num_heads)


def time_paged(
    attend: attention_op.Attend, config: ModelConfig, sequences: int, tokens: int, context_tokens: int, calls: int
) -> Timing:
    """Attention over pages: `tokens` queries of each sequence after `context_tokens` others."""
    q, kv, _, positions, sinks = _attention_arguments(config, sequences, tokens, context_tokens)
    run = _of_stored(attend)

    def step(i, q, others):
        y = run(q, *others).out
        return (q + (y * 1e-6).astype(q.dtype)) * q.dtype.type(0.999)

    seconds = per_call(step, q, (kv, positions, sinks), calls)
    keys = tokens * context_tokens + tokens * (tokens + 1) // 2
    num_bytes = 4 * sequences * (context_tokens + tokens) * config.num_kv_heads * config.head_dim + 6 * q.size
    name = f"paged attention, {sequences} x {tokens} tokens after {context_tokens}"
    return Timing(name, seconds, num_bytes, 4 * sequences * keys * config.num_heads * config.head_dim)


def relative_error(found: Any, expected: Any) -> float:
    """||found - expected|| / ||expected||; inf if anything is not finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    return float(error) if np.isfinite(error) else float("inf")


# ---- whole models ----


class Whole(NamedTuple):
    """A model with random weights on the device."""

    name: str
    config: ModelConfig
    declared: Model
    laid_out: Sharding
    params: Any
    pool_tokens: int  # of the pool that every decoding case shares, so that one program serves all contexts

    def forms(self) -> Forms:
        """All slots in one batch."""
        return under_load.forms(ModelStep(self.declared, self.config, self.laid_out))

    def compile_decode(self, slots: int) -> Any:
        """The program, for any context that the pool holds."""
        cache = jax.eval_shape(functools.partial(self._cache, slots))
        load = (cache, *under_load.drawing(self.config, [under_load.GREEDY] * slots))
        return under_load.decode_program(self.forms()).lower(self.params, *load, jnp.int32(1)).compile()

    def _cache(self, slots: int) -> kv_cache.KVCache:
        most = min(self.config.max_context_tokens, self.pool_tokens // slots)
        return under_load.filled(self.config, slots, self.pool_tokens // PAGE_TOKENS, most)

    def decode(self, compiled: Any, slots: int, contexts: Sequence[int], steps: int) -> Iterator[tuple[int, float]]:
        """Tokens per second of all slots after each context; the best of two dispatches."""
        cache = jax.jit(self._cache, static_argnums=0)(slots)
        load = Load(cache, *under_load.drawing(self.config, [under_load.GREEDY] * slots))
        for context in contexts:
            rates = []
            for _ in range(3):  # the first one warms up
                load = jax.block_until_ready(load.with_length(context))
                began = time.perf_counter()
                draws, cache, state = compiled(self.params, *load, jnp.int32(steps))
                token = np.asarray(draws.token)[:, :steps]
                rates.append(slots * steps / (time.perf_counter() - began))
                load = load._replace(cache=cache, state=state)
                if token.min() < 0:
                    raise GptossError(f"{self.name}: logits are not finite after {context} tokens")
            yield context, max(rates[1:])

    def prefill(self, tokens: int, width: int) -> float:
        """Tokens per second of one prompt, in chunks of `width`; the best of two runs."""
        width = min(width, tokens)
        load = under_load.start(self.config, [under_load.GREEDY], 0, tokens)
        ids = jax.random.randint(jax.random.key(1), (1, width), 0, self.config.num_token_ids, jnp.int32)
        counts, at = jnp.full(1, width, jnp.int32), jnp.zeros(1, jnp.int32)
        chunks = Chunks(ids, counts, counts)
        compiled = under_load.prefill_program(self.forms()).lower(self.params, *load, chunks, at).compile()
        rates = []
        for _ in range(3):
            load = jax.block_until_ready(load.with_length(0))
            began = time.perf_counter()
            for _ in range(tokens // width):
                _, cache, state = compiled(self.params, *load, chunks, at)
                load = load._replace(cache=cache, state=state)
            jax.block_until_ready(load)
            rates.append(tokens / (time.perf_counter() - began))
        return max(rates[1:])


def build(path: Path, kernels: layers.Kernels, memory_bytes: int) -> Whole:
    """The model of a config.json, with as large a pool of pages as memory leaves room for.

    Raises:
        GptossError: its weights do not fit.
    """
    config, laid_out = read_config(path), sharding.make()
    free = memory_bytes - config.weight_bytes
    per_token = config.cache_bytes(2 * config.sliding_window) - config.cache_bytes(2 * config.sliding_window - 1)
    tokens = min(free // per_token, 64 * config.max_context_tokens) // PAGE_TOKENS * PAGE_TOKENS
    if tokens < config.max_context_tokens // 16:
        raise GptossError(f"{path.stem} needs {config.weight_bytes / GIB:.1f} GiB of {memory_bytes / GIB:.1f}")
    declared = declare(config, laid_out, kernels)
    params = random_params(config, declared, laid_out, kernels.expert_mlp.layout)
    return Whole(path.stem, config, declared, laid_out, params, tokens)


# ---- the command ----


class Run:
    """What has been found so far, and the time that is left for more."""

    def __init__(self, minutes: float):
        self.ends = time.monotonic() + 60 * minutes
        self.report: dict[str, Any] = {"left_out": []}

    def has_time_for(self, what: str, seconds: float = 0) -> bool:
        """Whether `what`, which takes about `seconds`, can still be done; if not, that is noted."""
        if time.monotonic() + seconds < self.ends:
            return True
        self.leave_out(what, "no time")
        return False

    def leave_out(self, what: str, why: str) -> None:
        """Notes what was not measured."""
        self.report["left_out"].append(f"{what}: {why}")
        print(f"left out: {what}: {why}", flush=True)

    def add(self, section: str, entry: dict[str, Any], line: str) -> None:
        """Keeps a figure and prints its line."""
        self.report.setdefault(section, []).append(entry)
        print(line, flush=True)


def main(arguments: list[str]) -> None:
    """Everything, in order of importance."""
    if arguments:
        raise GptossError(f"{' '.join(arguments)}: expected flags only (--help lists them)")
    options, run = flags.FLAGS, Run(flags.FLAGS.minutes)
    hardware = Hardware.of(jax.devices()[0])
    kernels, line = layers.choose_kernels(options.kernels, hardware)
    print(f"{hardware.name}, jax {jax.__version__}\n{line}", flush=True)
    limits = measure_limits(options.copy_elements, options.matrix_side, options.calls)
    run.report |= {"device": hardware.name, "jax": jax.__version__, "date": date.today().isoformat(), "kernels": line}
    run.report["limits"] = limits._asdict()
    gigabytes, teraflops = limits.copied_bytes_per_second / 1e9, limits.bfloat16_operations_per_second / 1e12
    print(f"copies {gigabytes:,.0f} GB/s, multiplies {teraflops:,.0f} TFLOP/s (bfloat16)", flush=True)
    memory = options.memory_gib * GIB if options.memory_gib else _memory_bytes()
    for name in options.models:
        path = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
        measure_model(run, path, kernels, limits, int(memory))
    if options.transformers:
        beside_transformers(run, read_config(CONFIGS / "gpt-oss-20b.json"))
    text = json.dumps(run.report)
    if options.out:
        whole_files.write_whole(options.out, (json.dumps(run.report, indent=1) + "\n").encode())
    print(text)


def _memory_bytes() -> int:
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        raise GptossError("the device does not say how much memory it has, expected --memory-gib")
    return stats["bytes_limit"] - RESERVE_GIB * GIB


def measure_model(run: Run, path: Path, kernels: layers.Kernels, limits: Limits, memory: int) -> None:
    """One model: its kernels' numbers, its ops, decoding, prefill."""
    options = flags.FLAGS
    if not run.has_time_for(path.stem, 30):
        return
    try:
        whole = build(path, kernels, memory)
    except GptossError as error:
        return run.leave_out(path.stem, str(error))
    compiling = concurrent.futures.ThreadPoolExecutor(len(options.batch))
    programs = {slots: compiling.submit(whole.compile_decode, slots) for slots in map(int, options.batch)}
    layer = whole.params["layers"][1]["moe"]
    weights = expert_op.ExpertWeights(*(layer[m][n] for m in ("gate_up", "down") for n in ("blocks", "scales", "bias")))
    experts = Experts(kernels.expert_mlp, weights, whole.config)
    check(run, whole, experts, kernels.attention)
    for slots, program in programs.items():
        if run.has_time_for(f"{whole.name}: decoding {slots} slots", 15):
            decode(run, whole, program.result(), slots, limits)
    for tokens in map(int, options.prefill):
        if run.has_time_for(f"{whole.name}: prefill of {tokens}", 40):
            prefill(run, whole, tokens, limits)
    for timing in time_ops(run, whole, experts, kernels.attention):
        entry = {"model": whole.name, **timing.report(limits)}
        roofline = max(entry["seconds_of_bytes"], entry["seconds_of_operations"])
        times = f"{timing.seconds * 1e6:10.1f} us, roofline {roofline * 1e6:8.1f}, {entry['share_of_roofline']:6.1%}"
        run.add("ops", entry, f"{whole.name:13} {timing.op:48} {times}")


def check(run: Run, whole: Whole, experts: Experts, attention: attention_op.Attend) -> None:
    """Every kernel against float32 on the device.

    Raises:
        GptossError: one is wrong; timing it would say nothing.
    """
    tokens_of_experts = map(int, flags.FLAGS.check_tokens)
    errors = {f"expert_mlp, {tokens} tokens": experts.error(tokens) for tokens in tokens_of_experts}
    for sequences, tokens in (map(int, size.split("x")) for size in flags.FLAGS.check_attention):
        errors[f"attention, {sequences} x {tokens} tokens"] = attention_error(
            attention, whole.config, sequences, tokens
        )
    for what, error in errors.items():
        run.add("errors", {"model": whole.name, "op": what, "error": error}, f"{whole.name:13} {what:48} {error:.1e}")
        if error > BF16_ERROR:
            raise GptossError(f"{whole.name}: {what} is off by {error:.1e}, at most {BF16_ERROR:.0e} expected")


def decode(run: Run, whole: Whole, compiled: Any, slots: int, limits: Limits) -> None:
    """Decoding of `slots` slots after each context that fits."""
    steps = min(flags.FLAGS.steps, MAX_STEPS_PER_DISPATCH)
    most = min(whole.config.max_context_tokens, whole.pool_tokens // slots // PAGE_TOKENS * PAGE_TOKENS) - steps
    contexts = [min(context, whole.config.max_context_tokens - steps) for context in map(int, flags.FLAGS.contexts)]
    for context in contexts:
        if context > most:
            run.leave_out(f"{whole.name}: {slots} slots after {context:,}", "more than the pool of pages holds")
    for context, rate in whole.decode(compiled, slots, [c for c in contexts if c <= most], steps):
        seconds = slots / rate
        share = whole.config.decode_bytes(slots, context) / limits.copied_bytes_per_second / seconds
        entry = {"model": whole.name, "slots": slots, "context_tokens": context, "tokens_per_second": rate}
        line = (
            f"{whole.name:13} decoding {slots:3} slots after {context:7,} {rate:12,.1f} tokens/s, {share:6.1%} of bytes"
        )
        run.add("decode", entry | {"share_of_roofline": share}, line)


def prefill(run: Run, whole: Whole, tokens: int, limits: Limits) -> None:
    """A prompt of `tokens`."""
    rate = whole.prefill(tokens, flags.FLAGS.chunk)
    operations = under_load.prefill_operations(whole.config, 1, tokens) / tokens * rate
    share = operations / limits.bfloat16_operations_per_second
    entry = {"model": whole.name, "prompt_tokens": tokens, "tokens_per_second": rate, "share_of_multiplying": share}
    run.add(
        "prefill", entry, f"{whole.name:13} prefill of {tokens:7,} {rate:12,.1f} tokens/s, {share:6.1%} of multiplying"
    )


def time_ops(run: Run, whole: Whole, experts: Experts, attention: attention_op.Attend) -> Iterator[Timing]:
    """Each op at the sizes of decoding and of prefill."""
    calls = flags.FLAGS.calls
    for tokens in map(int, flags.FLAGS.op_tokens):
        if run.has_time_for(f"{whole.name}: expert_mlp of {tokens} tokens", 10):
            yield experts.time(tokens, calls)
    for size in flags.FLAGS.op_attention:
        sequences, tokens, context_tokens = map(int, size.split("x"))
        if run.has_time_for(f"{whole.name}: attention {size}", 10):
            yield time_paged(attention, whole.config, sequences, tokens, context_tokens, calls)


def beside_transformers(run: Run, config: ModelConfig) -> None:
    """Hugging Face's model on the same GPU, experts in bfloat16 as it runs them without further kernels."""
    what = "transformers"
    if absent := Transformers.why_not("cuda"):
        return run.leave_out(what, absent)
    if not run.has_time_for(what, 60):
        return None
    jax.clear_caches()
    peer = Transformers(config, threads=8, device="cuda")
    figures = {"decode": peer.decode(1, 1024, 32), "prefill": peer.prefill(1, 2048)}
    line = f"transformers, 20b: decoding {figures['decode']:.1f} tokens/s, prefill {figures['prefill']:,.0f}"
    run.add("transformers", {"decode_context": 1024, "prefill_tokens": 2048, **figures}, line)


def define_flags() -> None:
    """What is measured."""
    flags.DEFINE_list("models", ["gpt-oss-20b", "gpt-oss-120b"], "NAMES: of configs/, or config.json files.")
    flags.DEFINE_string("kernels", "auto", "NAMES: as for generate.")
    flags.DEFINE_float("minutes", 8.5, "after which no further case is begun.")
    flags.DEFINE_float("memory_gib", None, "of the device to use; by default what it has, less a reserve.")
    flags.DEFINE_list("batch", ["1", "8", "64", "256"], "NUMBERS: slots that decode together.")
    flags.DEFINE_list("contexts", ["1024", "8192", "65536", "131072"], "NUMBERS: tokens in the cache of each slot.")
    flags.DEFINE_list("prefill", ["512", "2048", "16384"], "NUMBERS: tokens of a prompt, multiples of the chunk.")
    flags.DEFINE_integer("chunk", 2048, "tokens of a prompt that go in at once.", lower_bound=1)
    flags.DEFINE_integer("steps", 32, "tokens drawn in one dispatch.", lower_bound=1)
    flags.DEFINE_integer("calls", 20, "of an op between two times.", lower_bound=1)
    flags.DEFINE_list("check_tokens", ["1", "67", "300"], "NUMBERS: tokens of expert_mlp, held against float32.")
    flags.DEFINE_list("check_attention", ["3x1", "2x200"], "SIZES: sequences x tokens, held against float32.")
    flags.DEFINE_list("op_tokens", ["1", "8", "64", "256", "2048", "8192"], "NUMBERS: tokens of expert_mlp.")
    sizes = ["1x1x8192", "1x1x130000", "8x1x65536", "64x1x8192", "1x2048x0", "1x2048x30720"]
    flags.DEFINE_list("op_attention", sizes, "SIZES: sequences x tokens x tokens before them.")
    flags.DEFINE_integer("copy_elements", 1 << 30, "of the array that is copied.")
    flags.DEFINE_integer("matrix_side", 8192, "of the matrices that are multiplied.")
    flags.DEFINE_boolean("transformers", True, "Run Hugging Face's model beside.")
    flags.DEFINE_string("out", None, "FILE: also write the result there.")


if __name__ == "__main__":
    define_flags()
    command.run(main, "gpu")
