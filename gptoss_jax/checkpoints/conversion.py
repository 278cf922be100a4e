"""Published safetensors -> a checkpoint: planned, checked, written, resumed and verified. Knows no command line."""

import dataclasses
import hashlib
import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from gptoss_jax.checkpoints import origin
from gptoss_jax.checkpoints.contents import FileReport
from gptoss_jax.checkpoints.leaf import Leaf, leaf_bytes
from gptoss_jax.checkpoints.orbax import integrity, manifest, writer
from gptoss_jax.checkpoints.orbax.manifest import CheckpointError, Manifest
from gptoss_jax.checkpoints.orbax.writer import Writer
from gptoss_jax.checkpoints.published import HUGGINGFACE_BF16, Source, SourceError
from gptoss_jax.checkpoints.safetensors_reader import library_faults
from gptoss_jax.errors import Fault, listed
from gptoss_jax.model import sharding, transformer
from gptoss_jax.model.config import ModelConfig, to_huggingface

WEIGHT_LAYOUT = "published"  # recorded in provenance.json: what a kernel wants is made when weights are loaded
LEAF_OVERHEAD_BYTES = 64 << 10  # zarr.json, the index of parts, and what the file system rounds up
SAMPLE_BYTES = 128 << 20  # read to estimate the time

Progress = Callable[[str, int, int], AbstractContextManager[Callable[[int], None]]]
"""Shows progress while its block runs: of what, bytes in all, bytes done before; the block reports bytes as done."""


class Plan(NamedTuple):
    """What a conversion would do."""

    written_bytes: int
    largest_leaf: str
    largest_leaf_bytes: int
    needed_bytes: int  # on the disk
    free_bytes: int
    seconds: float  # about


def declared_leaves(config: ModelConfig) -> dict[str, Leaf]:
    """The leaves of a checkpoint of this model, by path."""
    return dict(transformer.declare(config, sharding.make()).leaves)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """One source, and the checkpoint that is made of it.

    Attributes:
        source: published safetensors.
        dst: the folder of the checkpoint.
        leaves: what the checkpoint holds, by path.
        progress: shows how far long work is.
        say: takes a line for people.
    """

    source: Source
    dst: Path
    leaves: Mapping[str, Leaf]
    progress: Progress
    say: Callable[[str], object] = print

    @property
    def size_bytes(self) -> int:
        """Bytes of all leaves."""
        return sum(map(leaf_bytes, self.leaves.values()))

    def plan(self) -> Plan:
        """What `run` would do; measures how fast this machine reads, writes nothing.

        Raises:
            SourceError: headers are at fault: all listed.
        """
        self.source.check_headers(self.leaves)
        sizes = {path: leaf_bytes(leaf) for path, leaf in self.leaves.items()}
        largest = max(sizes, key=lambda path: sizes[path])
        free = shutil.disk_usage(_existing_parent(self.dst)).free
        needed = self.size_bytes + LEAF_OVERHEAD_BYTES * len(sizes)
        return Plan(self.size_bytes, largest, sizes[largest], needed, free, _expected_seconds(self.source))

    def check(self, writer: Writer | None = None) -> dict[str, FileReport]:
        """Reads every file from end to end; what a writer's journal says was read without fault is believed.

        Raises:
            SourceError: lists every fault of headers and contents.
        """
        source, faults = self.source, self.source.problems(self.leaves)
        notes = writer.notes if writer else {}
        noted = {name: FileReport.from_note(notes.get(name)) for name in source.files}
        reports = {name: report for name, report in noted.items() if report}
        left = [name for name in source.files if name not in reports]
        if left:
            with self.progress("checking", sum(source.files[name].size_bytes for name in left), 0) as report_bytes:
                for name in left:
                    report = reports[name] = source.check_file(name, report_bytes)
                    faults += report.faults
                    if writer and not faults:
                        writer.note(name, report.note())
        if faults:
            raise SourceError(listed(faults))
        return reports

    def run(self) -> None:
        """Writes the checkpoint, going on where an interrupted run left off.

        Raises:
            SourceError: something is wrong with the source; nothing is left behind.
            CheckpointError: something is in the way at `dst`.
            OSError: as the file system raises it; a later run goes on.
        """
        if self.source.problems(self.leaves):
            self.check()  # which raises, and says what is wrong with the contents as well
        identity = {"source": self.source.identity(), "config": to_huggingface(self.source.config)}
        kept, left_out = origin.collect(self.source.folder, self.source.files)
        with Writer(self.dst, identity) as writer:
            if writer.finished:
                self.say(f"resuming: {len(writer.finished)} of {len(self.leaves)} leaves are finished")
            _check_space(writer, self.leaves, sum(map(len, kept.values())))
            try:
                reports = self.check(writer)
            except SourceError:
                if not writer.finished:
                    writer.discard()
                raise
            for line in [*_rounding_lines(reports), *map(str, left_out)]:
                self.say(line)
            self._write(writer)
            writer.finish(self.source.config, _provenance(self.source, reports), kept)

    def _write(self, writer: Writer) -> None:
        left = {path: leaf for path, leaf in self.leaves.items() if path not in writer.finished}
        done_bytes = self.size_bytes - sum(map(leaf_bytes, left.values()))
        with self.progress("writing", self.size_bytes, done_bytes) as report_bytes:
            for path, leaf in left.items():
                writer.write(path, self.source.read(path, leaf))
                report_bytes(leaf_bytes(leaf))

    def accept_finished(self) -> None:
        """Refuses what lies at `dst` unless it is what this conversion would make, whichever version made it.

        Raises:
            CheckpointError, ConfigError: it is no finished checkpoint, a damaged one, or made from something else.
            SourceError: as `check`.
        """
        if not manifest.is_checkpoint(self.dst):
            raise CheckpointError(f"{self.dst}: exists and is no finished checkpoint; remove it or name another folder")
        faults = integrity.problems(self.dst, self.leaves)
        if not faults and manifest.read_config(self.dst) != self.source.config:
            faults = [Fault(str(self.dst / manifest.CONFIG), "not as this source's: convert again, or mend it")]
        if faults:
            raise CheckpointError(listed(faults))
        recorded = manifest.read_provenance(self.dst)
        of_source = {key: value for key, value in recorded.items() if key not in ("tool", "layout")}
        if of_source != self.source.provenance(self.check()):
            raise CheckpointError(
                f"{self.dst}: holds a checkpoint made from something else; remove it or name another folder"
            )
        # There still, if the conversion was killed between the last rename and this.
        shutil.rmtree(manifest.partial_folder(self.dst), ignore_errors=True)

    def verify(self) -> None:
        """Compares every leaf, read from the source through its table, with what lies at `dst`, by sha256.

        What was read by our own reader of headers is read once more by the safetensors library's.

        Raises:
            CheckpointError: lists every leaf that differs.
        """
        faults = [fault for file in self.source.files.values() for fault in library_faults(file)]
        faults += integrity.problems(self.dst, self.leaves)
        records = Manifest.read(self.dst).leaves
        with self.progress("verifying", self.size_bytes, 0) as report_bytes:
            for path, leaf in self.leaves.items() if not faults else ():
                expected = writer.sha256(self.source.read(path, leaf))
                stored = integrity.stored_sha256(self.dst, records[path])
                if not expected == stored == records[path].sha256:
                    hashes = f"{stored} on disk, {records[path].sha256} in the manifest, {expected} from the source"
                    faults.append(Fault(f"{self.dst}: leaf {path}", f"sha256 {hashes}"))
                report_bytes(leaf_bytes(leaf))
        if faults:
            raise CheckpointError(listed(faults))


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in Path(os.path.abspath(path)).parents if parent.exists())


