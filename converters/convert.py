"""The command that makes an Orbax checkpoint from published safetensors: checks all, then writes, resumes, verifies.

    python -m converters.convert SRC DST [--dry-run] [--verify] [--quantize-experts]

SRC is a folder as published: Hugging Face with MXFP4 experts, OpenAI's original/, or Hugging Face in BF16. DST must not
exist. An interrupted run leaves DST.partial, and the same command goes on from there. Exit codes: 0 done, 2 refused
(one line per problem), 130 interrupted.
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

from gptoss_jax.checkpoints import orbax
from gptoss_jax.checkpoints.orbax import CheckpointError, Leaf, Writer, leaf_bytes
from gptoss_jax.checkpoints.published import HUGGINGFACE_BF16, FileReport, Source, SourceError, open_source
from gptoss_jax.cli import command
from gptoss_jax.model import sharding, transformer
from gptoss_jax.model.config import to_huggingface

NAME = "convert"
LAYOUT = (
    "published"  # of the weights on disk, in the checkpoint's metadata; a kernel's own is made when they are loaded
)
LEAF_OVERHEAD_BYTES = 64 << 10  # zarr.json, the index of parts, and what the file system rounds up
LINE_SECONDS = 10  # between lines of progress where stderr is no terminal
SAMPLE_BYTES = 128 << 20  # read to estimate the time
Leaves = Mapping[str, Leaf]


# ---- progress ----


class Progress:
    """Bytes, rate and remaining time on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self, what: str, total_bytes: int, done_bytes: int = 0):
        self._what, self._total, self._start_bytes = what, total_bytes, done_bytes
        self._done, self._started = done_bytes, time.monotonic()
        self._next_line = self._started + LINE_SECONDS
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(desc=what, total=total_bytes, initial=done_bytes, unit="B", unit_scale=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *failure: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif failure == (None, None, None):
            self._line()

    def add(self, size_bytes: int) -> None:
        """Counts bytes as done."""
        self._done += size_bytes
        if self._bar is not None:
            self._bar.update(size_bytes)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            self._line()

    def _line(self) -> None:
        elapsed = max(time.monotonic() - self._started, 1e-6)
        rate = (self._done - self._start_bytes) / elapsed
        left = f", {_duration((self._total - self._done) / rate)} left" if rate and self._done < self._total else ""
        share = 100 * self._done / self._total if self._total else 100
        amount = f"{_gb(self._done)} of {_gb(self._total)} ({share:.0f} %)"
        print(f"{self._what}: {amount}, {rate / 1e6:,.0f} MB/s{left}", file=sys.stderr, flush=True)


def _gb(size_bytes: int | float) -> str:
    return f"{size_bytes / 1e9:.3f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.3f} MB"


def _duration(seconds: int | float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# ---- what is done ----


def declared_leaves(source: Source) -> Leaves:
    """What the model of this source declares."""
    return transformer.declare(source.config, sharding.make()).leaves


def plan(source: Source, leaves: Leaves, dst: Path) -> str:
    """What a conversion would do; measures how fast this machine reads, writes nothing."""
    sizes = {path: leaf_bytes(leaf) for path, leaf in leaves.items()}
    largest = max(sizes, key=lambda path: sizes[path])
    needed = sum(sizes.values()) + LEAF_OVERHEAD_BYTES * len(sizes)
    free = shutil.disk_usage(_existing_parent(dst)).free
    fits = "" if free >= needed else " (NOT ENOUGH)"
    return "\n".join(
        [
            f"would read    {len(source.tensors)} tensors, {_gb(source.size_bytes)} in {len(source.files)} files",
            f"would write   {len(leaves)} leaves, {_gb(sum(sizes.values()))}, to {dst}",
            f"largest leaf  {largest}, {_gb(sizes[largest])}",
            f"disk          {_gb(needed)} needed, {_gb(free)} free{fits}",
            f"time          about {_duration(_expected_seconds(source))}",
        ]
    )


def _expected_seconds(source: Source) -> float:
    """From one sample: every byte is read and hashed twice, and written once at about the same rate."""
    entry = max(source.tensors.values(), key=lambda entry: entry.size_bytes)
    started = time.monotonic()
    sample = entry.read(0, min(entry.size_bytes, SAMPLE_BYTES))
    hashlib.sha256(sample.data)
    seconds = 3 * (time.monotonic() - started) / max(sample.nbytes, 1) * source.size_bytes
    if source.layout == HUGGINGFACE_BF16:
        seconds += 2 * _packing_seconds(source)
    return seconds


def _packing_seconds(source: Source) -> float:
    packed = [source.tensors[recipe.tensor] for recipe in source.recipes.values() if recipe.pack == "blocks"]
    started = time.monotonic()
    source.pack_one_expert(packed[0])
    each = packed[0].size_bytes // packed[0].shape[0]
    return (time.monotonic() - started) / each * sum(entry.size_bytes for entry in packed)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in Path(os.path.abspath(path)).parents if parent.exists())


def check(source: Source, leaves: Leaves, writer: Writer | None = None) -> dict[str, FileReport]:
    """Looks through every file, all contents included; what a writer's journal says was looked through is believed.

    Raises:
        SourceError: lists every fault of headers and contents.
    """
    faults = source.problems(leaves)
    notes = writer.notes if writer else {}
    reports = {name: FileReport(**notes[name] | {"faults": ()}) for name in source.files if name in notes}
    left = [name for name in source.files if name not in reports]
    if left:
        with Progress("checking", sum(source.files[name].size_bytes for name in left)) as progress:
            for name in left:
                reports[name] = source.check_file(name, progress.add)
                faults += reports[name].faults
                if writer and not faults:
                    report = reports[name]
                    writer.note(name, {"sha256": report.sha256, "rounding": report.rounding})
    if faults:
        raise SourceError("\n".join(faults))
    return reports


def convert(source: Source, dst: Path, leaves: Leaves) -> None:
    """Writes the checkpoint, going on where an interrupted run left off.

    Raises:
        SourceError: something is wrong with the source; nothing is left behind.
        CheckpointError: something is in the way at `dst`.
        OSError: as the file system raises it; a later run goes on.
    """
    identity = {"source": source.identity(), "config": to_huggingface(source.config)}
    with Writer(dst, identity) as writer:
        if writer.finished:
            print(f"resuming: {len(writer.finished)} of {len(leaves)} leaves are finished")
        _check_space(writer, leaves)
        try:
            reports = check(source, leaves, writer)
        except SourceError:
            if not writer.finished:
                writer.discard()
            raise
        _print_rounding(reports)
        left = {path: leaf for path, leaf in leaves.items() if path not in writer.finished}
        total = sum(map(leaf_bytes, leaves.values()))
        with Progress("writing", total, total - sum(map(leaf_bytes, left.values()))) as progress:
            for path, leaf in left.items():
                writer.write(path, source.read(path, leaf))
                progress.add(leaf_bytes(leaf))
        writer.finish(source.config, _provenance(source, reports))


def _check_space(writer: Writer, leaves: Leaves) -> None:
    left = [leaf for path, leaf in leaves.items() if path not in writer.finished]
    needed = sum(map(leaf_bytes, left)) + LEAF_OVERHEAD_BYTES * len(left)
    free = shutil.disk_usage(writer.partial).free
    if free < needed:
        raise CheckpointError(f"{writer.dst}: {_gb(needed)} more are needed, {_gb(free)} are free: make room first")


def _print_rounding(reports: Mapping[str, FileReport]) -> None:
    rounding = {tensor: rms for report in reports.values() for tensor, rms in report.rounding.items()}
    for tensor in sorted(
        rounding, key=lambda tensor: [int(part) if part.isdigit() else part for part in tensor.split(".")]
    ):
        print(f"rounded to MXFP4: {tensor}: relative RMS error {rounding[tensor]:.4f}")


def _provenance(source: Source, reports: Mapping[str, FileReport]) -> dict:
    return {"tool": f"gptoss-jax {_version()}", "layout": LAYOUT} | source.provenance(reports)


def _version() -> str:
    try:
        return importlib.metadata.version("gptoss-jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def is_made_from(dst: Path, source: Source, reports: Mapping[str, FileReport]) -> bool:
    """Whether the checkpoint at `dst` was made from this very source, whichever version of the tool made it."""
    recorded = orbax.read_provenance(dst)
    ours = ("tool", "layout")
    return {key: recorded[key] for key in recorded if key not in ours} == source.provenance(reports)


def verify(source: Source, dst: Path, leaves: Leaves) -> int:
    """Compares every leaf, read from the source through its table, with what lies at `dst`, by sha256.

    Returns:
        Bytes compared.

    Raises:
        CheckpointError: lists every leaf that differs.
    """
    faults = orbax.problems(dst, leaves)
    total = sum(map(leaf_bytes, leaves.values()))
    manifest = orbax.Manifest.read(dst)
    with Progress("verifying", total) as progress:
        for path, leaf in leaves.items() if not faults else ():
            expected = orbax.sha256(source.read(path, leaf))
            stored = orbax.stored_sha256(dst, manifest.leaves[path])
            if not expected == stored == manifest.leaves[path].sha256:
                faults.append(
                    f"{dst}: leaf {path}: sha256 {stored} on disk, {manifest.leaves[path].sha256} in the manifest, "
                    f"{expected} from the source"
                )
            progress.add(leaf_bytes(leaf))
    if faults:
        raise CheckpointError("\n".join(faults))
    return total


# ---- the command ----


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    src: Path
    dst: Path
    dry_run: bool
    verify: bool
    quantize_experts: bool


def run(options: Options) -> None:
    """Does what the command line asks for.

    Raises:
        SourceError, CheckpointError, ConfigError, OSError: as `convert`.
    """
    src, dst = options.src.resolve(), options.dst.resolve()
    if dst == src or dst in src.parents:
        raise SourceError(f"DST {dst} is or holds SRC: name a folder of its own for the checkpoint")
    source = open_source(options.src, quantize_experts=options.quantize_experts)
    remark = f" ({source.remark})" if source.remark else ""
    print(f"{options.src}: layout {source.layout}{remark}, {len(source.files)} files, {len(source.tensors)} tensors")
    leaves = declared_leaves(source)
    if options.dry_run:
        if faults := source.problems(leaves):
            raise SourceError("\n".join(faults))
        print(plan(source, leaves, options.dst))
        if os.path.lexists(options.dst) or orbax.partial_folder(options.dst).exists():
            print(f"note          {options.dst} or its .partial is there already, and will not be replaced")
        return
    if os.path.lexists(options.dst):
        _accept_finished(source, options.dst, leaves)
        print(f"{options.dst}: finished already, from this very source: nothing to convert")
    else:
        started = time.monotonic()
        convert(source, options.dst, leaves)
        size = sum(map(leaf_bytes, leaves.values()))
        print(f"{options.dst}: {len(leaves)} leaves, {size:,} bytes, {time.monotonic() - started:.1f} s")
    if options.verify:
        size = verify(source, options.dst, leaves)
        print(f"{options.dst}: verified: all {len(leaves)} leaves, {size:,} bytes, equal the source's by sha256")


def _accept_finished(source: Source, dst: Path, leaves: Leaves) -> None:
    """Refuses what lies at `dst` unless it is what this conversion would make."""
    if not orbax.is_checkpoint(dst):
        raise CheckpointError(f"{dst}: exists and is no finished checkpoint; remove it or name another folder")
    if faults := orbax.problems(dst, leaves):
        raise CheckpointError("\n".join(faults))
    if not is_made_from(dst, source, check(source, leaves)):
        raise CheckpointError(f"{dst}: holds a checkpoint made from something else; remove it or name another folder")
    shutil.rmtree(orbax.partial_folder(dst), ignore_errors=True)  # killed between the last rename and this


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_bool("dry_run", False, "Print what would be done, and touch nothing.")
    flags.DEFINE_bool("verify", False, "Read both sides again and compare every tensor's sha256.")
    flags.DEFINE_bool("quantize_experts", False, "Round bfloat16 experts that are not on the MXFP4 grid to it.")


@contextlib.contextmanager
def _resumable(dst: str) -> Iterator[None]:
    """Says of what stopped a conversion half-way that the same command goes on."""
    again = "run the same command again, it goes on where it stopped"
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        resumable = f": {again}" if orbax.partial_folder(dst).is_dir() else ""
        command.refuse(f"{dst}: the disk is full: make room and {again}" if full else f"{error}{resumable}", NAME)
    except KeyboardInterrupt:
        print(f"\n{NAME}: {dst}: interrupted: {again}", file=sys.stderr)
        sys.exit(command.INTERRUPTED)


def main(arguments: list[str]) -> None:
    """Runs the command on SRC and DST."""
    if len(arguments) != 2:
        raise SourceError(f"expected two folders, SRC DST, got {arguments or 'none'}")
    src, dst = arguments
    asked = flags.FLAGS
    options = Options(Path(src), Path(dst), asked.dry_run, asked.verify, asked.quantize_experts)
    with _resumable(dst):
        run(options)


def cli() -> None:
    """Entry point of the command."""
    define_flags()
    jax.config.update("jax_platforms", "cpu")  # only shapes are declared; leave accelerators to those who compute
    command.run(main, NAME)


if __name__ == "__main__":
    cli()
