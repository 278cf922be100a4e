"""The command that writes a converted checkpoint as published: safetensors that transformers and others load.

    python -m converters.export CHECKPOINT DST [--format huggingface|openai|bf16] [--dry-run] [--verify]
    python -m converters.export CHECKPOINT DST --adapter FOLDER [--keep-adapter | --text FILE] [--accept-loss]

CHECKPOINT is a folder that converters.convert or a training run wrote. DST must not exist, nor lie in CHECKPOINT.
Formats: huggingface (MXFP4 experts, as OpenAI publishes), openai (the files of its original/ folder, put into DST
itself), bf16 (Hugging Face with experts in bfloat16: the same numbers, three to four times the size). In the format
that it was converted from, a model has the very files that it came in, byte by byte. An adapter (LoRA, as fine-tuning
makes one) is merged into the weights, experts included, or with --keep-adapter copied to DST/adapter. Before a merged
model is written, a table says what rounding left of each matrix's difference, and how far the merged model is from the
adapter's and from the base, on a text; DST/merge_report.json has it too. It is refused where it is nearer to the base.
An interrupted run leaves no DST, and the same command starts anew. Exit codes: 0 done, 2 refused (one line per
problem), 130 interrupted.
"""

if __name__ == "__main__":  # before what takes long to import
    from gptoss_jax.cli import interrupts

    interrupts.end_at_once()

import contextlib
import dataclasses
import errno
import time
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from converters import merge_report
from gptoss_jax.checkpoints import peft
from gptoss_jax.checkpoints.export import FORMATS, Export, ExportError, open_export
from gptoss_jax.checkpoints.export_leaves import Change
from gptoss_jax.checkpoints.merging import Merger
from gptoss_jax.cli import command
from gptoss_jax.cli.byte_progress import byte_progress, gigabytes
from gptoss_jax.errors import GptossError, one_line, short

NAME = "export"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    checkpoint: Path
    dst: Path
    format: str = "huggingface"
    shard_gb: float | None = None
    dry_run: bool = False
    verify: bool = False
    adapter: Path | None = None
    keep_adapter: bool = False
    text: Path | None = None
    accept_loss: bool = False
    keep_scales: bool = False


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_enum("format", "huggingface", list(FORMATS), "published format to write")
    flags.DEFINE_float(
        "shard_gb",
        None,
        "most GB in one file (if not given: as the source was split in its own format; else 5, and openai is one file)",
    )
    flags.DEFINE_bool("dry_run", False, "Print what would be done, and touch nothing.")
    flags.DEFINE_bool("verify", False, "Read DST again: compare its files with the source's, or its tensors.")
    flags.DEFINE_string("adapter", None, "FOLDER: A PEFT adapter (LoRA) to merge into the weights.")
    flags.DEFINE_bool("keep_adapter", False, "Write the base as it is, and the adapter beside it, to DST/adapter.")
    flags.DEFINE_string(
        "text", None, "FILE: What merging is measured on: a text, or conversations (.jsonl) as for gptoss_jax.finetune."
    )
    flags.DEFINE_bool(
        "keep_scales", False, "Blocks of merged experts keep the base's MXFP4 scale where that rounds less off."
    )
    flags.DEFINE_bool("accept_loss", False, "Write a merged model that is nearer to the base than to the adapter's.")


def main(arguments: list[str]) -> None:
    """Runs the command on CHECKPOINT and DST."""
    given = flags.FLAGS
    if len(arguments) != 2:
        raise GptossError(f"expected two folders, CHECKPOINT DST, got {short(arguments) if arguments else 'none'}")
    checkpoint, dst = map(Path, arguments)
    with _full_disk(dst):
        run(_options(given, checkpoint, dst))


def _options(given: flags.FlagValues, checkpoint: Path, dst: Path) -> Options:
    def path(name: str) -> Path | None:
        value = given[name].value
        return None if value is None else Path(value)

    return Options(
        checkpoint,
        dst,
        given.format,
        given.shard_gb,
        given.dry_run,
        given.verify,
        path("adapter"),
        given.keep_adapter,
        path("text"),
        given.accept_loss,
        given.keep_scales,
    )


