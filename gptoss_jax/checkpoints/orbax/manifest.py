"""What a finished checkpoint says of itself: every leaf's shape, dtype, size and hash, its model, and its origin."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.checkpoints.orbax import zarr
from gptoss_jax.errors import GptossError
from gptoss_jax.model import config as config_module
from gptoss_jax.model.config import ModelConfig

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ORBAX_METADATA = "_METADATA"
DTYPES = ("bfloat16", "float32", "uint8")  # what weights are stored in


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
    def from_json(cls, raw: Mapping[str, Any]) -> "LeafRecord":
        """The record that `dataclasses.asdict` has become in a JSON file."""
        return cls(raw["path"], tuple(raw["shape"]), raw["dtype"], raw["sha256"], raw["file_bytes"])

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
        """Whether each field is of its type: a manifest is a file, and files get damaged."""
        whole = all(isinstance(number, int) for number in (*self.shape, self.file_bytes))
        return isinstance(self.path, str) and isinstance(self.sha256, str) and self.dtype in DTYPES and whole

    @property
    def file(self) -> str:
        """The data file, relative to the checkpoint: zarr3's only chunk."""
        return f"{self.folder}/" + ".".join(["c", *("0" for _ in self.shape)])


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Every leaf of a checkpoint, by path in sorted order."""

    leaves: Mapping[str, LeafRecord]

    def to_json(self) -> str:
        """The text of manifest.json."""
        leaves = [dataclasses.asdict(self.leaves[path]) for path in sorted(self.leaves)]
        return zarr.to_json({"format_version": FORMAT_VERSION, "leaves": leaves})

    @classmethod
    def read(cls, path: str | Path) -> "Manifest":
        """The manifest of the checkpoint at `path`.

        Raises:
            CheckpointError: there is no finished checkpoint, its manifest is damaged or of another version.
        """
        file = Path(path) / MANIFEST
        if not file.is_file():
            raise CheckpointError(_why_absent(Path(path)))
        raw = _read_object(file)
        if raw.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: format version {raw.get('format_version')!r}, expected {FORMAT_VERSION}: convert again"
            )
        try:
            records = [LeafRecord.from_json(leaf) for leaf in raw["leaves"]]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: damaged ({error!r}): convert again") from None
        if faulty := [record.path for record in records if not record.is_plausible]:
            raise CheckpointError(f"{file}: damaged (leaf {faulty[0]!r}): convert again")
        return cls({record.path: record for record in records})


def is_checkpoint(path: str | Path) -> bool:
    """Whether a finished checkpoint of this format lies at `path`."""
    return (Path(path) / MANIFEST).is_file()


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
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing: the checkpoint is damaged, convert again") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{file}: damaged ({error!r}): convert again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: damaged (a {type(content).__name__}, expected an object): convert again")
    return content


def partial_folder(dst: str | Path) -> Path:
    """Where a checkpoint that is to be at `dst` is written until it is whole."""
    dst = Path(os.path.abspath(dst))
    return dst.with_name(dst.name + ".partial")


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
