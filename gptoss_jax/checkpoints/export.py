"""A checkpoint of ours -> a published folder, leaf by leaf in bounded memory. Knows no JAX and no command line.

A folder in the format of the checkpoint's source has the source's own files: the same split, the same order, the same
headers, so that an untouched model comes out byte by byte as it came in. Another format has a layout of our own.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from gptoss_jax.checkpoints import (
    export_check,
    export_files,
    export_leaves,
    huggingface,
    origin,
    published,
    safetensors_writer,
)
from gptoss_jax.checkpoints.export_leaves import Change, LeafWriter
from gptoss_jax.checkpoints.opening import check_names
from gptoss_jax.checkpoints.orbax import integrity, manifest
from gptoss_jax.checkpoints.orbax.manifest import CONFIG, GENERATION_CONFIG, CheckpointError, LeafRecord, Manifest
from gptoss_jax.checkpoints.origin import Origin
from gptoss_jax.checkpoints.recipe import Recipe
from gptoss_jax.checkpoints.safetensors_writer import HeaderError, Shard, Tensor
from gptoss_jax.checkpoints.shards import INDEX
from gptoss_jax.checkpoints.unfinished import UnfinishedFolder, check_can_write
from gptoss_jax.errors import Fault, GptossError, listed, short
from gptoss_jax.files import FileError, parse_json
from gptoss_jax.model.config import ConfigError, ModelConfig, parse_config

FORMATS: Mapping[str, str] = {
    "huggingface": published.HUGGINGFACE,
    "openai": published.OPENAI,
    "bf16": published.HUGGINGFACE_BF16,
}
"""Formats by their names on the command line -> those of `published.FORMATS`."""

SHARD_BYTES = 5_000_000_000  # about that of the published 20b's files
LEAST_SHARD_BYTES = 1_000
DTYPES = "dtypes.json"
_MADE = (CONFIG, INDEX, DTYPES)  # what belongs to one format, or one split, alone

Progress = Callable[[str, int, int], AbstractContextManager[Callable[[int], None]]]
"""Shows progress while its block runs: of what, bytes in all, bytes done before; the block reports bytes as done."""


class ExportError(GptossError):
    """A checkpoint that cannot be exported as asked. One fault per line."""


class Exported(NamedTuple):
    """What was written."""

    dst: Path
    files: int
    tensors: int
    size_bytes: int


@contextlib.contextmanager
def silent(what: str, total_bytes: int, done_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows no progress."""
    del what, total_bytes, done_bytes
    yield lambda _: None


