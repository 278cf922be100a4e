r"""Answers held to schemas: what it costs, and whether any answer that is whole breaks its schema.

    python -m benchmarks.structured
    python -m benchmarks.structured --layers 4 --answers 16 --tokens 24 --rounds 3
    python -m benchmarks.structured --checkpoint FOLDER --answers 200
    python -m benchmarks.structured --layers 2 --answers 0 --only-held

Prints a table and a line of JSON: compiling a form and its first mask, over 50 schemas; the time per step with every
row held and with none, greedy and drawn, in turns; that of rows that are not held, alone and with one held row beside
them; and --answers answers drawn under the schemas at temperature 2, each looked at with jsonschema. Without
--checkpoint the model is tiny.json's on random weights, or a few layers of the 20b's. These end nothing by themselves:
biases make the ends of reasoning, texts, lists and objects likely.
"""

import collections
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from benchmarks import true_width
from benchmarks.schemas import SCHEMAS
from converters.random_checkpoint import write_checkpoint
from gptoss_jax.cli import command
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.engine.scheduler import Decode, Scheduler
from gptoss_jax.errors import GptossError
from gptoss_jax.files import of_configs
from gptoss_jax.grammar.compiled import CompiledForm, compile_form
from gptoss_jax.grammar.forms import Body, answer_form
from gptoss_jax.grammar.verdict import check_json, verdict
from gptoss_jax.harmony import messages, render, tokenizer
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.settings import ResponseFormat, Settings
from gptoss_jax.harmony.tool_schemas import StrictTool
from gptoss_jax.runtime import loading
from gptoss_jax.runtime.answers import collect
from gptoss_jax.runtime.language_model import LanguageModel

ROWS = 16
MOST_TOKENS = 300
TEMPERATURE = 2.0
_ENDS = {'"': 18.0, "}": 18.0, "]": 18.0, '"}': 18.0, '",': 18.0, ",": 16.0, ":": 16.0}
FLAGS = flags.FLAGS


class Drawn(NamedTuple):
    """An answer, and what it was held to."""

    form: CompiledForm
    answer: Answer

    @property
    def status(self) -> str:
        """That of its verdict; "invalid" also where jsonschema finds what the grammar should have held."""
        found = verdict(self.form, self.answer)["status"]
        if found != "valid":
            return found
        (message,) = (m for m in self.answer.messages if m.kind in ("final", "call"))
        body = self.form.form.final if message.kind == "final" else self.form.form.calls[0][1]
        assert isinstance(body, Body)
        fault = check_json(body, message.content)
        return "valid" if fault is None else fault.status


def settings_of(schema: Any, number: int) -> Settings:
    """Every other schema is a response format, the others are a strict function's parameters where they can be."""
    if number % 2 and schema.get("type") == "object" and schema.get("properties"):
        return Settings(tools=(StrictTool(name="f", description="", parameters=dict(schema)),))
    return Settings(response_format=ResponseFormat("answer", dict(schema)))


def form_of(schema: Any, number: int) -> CompiledForm:
    """What `settings_of` holds an answer to."""
    form = answer_form(settings_of(schema, number))
    if form is None:
        raise GptossError(f"schema {number} holds nothing")
    # A final answer of any text proves nothing: of a function's form the call alone is left.
    form = dataclasses.replace(form, final=None) if form.final == "free" else form
    return compile_form(form, tokenizer.load_tokenizer())


def ending_sampling(seed: int) -> SamplingParams:
    """At random, with ends likely enough that most answers come to one."""
    words = tokenizer.load_tokenizer()
    biases = {words.encode(text)[0]: bias for text, bias in _ENDS.items()}
    return SamplingParams(temperature=TEMPERATURE, seed=seed, logit_bias={**biases, tokenizer.END: 24.0})


def draw_answers(engine: Engine, count: int, most_tokens: int = MOST_TOKENS) -> Iterator[Drawn]:
    """`count` answers under the schemas in turn, each with a seed of its own."""
    words = tokenizer.load_tokenizer()
    forms = [form_of(schema, number) for number, schema in enumerate(SCHEMAS)]
    prompt = tuple(render.render([messages.user("Answer.")], Settings()))
    streams, requests = [AnswerStream(words) for _ in range(count)], []
    for i, stream in enumerate(streams):
        form, stop_ids = forms[i % len(forms)], engine.config.stop_ids
        requests.append(Request(prompt, stop_ids, most_tokens, ending_sampling(i), stream.ends_at, form))
    for i, sample in enumerate(collect(engine, requests, streams)):
        yield Drawn(forms[i % len(forms)], sample.answer)


