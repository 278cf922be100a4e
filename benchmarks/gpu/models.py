"""Whole models on random weights: decoding, reading prompts. All programs are compiled before weights are made."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import under_load
from benchmarks.gpu import limits, timing, weights
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.options import numbers
from benchmarks.gpu.results import Results
from benchmarks.under_load import Load
from gptoss_jax.engine.programs import MAX_STEPS_PER_DISPATCH, Chunks, ModelStep
from gptoss_jax.errors import GptossError
from gptoss_jax.model import kv_cache, sharding
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.kv_cache import PAGE_TOKENS, KVCache
from gptoss_jax.model.layers import Joined, Kernels
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.taps import Taps
from gptoss_jax.model.transformer import Model, declare
from gptoss_jax.runtime import weight_transforms
from pallas_kernels.expert_mlp import WeightLayout

GIB = 1 << 30
RESERVE_GIB = 4  # of the device's memory, for temporaries, sampling's arrays and what XLA keeps


class Whole(NamedTuple):
    """A model, before its weights are there."""

    config: ModelConfig
    declared: Model
    sharding: Sharding
    layout: WeightLayout
    few_launches: bool  # as `Kernels` has it

    @classmethod
    def of(cls, config: ModelConfig, kernels: Kernels) -> "Whole":
        """On one device, bfloat16."""
        laid_out = sharding.make()
        return cls(
            config, declare(config, laid_out, kernels), laid_out, kernels.expert_mlp.layout, kernels.few_launches
        )

    @property
    def step(self) -> ModelStep:
        """What an engine runs."""
        return ModelStep(self.declared, self.config, self.sharding)

    def shapes(self) -> Any:
        """Of the weights."""
        separate = weights.shapes_of(self.declared, self.layout)
        return self.joined(separate, functools.partial(jax.eval_shape, weight_transforms.joined))

    def params(self) -> Any:
        """The weights themselves."""
        return jax.block_until_ready(self.joined(self.separate_params()))

    def separate_params(self) -> Any:
        """The same with each projection by itself, as it is published."""
        return weights.random_params(self.declared, self.layout)

    def joined(self, params: Any, join: Callable[..., Joined] | None = None) -> Any:
        """What `loading.load` hands to these kernels; `join` is of `weight_transforms.join_projections`."""
        return weight_transforms.join_projections(params, join) if self.few_launches else params

    def empty(self, slots: int, tokens: int) -> KVCache:
        """A cache of random keys and values, each slot with room for `tokens`."""
        return under_load.filled(self.config, slots, slots * kv_cache.num_pages(tokens), tokens)


def memory_bytes(options: flags.FlagValues) -> int:
    """For weights and caches.

    Raises:
        GptossError: the device does not say what it has.
    """
    if options.memory_gib:
        return int(options.memory_gib * GIB)
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        raise GptossError("the device does not say how much memory it has, expected --memory-gib")
    return stats["bytes_limit"] - RESERVE_GIB * GIB


# ---- decoding ----


class DecodeCase(NamedTuple):
    """Slots that decode together, and their programs."""

    slots: int
    contexts: list[int]
    tokens: int  # that each slot has room for: no more than the longest context needs
    program: Any
    count_experts: Any


def measure_decode(results: Results, options: flags.FlagValues, config: ModelConfig, kernels: Kernels) -> None:
    """The section."""
    known, whole = limits.of(results), Whole.of(config, kernels)
    steps = min(options.steps, MAX_STEPS_PER_DISPATCH)
    cases = list(_decode_cases(results, options, whole, steps))
    began = time.perf_counter()
    programs = timing.compile_all([program for case in cases for program in (case.program, case.count_experts)])
    print(f"{len(programs)} programs compiled in {time.perf_counter() - began:.0f} s", flush=True)
    params = whole.params()
    for case, program, count in zip(cases, programs[::2], programs[1::2], strict=True):
        try:
            for entry in _decode(whole, params, case._replace(program=program, count_experts=count), steps, options):
                _report_decode(results, config, known, case.slots, entry)
        except (jax.errors.JaxRuntimeError, TypeError, GptossError) as error:  # the next ones may do
            results.judge({"error": str(error)[:2000]}, f"decoding {case.slots} slots", str(error)[:300], ok=False)


def _decode_cases(results: Results, options: flags.FlagValues, whole: Whole, steps: int) -> Iterator[DecodeCase]:
    """What fits, lowered; what does not is left out and said."""
    config, params = whole.config, whole.shapes()
    free = memory_bytes(options) - config.weight_bytes
    for slots in numbers(options.batch):
        longest = config.max_context_tokens - steps
        contexts = sorted({min(context, longest) for context in numbers(options.contexts)})
        fitting = [context for context in contexts if slots * config.cache_bytes(context + steps) <= free]
        for context in contexts[len(fitting) :]:
            needed = slots * config.cache_bytes(context + steps) / GIB
            why = f"its cache is {needed:.1f} GiB, and {max(free, 0) / GIB:.1f} are free beside the weights"
            results.leave_out(f"decoding {slots} slots after {context:,}", why)
        if not fitting:
            continue
        tokens = -(-(fitting[-1] + steps) // PAGE_TOKENS) * PAGE_TOKENS
        cache = jax.eval_shape(functools.partial(whole.empty, slots, tokens))
        load = Load(cache, *under_load.drawing(config, [under_load.GREEDY] * slots))
        program = under_load.decode_program(under_load.forms(whole.step)).lower(params, *load, jnp.int32(1))
        count = jax.jit(functools.partial(experts_hit, whole), donate_argnums=1)
        yield DecodeCase(slots, fitting, tokens, program, count.lower(params, cache, load.state.token))


def experts_hit(whole: Whole, params: Any, cache: KVCache, token: jax.Array) -> tuple[jax.Array, KVCache]:
    """How many different experts each layer takes for the next token of all slots, [L], and the cache after it."""
    layers, config = range(whole.config.num_layers), whole.config
    taps = Taps([f"layers/{layer}/router" for layer in layers], config.num_layers)
    ones = jnp.ones(token.shape, jnp.int32)
    _, after = whole.declared.bind(params)(token[:, None], ones, cache, taps)
    logits = jnp.stack([taps.found[f"layers/{layer}/router"][:, 0] for layer in layers])
    ids = jax.lax.top_k(logits, config.experts_per_token)[1].reshape(len(layers), -1)
    hit = jnp.zeros((len(layers), config.num_experts), jnp.int32).at[jnp.arange(len(layers))[:, None], ids].set(1)
    assert after is not None, "given a cache, a transformer gives one"
    return jnp.sum(hit, axis=1), after


class Decoded(NamedTuple):
    """What a case found."""

    context_tokens: int
    seconds: list[float]  # of one step, of each dispatch
    experts_hit: float  # of all layers together


def _decode(whole: Whole, params: Any, case: DecodeCase, steps: int, options: flags.FlagValues) -> Iterator[Decoded]:
    for program in (case.program, case.count_experts):
        if isinstance(program, Exception):
            raise GptossError(str(program))
    cache = jax.jit(whole.empty, static_argnums=(0, 1))(case.slots, case.tokens)
    load = Load(cache, *under_load.drawing(whole.config, [under_load.GREEDY] * case.slots))
    for context in case.contexts:
        seconds = []
        for _ in range(options.dispatches + 1):
            load = jax.block_until_ready(load.with_length(context))
            began = time.perf_counter()
            draws, cache, state = case.program(params, *load, jnp.int32(steps))
            token = np.asarray(draws.token)[:, :steps]
            seconds.append((time.perf_counter() - began) / steps)
            load = load._replace(cache=cache, state=state)
            if token.min() < 0:
                raise GptossError(f"logits are not finite after {context} tokens")
        load = load.with_length(context)
        hit, cache = case.count_experts(params, load.cache, load.state.token)
        load = load._replace(cache=cache)
        yield Decoded(context, seconds[1:], float(np.asarray(hit).sum()))


def _report_decode(results: Results, config: ModelConfig, known: Limits, slots: int, found: Decoded) -> None:
    """With the time that reading what a step needs takes: the experts that were hit, not those that might be."""
    needed = config.attention_bytes + config.unembedding_bytes + found.experts_hit * config.expert_bytes
    needed += slots * config.cache_bytes(found.context_tokens)
    seconds, floor = statistics.median(found.seconds), needed / known.read_bytes_per_second
    rates = [slots / each for each in (seconds, max(found.seconds), min(found.seconds))]
    layers = found.experts_hit / config.num_layers
    entry = {
        "slots": slots,
        "context_tokens": found.context_tokens,
        "tokens_per_second": rates[0],
        "seconds_per_step": seconds,
        "fastest_seconds": min(found.seconds),
        "slowest_seconds": max(found.seconds),
        "experts_hit_per_layer": layers,
        "bytes": needed,
        "share_of_reading": floor / seconds,
    }
    rate = f"{rates[0]:12,.1f} tokens/s ({rates[1]:,.1f} to {rates[2]:,.1f})"
    line = f"decoding {slots:3} slots after {found.context_tokens:7,} {rate}, {layers:.1f} experts a layer"
    results.add("decode", entry, f"{line}, {floor / seconds:6.1%} of reading")


# ---- prompts ----


def measure_prefill(results: Results, options: flags.FlagValues, config: ModelConfig, kernels: Kernels) -> None:
    """The section: one prompt at a time, in chunks."""
    known, whole = limits.of(results), Whole.of(config, kernels)
    lengths = [tokens for tokens in numbers(options.prefill) if tokens <= config.max_context_tokens]
    program = under_load.prefill_program(under_load.forms(whole.step))
    shapes, at = whole.shapes(), jnp.zeros(1, jnp.int32)
    lowered = []
    for tokens in lengths:
        cache = jax.eval_shape(functools.partial(whole.empty, 1, tokens))
        load = Load(cache, *under_load.drawing(config, [under_load.GREEDY]))
        lowered.append(program.lower(shapes, *load, _chunks(config, min(options.chunk, tokens)), at))
    compiled = timing.compile_all(lowered)
    params = whole.params()
    for tokens, program in zip(lengths, compiled, strict=True):
        try:
            if isinstance(program, Exception):
                raise GptossError(str(program))
            seconds = _prefill(whole, params, program, tokens, options)
            _report_prefill(results, config, known, tokens, seconds)
        except (jax.errors.JaxRuntimeError, TypeError, GptossError) as error:
            results.judge({"error": str(error)[:2000]}, f"prefill of {tokens}", str(error)[:300], ok=False)


def _chunks(config: ModelConfig, width: int) -> Chunks:
    ids = jax.random.randint(jax.random.key(1), (1, width), 0, config.num_token_ids, jnp.int32)
    counts = jnp.full(1, width, jnp.int32)
    return Chunks(ids, counts, counts)


def _prefill(whole: Whole, params: Any, program: Any, tokens: int, options: flags.FlagValues) -> list[float]:
    width, at = min(options.chunk, tokens), jnp.zeros(1, jnp.int32)
    cache = jax.jit(whole.empty, static_argnums=(0, 1))(1, tokens)
    load, chunks = Load(cache, *under_load.drawing(whole.config, [under_load.GREEDY])), _chunks(whole.config, width)
    seconds = []
    for _ in range(options.dispatches + 1):
        load = jax.block_until_ready(load.with_length(0))
        began = time.perf_counter()
        for _ in range(tokens // width):
            _, cache, state = program(params, *load, chunks, at)
            load = load._replace(cache=cache, state=state)
        jax.block_until_ready(load)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _report_prefill(
    results: Results, config: ModelConfig, known: Limits, tokens: int, seconds: Sequence[float]
) -> None:
    rates = [tokens / each for each in (statistics.median(seconds), max(seconds), min(seconds))]
    operations = under_load.prefill_operations(config, 1, tokens)
    share = operations / known.bfloat16_operations_per_second / statistics.median(seconds)
    entry = {
        "prompt_tokens": tokens,
        "tokens_per_second": rates[0],
        "slowest": rates[1],
        "fastest": rates[2],
        "share_of_multiplying": share,
    }
    line = f"prefill of {tokens:7,} {rates[0]:12,.1f} tokens/s ({rates[1]:,.1f} to {rates[2]:,.1f})"
    results.add("prefill", entry, f"{line}, {share:6.1%} of multiplying")
