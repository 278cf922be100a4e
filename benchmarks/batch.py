"""Measures the engine on batch jobs: mixed lengths, shared prefixes, and what its host side costs.

    python -m benchmarks.batch
    python -m benchmarks.batch --llama-server PATH --llama-batched-bench PATH
    python -m benchmarks.batch --checkpoint FOLDER --rows 200

Lengths are ShareGPT's as vLLM's paper gives them (Kwon et al., arXiv:2309.06180, figure 11: prompts of 161.31 tokens
and answers of 337.99 in the mean), log-normal, with deviations of our own choice, cut to 20-2,000 and 10-800. Without
--checkpoint the model is the 20b's first layers at true width on random weights, with a vocabulary cut like its layers,
so that drawing a token is the same share of a step as in the whole model. Answers never stop early, and tokens are
drawn at temperature 1.

The job runs through the engine (its slots filled again as answers end), in static batches (the next begins when the
longest answer of the last has ended), and, some of its rows, one at a time. An ended answer costs this engine nothing;
of the first rows a static batch is therefore run as others compute it too, where every row is drawn until the longest
has ended (only the tokens that were asked for count). Beside the engine its own programs are dispatched again with the
same arguments and no engine around them: what that saves is the engine's overhead. On a busy machine two runs are never
alike, so the time in which no program ran is reported beside it. Then rows that share a prefix, with and without the
prefix cache. llama-server gets the same ids and lengths over HTTP, with as many parallel slots; llama-batched-bench
decodes equal sequences, which is the most that llama.cpp could reach. All take turns in each round; figures are
medians, and ratios are medians of the rounds' own.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from benchmarks import true_width, write_gguf
from benchmarks.peers import Llama, LlamaServer
from converters.random_checkpoint import with_vocab_size, write_checkpoint
from gptoss_jax.cli import command
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.runner import Compiled, ModelRunner
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.errors import GptossError
from gptoss_jax.runtime import loading
from gptoss_jax.runtime.language_model import LanguageModel


class Lengths(NamedTuple):
    """A log-normal distribution of whole numbers, cut at both ends."""

    mean: float
    deviation: float  # of the logarithm
    least: int
    most: int

    def draw(self, count: int, seed: int) -> list[int]:
        """So many of them: the distribution's own quantiles, shuffled, so that a short job is like a long one."""
        at = statistics.NormalDist(np.log(self.mean) - self.deviation**2 / 2, self.deviation)
        lengths = [np.exp(at.inv_cdf((i + 0.5) / count)) for i in range(count)]
        np.random.default_rng(seed).shuffle(lengths)
        return [int(np.clip(round(length), self.least, self.most)) for length in lengths]


PROMPTS = Lengths(161.31, 1.1, 20, 2000)
ANSWERS = Lengths(337.99, 0.9, 10, 800)
SUFFIXES, SHORT_ANSWERS = Lengths(40, 0.5, 10, 200), Lengths(30, 0.5, 5, 100)  # of rows that share a prefix


class Row(NamedTuple):
    """One line of a job."""

    prompt: tuple[int, ...]
    answer_tokens: int


def mixed_job(rows: int, num_token_ids: int, scale: float) -> list[Row]:
    """Rows of mixed lengths, each `scale` times what is published."""
    return _rows(PROMPTS.draw(rows, 1), ANSWERS.draw(rows, 2), (), num_token_ids, scale)


def shared_job(rows: int, prefix_tokens: int, num_token_ids: int, scale: float) -> list[Row]:
    """Rows that begin alike."""
    prefix = tuple(np.random.default_rng(3).integers(0, num_token_ids, round(scale * prefix_tokens)).tolist())
    return _rows(SUFFIXES.draw(rows, 4), SHORT_ANSWERS.draw(rows, 5), prefix, num_token_ids, scale)


def _rows(
    prompts: list[int], answers: list[int], prefix: tuple[int, ...], num_token_ids: int, scale: float
) -> list[Row]:
    random = np.random.default_rng(len(prompts))
    lengths = [[max(1, round(scale * length)) for length in pair] for pair in zip(prompts, answers, strict=True)]
    return [Row((*prefix, *random.integers(0, num_token_ids, prompt).tolist()), answer) for prompt, answer in lengths]