@dataclasses.dataclass(frozen=True)
class Export:
    """A checkpoint, opened, and the files that it becomes.

    Attributes:
        checkpoint: its folder.
        config: its model.
        format: a key of `published.FORMATS`.
        shards: the safetensors files.
        small_files: name -> content of what lies beside them.
        source_sha256: safetensors file -> its hash if nothing is changed; empty where they are not the source's.
        notes: lines for people: what the format cannot say.
        metadata: of the safetensors files.
        records: what is stored, by leaf.
        recipes: which tensor each leaf is of.
    """

    checkpoint: Path
    config: ModelConfig
    format: str
    shards: Sequence[Shard]
    small_files: Mapping[str, bytes]
    source_sha256: Mapping[str, str]
    notes: Sequence[str]
    metadata: Mapping[str, str]
    records: Mapping[str, LeafRecord]
    recipes: Mapping[str, Recipe]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(shard.size_bytes for shard in self.shards) + sum(map(len, self.small_files.values()))

    @property
    def packs(self) -> bool:
        """Whether experts are written as MXFP4."""
        return self.format != published.HUGGINGFACE_BF16

    @property
    def leaves_bytes(self) -> int:
        """Bytes of all leaves."""
        return sum(record.size_bytes for record in self.records.values())

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What is written, by name."""
        return _tensors(self.recipes)

    def free_bytes(self, dst: Path) -> int:
        """What the disk has room for where `dst` is to be."""
        above = next(parent for parent in Path(os.path.abspath(dst)).parents if parent.exists())
        return shutil.disk_usage(above).free

    def check(self, dst: Path) -> None:
        """Refuses a place where the folder cannot be written.

        Raises:
            UnfinishedError: something is in the way at `dst`.
            ExportError: it lies in the checkpoint.
        """
        check_can_write(dst)
        here, there = Path(os.path.realpath(self.checkpoint)), Path(os.path.realpath(dst))
        if here in there.parents:
            raise ExportError(f"DST {dst} lies in CHECKPOINT: name a folder outside of it")

    def check_room(self, dst: Path) -> None:
        """Refuses a disk that is too full.

        Raises:
            ExportError: there is too little room.
        """
        if (free := self.free_bytes(dst)) < self.size_bytes:
            raise ExportError(f"{dst}: {self.size_bytes:,} bytes are needed, {free:,} are free: make room first")

    def run(
        self, dst: Path, change: Change | None = None, changed_by: str | None = None, progress: Progress = silent
    ) -> Exported:
        """Writes the folder. A run that fails leaves nothing.

        Args:
            dst: the folder to be; nothing may exist there.
            change: replaces contents of leaves; None: they are written as they are.
            changed_by: what the files' metadata say of the change, as "changed_by".
            progress: shows how far it is.

        Raises:
            UnfinishedError: something is in the way at `dst`.
            CheckpointError: a leaf is damaged: what is read is compared with its hash.
            ExportError: there is too little room.
            ChangeError: a change gave something else than a leaf's arrays.
            OSError: as the file system raises it.
        """
        self.check(dst)
        self.check_room(dst)
        shards = self._headed(changed_by) if changed_by else self.shards
        with UnfinishedFolder(dst) as folder, progress("writing", self.leaves_bytes, 0) as report_bytes:
            for name, content in self.small_files.items():
                folder.add(name, content)
            for shard in shards:
                folder.reserve(shard.name, shard.size_bytes)
                folder.write(shard.name, shard.header, 0)
            writer = LeafWriter(self.checkpoint, self.records, self.recipes, shards, folder, report_bytes)
            for path in export_leaves.paths(self.records):
                writer.write(path, change)
            folder.finish()
        return Exported(dst, len(shards) + len(self.small_files), len(self.tensors), self.size_bytes)

    def _headed(self, changed_by: str) -> list[Shard]:
        """The same files, whose metadata say that they were changed: nobody's random weights any more."""
        metadata = {key: value for key, value in self.metadata.items() if key != "weights"}
        metadata["changed_by"] = changed_by
        tensors = self.tensors
        return [safetensors_writer.from_header(shard.name, shard.header, tensors, metadata) for shard in self.shards]

    def verify(self, dst: Path, progress: Progress = silent) -> str:
        """Reads the folder at `dst`, to which nothing was changed, again, and says what was found equal.

        Its files are compared with the source's, by sha256, where these are known; else leaves with the checkpoint's.

        Raises:
            ExportError: lists what differs.
            SourceError, ConfigError: it is no published folder any more.
        """
        by_files = bool(self.source_sha256)
        total_bytes = sum(shard.size_bytes for shard in self.shards) if by_files else self.leaves_bytes
        with progress("verifying", total_bytes, 0) as report_bytes:
            if by_files:
                faults = list(export_check.file_faults(dst, self.source_sha256, report_bytes))
            else:
                faults = list(export_check.leaf_faults(dst, self.checkpoint, self.records, report_bytes))
        if faults:
            raise ExportError(listed(faults))
        if by_files:
            return f"all {len(self.source_sha256)} safetensors files equal the source's by sha256"
        return f"all {len(self.records)} leaves, {self.leaves_bytes:,} bytes, equal the checkpoint's"


def open_export(checkpoint: Path, format: str = "huggingface", *, shard_bytes: int | None = None) -> Export:
    """Opens a checkpoint for an export. Only what lies beside the leaves is read.

    Args:
        checkpoint: a finished checkpoint of ours.
        format: a key of FORMATS.
        shard_bytes: most bytes of tensors in one file. None: the source's own files where the format is the source's,
            else SHARD_BYTES; one file in OpenAI's format.

    Raises:
        CheckpointError: no finished checkpoint, or a damaged one: all faults listed.
        ConfigError: its config.json is damaged.
        ExportError: an unknown format, a size of files that is out of range, or a model that the format cannot hold.
    """
    if format not in FORMATS:
        raise ExportError(f"format is {short(format)}, expected one of {', '.join(FORMATS)}")
    if shard_bytes is not None and shard_bytes < LEAST_SHARD_BYTES:
        raise ExportError(f"shard_bytes is {shard_bytes}, expected at least {LEAST_SHARD_BYTES:,}")
    stored = Manifest.read(checkpoint)
    config = manifest.read_config(checkpoint)
    check_names(checkpoint, stored, config)
    _check_stored(checkpoint, stored, huggingface.mxfp4_recipes(config))
    kept = origin.read(checkpoint, stored)
    return _planned(checkpoint, config, FORMATS[format], stored, kept, shard_bytes)


def _check_stored(checkpoint: Path, stored: Manifest, recipes: Mapping[str, Recipe]) -> None:
    """Refuses leaves of other sizes than the model's, and files that are not what the manifest describes."""
    faults = [
        Fault(f"{checkpoint}: leaf {path}", f"{record.dtype} {record.shape}: not of the model in config.json")
        for path, record in sorted(stored.leaves.items())
        if (record.dtype, record.size_bytes) != (recipes[path].leaf_dtype, recipes[path].leaf_bytes)
    ]
    if faults := faults or integrity.file_problems(checkpoint, stored):
        raise CheckpointError(listed(faults))


