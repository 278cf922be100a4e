"""Answers one prompt, `--n` times: from the flags to what is printed, and the exit code."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from absl import flags

from gptoss_jax import whole_files
from gptoss_jax.cli import (
    answer_report,
    command,
    hosts,
    interrupts,
    model_flags,
    profiling,
    prompts,
    sampling_flags,
    tool_answering,
    tool_flags,
)
from gptoss_jax.cli.answer_view import AnswerView, form_remarks, remarks
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.engine.request import Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.errors import GptossError
from gptoss_jax.grammar.compiled import CompiledForm
from gptoss_jax.harmony import messages, render
from gptoss_jax.harmony.answer import AnswerStream
from gptoss_jax.harmony.parsed import Delta
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.runtime.answers import Sample, collect
from gptoss_jax.tools.rounds import Rounds
from gptoss_jax.tools.toolbox import Toolbox

if TYPE_CHECKING:
    import gptoss_jax.engine.engine

MAX_SLOTS = 16  # answers to one prompt that run at once
MAX_ANSWERS = 1024


def answer(options: flags.FlagValues, arguments: Sequence[str], echoed: Sequence[str]) -> int:
    """Answers the prompt that the flags give.

    Args:
        options: all flags of `gptoss_jax.generate`.
        arguments: the positional ones.
        echoed: names of the flags that --json repeats.

    Returns:
        The exit code.

    Raises:
        GptossError: flags, files or weights that are not what they should be.
        BrokenPipeError: nobody reads stdout any more.
    """
    sampling = sampling_flags.sampling(options)
    if not 1 <= options.n <= MAX_ANSWERS:
        raise GptossError(f"--n is {options.n}, expected 1 to {MAX_ANSWERS}")
    profiling.check(options)
    if options.save:
        whole_files.check_can_write(options.save)
    screen = Screen(quiet=options.quiet)
    model_flags.default_to_demo_model(options, screen)
    with tool_flags.opened(options) as toolbox:
        return _answer(options, screen, arguments, sampling, echoed, toolbox)


def _answer(
    options: flags.FlagValues,
    screen: Screen,
    arguments: Sequence[str],
    sampling: SamplingParams,
    echoed: Sequence[str],
    toolbox: Toolbox | None,
) -> int:
    """The prompt and its requests, checked before the model is loaded; gives the exit code."""
    config = model_flags.config(options)
    prompt = prompts.read(options, arguments, toolbox)
    request = sampling_flags.request(options, config, prompt.token_ids, sampling, prompt.form)
    tokenizer, requests = load_tokenizer(options.vocab), []
    streams = [AnswerStream(tokenizer, stop_strings=options.stop, raw=options.raw) for _ in range(options.n)]
    for i, stream in enumerate(streams):
        seeded = dataclasses.replace(sampling, seed=(sampling.seed + i) % 2**32)
        requests.append(dataclasses.replace(request, sampling=seeded, ends_at=stream.ends_at))
    return _run(options, screen, prompt, requests, streams, echoed, toolbox)


def _run(
    options: flags.FlagValues,
    screen: Screen,
    prompt: prompts.Prompt,
    requests: Sequence[Request],
    streams: Sequence[AnswerStream],
    echoed: Sequence[str],
    toolbox: Toolbox | None,
) -> int:
    """Loads the model, and shows and keeps the answers to `requests`; gives the exit code."""
    returns = options.n > 1 or toolbox is not None  # to the same prompt
    engine_config = sampling_flags.engine_config(options, min(options.n, MAX_SLOTS), prefix_cache=returns)
    language_model, engine = model_flags.load_for_answers(options, screen, engine_config)
    hosts.check_same("the prompt", [(request.token_ids, request.stop_ids, request.sampling) for request in requests])
    compile_seconds, prompt_tokens = engine.runner.compile_seconds, len(prompt.token_ids)
    acting = prompts.settings_line(prompt.settings, requests[0].sampling.seed)
    screen.note(f"compiled in {compile_seconds:.1f} s; prompt of {prompt_tokens} tokens; {acting}")
    for remark in (*prompt.remarks, *(prompt.form.remarks if prompt.form else ())):
        screen.say(remark)
    for call in render.calls_without_result(prompt.conversation or []):
        screen.say(f"the conversation holds a call to {call} and no result of it (--tool-results gives one)")
    turn: Rounds | None = None
    with interrupts.noted() as pressed:  # until what had come is printed and saved
        stopped = hosts.agreed(lambda: pressed() or screen.reader_left)
        with profiling.traced(options, screen):
            if toolbox is None:
                samples = _collected(options, screen, prompt, requests, streams, engine, stopped)
            else:
                samples, turn = tool_answering.collected(options, screen, prompt, requests[0], engine, toolbox, stopped)
        was_stopped = stopped()  # in any process; from here on each is on its own
        at_length = options.json or options.stats
        statistics = answer_report.measure(
            language_model,
            compile_seconds,
            prompt_tokens,
            samples if turn is None else answer_report.one_after_another(samples),
            cached_prompt_tokens=engine.statistics.cached_prompt_tokens,
            with_bandwidth=at_length,
        )
        if options.json:
            settings = answer_report.settings_document(
                options, echoed, prompt, requests[0], deterministic=engine.runner.deterministic
            )
            screen.document(answer_report.document(settings, prompt, samples, statistics, turn))
        screen.note(answer_report.statistics_line(statistics, at_length=at_length))
        if options.save and hosts.is_first():
            spoken = prompt.conversation_with(samples[0].answer) if turn is None else turn.messages
            messages.write_messages(options.save, spoken)
    screen.check_reader()
    if any(sample.answer.finish_reason in ("error", "constraint") for sample in samples):
        return command.EXIT_CODE
    return interrupts.EXIT_CODE if pressed() or was_stopped else 0


def _collected(
    options: flags.FlagValues,
    screen: Screen,
    prompt: prompts.Prompt,
    requests: Sequence[Request],
    streams: Sequence[AnswerStream],
    engine: "gptoss_jax.engine.engine.Engine",
    stopped: Callable[[], bool],
) -> list[Sample]:
    """The answers, each shown as soon as it can be."""
    shown = _Answers(screen, options, [request.sampling.seed for request in requests], prompt.form)
    samples: list[Sample] = []
    for sample in collect(engine, requests, streams, shown.show, stopped):
        shown.finish(sample)
        samples.append(sample)
    return samples


class _Answers:
    """What people see of `--n` answers: a single one as it comes, several each when it and those before have ended."""

    def __init__(self, screen: Screen, options: flags.FlagValues, seeds: Sequence[int], form: CompiledForm | None):
        self._screen, self._options, self._seeds, self._form = screen, options, seeds, form
        self._finished = 0
        self._view = self._new_view()

    def _new_view(self) -> AnswerView:
        options = self._options
        return AnswerView(self._screen, show_reasoning=options.show_reasoning, print_calls=not options.raw)

    def show(self, deltas: list[Delta]) -> None:
        if len(self._seeds) == 1 and not self._options.json:
            self._view.show(deltas)

    def finish(self, sample: Sample) -> None:
        """Shows the answer, or its end, and what a reader should know of it."""
        several, i = len(self._seeds) > 1, self._finished
        label = f"answer {i + 1} of {len(self._seeds)} (seed {self._seeds[i]})"
        if several and not self._options.json:
            self._screen.say(f"{label}:")
            self._view = self._new_view()
            self._view.show(sample.deltas)
        if not self._options.json:
            self._view.finish(sample.answer)
        hidden = not (self._options.show_reasoning or self._options.json or self._options.raw)
        found = [
            *remarks(sample.answer, "--show-reasoning" if hidden else ""),
            *form_remarks(self._form, sample.answer),
        ]
        for remark in found:
            self._screen.say(f"{label}: {remark}" if several and self._options.json else remark)
        self._finished += 1