# ---- ours ----


def run(engine: Engine, rows: Sequence[Row]) -> float:
    """Seconds until the last answer has ended."""
    began = time.perf_counter()
    for seed, row in enumerate(rows):
        engine.submit(Request(row.prompt, (), row.answer_tokens, SamplingParams(seed=seed)))
    drawn = sum(len(event.token_ids) for event in engine.run())
    seconds = time.perf_counter() - began
    if drawn != answer_tokens(rows):
        raise GptossError(f"{drawn} tokens drawn, expected {answer_tokens(rows)}")
    return seconds


def run_in_batches(engine: Engine, rows: Sequence[Row], size: int) -> float:
    """Seconds of static batches: the next begins when the longest answer of the last has ended."""
    return sum(run(engine, rows[first : first + size]) for first in range(0, len(rows), size))


def run_padded(engine: Engine, rows: Sequence[Row]) -> float:
    """Seconds of one static batch whose every answer is drawn until the longest has ended."""
    return run(engine, [row._replace(answer_tokens=max(row.answer_tokens for row in rows)) for row in rows])


def answer_tokens(rows: Sequence[Row]) -> int:
    """Tokens of all answers."""
    return sum(row.answer_tokens for row in rows)


def context_tokens(rows: Sequence[Row]) -> int:
    """What the longest prompt with the longest answer takes of a context."""
    return max(len(row.prompt) for row in rows) + max(row.answer_tokens for row in rows)


# ---- its programs alone ----


class Call(NamedTuple):
    """A dispatch: what was run, and its arguments beside the weights, the cache and the slots."""

    kind: str
    program: Any
    arguments: tuple[Any, ...]
    page_table: np.ndarray | None  # of the cache that it was given


class Recorder:
    """Notes every dispatch of an engine without a prefix cache, and how long its programs ran.

    Attributes:
        calls: the dispatches, in order.
        seconds: from each dispatch until its results were there, added up.
    """

    def __init__(self):
        self.calls: list[Call] = []
        self.seconds = 0.0

    def clear(self) -> None:
        """Forgets what was noted."""
        self.calls, self.seconds = [], 0.0

    def around(self, compiled: Compiled) -> Compiled:
        """The same programs, each of whose dispatches is noted."""
        return Compiled(
            admit=self._noting("admit", compiled.admit, 3),
            halt=self._noting("halt", compiled.halt, 1),
            prefill={width: self._noting("prefill", program, 4) for width, program in compiled.prefill.items()},
            decode=self._noting("decode", compiled.decode, 4),
            later={},
        )

    def _noting(self, kind: str, program: Any, given: int) -> Callable[..., Any]:
        def dispatch(*arguments: Any) -> Any:
            table = np.array(arguments[1].page_table) if given == 4 else None
            self.calls.append(Call(kind, program, arguments[given:], table))
            began = time.perf_counter()
            results = jax.block_until_ready(program(*arguments))
            self.seconds += time.perf_counter() - began
            return results

        return dispatch


def dispatch_again(runner: ModelRunner, calls: Sequence[Call]) -> float:
    """Seconds of the same dispatches, one after the other, for nobody: of an idle runner that made them."""
    params, cache, options, state = runner._params, runner._cache, runner._options, runner._state
    tables = [None if call.page_table is None else runner._to_slots(call.page_table) for call in calls]
    jax.block_until_ready((cache, tables))
    began = time.perf_counter()
    for call, table in zip(calls, tables, strict=True):
        match call.kind:
            case "admit":
                lengths, options, state = call.program(cache.lengths, options, state, *call.arguments)
                cache = cache._replace(lengths=lengths)
            case "halt":
                state = state._replace(remaining=call.program(state.remaining, *call.arguments))
            case _:
                cache = cache._replace(page_table=table)
                _, cache, state = call.program(params, cache, options, state, *call.arguments)
    jax.block_until_ready((cache, state))
    runner._cache, runner._options, runner._state = cache, options, state
    return time.perf_counter() - began


# ---- what is measured ----