def run(options: Options) -> None:
    """Does what the command line asks for.

    Raises:
        CheckpointError, ConfigError, ExportError, UnfinishedError, OSError: as `open_export` and `Export.run`.
        AdapterError: no adapter, or not one of this model.
    """
    export, dst = _open(options), options.dst
    print(one_line(f"{options.checkpoint}: to format {export.format}, {_layout(export)}"))
    for note in export.notes:
        print(one_line(f"note: {note}"))
    export, change, changed_by = _with_adapter(export, options) if options.adapter else (export, None, None)
    if options.dry_run:
        print(_plan_text(export, dst))
        return
    started = time.monotonic()
    done = export.run(dst, change, changed_by, progress=byte_progress)
    took = f"{time.monotonic() - started:.1f} s"
    print(one_line(f"{dst}: {done.files} files, {done.tensors} tensors, {done.size_bytes:,} bytes, {took}"))
    if options.verify:
        print(one_line(f"{dst}: verified: {export.verify(dst, byte_progress)}"))


def _open(options: Options) -> Export:
    _check_together(options)
    if options.shard_gb is not None and not 1e-6 <= options.shard_gb <= 1e6:  # NaN too
        raise ExportError(f"--shard-gb is {options.shard_gb}, expected 0.000001 to 1,000,000")
    shard_bytes = None if options.shard_gb is None else round(options.shard_gb * 1e9)
    export = open_export(options.checkpoint, options.format, shard_bytes=shard_bytes)
    export.check(options.dst)
    return export


def _check_together(options: Options) -> None:
    """Refuses flags that say nothing, or two things, together."""
    for flag in ("keep_adapter", "text", "accept_loss", "keep_scales"):
        if getattr(options, flag) and not options.adapter:
            raise ExportError(f"--{flag.replace('_', '-')} without --adapter: expected the adapter's folder")
    if options.keep_adapter and (options.text or options.accept_loss or options.keep_scales):
        raise ExportError("--keep-adapter merges nothing: expected no --text, --accept-loss, --keep-scales beside it")
    if options.verify and options.adapter and not options.keep_adapter:
        raise ExportError("--verify compares with the source, and a merged model is none: leave one of them out")


def _with_adapter(export: Export, options: Options) -> tuple[Export, Change | None, str | None]:
    """The export with the adapter merged, or beside it: what is written, and what changes leaves on the way.

    Raises:
        ExportError: the merged model is nearer to the base than to the adapter's, and that is not accepted.
    """
    assert options.adapter is not None, "asked for"
    factors = peft.read(options.adapter, export.config)
    if options.keep_adapter:
        print(one_line(f"adapter of {len(factors)} matrices: kept, in {options.dst / 'adapter'}"))
        return merge_report.beside(export, options.adapter), None, None
    if not options.dry_run:
        export.check_room(options.dst)  # before what may take an hour
    merger = Merger(export.config, factors, pack=export.packs, keep_scales=options.keep_scales)
    report = merge_report.measure(export, options.adapter, factors, merger, options.text, byte_progress)
    print(report.text())
    if report.is_lost and not options.accept_loss:
        raise ExportError(report.refusal())
    if report.is_lost:
        print("note: the merged model is nearer to the base than to the adapter's: accepted, as asked")
    if not export.packs:
        print("note: merged experts are no MXFP4 numbers: transformers runs them, here converters.convert rounds them")
    document = {merge_report.FILE: report.document(accepted=report.is_lost)}
    export = dataclasses.replace(export, small_files={**export.small_files, **document})
    changed_by = f"converters.export --adapter, merged: adapter sha256 {report.adapter_sha256}"
    return export, merger, changed_by


def _layout(export: Export) -> str:
    files = f"{len(export.shards)} safetensors file{'s' * (len(export.shards) > 1)}"
    return f"{files} as the source's" if export.source_sha256 else files


def _plan_text(export: Export, dst: Path) -> str:
    """What `--dry-run` prints."""
    free = export.free_bytes(dst)
    fits = "" if free >= export.size_bytes else " (NOT ENOUGH)"
    largest = max(export.shards, key=lambda shard: shard.size_bytes)
    lines = [
        f"would read    {len(export.records)} leaves, {gigabytes(export.leaves_bytes)}",
        f"would write   {len(export.tensors)} tensors, {gigabytes(export.size_bytes)}, to {dst}",
        f"largest file  {largest.name}, {gigabytes(largest.size_bytes)}",
        f"beside them   {', '.join(export.small_files)}",
        f"disk          {gigabytes(export.size_bytes)} needed, {gigabytes(free)} free{fits}",
    ]
    return "\n".join(map(one_line, lines))


@contextlib.contextmanager
def _full_disk(dst: Path) -> Iterator[None]:
    """Says of a full disk which one it is."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            command.refuse(f"{dst}: the disk is full: make room and run the same command again", NAME)
        raise


def cli() -> None:
    """The console script."""
    define_flags()
    command.run(main, NAME)


if __name__ == "__main__":
    cli()
