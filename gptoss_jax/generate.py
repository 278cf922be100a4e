r"""Answers a prompt, or talks with you.

    python -m gptoss_jax.generate --checkpoint DIR "Why is the sky blue?"
    python -m gptoss_jax.generate --checkpoint DIR --chat
    python -m gptoss_jax.generate --checkpoint DIR --prompt-file q.txt --json
    git diff | python -m gptoss_jax.generate --checkpoint DIR --system "Review."

A model that may call tools, and what it says to their results:

    python -m gptoss_jax.generate --checkpoint DIR --tools tools.json \
        --save talk.json "Do I need an umbrella in Paris?"
    python -m gptoss_jax.generate --checkpoint DIR --messages talk.json \
        --tool-results results.json

The answer goes to stdout as it comes: the final answer alone, or the calls of
a model that stopped to call tools, one JSON object a line. Reasoning
(--show-reasoning), statistics and progress go to stderr. --json prints one
document instead, with all that was asked, drawn and parsed.

Exit codes: 0 the answer ended, or was cut at a limit (stderr says so, and so
does finish_reason in --json); 2 bad input, or a model whose numbers are not
finite; 130 interrupted with Ctrl-C; 141 the reader of stdout went away. What
had come is printed, and written by --save, in each case.

Deterministic runs (the default on CPUs) give a request the same tokens and log
probabilities, bit by bit, alone and in any batch. With --nodeterministic (the
default on GPUs and TPUs) rows share their arithmetic on any kernels: the
weights are read once for all of them, and where kernels do not keep rows apart
the last bits are given up. Sums round differently with the number of rows, log
probabilities move by about 0.01, and now and then another token is drawn
(docs/generate.md has the measurement).
"""

import dataclasses
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gptoss_jax.errors import GptossError

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `command.run`: these imports would swallow an exception

from absl import flags
from openai_harmony import Message

from gptoss_jax.cli import chat, command
from gptoss_jax.cli import options as request_flags
from gptoss_jax.cli.terminal import AnswerView, Screen, interrupted_late, interruptible, load_model, remarks
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.request import Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.harmony import messages, render, tokenizer
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.messages import Conversation
from gptoss_jax.harmony.parser import Delta
from gptoss_jax.harmony.render import Settings
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.runtime import language_model as runtime
from gptoss_jax.runtime.answers import Sample, collect
from gptoss_jax.runtime.language_model import LanguageModel

PROMPTS = ("prompt", "prompt_file", "token_ids")
ASKED = (*PROMPTS, "messages", "tool_results", "chat")
SHOWN = ("show_reasoning", "json", "raw", "save", "n")
_APART = (("raw", "json"), ("raw", "show_reasoning"))
_TOGETHER = (("top_logprobs", "json"), ("tool_results", "messages"))
SECTIONS = {
    "What is asked (text on stdin where none of these is given)": ASKED,
    "What the model is told": request_flags.PROMPT_FLAGS,
    "How tokens are drawn": request_flags.SAMPLING_FLAGS,
    "What is shown and kept": SHOWN,
    "Model and machine": (*runtime.FLAGS, *request_flags.ENGINE_FLAGS),
}
_WITHOUT_CHAT = ("prompt", "prompt_file", "tool_results", "token_ids", "json", "raw", "save", "n", "top_logprobs")
MAX_ROWS = 16  # answers to one prompt that run at once
MAX_ANSWERS = 1024