# ---- what it costs ----


def compile_times() -> dict[str, float]:
    """Milliseconds of a form that nobody has compiled before, up to its first mask."""
    words, seconds = tokenizer.load_tokenizer(), []
    compile_form.cache_clear()
    form_of({"type": "string"}, 0)  # the vocabulary, once a process
    for number, schema in enumerate(SCHEMAS):
        form = answer_form(settings_of(schema, number))
        assert form is not None
        began = time.perf_counter()
        compile_form(form, words).start().advance(())
        seconds.append(time.perf_counter() - began)
    p50, p95 = np.percentile(np.array(seconds) * 1e3, (50, 95)).tolist()
    return {"compile_ms_p50": p50, "compile_ms_p95": p95}


class _StepByStep(Scheduler):
    """Dispatches of one step, as held slots take them: what is left beside them is the masks' own."""

    def next(self, running):
        """See `Scheduler`."""
        found = super().next(running)
        return Decode(1) if isinstance(found, Decode) else found


class Seconds(NamedTuple):
    """What a step takes."""

    cpu: float  # of all threads: masks hide behind nothing
    clock: float  # which says how busy the machine is, too

    @classmethod
    def now(cls) -> "Seconds":
        """Of the process so far."""
        return cls(time.process_time(), time.perf_counter())


def _seconds_per_step(
    engine: Engine, constraints: Sequence[Any], tokens: int, counted: range, sampling: SamplingParams
) -> Seconds:
    """Time in which each row in `counted` gets a token, from where all of them decode to their ends."""
    prompt = tuple(render.render([messages.user("Answer.")], Settings()))
    numbers = [
        engine.submit(Request(prompt, (), tokens, dataclasses.replace(sampling, seed=i), constraint=constraint))
        for i, constraint in enumerate(constraints)
    ]
    unfinished, begun = {numbers[i] for i in counted}, set[int]()
    count, began = 0, Seconds.now()
    while unfinished:
        all_decode = len(begun) == len(numbers)
        for event in engine.tick():
            begun.add(event.request_id)
            if event.request_id in unfinished and all_decode:
                count += len(event.token_ids)
            if event.finish_reason:
                unfinished.discard(event.request_id)
        began = began if all_decode else Seconds.now()
    ended = Seconds.now()
    for number in numbers:
        engine.cancel(number)
    if not count:
        raise GptossError(f"rows ended before all had begun: raise --tokens, which is {tokens}")
    return Seconds(*((end - begin) * len(counted) / count for begin, end in zip(began, ended, strict=True)))


def token_times(
    model: LanguageModel, engine: Engine, tokens: int, rounds: int, *, only_held: bool = False
) -> dict[str, float]:
    """Milliseconds per step and what held rows cost, medians of the rounds, and medians of the rounds' own ratios.

    Held rows write a text of a schema, which needs a mask of 200,000 ids for every token. Rows that are greedy, and
    those drawn from the whole vocabulary. Beside free rows whose dispatches have as many steps as they like, there are
    free ones a step at a time, as held rows take them. `only_held`: nothing but held rows and free ones, greedy.
    """
    text = answer_form(Settings(response_format=ResponseFormat("t", {"type": "string", "minLength": 10**6})))
    assert text is not None
    whole = compile_form(text, tokenizer.load_tokenizer())
    everything = range(engine.engine_config.slots)
    step_by_step = model.engine(engine.engine_config, scheduler=_StepByStep(), compiled=engine.runner.compiled)
    nobody, all_held = [None for _ in everything], [_Writing(whole) for _ in everything]
    cases: dict[str, tuple[Engine, list[Any], range]] = {
        "free": (engine, nobody, everything),
        "stepwise": (step_by_step, nobody, everything),
        "held": (engine, all_held, everything),
        "others": (engine, [*nobody[1:], all_held[0]], everything[:-1]),
    }
    samplings = {"greedy": SamplingParams(temperature=0.0), "drawn": SamplingParams()}
    if only_held:
        cases, samplings = {name: cases[name] for name in ("free", "held")}, {"greedy": samplings["greedy"]}
    found: dict[str, float] = {}
    for kind, sampling in samplings.items():
        times: dict[str, list[Seconds]] = collections.defaultdict(list)
        for on, constraints, counted in cases.values():  # compiles
            _seconds_per_step(on, constraints, tokens, counted, sampling)
        for _ in range(rounds):
            for case, (on, constraints, counted) in cases.items():
                times[case].append(_seconds_per_step(on, constraints, tokens, counted, sampling))
        found |= {f"{kind}_{case}_cpu_ms": statistics.median(x.cpu for x in some) * 1e3 for case, some in times.items()}
        for case, beside in (("held", "free"), ("held", "stepwise"), ("others", "free")):
            if {case, beside} <= cases.keys():
                found |= _overheads(f"{kind}_{case}_beside_{beside}", times[case], times[beside])
    return found


