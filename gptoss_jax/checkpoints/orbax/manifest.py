"""What a finished checkpoint says of itself: every leaf's shape, dtype, size and hash, its model, and its origin."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.checkpoints.leaf import are_sizes
from gptoss_jax.checkpoints.orbax import zarr
from gptoss_jax.errors import GptossError, one_line, short
from gptoss_jax.files import FileError, read_json
from gptoss_jax.model import config as config_module
from gptoss_jax.model.config import ModelConfig

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ORBAX_METADATA = "_METADATA"
ORIGIN = "origin"  # the folder of what is kept of the source: `checkpoints.origin`
DTYPES = ("bfloat16", "float32", "uint8")  # what weights are stored in


_ORIGIN_NAME = re.compile(r"[\w-][^/\x00-\x1f]{0,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(r"\w[\w.-]{0,127}(/\w[\w.-]{0,127}){0,15}")


class CheckpointError(GptossError):
    """A checkpoint that is absent, unfinished, damaged, or of another model. One fault per line."""


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """What is stored for one leaf.

    Attributes:
        path: as in "layers/0/attention/q/weight".
        shape: sizes of the axes.
        dtype: a NumPy or ml_dtypes name, as in "bfloat16".
        sha256: of the tensor's little-endian bytes in C order.
        file_bytes: size of its data file: the tensor's bytes and the index after them.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    file_bytes: int

    @classmethod
    def from_json(cls, raw: Any) -> "LeafRecord":
        """The record that `dataclasses.asdict` has become in a JSON file.

        Raises:
            CheckpointError: it is none: files get damaged.
        """
        try:
            record = cls(raw["path"], tuple(raw["shape"]), raw["dtype"], raw["sha256"], raw["file_bytes"])
        except (KeyError, TypeError):
            raise CheckpointError(f"no record of a leaf: {short(raw)}") from None
        if not record.is_plausible:
            raise CheckpointError(f"no record of a leaf: {short(record.path)}")
        return record

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor itself."""
        return math.prod(self.shape) * zarr.dtype_of(self.dtype).itemsize

    @property
    def folder(self) -> str:
        """Name of the leaf's folder, as Orbax wants it."""
        return self.path.replace("/", ".")

    @property
    def is_plausible(self) -> bool:
        """Whether the fields can be those of a leaf that was written."""
        sizes = are_sizes(self.shape) and are_sizes([self.file_bytes])
        names = isinstance(self.path, str) and isinstance(self.sha256, str) and self.dtype in DTYPES
        return sizes and names and bool(_PATH.fullmatch(self.path)) and self.size_bytes < self.file_bytes

    @property
    def file(self) -> str:
        """The data file, relative to the checkpoint: zarr3's only chunk."""
        return f"{self.folder}/" + ".".join(["c", *("0" for _ in self.shape)])


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Every leaf of a checkpoint, by path in sorted order, and what it keeps of its source.

    Attributes:
        leaves: by path.
        origin: file in `origin/` -> its sha256.
    """

    leaves: Mapping[str, LeafRecord]
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The text of manifest.json."""
        leaves = [dataclasses.asdict(self.leaves[path]) for path in sorted(self.leaves)]
        origin = {"origin": dict(sorted(self.origin.items()))} if self.origin else {}
        return zarr.to_json({"format_version": FORMAT_VERSION, "leaves": leaves, **origin})

    @classmethod
    def read(cls, path: str | Path) -> "Manifest":
        """The manifest of the checkpoint at `path`.

        Raises:
            CheckpointError: there is no finished checkpoint, its manifest is damaged or of another version.
        """
        file = Path(path) / MANIFEST
        if not os.path.lexists(file):
            raise CheckpointError(_why_absent(Path(path)))
        raw = _read_object(file)
        if raw.get("format_version") != FORMAT_VERSION:
            version = short(raw.get("format_version"))
            raise CheckpointError(f"{file}: format version {version}, expected {FORMAT_VERSION}: convert again")
        leaves = raw.get("leaves")
        try:
            records = [LeafRecord.from_json(leaf) for leaf in (leaves if isinstance(leaves, list) else [leaves])]
        except CheckpointError as error:
            raise CheckpointError(one_line(f"{file}: damaged ({error}): convert again")) from None
        if len(named := {record.path: record for record in records}) < len(records):
            raise CheckpointError(f"{file}: damaged (a leaf is listed twice): convert again")
        return cls(named, _origin(file, raw.get("origin", {})))


def _origin(file: Path, raw: Any) -> dict[str, str]:
    """File -> hash, as `to_json` writes it: names of files in one folder."""
    if not isinstance(raw, dict) or not all(map(_ORIGIN_NAME.fullmatch, raw)):
        raise CheckpointError(f"{file}: damaged (no list of origin's files: {short(raw)}): convert again")
    if wrong := [name for name, sha256 in raw.items() if not (isinstance(sha256, str) and _SHA256.fullmatch(sha256))]:
        raise CheckpointError(one_line(f"{file}: damaged (no sha256 of {short(wrong[0])}): convert again"))
    return raw


def is_checkpoint(path: str | Path) -> bool:
    """Whether a finished checkpoint of this format lies at `path`."""
    return os.path.lexists(Path(path) / MANIFEST)


def read_config(path: str | Path) -> ModelConfig:
    """The model that the checkpoint at `path` holds.

    Raises:
        ConfigError: its config.json is absent or damaged.
    """
    return config_module.read_config(Path(path) / CONFIG)


def read_provenance(path: str | Path) -> dict[str, Any]:
    """Where the checkpoint at `path` comes from, as its writer recorded it.

    Raises:
        CheckpointError: the record is absent or damaged.
    """
    return _read_object(Path(path) / PROVENANCE)


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        content = read_json(file)
    except FileError as error:
        raise CheckpointError(one_line(f"{file}: damaged ({error.what}): convert again")) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: damaged (a {type(content).__name__}, expected an object): convert again")
    return content


def partial_folder(dst: str | Path) -> Path:
    """Where a checkpoint that is to be at `dst` is written until it is whole."""
    dst = Path(os.path.abspath(dst))
    return dst.parent / f"{dst.name}.partial"  # of the root too, which has no name


def is_unfinished(path: str | Path) -> bool:
    """Whether a checkpoint at `path` was begun and not finished: there, or in the folder where it is written."""
    path = Path(os.path.abspath(path))
    begun = path.name.endswith(".partial") or path.parent.name.endswith(".partial") or partial_folder(path).exists()
    return not is_checkpoint(path) and (begun or (path / ORBAX_METADATA).exists())


def _why_absent(path: Path) -> str:
    if path.name.endswith(".partial") or path.parent.name.endswith(".partial"):
        return f"{path}: an unfinished checkpoint: run the command that writes it again, it resumes"
    if partial_folder(path).exists():
        return f"{path}: not finished (see {partial_folder(path)}): run the command that writes it again, it resumes"
    if not path.exists():
        return f"{path}: no such folder"
    if not path.is_dir():
        return f"{path}: a file, expected the folder of a checkpoint"
    return f"{path}: has no {MANIFEST}, so it is no finished checkpoint; python -m converters.convert makes one"