def define_flags() -> None:
    """This command's flags, the shared ones among them."""
    flags.DEFINE_string("prompt", None, "TEXT: What you say; the same as giving it without a flag.")
    flags.DEFINE_string("prompt_file", None, "FILE: A text file with what you say; - is stdin.")
    flags.DEFINE_string(
        "messages", None, "FILE: A conversation to go on from, JSON: OpenAI-style, harmony's or --save's."
    )
    flags.DEFINE_string("tool_results", None, "FILE: What the calls at the end of --messages gave, JSON.")
    flags.DEFINE_string("token_ids", None, "IDS: The whole prompt as token ids in place of text: 1,2,3.")
    flags.DEFINE_bool("chat", False, "Talk: a session that remembers; /help lists its commands.")

    flags.DEFINE_bool("show_reasoning", False, "Show the model's reasoning, dim, on stderr.")
    flags.DEFINE_bool("json", False, "Print one JSON document with everything.")
    flags.DEFINE_bool("raw", False, "Print all that comes, as it comes, control tokens spelled out.")
    flags.DEFINE_string(
        "save", None, "FILE: Where to write the conversation (of --n answers, the first) as JSON, for --messages."
    )
    flags.DEFINE_integer("n", 1, "N: Answers to the prompt; the second is drawn with seed + 1, and so on.")
    request_flags.define_flags()
    runtime.define_flags()


class Prompt(NamedTuple):
    """What the model is to go on from."""

    token_ids: list[int]
    text: str | None = None  # what was said last, if it was said as text
    conversation: list[Message] | None = None  # what they render, with what is put in front; None: plain ids
    told: Mapping[str, Any] = {}  # fields of `Settings` that acted


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    options = flags.FLAGS
    screen, words = Screen(), tokenizer.load_tokenizer(options.vocab)
    told, drawn = request_flags.settings(options), request_flags.sampling(options)
    request_flags.refuse_together(options, *_APART)
    if options.chat:
        _chat(options, arguments, screen, words, told, drawn)
    else:
        request_flags.refuse_without(options, *_TOGETHER)
        prompt = read_prompt(options, arguments, told)
        _answer(options, screen, words, prompt, drawn)


def _answer(options: flags.FlagValues, screen: Screen, words: Tokenizer, prompt: Prompt, drawn: SamplingParams) -> None:
    """One prompt, `--n` answers."""
    if not 1 <= options.n <= MAX_ANSWERS:
        raise GptossError(f"--n is {options.n}, expected 1 to {MAX_ANSWERS}")
    if options.save:
        messages.check_can_write(options.save)
    config = runtime.config_from_flags(options)
    seeds = [dataclasses.replace(drawn, seed=(drawn.seed + i) % 2**32) for i in range(options.n)]
    streams = [AnswerStream(words, stop_strings=options.stop, raw=options.raw) for _ in seeds]
    requests = [
        dataclasses.replace(request_flags.request(options, config, prompt.token_ids, seed), ends_at=stream.ends_at)
        for seed, stream in zip(seeds, streams, strict=True)
    ]
    language_model, runner = load(options, screen, rows=min(options.n, MAX_ROWS))
    screen.say(f"compiled in {runner.runner.compile_seconds:.1f} s; prompt of {len(prompt.token_ids)} tokens")
    for call in render.calls_without_result(prompt.conversation or []):
        screen.say(f"the conversation holds a call to {call} and no result of it (--tool-results gives one)")
    shown = _Shown(screen, options, [request.sampling.seed for request in requests])
    samples: list[Sample] = []
    with interruptible(insisting=False) as pressed:  # until what had come is printed and saved
        for sample in collect(runner, requests, streams, shown.show, lambda: pressed() or screen.reader_left):
            shown.finish(sample)
            samples.append(sample)
        if options.save:
            messages.write_messages(options.save, conversation(prompt, samples[0].answer))
        statistics = measure(language_model, runner, len(prompt.token_ids), samples)
        if options.json:
            screen.document(document(options, runner, prompt, requests, samples, statistics))
        screen.say(statistics_line(statistics))
    screen.check_reader()
    if any(sample.answer.finish_reason == "error" for sample in samples):
        sys.exit(command.EXIT_CODE)
    if pressed():
        sys.exit(command.INTERRUPTED)