def _expected_seconds(source: Source) -> float:
    """From one sample: every byte is read and hashed twice, and written once at about the same rate."""
    entry = max(source.tensors.values(), key=lambda entry: entry.size_bytes)
    started = time.monotonic()
    sample = entry.read(0, min(entry.size_bytes, SAMPLE_BYTES))
    hashlib.sha256(sample.data)
    seconds = 3 * (time.monotonic() - started) / max(sample.nbytes, 1) * source.size_bytes
    return seconds + (2 * _packing_seconds(source) if source.format == HUGGINGFACE_BF16 else 0)


def _packing_seconds(source: Source) -> float:
    packed = [source.tensors[recipe.tensor] for recipe in source.recipes.values() if recipe.pack == "blocks"]
    started = time.monotonic()
    source.pack_one_expert(packed[0])
    each = packed[0].size_bytes // packed[0].shape[0]
    return (time.monotonic() - started) / each * sum(entry.size_bytes for entry in packed)


def _check_space(writer: Writer, leaves: Mapping[str, Leaf], kept_bytes: int) -> None:
    left = [leaf for path, leaf in leaves.items() if path not in writer.finished]
    needed = sum(map(leaf_bytes, left)) + LEAF_OVERHEAD_BYTES * len(left) + kept_bytes
    free = shutil.disk_usage(writer.partial).free
    if free < needed:
        raise CheckpointError(f"{writer.dst}: {needed:,} bytes more are needed, {free:,} are free: make room first")


def _rounding_lines(reports: Mapping[str, FileReport]) -> list[str]:
    """A line for each tensor whose experts were rounded, layers in their order."""

    def by_number(tensor: str) -> list[int | str]:
        return [int(part) if part.isdigit() else part for part in tensor.split(".")]

    rounding = {tensor: rms for report in reports.values() for tensor, rms in report.rounding.items()}
    return [
        f"rounded to MXFP4: {tensor}: relative RMS error {rounding[tensor]:.4f}"
        for tensor in sorted(rounding, key=by_number)
    ]


def _provenance(source: Source, reports: Mapping[str, FileReport]) -> dict[str, Any]:
    return {"tool": f"gptoss-jax {_version()}", "layout": WEIGHT_LAYOUT} | source.provenance(reports)


def _version() -> str:
    try:
        return importlib.metadata.version("gptoss-jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
