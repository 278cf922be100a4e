"""Measures decoding and prefill on a CPU against what its memory and its arithmetic allow, and against others.

    python -m benchmarks.cpu --layers 4
    python -m benchmarks.cpu --checkpoint FOLDER --llama-bench PATH --gguf FILE

Runs the engine's own programs, sampling included, with all slots in one batch (as an engine with deterministic=False),
on a cache of its own: a long context is filled with random keys and values, as a prefill of 131,072 tokens would take
too long, and a step's time does not depend on their values. In each round, ours, the others and the machine's limit
(reading memory, or multiplying float32 matrices) take turns; a case's figures are medians over the rounds. Shares are
medians of the rounds' own shares, because a shared machine's limits move from minute to minute. Run it on a machine
that does nothing else: threads that wait for each other in a loop, as llama.cpp's do, suffer most from company.
"""

import concurrent.futures
import contextlib
import functools
import json
import mmap
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import cpu_kernels
from benchmarks import true_width, under_load
from benchmarks.peers import Llama, Transformers
from gptoss_jax.checkpoints import host_memory
from gptoss_jax.cli import command
from gptoss_jax.engine.programs import MAX_STEPS_PER_DISPATCH, Chunks, Forms, ModelStep
from gptoss_jax.errors import GptossError
from gptoss_jax.model import layers, sharding
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.transformer import Params, declare, nest
from gptoss_jax.runtime import loading, weight_transforms
from gptoss_jax.runtime.number_formats import DENSE_ITEMSIZE
from pallas_kernels.choice import Hardware

READ_BYTES = 1 << 29  # far above any cache
LIMIT_TRIES = 4  # of which the best is what the memory can do: a shared machine gives less for moments
SQUARE = 2048  # rows and columns of the matrices whose product shows the float32 peak
LISTS = ("contexts", "prefill", "batch", "prefill_batch", "peer_contexts")  # flags that are lists of numbers


class Peer(Protocol):
    """Somebody else's implementation."""

    @property
    def name(self) -> str:
        """What it is called in the results."""
        ...

    def can_run(self, sequences: int) -> bool:
        """Whether it takes a batch of so many sequences."""
        ...

    def decode(self, sequences: int, context_tokens: int, steps: int) -> float:
        """Tokens per second of all sequences together, over `steps` steps after a context of `context_tokens` each."""
        ...

    def prefill(self, sequences: int, tokens: int) -> float:
        """Tokens per second of all sequences together, each with a prompt of `tokens`."""
        ...


class Subject(NamedTuple):
    """What is measured."""

    config: ModelConfig
    params: Params
    forms: Forms
    kernels: str
    described: str


# ---- the machine's limits ----


def reading(pages: str) -> Callable[[], float]:
    """Reads a large array with a thread per core: bytes per second. `pages` are "huge" or "small"."""
    content = host_memory.empty(READ_BYTES) if pages == "huge" else small_pages(READ_BYTES)
    content[:] = 1
    parts = np.array_split(content.view(np.uint64), os.cpu_count() or 1)
    pool = concurrent.futures.ThreadPoolExecutor(len(parts))

    def read() -> float:
        began = time.perf_counter()
        list(pool.map(np.add.reduce, parts))
        return READ_BYTES / (time.perf_counter() - began)

    return lambda: max(read() for _ in range(LIMIT_TRIES))


def small_pages(num_bytes: int) -> np.ndarray:
    """uint8 [num_bytes] in pages of 4 KiB even where the system would give larger ones unasked."""
    mapping = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that knows no others
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(mapping, np.uint8)