class _Shown:
    """What people see of `--n` answers: a single one as it comes, several each when it and those before have ended."""

    def __init__(self, screen: Screen, options: flags.FlagValues, seeds: Sequence[int]):
        self._screen, self._options, self._seeds = screen, options, seeds
        self._answers = 0
        self._view = self._new_view()

    def _new_view(self) -> AnswerView:
        options = self._options
        return AnswerView(self._screen, show_reasoning=options.show_reasoning, print_calls=not options.raw)

    def show(self, deltas: list[Delta]) -> None:
        if len(self._seeds) == 1 and not self._options.json:
            self._view.show(deltas)

    def finish(self, sample: Sample) -> None:
        """Shows the answer, or its end, and what is to be said of it."""
        several, i = len(self._seeds) > 1, self._answers
        label = f"answer {i + 1} of {len(self._seeds)} (seed {self._seeds[i]})"
        if several and not self._options.json:
            self._screen.say(f"{label}:")
            self._view = self._new_view()
            self._view.show(sample.deltas)
        if not self._options.json:
            self._view.finish(sample.answer)
        hidden = not (self._options.show_reasoning or self._options.json or self._options.raw)
        for remark in remarks(sample.answer, "--show-reasoning" if hidden else ""):
            self._screen.say(f"{label}: {remark}" if several and self._options.json else remark)
        self._answers += 1


def _chat(
    options: flags.FlagValues,
    arguments: Sequence[str],
    screen: Screen,
    words: Tokenizer,
    told: Settings,
    drawn: SamplingParams,
) -> None:
    """A session of prompts and answers."""
    wrong = [command.spelled(flag) for flag in _WITHOUT_CHAT if options[flag].present]
    if wrong == ["--save"] and not arguments:
        raise GptossError("--chat and --save: leave --save out; /save FILE in the session writes the conversation")
    if wrong or arguments:
        raise GptossError(
            f"--chat and {[*wrong, 'a prompt'][0]}: leave one of them out; a chat asks for prompts itself"
        )
    before = messages.read_messages(options.messages) if options.messages else Conversation(())
    told = request_flags.merge(told, before, options)
    config = runtime.config_from_flags(options)
    request = request_flags.request(options, config, [tokenizer.START], drawn)
    AnswerStream(words, stop_strings=options.stop)  # refuses what it cannot look for
    _, runner = load(options, screen, rows=1)
    talk = chat.ChatSession(runner, words, request, tuple(options.stop), told, list(before.messages), options.vocab)
    chat.run(talk, screen, show_reasoning=options.show_reasoning)


# ---- the prompt ----


def read_prompt(options: flags.FlagValues, arguments: Sequence[str], told: Settings) -> Prompt:
    """What the flags, the words behind them, or stdin ask.

    Raises:
        GptossError: nothing, or more than one thing; a file that is not what it should be.
    """
    given = request_flags.only_source(options, arguments, "prompt", PROMPTS)
    if given is None and not options.messages and not sys.stdin.isatty():
        given = "prompt_file", "-"
    match given:
        case ("token_ids", _):
            return Prompt(_plain_ids(options))
        case ("prompt_file", path):
            return _render(options, request_flags.read_text(path), told)
        case _:
            return _render(options, given[1] if given else None, told)


def _plain_ids(options: flags.FlagValues) -> list[int]:
    for flag in (*request_flags.PROMPT_FLAGS, "messages", "tool_results", "save"):
        if options[flag].present:
            raise GptossError(f"--token-ids is the whole prompt, so {command.spelled(flag)} has no place in it")
    return list(request_flags.ids("token_ids", options.token_ids.split(",")))


def _render(options: flags.FlagValues, text: str | None, told: Settings) -> Prompt:
    """The conversation in --messages, the results of its calls, and what is said next."""
    before = messages.read_messages(options.messages) if options.messages else Conversation(())
    said = list(before.messages)
    if options.tool_results:
        said += messages.read_tool_results(options.tool_results, before)
    if text is not None:
        said.append(messages.user(text))
    if not said:
        raise GptossError("no prompt: give one in quotes, or --prompt-file, --messages, --token-ids, --chat, or stdin")
    told = request_flags.merge(told, before, options)
    ids = render.render(said, told, vocab_path=options.vocab)
    return Prompt(ids, text, render.with_opening(said, told), render.acting(told, said))