def _overheads(name: str, some: Sequence[Seconds], others: Sequence[Seconds]) -> dict[str, float]:
    """Percent, of either time."""
    pairs = list(zip(some, others, strict=True))
    return {
        f"{name}_{field}_percent": 100
        * (statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs) - 1)
        for field in Seconds._fields
    }


class _Writing:
    """A form whose answers begin inside the text."""

    def __init__(self, form: CompiledForm):
        self._form, self.num_ids, self.end_ids = form, form.num_ids, form.end_ids

    def start(self) -> Any:
        matcher = self._form.start()
        words = tokenizer.load_tokenizer()
        matcher.advance(words.encoding.encode('<|channel|>final<|message|>"', allowed_special="all"))
        return matcher


# ---- the command ----


def define_flags() -> None:
    """This benchmark's flags."""
    flags.DEFINE_string("checkpoint", None, "FOLDER: Weights; left out: random ones of --config.")
    flags.DEFINE_string(
        "config", None, "FILE: Sizes of the random weights; left out: tiny.json, with --layers the 20b's."
    )
    flags.DEFINE_integer("layers", None, "N: Layers that the config is cut to, an even number.", lower_bound=2)
    flags.DEFINE_integer("answers", 1000, "N: Answers to draw and look at.", lower_bound=0)
    flags.DEFINE_integer("rows", ROWS, "N: Rows at once.", lower_bound=2)
    flags.DEFINE_integer("tokens", 64, "N: Tokens of each row that are timed.", lower_bound=2)
    flags.DEFINE_integer("rounds", 5, "N: Times that each is timed.", lower_bound=1)
    flags.DEFINE_bool("only_held", False, "Time held rows and free ones alone, greedy.")


def measure(
    model: LanguageModel, *, answers: int, rows: int, tokens: int, rounds: int, only_held: bool
) -> dict[str, Any]:
    """All figures."""
    engine = model.engine(EngineConfig(slots=rows, max_context_tokens=1024, prefix_snapshots=0))
    found: dict[str, Any] = {**compile_times(), **token_times(model, engine, tokens, rounds, only_held=only_held)}
    drawn = list(draw_answers(engine, answers))
    found["answers"] = dict(collections.Counter(each.status for each in drawn))
    wrong = [each for each in drawn if each.status not in ("valid", "cut")]
    return found | {"invalid": [each.answer.parsed.text for each in wrong[:3]]}


def _raw_config() -> dict[str, Any]:
    if FLAGS.layers is not None:
        return true_width.raw_config(FLAGS.layers, Path(FLAGS.config or true_width.CONFIG))
    return json.loads(Path(FLAGS.config or of_configs("configs/tiny.json")).read_text())


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    if arguments:
        raise GptossError(f"{arguments[0]}: expected flags only")
    load_average = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        source = FLAGS.checkpoint
        if source is None:
            source = Path(folder) / "model"
            write_checkpoint(source, _raw_config())
        model = loading.load(source)
        found = measure(
            model,
            answers=FLAGS.answers,
            rows=FLAGS.rows,
            tokens=FLAGS.tokens,
            rounds=FLAGS.rounds,
            only_held=FLAGS.only_held,
        )
    for name, value in found.items():
        print(f"{name:<44}{value:.3f}" if isinstance(value, float) else f"{name:<44}{value}")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    about = {"machine": machine, "load_average_before": load_average, "rows": FLAGS.rows, "kernels": model.kernels}
    print(json.dumps(about | found, ensure_ascii=False))


if __name__ == "__main__":
    define_flags()
    command.run(main, "structured")
