"""The command that makes an Orbax checkpoint from published safetensors: checks all, then writes, resumes, verifies.

    python -m converters.convert SRC DST [--dry-run] [--verify] [--quantize-experts]

SRC is a folder as published: Hugging Face with MXFP4 experts, OpenAI's original/, or Hugging Face in BF16. DST must not
exist. An interrupted run leaves DST.partial, and the same command goes on from there. Exit codes: 0 done, 2 refused
(one line per problem), 130 interrupted.
"""

if __name__ == "__main__":  # before what takes long to import
    from gptoss_jax.cli import interrupts

    interrupts.end_at_once()

import contextlib
import dataclasses
import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from gptoss_jax.checkpoints.orbax.manifest import partial_folder
from gptoss_jax.checkpoints.published import SourceError, open_source
from gptoss_jax.cli import command, interrupts, mistakes
from gptoss_jax.cli.byte_progress import byte_progress, duration, gigabytes
from gptoss_jax.errors import GptossError

if TYPE_CHECKING:
    from gptoss_jax.checkpoints.conversion import Conversion

NAME = "convert"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    src: Path
    dst: Path
    dry_run: bool = False
    verify: bool = False
    quantize_experts: bool = False


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_bool("dry_run", False, "Print what would be done, and touch nothing.")
    flags.DEFINE_bool("verify", False, "Read both sides again and compare every tensor's sha256.")
    flags.DEFINE_bool("quantize_experts", False, "Round bfloat16 experts that are not on the MXFP4 grid to it.")


def main(arguments: list[str]) -> None:
    """Runs the command on SRC and DST."""
    if len(arguments) != 2:
        raise GptossError(f"expected two folders, SRC DST, got {arguments or 'none'}")
    src, dst = map(Path, arguments)
    given = flags.FLAGS
    with _resumable(dst):
        run(Options(src, dst, given.dry_run, given.verify, given.quantize_experts))


def run(options: Options) -> None:
    """Does what the command line asks for.

    Raises:
        SourceError, CheckpointError, ConfigError, OSError: as `Conversion.run` and `open_source`.
    """
    conversion = open_conversion(options)
    if options.dry_run:
        print(_plan_text(conversion))
        return
    dst, leaves = options.dst, len(conversion.leaves)
    if os.path.lexists(dst):
        conversion.accept_finished()
        print(f"{dst}: finished already, from this very source: nothing to convert")
    else:
        started = time.monotonic()
        conversion.run()
        print(f"{dst}: {leaves} leaves, {conversion.size_bytes:,} bytes, {time.monotonic() - started:.1f} s")
    if options.verify:
        conversion.verify()
        print(f"{dst}: verified: all {leaves} leaves, {conversion.size_bytes:,} bytes, equal the source's by sha256")


def open_conversion(options: Options) -> "Conversion":
    """What is to be converted, its headers read.

    Raises:
        SourceError: there is no published checkpoint, or DST lies in its way.
        ConfigError: its config.json is not a gpt-oss model.
    """
    src, dst = options.src.resolve(), options.dst.resolve()
    if dst == src or dst in src.parents:
        raise SourceError(f"DST {dst} is or holds SRC: name a folder of its own for the checkpoint")
    source = open_source(options.src, quantize_experts=options.quantize_experts)
    remark = f" ({source.remark})" if source.remark else ""
    print(f"{options.src}: format {source.format}{remark}, {len(source.files)} files, {len(source.tensors)} tensors")
    with interrupts.ended_by_ctrl_c():
        import jax

        from gptoss_jax.checkpoints import conversion

    jax.config.update("jax_platforms", "cpu")  # only shapes are declared; leave accelerators to those who compute
    leaves = conversion.declared_leaves(source.config)
    return conversion.Conversion(source, options.dst, leaves, byte_progress)


def _plan_text(conversion: "Conversion") -> str:
    """What `--dry-run` prints."""
    source, dst, plan = conversion.source, conversion.dst, conversion.plan()
    fits = "" if plan.free_bytes >= plan.needed_bytes else " (NOT ENOUGH)"
    lines = [
        f"would read    {len(source.tensors)} tensors, {gigabytes(source.size_bytes)} in {len(source.files)} files",
        f"would write   {len(conversion.leaves)} leaves, {gigabytes(plan.written_bytes)}, to {dst}",
        f"largest leaf  {plan.largest_leaf}, {gigabytes(plan.largest_leaf_bytes)}",
        f"disk          {gigabytes(plan.needed_bytes)} needed, {gigabytes(plan.free_bytes)} free{fits}",
        f"time          about {duration(plan.seconds)}",
    ]
    if os.path.lexists(dst) or partial_folder(dst).exists():
        lines.append(f"note          {dst} or its .partial is there already, and will not be replaced")
    return "\n".join(lines)


@contextlib.contextmanager
def _resumable(dst: Path) -> Iterator[None]:
    """Says of what stopped a conversion half-way that the same command goes on."""
    again = "run the same command again, it goes on where it stopped"
    try:
        yield
    except BrokenPipeError:  # of what is printed
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            command.refuse(f"{dst}: the disk is full: make room and {again}", NAME)
        resumable = f": {again}" if partial_folder(dst).is_dir() else ""
        command.refuse(f"{mistakes.of_file(error)}{resumable}", NAME)
    except KeyboardInterrupt:
        print(f"\n{NAME}: {dst}: interrupted: {again}", file=sys.stderr)
        sys.exit(interrupts.EXIT_CODE)


def cli() -> None:
    """The console script."""
    define_flags()
    command.run(main, NAME)


if __name__ == "__main__":
    cli()