def multiplying() -> Callable[[], float]:
    """Multiplies float32 matrices, by XLA and by NumPy's BLAS: operations per second of the better one.

    OPENBLAS_CORETYPE, where somebody has set it, may hold NumPy's back: unset it for this command.
    """
    x = np.ones((SQUARE, SQUARE), np.float32)
    on_device, product = jax.device_put(x), jax.jit(jnp.dot)

    def best(multiply: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            multiply()
            seconds.append(time.perf_counter() - began)
        return 2 * SQUARE**3 / min(seconds)

    def peak() -> float:
        found = max(best(lambda: product(on_device, on_device).block_until_ready()), best(lambda: x @ x))
        time.sleep(0.2)  # for 0.1 s after a product BLAS's threads wait in a loop, beside whatever is measured next
        return found

    return peak


# ---- ours ----


def load(options: flags.FlagValues) -> Subject:
    """The model that the flags name."""
    laid_out = sharding.make()
    if options.checkpoint:
        loaded = loading.load(options.checkpoint, kernels=options.kernels, dense=options.dense)
        step = ModelStep(loaded.model, loaded.config, laid_out)
        forms = under_load.forms(step, slot_by_slot=options.one_by_one)
        return Subject(loaded.config, loaded.params, forms, loaded.kernels, options.checkpoint)
    config, leaves = true_width.leaves(true_width.raw_config(options.layers, Path(options.config)))
    kernels, reason = layers.choose_kernels(options.kernels, Hardware.of(jax.devices()[0]))
    declared = declare(config, laid_out, kernels)
    transforms = [
        weight_transforms.to_devices(declared, laid_out),
        weight_transforms.to_dense_format(declared, options.dense),
    ]
    params = nest(dict(weight_transforms.apply(transforms, leaves)))
    forms = under_load.forms(ModelStep(declared, config, laid_out), slot_by_slot=options.one_by_one)
    name = f"{Path(options.config).stem} cut to {options.layers} layers, random weights, seed {true_width.SEED}"
    return Subject(config, params, forms, reason, name)


def decoding(subject: Subject, slots: int, context_tokens: int, steps: int) -> Callable[[], float]:
    """Decodes `steps` tokens of each slot in one dispatch, after the context: tokens per second of all slots."""
    load = under_load.start(subject.config, [under_load.GREEDY] * slots, context_tokens, steps)
    compiled = under_load.decode_program(subject.forms).lower(subject.params, *load, np.int32(steps)).compile()

    def run(count: int) -> float:
        nonlocal load
        load = jax.block_until_ready(load.with_length(context_tokens))
        began = time.perf_counter()
        draws, cache, state = compiled(subject.params, *load, np.int32(count))
        load = load._replace(cache=cache, state=state)
        token = np.asarray(draws.token)[:, :count]
        seconds = time.perf_counter() - began
        if token.min() < 0:
            raise GptossError(
                f"{slots} slots at {context_tokens} tokens: logits are not finite; are the kernels right?"
            )
        return slots * count / seconds

    run(1)  # pages are touched
    return lambda: run(steps)


def prefilling(subject: Subject, slots: int, tokens: int, chunk: int) -> Callable[[], float]:
    """Runs a prompt of each slot, chunk by chunk, up to its first drawn token: tokens per second of all slots."""
    load = under_load.start(subject.config, [under_load.GREEDY] * slots, 0, tokens)
    chunks = _chunks(subject.config, slots, tokens, min(chunk, tokens))
    at = np.zeros(1, np.int32)
    compiled = under_load.prefill_program(subject.forms).lower(subject.params, *load, chunks[0], at).compile()

    def run(last: int) -> tuple[float, np.ndarray]:
        """Seconds of the first chunks, and the tokens drawn after them."""
        nonlocal load
        load = jax.block_until_ready(load.with_length(0))
        began = time.perf_counter()
        token = np.zeros(slots, np.int32)
        for each in chunks[:last]:
            draw, cache, state = compiled(subject.params, *load, each, at)
            load, token = load._replace(cache=cache, state=state), draw.token
        token = np.asarray(token)
        return time.perf_counter() - began, token

    def run_all() -> float:
        seconds, token = run(len(chunks))
        if token.min() < 0:
            raise GptossError(f"{slots} slots of {tokens} tokens: logits are not finite; are the kernels right?")
        return slots * tokens / seconds

    run(1)  # pages are touched
    return run_all


def _chunks(config: ModelConfig, slots: int, tokens: int, width: int) -> list[Any]:
    """Random prompts of `tokens` tokens in chunks of `width`, the last one padded; one token is drawn after it."""
    ids = np.random.default_rng(tokens).integers(0, config.num_token_ids, (slots, tokens)).astype(np.int32)
    chunks = []
    for first in range(0, tokens, width):
        chunk = np.zeros((slots, width), np.int32)
        count = min(width, tokens - first)
        chunk[:, :count] = ids[:, first : first + count]
        budget = int(first + width >= tokens)
        chunks.append(Chunks._make([chunk, np.full(slots, count, np.int32), np.full(slots, budget, np.int32)]))
    return chunks


# ---- in turns ----


def in_turns(runners: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each runner gives in each round."""
    figures: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            figures[name].append(run())
    return figures


def _median_ratio(over: list[float], under: list[float], factor: float = 1.0) -> float:
    return round(statistics.median(factor * a / b for a, b in zip(over, under, strict=True)), 3)


def _against(figures: dict[str, list[float]]) -> dict[str, Any]:
    """Ours and the others as medians, and ours over each of them, round by round."""
    others = [name for name in figures if name not in ("ours", "limit")]
    return {
        "tokens_per_second": round(statistics.median(figures["ours"]), 2),
        **{name: round(statistics.median(figures[name]), 2) for name in others},
        **{f"over {name}": _median_ratio(figures["ours"], figures[name]) for name in others},
    }


def decode_case(
    subject: Subject, peers: list[Peer], limit: Callable[[], float], options: flags.FlagValues, slots: int, context: int
) -> dict[str, Any]:
    """One line of the table: a batch at a context."""
    steps = options.steps
    runners = {"ours": decoding(subject, slots, context, steps), "limit": limit}
    for peer in peers if context in _whole_numbers(options.peer_contexts) else ():
        if peer.can_run(slots):
            runners[peer.name] = functools.partial(peer.decode, slots, context, steps)
    figures = in_turns(runners, options.rounds)
    num_bytes = subject.config.decode_bytes(slots, context, dense_itemsize=DENSE_ITEMSIZE[options.dense])
    return {
        "slots": slots,
        "context_tokens": context,
        **_against(figures),
        "step_bytes": num_bytes,
        "bytes_per_second": round(num_bytes * statistics.median(figures["ours"]) / slots),
        "read_bytes_per_second": round(statistics.median(figures["limit"])),
        "share_of_reading": _median_ratio(figures["ours"], figures["limit"], num_bytes / slots),
    }


def prefill_case(
    subject: Subject, peers: list[Peer], limit: Callable[[], float], options: flags.FlagValues, slots: int, tokens: int
) -> dict[str, Any]:
    """One line of the table: a batch of prompts of one length."""
    runners = {"ours": prefilling(subject, slots, tokens, options.chunk), "limit": limit}
    for peer in peers:
        if peer.can_run(slots):
            runners[peer.name] = functools.partial(peer.prefill, slots, tokens)
    figures = in_turns(runners, options.rounds)
    operations = under_load.prefill_operations(subject.config, slots, tokens)
    return {
        "slots": slots,
        "prompt_tokens": tokens,
        "chunk_tokens": min(options.chunk, tokens),
        **_against(figures),
        "operations": operations,
        "operations_per_second": round(operations * statistics.median(figures["ours"]) / (slots * tokens)),
        "peak_operations_per_second": round(statistics.median(figures["limit"])),
        "share_of_peak": _median_ratio(figures["ours"], figures["limit"], operations / (slots * tokens)),
    }


# ---- the command ----


def check_instruction_sets(flag: str, names: list[str]) -> None:
    """Raises GptossError for one that this machine does not have, and where there is no library."""
    if reason := cpu_kernels.why_not():
        raise GptossError(f"{flag}: {reason}")
    have = cpu_kernels.instruction_sets()
    if missing := [name for name in names if name not in have]:
        raise GptossError(f"{flag} {missing[0]}: this machine has {', '.join(have)}")


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_string("checkpoint", None, "FOLDER: A converted checkpoint, or a folder of published safetensors.")
    flags.DEFINE_integer("layers", None, "In place of a checkpoint: layers of true width with random weights, even.")
    flags.DEFINE_string("config", str(true_width.CONFIG), "FILE: With --layers: the config.json that is cut down.")
    flags.DEFINE_string("kernels", "auto", "NAMES: auto, or by name: attention=reference,expert_mlp=reference.")
    flags.DEFINE_string("instruction_set", None, "NAME: That the C++ kernels use, in place of the machine's best.")
    flags.DEFINE_enum("dense", "bfloat16", list(DENSE_ITEMSIZE), "Weights of attention and unembedding.")
    flags.DEFINE_list(
        "contexts", ["16", "1024", "16384", "131072"], "N,N,...: Tokens in the cache before a decoding step."
    )
    flags.DEFINE_list("prefill", ["128", "512", "2048"], "N,N,...: Lengths of prompts.")
    flags.DEFINE_list("batch", ["1", "4", "16"], "N,N,...: Slots of a decoding step.")
    flags.DEFINE_list("prefill_batch", ["1"], "N,N,...: Prompts that are prefilled at once.")
    flags.DEFINE_integer("chunk", 512, "Tokens of a prompt that go through the model at once, at most.", lower_bound=1)
    flags.DEFINE_integer(
        "steps", 16, "Decoding steps of a measurement.", lower_bound=1, upper_bound=MAX_STEPS_PER_DISPATCH
    )
    flags.DEFINE_integer("rounds", 3, "Measurements, of which the median counts.", lower_bound=1)
    flags.DEFINE_bool("one_by_one", False, "Run a batch's slots one after the other, as deterministic engines do.")
    flags.DEFINE_float("cache_gib", 4.0, "GiB: Cases whose keys and values take more are left out.")
    flags.DEFINE_string("llama_bench", None, "FILE: llama.cpp's program of that name, run beside ours.")
    flags.DEFINE_string("llama_batched_bench", None, "FILE: The same for batches.")
    flags.DEFINE_string("gguf", None, "FILE: The same weights for llama.cpp: benchmarks.write_gguf makes it.")
    flags.DEFINE_bool("transformers", True, "Run transformers beside ours where it and torch are installed.")
    flags.DEFINE_list("peer_contexts", ["16", "1024"], "N,N,...: Contexts at which others decode; they prefill them.")


def _whole_numbers(texts: list[str]) -> list[int]:
    if not all(text.isdecimal() and int(text) for text in texts):
        raise GptossError(f"{','.join(texts)}: expected whole numbers above 0, with commas between them")
    return [int(text) for text in texts]


def _peers(options: flags.FlagValues, config: ModelConfig) -> tuple[list[Peer], dict[str, str]]:
    """Who runs beside us, and why others do not."""
    threads = os.cpu_count() or 1
    peers: list[Peer] = []
    absent: dict[str, str] = {}
    if options.llama_bench:
        batched = Path(options.llama_batched_bench) if options.llama_batched_bench else None
        programs = Path(options.llama_bench), batched, Path(options.gguf)
        peers.extend(Llama(*programs, threads, huge_pages) for huge_pages in (False, True))
    else:
        absent["llama.cpp"] = "no --llama-bench"
    reason = Transformers.why_not() if options.transformers else "--notransformers"
    if reason:
        absent["transformers"] = reason
    else:
        peers.append(Transformers(config, threads))
    return peers, absent


def _cases(options: flags.FlagValues, subject: Subject, peers: list[Peer]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each case's kind and figures, as they come."""
    read = reading("huge")
    for context in _whole_numbers(options.contexts):
        for slots in _whole_numbers(options.batch):
            cache_bytes = slots * subject.config.cache_bytes(context)
            if cache_bytes > options.cache_gib * 2**30:
                left_out = f"keys and values of {cache_bytes / 2**30:.1f} GiB, above --cache-gib"
                yield "decode", {"slots": slots, "context_tokens": context, "left_out": left_out}
            else:
                yield "decode", decode_case(subject, peers, read, options, slots, context)
    multiply = multiplying()
    for tokens in _whole_numbers(options.prefill):
        for slots in _whole_numbers(options.prefill_batch):
            yield "prefill", prefill_case(subject, peers, multiply, options, slots, tokens)


def _line(kind: str, case: dict[str, Any], peers: list[Peer]) -> str:
    """A case as a line of the table."""
    what = (
        f"{case['slots']:2d} x decode at {case['context_tokens']:7,d}"
        if kind == "decode"
        else (f"{case['slots']:2d} x prefill of {case['prompt_tokens']:6,d}")
    )
    if "left_out" in case:
        return f"{what}: left out: {case['left_out']}"
    others = "".join(
        f", {peer.name} {case[peer.name]:.1f} (x {case[f'over {peer.name}']:.2f})"
        for peer in peers
        if peer.name in case
    )
    if kind == "decode":
        limit = f"{case['bytes_per_second'] / 1e9:6.1f} GB/s, {100 * case['share_of_reading']:4.0f} % of reading"
    else:
        limit = f"{case['operations_per_second'] / 1e9:6.1f} GFLOP/s, {100 * case['share_of_peak']:4.0f} % of the peak"
    return f"{what}: {case['tokens_per_second']:8.1f} tokens/s, {limit}{others}"


def main(arguments: list[str]) -> None:
    """Prints a line for each case, then one JSON line."""
    del arguments
    options = flags.FLAGS
    if (options.checkpoint is None) == (options.layers is None):
        raise GptossError("expected either --checkpoint or --layers")
    if (options.llama_bench is None) != (options.gguf is None):
        raise GptossError("--llama-bench and --gguf belong together: expected both or neither")
    numbers = {name: _whole_numbers(getattr(options, name)) for name in LISTS}
    if options.one_by_one and max(numbers["prefill_batch"]) > 1:
        raise GptossError("--one-by-one prefills one prompt at a time, expected --prefill-batch 1")
    name = options.instruction_set
    if name:
        check_instruction_sets("--instruction-set", [name])
    with cpu_kernels.instruction_set(name) if name else contextlib.nullcontext():
        _measure(options)


def _measure(options: flags.FlagValues) -> None:
    load_average = os.getloadavg()[0]
    subject = load(options)
    if name := options.instruction_set:
        subject = subject._replace(kernels=f"{subject.kernels}; C++ for {name} alone")
    print(f"{subject.described}\n{subject.kernels}\nload average before: {load_average:.1f}", flush=True)
    peers, absent = _peers(options, subject.config)
    for name, reason in absent.items():
        print(f"{name} is not run: {reason}")
    if core := os.environ.get("OPENBLAS_CORETYPE"):
        print(f"OPENBLAS_CORETYPE is {core}: unset it, or the float32 peak may be that of another core")
    bandwidth = {pages: round(reading(pages)()) for pages in ("huge", "small")}
    print("reading: " + ", ".join(f"{rate / 1e9:.1f} GB/s in {pages} pages" for pages, rate in bandwidth.items()))
    results: dict[str, Any] = {"decode": [], "prefill": []}
    for kind, case in _cases(options, subject, peers):
        results[kind].append(case)
        print(_line(kind, case, peers), flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    about = {
        "machine": machine,
        "model": subject.described,
        "kernels": subject.kernels,
        "dense": options.dense,
        "one_by_one": options.one_by_one,
    }
    about["load_average_before"] = round(load_average, 2)
    print(json.dumps(about | {"not_run": absent, "read_bytes_per_second": bandwidth, **results}))


if __name__ == "__main__":
    define_flags()
    command.run(main, "cpu")