def _planned(
    checkpoint: Path, config: ModelConfig, format: str, stored: Manifest, kept: Origin, shard_bytes: int | None
) -> Export:
    recipes = published.FORMATS[format](config)
    notes = export_files.lost_in_openai(config) if format == published.OPENAI else []
    if eps := [note for note in notes if note.startswith("rms_norm_eps")]:
        raise ExportError(f"{checkpoint}: OpenAI's format has no key for it: {eps[0]}: take another --format")
    metadata = {"format": "pt"} | {key: value for key, value in kept.metadata.items() if key == "weights"}
    as_source = shard_bytes is None and kept.format == format and bool(kept.headers)
    if as_source:
        shards, metadata = _source_shards(checkpoint, recipes, kept), kept.metadata
    else:
        shards = _shards(format, recipes, shard_bytes, metadata)
    small_files = _small_files(config, format, shards, _tensors(recipes), kept, as_source=as_source)
    hashes = kept.sha256 if as_source and kept.is_exact else {}
    notes = [f"OpenAI's config.json has no key for it: {note}" for note in notes]
    return Export(checkpoint, config, format, shards, small_files, hashes, notes, metadata, stored.leaves, recipes)


def _tensors(recipes: Mapping[str, Recipe]) -> dict[str, Tensor]:
    return {recipe.tensor: Tensor(recipe.tensor, recipe.dtype, recipe.shape) for recipe in recipes.values()}


def _source_shards(checkpoint: Path, recipes: Mapping[str, Recipe], kept: Origin) -> list[Shard]:
    """The source's own files."""
    tensors = _tensors(recipes)
    try:
        shards = [safetensors_writer.from_header(name, header, tensors) for name, header in kept.headers.items()]
    except HeaderError as error:
        raise CheckpointError(f"{checkpoint}: {manifest.ORIGIN}: {error}: convert again") from None
    placed = [name for shard in shards for name in shard.offsets]
    if sorted(placed) != sorted(tensors):
        raise CheckpointError(f"{checkpoint}: {manifest.ORIGIN} has not every tensor once: convert again")
    return shards


def _shards(
    format: str, recipes: Mapping[str, Recipe], shard_bytes: int | None, metadata: Mapping[str, str]
) -> list[Shard]:
    """Files of our own layout."""
    tensors = _tensors(recipes).values()
    if format == published.OPENAI:
        return safetensors_writer.shards(tensors, shard_bytes, metadata, joint="--")
    return safetensors_writer.shards(tensors, shard_bytes or SHARD_BYTES, metadata)


def _small_files(
    config: ModelConfig,
    format: str,
    shards: Sequence[Shard],
    tensors: Mapping[str, Tensor],
    kept: Origin,
    *,
    as_source: bool,
) -> dict[str, bytes]:
    """What lies beside the tensors: the source's where they are of this format, else made from the numbers."""
    same_format = kept.format == format
    made = _made_files(config, format, tensors)
    if len(shards) > 1 and not as_source:
        made[INDEX] = export_files.to_json(safetensors_writer.index(shards, tensors.values()))
    of_source = dict(kept.files) if same_format else _of_any_format(format, kept)
    if not as_source:
        of_source.pop(INDEX, None)
    if CONFIG in of_source and not _is_of(of_source[CONFIG], config):
        del of_source[CONFIG]
    if as_source:  # which may have none of some that we would make
        made = {CONFIG: made[CONFIG]}
    return dict(sorted((made | of_source).items()))


def _made_files(config: ModelConfig, format: str, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    if format == published.OPENAI:
        contents = {
            CONFIG: export_files.openai_config(config),
            DTYPES: export_files.openai_dtypes(tensors.values()),
        }
    else:
        is_packed = format == published.HUGGINGFACE
        contents = {
            CONFIG: export_files.huggingface_config(config, is_packed=is_packed),
            GENERATION_CONFIG: export_files.generation_config(config),
        }
    return {name: export_files.to_json(content) for name, content in contents.items()}


def _of_any_format(format: str, kept: Origin) -> dict[str, bytes]:
    """The source's files that serve another format: the tokenizer's and the licence, in Hugging Face's formats."""
    if published.OPENAI in (format, kept.format):
        return {}
    return {name: content for name, content in kept.files.items() if name not in _MADE}


def _is_of(content: bytes, config: ModelConfig) -> bool:
    """Whether a config.json says what the checkpoint's own says: somebody may have mended that."""
    try:
        return parse_config(parse_json(content, CONFIG)) == config
    except (ConfigError, FileError):
        return False
