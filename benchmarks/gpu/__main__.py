"""Checks and measures the kernels and whole models on one GPU, beside what its memory and its tensor cores allow.

    python -m benchmarks.gpu --out results.jsonl
    python -m benchmarks.gpu --only smoke --out smoke.jsonl
    python -m benchmarks.gpu --only decode --models gpt-oss-20b --batch 1,8

Needs jax with CUDA, flax, orbax, jaxtyping, einops, absl, tqdm, rich and this
repository, and no files: random weights of the true shapes are made on the
device. Sections, each a process with a time limit (docs/kernels.md says what
to run first):

    smoke        every form of each kernel against float32 and against itself
    limits       copying, reading, multiplying, launching: what shares are of
    ops          each op whole, and its kernels alone
    decode       whole models drawing tokens; prefill: reading prompts
    profile      the launches of a decoding step, by name and duration
    transformers Hugging Face's model, where torch sees the GPU

Every figure is a line of --out as soon as it is measured; an error or a hang
ends its own section. Times are medians of several dispatches, with their
spread. Prints a table, then one JSON line with everything. Exit codes: 0 all
sections ended well; 1 one has not; 2 bad flags.
"""

import sys

from absl import flags

from benchmarks.gpu import driver, options
from gptoss_jax.cli import command
from gptoss_jax.errors import GptossError


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    if arguments:
        raise GptossError(f"{' '.join(arguments)}: expected flags only (--help lists them)")
    options.check(flags.FLAGS)
    if flags.FLAGS.section:
        from benchmarks.gpu import sections  # here, so that the process which waits for sections never holds the GPU

        sys.exit(sections.run(flags.FLAGS))
    sys.exit(driver.run(flags.FLAGS, sys.argv[1:]))


if __name__ == "__main__":
    options.define_flags()
    command.run(main, "gpu", options.SECTIONS)