# ---- the run ----


def load(options: flags.FlagValues, screen: Screen, rows: int) -> tuple[LanguageModel, Engine]:
    """The model, and an engine of at least so many rows, with a progress bar for each."""
    with interrupted_late() as pressed:
        language_model = load_model(screen, options, pressed, if_random="the text is noise, not an answer")
        shards = language_model.sharding.size("batch")
        with screen.progress("compiling", pressed) as report:
            engine_config = request_flags.engine_config(options, slots=-(-rows // shards) * shards)
            return language_model, language_model.engine(engine_config, report=report)


# ---- what is said of it ----


def measure(
    language_model: LanguageModel, runner: Engine, prompt_tokens: int, samples: Sequence[Sample]
) -> dict[str, float | int | None]:
    """Seconds, rates over all answers, and the share of what memory bandwidth allows by the cost model."""
    tokens = [len(sample.answer.parsed.token_ids) for sample in samples]
    steps = sum(tokens) - len(tokens)
    first = min(sample.first_token_seconds for sample in samples)
    seconds = max(sample.last_token_seconds for sample in samples) - first
    rate = steps / seconds if steps > 0 and seconds > 0 else None
    statistics: dict[str, float | int | None] = {
        "prompt_tokens": prompt_tokens,
        "answer_tokens": sum(tokens),
        "load_seconds": round(language_model.load_seconds, 3),
        "compile_seconds": round(runner.runner.compile_seconds, 3),
        "first_token_seconds": round(first, 3),
        "decode_tokens_per_second": rate and round(rate, 3),
    }
    if rate and len(samples) == 1:
        devices = language_model.mesh.devices.flat
        memories = 1 if devices[0].platform == "cpu" else len(devices)  # a CPU's devices share one
        bandwidth = runtime.read_bandwidth(devices[0]) * memories
        context = prompt_tokens + steps // 2
        step_bytes = language_model.decode_bytes(1, context)
        statistics["read_bandwidth_gb_per_second"] = round(bandwidth / 1e9, 2)
        statistics["share_of_bandwidth_limit"] = round(rate * step_bytes / bandwidth, 4)
    return statistics


def document(
    options: flags.FlagValues,
    runner: Engine,
    prompt: Prompt,
    requests: Sequence[Request],
    samples: Sequence[Sample],
    statistics: dict[str, float | int | None],
) -> dict[str, Any]:
    """What --json prints. `conversation` goes on from the first answer, and is what --messages takes back."""
    echoed = [name for names in SECTIONS.values() for name in names]
    return {
        "settings": {name: options[name].value for name in echoed}
        | request_flags.as_acted(options, prompt.told, requests[0])
        | {"prompt": prompt.text, "deterministic": runner.runner.deterministic},
        "prompt_token_ids": prompt.token_ids,
        "answers": [sample.answer.document() for sample in samples],
        "conversation": messages.to_json(conversation(prompt, samples[0].answer)),
        "statistics": statistics,
    }


def conversation(prompt: Prompt, answer: Answer) -> list[Message]:
    """The prompt's messages and the answer's; none behind plain token ids."""
    if prompt.conversation is None:
        return []
    return [*prompt.conversation, *messages.from_parsed(answer.history())]


def statistics_line(statistics: dict[str, Any]) -> str:
    """Times and rates in words."""
    line = f"first token after {statistics['first_token_seconds']:.2f} s; {statistics['answer_tokens']} tokens"
    if statistics["decode_tokens_per_second"]:
        line += f", {statistics['decode_tokens_per_second']:.2f} tokens/s"
    if "share_of_bandwidth_limit" in statistics:
        line += (
            f", {100 * statistics['share_of_bandwidth_limit']:.1f} % of what "
            f"{statistics['read_bandwidth_gb_per_second']:.1f} GB/s of measured read bandwidth allow"
        )
    return line


def cli() -> None:
    """The console script."""
    define_flags()
    command.run(main, "generate", SECTIONS)


if __name__ == "__main__":
    cli()