class Results:
    """Seconds of each way to run a job, round by round."""

    def __init__(self, jobs: Mapping[str, Sequence[Row]]):
        """`jobs`: what each way runs."""
        self._jobs, self._seconds = jobs, {name: list[float]() for name in jobs}

    def take(self, name: str, seconds: float) -> None:
        """Notes and prints how long a way took."""
        self._seconds[name].append(seconds)
        tokens = answer_tokens(self._jobs[name])
        print(f"{name}: {seconds:.1f} s, {tokens} tokens, {tokens / seconds:.1f} tokens/s", flush=True)

    def rates(self) -> dict[str, float]:
        """Tokens of answers per second, the medians."""
        taken = {name: statistics.median(seconds) for name, seconds in self._seconds.items() if seconds}
        return {name: round(answer_tokens(self._jobs[name]) / seconds, 2) for name, seconds in taken.items()}

    def faster(self, name: str, other: str) -> float | None:
        """How many times as many tokens a second one way gives as the other; None if either was not measured."""
        pairs = list(zip(self._seconds[name], self._seconds[other], strict=False))
        more = answer_tokens(self._jobs[name]) / answer_tokens(self._jobs[other])
        return round(statistics.median(theirs / ours for ours, theirs in pairs) * more, 3) if pairs else None


def measure(model: LanguageModel, gguf: Path | None, options: flags.FlagValues) -> dict[str, Any]:
    """Runs everything in turns, and gives rates and ratios."""
    ids, slots, scale = model.config.num_token_ids, options.slots, options.scale
    mixed, few = mixed_job(options.rows, ids, scale), mixed_job(options.rows, ids, scale)[: options.alone_rows]
    shared = shared_job(options.prefix_rows, options.prefix_tokens, ids, scale)
    names = ("engine", "its programs", "static batches", "llama-server")
    results = Results(
        {name: mixed for name in names}
        | {"one at a time": few, "static batch, padded": mixed[:slots]}
        | {name: shared for name in ("prefix cache", "no prefix cache", "llama-server, prefix")}
    )
    longest, recorder, host_shares = context_tokens([*mixed, *shared]), Recorder(), list[float]()
    without = EngineConfig(slots=slots, max_context_tokens=longest, prefix_snapshots=0)
    compiled = model.engine(without).runner.compiled
    engine, noting = (model.engine(without, compiled=each) for each in (compiled, recorder.around(compiled)))
    alone = model.engine(EngineConfig(max_context_tokens=longest, prefix_snapshots=0))
    caching = EngineConfig(slots=slots, max_context_tokens=longest)
    compiled_caching = model.engine(caching).runner.compiled
    for each in (engine, noting, alone):
        run(each, mixed[:1])  # pages are touched
    for _ in range(options.rounds):
        recorder.clear()
        seconds = run(noting, mixed)
        host_shares.append(seconds / recorder.seconds - 1)
        results.take("engine", seconds)
        results.take("its programs", dispatch_again(noting.runner, recorder.calls))
        results.take("static batches", run_in_batches(engine, mixed, slots))
        results.take("static batch, padded", run_padded(engine, mixed[:slots]))
        results.take("one at a time", run_in_batches(alone, few, 1))
        results.take("no prefix cache", run(engine, shared))
        cached = model.engine(caching, compiled=compiled_caching)  # empty
        results.take("prefix cache", run(cached, shared))
        print(f"{cached.statistics.hit_rate:.1%} of the prompts' tokens were in the prefix cache")
        if gguf and options.llama_server:
            server = LlamaServer(Path(options.llama_server), gguf, os.cpu_count() or 1, slots, longest)
            for name, rows, cache_prompt in (("llama-server", mixed, False), ("llama-server, prefix", shared, True)):
                results.take(
                    name, server.seconds([(row.prompt, row.answer_tokens) for row in rows], cache_prompt=cache_prompt)
                )
    figures: dict[str, Any] = {"tokens_per_second": results.rates()}
    figures["overhead"] = round((results.faster("its programs", "engine") or 1) - 1, 4)
    figures["time between its programs"] = round(statistics.median(host_shares), 4)
    for other in ("static batches", "static batch, padded", "one at a time", "llama-server"):
        figures[f"engine over {other}"] = results.faster("engine", other)
    for other in ("no prefix cache", "llama-server, prefix"):
        figures[f"prefix cache over {other}"] = results.faster("prefix cache", other)
    if gguf and options.llama_batched_bench:
        figures["llama-batched-bench"] = _batched_bench(gguf, mixed, options)
    return figures


