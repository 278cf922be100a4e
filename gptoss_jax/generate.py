r"""Answers a prompt, or talks with you.

    python -m gptoss_jax.generate --checkpoint DIR "Why is the sky blue?"
    python -m gptoss_jax.generate --checkpoint DIR --chat
    python -m gptoss_jax.generate --checkpoint DIR --prompt-file q.txt --json
    git diff | python -m gptoss_jax.generate --checkpoint DIR --system "Review."

A model that may call tools, and what it says to their results:

    python -m gptoss_jax.generate --checkpoint DIR --tools tools.json \
        --save chat.json "Do I need an umbrella in Paris?"
    python -m gptoss_jax.generate --checkpoint DIR --messages chat.json \
        --tool-results results.json

A model whose calls are carried out here, until it answers:

    python -m gptoss_jax.generate --checkpoint DIR --tool python "What is 2^89?"
    python -m gptoss_jax.generate --checkpoint DIR --mcp 'my-server --flag' \
        "What is on my calendar?"

The answer goes to stdout as it comes: the final answer alone, or the calls of
a model that stopped to call tools, one JSON object a line. Reasoning
(--show-reasoning), statistics and progress go to stderr. --json prints one
document instead, with all that was asked, drawn and parsed.

Exit codes: 0 the answer ended, or was cut at a limit (stderr says so, and so
does finish_reason in --json); 2 bad input, or a model whose numbers are not
finite; 130 interrupted with Ctrl-C; 141 the reader of stdout went away. What
had come is printed, and written by --save, in each case. Over several hosts 75:
another process is lost, which a line names; what was printed is there.

Deterministic runs (the default on CPUs) give a request the same tokens and log
probabilities, bit by bit, alone and in any batch. With --nodeterministic (the
default on GPUs and TPUs) weights are read once for all requests on any kernels,
and where kernels are not batch invariant the last bits are given up. Sums round
differently with the size of the batch, log probabilities move by about 0.01,
and now and then another token is drawn (docs/generate.md has the measurement).
"""

if __name__ == "__main__":  # before what takes long to import
    from gptoss_jax.cli import interrupts

    interrupts.end_at_once()

import sys

from absl import flags

from gptoss_jax.cli import command, flag_values, model_flags, profiling, prompt_flags, sampling_flags, tool_flags

SECTIONS = {
    "What is asked (text on stdin where none of these is given)": (
        "prompt",
        "prompt_file",
        "token_ids",
        "messages",
        "tool_results",
        "chat",
    ),
    "What the system and developer messages say": (*prompt_flags.PROMPT_FLAGS, "tool_choice"),
    "What it may call that is run here": tool_flags.TOOL_FLAGS,
    "How tokens are drawn": sampling_flags.SAMPLING_FLAGS,
    "What is shown and kept": ("show_reasoning", "json", "raw", "stats", "quiet", "save", "n"),
    "Model and machine": (*model_flags.MODEL_FLAGS, *sampling_flags.ENGINE_FLAGS, *profiling.PROFILE_FLAGS),
}


def define_flags() -> None:
    """This command's flags, the shared ones among them."""
    flags.DEFINE_string("prompt", None, "TEXT: What you say; the same as giving it without a flag.")
    flags.DEFINE_string("prompt_file", None, "FILE: A text file with what you say; - is stdin.")
    flags.DEFINE_string(
        "messages", None, "FILE: A conversation to go on from, JSON: OpenAI-style, harmony's or --save's."
    )
    flags.DEFINE_string("tool_results", None, "FILE: What the calls at the end of --messages gave, JSON.")
    flags.DEFINE_string("token_ids", None, "IDS: The whole prompt as token ids in place of text: 1,2,3.")
    flags.DEFINE_bool("chat", False, "A session of prompts and answers that remembers; /help lists its commands.")

    flags.DEFINE_string("tool_choice", "auto", "NAME: Which of --tools it has to call: auto, none, required, or one.")

    flags.DEFINE_bool("show_reasoning", False, "Show the model's reasoning, dim, on stderr.")
    flags.DEFINE_bool("json", False, "Print one JSON document with everything.")
    flags.DEFINE_bool("raw", False, "Print all that comes, as it comes, control tokens spelled out.")
    flags.DEFINE_bool("stats", False, "Print all times and rates, beside what memory bandwidth allows, on stderr.")
    flags.DEFINE_bool("quiet", False, "Print no notes and no progress on stderr: only what is wrong with the answer.")
    flags.DEFINE_string(
        "save", None, "FILE: Where to write the conversation (of --n answers, the first) as JSON, for --messages."
    )
    flags.DEFINE_integer("n", 1, "N: Answers to the prompt; the second is drawn with seed + 1, and so on.")
    prompt_flags.define_flags()
    tool_flags.define_flags()
    sampling_flags.define_flags()
    model_flags.define_flags()
    profiling.define_flags()


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    from gptoss_jax.cli import answering, chat  # here, so that --help need not wait for what they import

    options = flags.FLAGS
    flag_values.refuse_together(
        options,
        ("raw", "json"),
        ("raw", "show_reasoning"),
        ("stats", "quiet"),
        ("chat", "coordinator"),
        ("chat", "profile"),
    )
    if options.chat:
        chat.run(options, arguments)
        return
    flag_values.refuse_without(options, ("top_logprobs", "json"), ("tool_results", "messages"))
    echoed = [name for names in SECTIONS.values() for name in names]
    sys.exit(answering.answer(options, arguments, echoed))


def cli() -> None:
    """The console script."""
    define_flags()
    command.run(main, "generate", SECTIONS)


if __name__ == "__main__":
    cli()
