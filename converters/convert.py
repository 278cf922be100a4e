"""The command that makes an Orbax checkpoint from published safetensors: checks all, then writes, resumes, verifies.

    python -m converters.convert SRC DST [--dry-run] [--verify] [--quantize-experts]
    python -m converters.convert --verify DST

SRC is a folder as published: Hugging Face with MXFP4 experts, OpenAI's original/, or Hugging Face in BF16. DST must not
exist, nor lie in SRC. An interrupted run leaves DST.partial, and the same command goes on from there. --verify alone
reads a finished DST and compares it with its own manifest. Exit codes: 0 done, 2 refused (one line per problem), 130
interrupted.
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

from gptoss_jax.checkpoints.leaf import Leaf, leaf_bytes
from gptoss_jax.checkpoints.opening import open_weights
from gptoss_jax.checkpoints.orbax import integrity
from gptoss_jax.checkpoints.orbax.manifest import Manifest, partial_folder
from gptoss_jax.checkpoints.published import SourceError, open_source
from gptoss_jax.cli import command, interrupts, mistakes
from gptoss_jax.cli.byte_progress import byte_progress, duration, gigabytes
from gptoss_jax.errors import GptossError, one_line, short
from gptoss_jax.model.config import ModelConfig

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
    flags.DEFINE_bool(
        "verify", False, "Compare every tensor's sha256: SRC's with DST's; of DST alone, with its manifest."
    )
    flags.DEFINE_bool("quantize_experts", False, "Round bfloat16 experts that are not on the MXFP4 grid to it.")


def main(arguments: list[str]) -> None:
    """Runs the command on SRC and DST, or verifies DST."""
    given = flags.FLAGS
    if given.verify and len(arguments) == 1 and not given.dry_run and not given.quantize_experts:
        verify_alone(Path(arguments[0]))
        return
    if len(arguments) != 2:
        raise GptossError(f"expected two folders, SRC DST, got {short(arguments) if arguments else 'none'}")
    src, dst = map(Path, arguments)
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
        print(one_line(f"{dst}: finished already, from this very source: nothing to convert"))
    else:
        started = time.monotonic()
        conversion.run()
        took = f"{time.monotonic() - started:.1f} s"
        print(one_line(f"{dst}: {leaves} leaves, {conversion.size_bytes:,} bytes, {took}"))
    if options.verify:
        conversion.verify()
        what = f"all {leaves} leaves, {conversion.size_bytes:,} bytes, equal the source's by sha256"
        print(one_line(f"{dst}: verified: {what}"))


def open_conversion(options: Options) -> "Conversion":
    """What is to be converted, its headers read.

    Raises:
        SourceError: there is no published checkpoint, or DST lies in its way.
        ConfigError: its config.json is not a gpt-oss model.
    """
    _check_separate(options.src, options.dst)
    source = open_source(options.src, quantize_experts=options.quantize_experts)
    remark = f" ({source.remark})" if source.remark else ""
    what = f"{len(source.files)} files, {len(source.tensors)} tensors"
    print(one_line(f"{options.src}: format {source.format}{remark}, {what}"))
    leaves = _declared_leaves(source.config)
    from gptoss_jax.checkpoints import conversion

    return conversion.Conversion(source, options.dst, leaves, byte_progress)


def _check_separate(src: Path, dst: Path) -> None:
    """Refuses to write where the source lies, whichever links lead there."""
    where = Path(os.path.realpath(src))
    for written in (Path(os.path.realpath(path)) for path in (dst, partial_folder(dst))):
        if written == where or written in where.parents:
            raise SourceError(f"DST {dst} is or holds SRC: name a folder of its own for the checkpoint")
        if where in written.parents:
            raise SourceError(f"DST {dst} lies in SRC: name a folder outside of it for the checkpoint")


def _declared_leaves(config: ModelConfig) -> dict[str, Leaf]:
    """What a model declares. Imports JAX for it, and leaves accelerators to those who compute."""
    with interrupts.ended_by_ctrl_c():
        import jax

        from gptoss_jax.checkpoints import conversion

    jax.config.update("jax_platforms", "cpu")  # only shapes are declared
    return conversion.declared_leaves(config)


def verify_alone(dst: Path) -> None:
    """Compares a finished checkpoint with its own manifest, and says so.

    Raises:
        CheckpointError: no finished checkpoint, or a damaged one: all faults listed.
        ConfigError: its config.json is damaged.
    """
    Manifest.read(dst)  # raises for what is no checkpoint of ours
    config = open_weights(dst).config
    leaves = _declared_leaves(config)
    size_bytes = sum(map(leaf_bytes, leaves.values()))
    with byte_progress("verifying", size_bytes, 0) as report_bytes:
        integrity.verify(dst, leaves, report_bytes)
    what = f"all {len(leaves)} leaves, {size_bytes:,} bytes, have the sha256 that its manifest names"
    print(one_line(f"{dst}: verified: {what}"))


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
    return "\n".join(map(one_line, lines))


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
