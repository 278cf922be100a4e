r"""Fine-tunes a model on conversations: all of its weights, or adapters beside them.

    python -m gptoss_jax.finetune --checkpoint DIR --data FILE --output OUT
    python -m gptoss_jax.finetune --checkpoint checkpoint --data chats.jsonl \
        --validation 0.05 --output run --lora-rank 32 --epochs 3
    python -m gptoss_jax.finetune --checkpoint start --data chats.jsonl \
        --output run --method full --optimizer muon --steps 2000

FILE is JSONL, a conversation on each line: {"messages": [...]}, in the forms of
generate's --messages. What the assistant says is learned; docs/finetune.md has
the forms, every option's meaning, and a whole example.

OUT is a folder: run.json, metrics.csv, router.csv, tensorboard/, loss.png,
states/, and in the end checkpoint/ (--method full), which all commands load, or
adapter/ (--method lora), a PEFT folder. If the run is killed, the same command
goes on from the last saved state, to the same bits as without interruption.

    python -m gptoss_jax.finetune --dry-run --checkpoint DIR ...

says what memory the run would take on each device, and with --data how many
tokens and steps it has; there --checkpoint may also name a config.json.

Exit codes: 0 all steps are done; 2 bad input, or a loss that is no number; 130
and 143 interrupted with Ctrl-C or SIGTERM, the state is saved then.
"""

if __name__ == "__main__":  # before what takes long to import
    from gptoss_jax.cli import interrupts

    interrupts.end_at_once()

import sys

from absl import flags

from gptoss_jax.cli import command, finetune_flags


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    from gptoss_jax.cli import finetune_run  # here, so that --help need not wait for what it imports

    sys.exit(finetune_run.run(flags.FLAGS, arguments))


def cli() -> None:
    """The console script."""
    finetune_flags.define_flags()
    command.run(main, "finetune", finetune_flags.SECTIONS)


if __name__ == "__main__":
    cli()
