r"""Answers the rows of files, each exactly once, whatever happens to the process.

    python -m gptoss_jax.batch IN [IN ...] OUT --checkpoint DIR
    python -m gptoss_jax.batch prompts.jsonl answers.jsonl --checkpoint DIR
    python -m gptoss_jax.batch 'parts/*.jsonl.gz' answers.parquet \
        --checkpoint DIR --max-new-tokens 2000 --reasoning-effort low

IN is JSONL, plain or packed with gzip or zstd, or Parquet; a path, a pattern,
a URL (s3://, gs://, ...), or - for stdin. A row is plain, such as

    {"id": "a", "prompt": "Why is the sky blue?", "temperature": 0}

with prompt, messages or token_ids, and any option below by its name; or
OpenAI's Batch form: custom_id, method, url and body, for
/v1/chat/completions, /v1/responses and /v1/completions. Options on the
command line are defaults that a row overrides. docs/batch.md has every field.

OUT is JSONL, to which finished rows are appended; with --keep-order, or as
.jsonl.gz, .jsonl.zst, .parquet or a URL, it is written when all rows are done.
All rows are checked before the weights are read. If the job is killed, the
same command goes on: every row has one line in the end, and the same tokens
as without the interruption (on CPUs, or with --deterministic).

Calls of tools that are switched on are run here, while other rows go on:

    python -m gptoss_jax.batch IN OUT --checkpoint DIR --tool python

A job cut in parts, for any cluster (then --merge makes OUT of them):

    python -m gptoss_jax.batch IN OUT --checkpoint DIR --shard 0/8
    python -m gptoss_jax.batch IN OUT --merge

With Ray (pip install 'gptoss-jax[ray]'), one command for a whole cluster, whose
machines share the folders of OUT, IN and the checkpoint:

    python -m gptoss_jax.batch IN OUT --checkpoint DIR --ray --ray-address HOST:6379

Exit codes: 0 every row has its line, an answer or an error; 2 bad input; 130
and 143 interrupted with Ctrl-C or SIGTERM, 75 another process of several hosts
is lost: the same command goes on.
"""

if __name__ == "__main__":  # before what takes long to import
    from gptoss_jax.cli import interrupts

    interrupts.end_at_once()

import sys

from absl import flags

from gptoss_jax.cli import command, flag_values, model_flags, profiling, prompt_flags, sampling_flags, tool_flags

SECTIONS = {
    "The job": (
        "validate",
        "on_bad_row",
        "keep_order",
        "restart",
        "state",
        "slots",
        "pool_tokens",
        "quiet",
    ),
    "Many machines": ("shard", "merge", "ray", "ray_address", "ray_workers"),
    "What the system and developer messages say, where a row does not": prompt_flags.PROMPT_FLAGS,
    "Tools that a model may call, run here": tool_flags.TOOL_FLAGS,
    "How tokens are drawn, where a row does not say": ("n", "logprobs", *sampling_flags.SAMPLING_FLAGS),
    "Model and machine": (*model_flags.MODEL_FLAGS, *sampling_flags.ENGINE_FLAGS, *profiling.PROFILE_FLAGS),
}


def define_flags() -> None:
    """This command's flags, the shared ones among them."""
    flags.DEFINE_bool("validate", False, "Only check the rows; OUT may be left out.")
    flags.DEFINE_enum("on_bad_row", "error", ["error", "stop"], "What becomes of it: a line with its error, or no job.")
    flags.DEFINE_bool("keep_order", False, "Write OUT in the order of the input, when all rows are done.")
    flags.DEFINE_bool("restart", False, "Throw away what an earlier job has written to OUT.")
    flags.DEFINE_string("shard", None, "I/N: Answer every N-th row only, from row I on, I from 0; --merge joins them.")
    flags.DEFINE_bool("merge", False, "Make OUT of what shards have written, and check that no row is missing.")
    flags.DEFINE_bool("ray", False, "Have workers answer that Ray starts, and starts again when they die.")
    flags.DEFINE_string("ray_address", None, "HOST:PORT: A Ray cluster; left out: one on this machine, for this job.")
    flags.DEFINE_integer(
        "ray_workers", None, "N: Workers, a model each; left out: as GPUs or TPUs suffice, or machines."
    )
    flags.DEFINE_string("state", None, "PATH: Where the job's own files lie, PATH.job.json and others; left out: OUT.")
    flags.DEFINE_integer("slots", 16, "N: Answers that are drawn at once; rounded up to the mesh's data shards.")
    flags.DEFINE_integer("pool_tokens", None, "N: Tokens in the cache at most; left out: all slots at their longest.")
    flags.DEFINE_bool("quiet", False, "Print no notes and no progress on stderr: only what is wrong.")
    flags.DEFINE_integer("n", 1, "N: Answers to each prompt.")
    flags.DEFINE_bool("logprobs", False, "Give the log probability of each token.")
    prompt_flags.define_flags()
    sampling_flags.define_flags()
    tool_flags.define_flags()
    model_flags.define_flags()
    profiling.define_flags()


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    from gptoss_jax.cli import batch_job  # here, so that --help need not wait for what it imports

    options = flags.FLAGS
    flag_values.refuse_together(
        options, ("validate", "merge"), ("validate", "restart"), ("shard", "merge"), ("restart", "merge")
    )
    flag_values.refuse_together(options, ("coordinator", "validate"), ("coordinator", "merge"))
    flag_values.refuse_together(options, ("ray", "shard"), ("ray", "merge"), ("ray", "coordinator"))
    flag_values.refuse_together(options, ("ray", "tool"), ("ray", "mcp"))  # an offer of tools is one process's
    flag_values.refuse_together(options, ("profile", "validate"), ("profile", "merge"), ("profile", "ray"))
    flag_values.refuse_without(options, ("ray_address", "ray"), ("ray_workers", "ray"))
    sys.exit(batch_job.run(options, arguments))


def cli() -> None:
    """The console script."""
    define_flags()
    command.run(main, "batch", SECTIONS)


if __name__ == "__main__":
    cli()