def _batched_bench(gguf: Path, rows: Sequence[Row], options: flags.FlagValues) -> float:
    """Tokens per second of equal sequences, as long as the job's rows are in the mean: decoding alone."""
    bench = Path(options.llama_batched_bench)
    prompt = round(statistics.mean(len(row.prompt) for row in rows))
    answer = round(statistics.mean(row.answer_tokens for row in rows))
    return Llama(bench, bench, gguf, os.cpu_count() or 1, huge_pages=True).decode(options.slots, prompt, answer)


# ---- the command ----


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_string("checkpoint", None, "FOLDER: Published safetensors; left out: layers with random weights.")
    flags.DEFINE_integer("layers", 2, "Without --checkpoint: layers of true width, an even number.", lower_bound=2)
    flags.DEFINE_string("config", str(true_width.CONFIG), "FILE: Without --checkpoint: the config.json that is cut.")
    flags.DEFINE_integer("slots", 16, "Answers that are drawn at once.", lower_bound=2)
    flags.DEFINE_integer("rows", 48, "Rows of the job of mixed lengths.", lower_bound=1)
    flags.DEFINE_integer("alone_rows", 6, "Rows of it that are run one at a time too.", lower_bound=1)
    flags.DEFINE_integer("prefix_rows", 64, "Rows that share a prefix.", lower_bound=1)
    flags.DEFINE_integer("prefix_tokens", 1000, "Tokens of that prefix.", lower_bound=1)
    flags.DEFINE_float("scale", 1.0, "X: Lengths are multiplied by it.", lower_bound=0.001)
    flags.DEFINE_integer("rounds", 3, "Measurements, of which the median counts.", lower_bound=1)
    flags.DEFINE_string("llama_server", None, "FILE: llama.cpp's program of that name, run beside ours.")
    flags.DEFINE_string("llama_batched_bench", None, "FILE: The same for equal sequences.")


def cut(layers: int, path: Path) -> dict[str, Any]:
    """The config.json at `path` with so many layers, and as large a part of its vocabulary."""
    whole = json.loads(path.read_text())
    vocabulary = -(-whole["vocab_size"] * layers // whole["num_hidden_layers"] // 64) * 64
    return with_vocab_size(true_width.raw_config(layers, path), min(vocabulary, whole["vocab_size"]))


@contextmanager
def _files(options: flags.FlagValues) -> Iterator[tuple[Path, Path | None]]:
    """The checkpoint, and the same as GGUF if llama.cpp is asked for, in a folder that is deleted afterwards."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = Path(options.checkpoint or folder / "published")
        if not options.checkpoint:
            write_checkpoint(checkpoint, cut(options.layers, Path(options.config)))
        gguf = folder / "model.gguf" if options.llama_server or options.llama_batched_bench else None
        if gguf:
            write_gguf.write(gguf, write_gguf.published(checkpoint), "bf16")
        yield checkpoint, gguf


def main(arguments: list[str]) -> None:
    """Prints a line for each run, then one JSON line."""
    if arguments:
        raise GptossError(f"{arguments[0]}: expected flags only")
    options, load_average = flags.FLAGS, os.getloadavg()[0]
    if (options.llama_server or options.llama_batched_bench) and (missing := write_gguf.missing()):
        raise GptossError(missing)
    with _files(options) as (checkpoint, gguf):
        model = loading.load(checkpoint)
        print(f"{model!r}\nload average before: {load_average:.1f}", flush=True)
        figures = measure(model, gguf, options)
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}",
        "kernels": model.kernels,
        "layers": model.config.num_layers,
        "vocabulary": model.config.vocab_size,
        "load_average_before": round(load_average, 2),
        **{name: options[name].value for name in ("slots", "rows", "alone_rows", "prefix_rows", "scale", "rounds")},
    }
    print(json.dumps(about | figures))


if __name__ == "__main__":
    define_flags()
    command.run(main, "batch")
