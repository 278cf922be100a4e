"""A published checkpoint as declared leaves: which format it has, what is wrong with it, and each leaf's array.

Nothing is held but headers; a leaf is read when asked for. Conversion and loading both read through this.
"""

import dataclasses
import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptoss_jax.checkpoints import foreign, host_memory, huggingface, openai, packing
from gptoss_jax.checkpoints.contents import ContentCheck, FileReport
from gptoss_jax.checkpoints.leaf import Leaf
from gptoss_jax.checkpoints.orbax import manifest
from gptoss_jax.checkpoints.recipe import Recipe
from gptoss_jax.checkpoints.safetensors_reader import CHUNK_BYTES, Entry, SafetensorsFile, SourceError, tensor_fault
from gptoss_jax.checkpoints.shards import INDEX, open_files
from gptoss_jax.errors import Fault, listed
from gptoss_jax.model.config import ModelConfig, read_config

# Format -> its table. The names are what people read, and what provenance.json keeps.
FORMATS: Mapping[str, Callable[[ModelConfig], dict[str, Recipe]]] = {
    "Hugging Face, MXFP4 experts": huggingface.mxfp4_recipes,
    "OpenAI original": openai.original_recipes,
    "Hugging Face, BF16 experts": huggingface.bf16_recipes,
}
HUGGINGFACE, OPENAI, HUGGINGFACE_BF16 = FORMATS

_CAST = ": cast it, as transformers does: from_pretrained(SRC, dtype=torch.bfloat16), then save_pretrained"
_HOW_TO_CAST = {(dtype, "BF16"): _CAST for dtype in ("F16", "F32", "F64")}
_LAYER = re.compile(r"(?:model\.layers|block)\.(\d{1,6})\.")
_NUMPY = {"BF16": np.dtype(ml_dtypes.bfloat16), "U8": np.dtype(np.uint8)}


def _silent(_: int) -> None:
    pass


class ContentError(SourceError):
    """Faults of a published checkpoint, each of them at hand.

    Attributes:
        faults: all that were found.
    """

    def __init__(self, faults: Sequence[Fault]):
        super().__init__(listed(faults))
        self.faults = faults


@dataclasses.dataclass
class Source:
    """A published checkpoint, opened.

    Attributes:
        folder: where its files lie (`original/` inside the folder asked for, perhaps).
        format: a key of FORMATS.
        remark: what else should be known about the choice of folder, or "".
        config: the model.
        files: safetensors files by name.
        recipes: leaf -> the tensor that it is made from.
        quantize_experts: whether bfloat16 experts off the MXFP4 grid are rounded to it.
    """

    folder: Path
    format: str
    remark: str
    config: ModelConfig
    files: dict[str, SafetensorsFile]
    recipes: dict[str, Recipe]
    quantize_experts: bool
    _faults: list[Fault]
    _absent: set[str]  # tensors that some fault already explains
    _scales: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(file.size_bytes for file in self.files.values())

    @functools.cached_property
    def tensors(self) -> dict[str, Entry]:
        """Every readable tensor, by name."""
        return {name: entry for file in self.files.values() for name, entry in file.tensors.items()}

    def identity(self) -> dict[str, Any]:
        """What distinguishes this source from another without reading its contents."""
        files = {name: {"size": file.size_bytes, "mtime_ns": file.mtime_ns} for name, file in self.files.items()}
        return {"layout": self.format, "files": files, "quantize_experts": self.quantize_experts}

    # ---- headers ----

    def problems(self, leaves: Iterable[str] = ()) -> list[Fault]:
        """Faults of headers and index for which `leaves` cannot be read from here."""
        tensors = self.tensors
        wanted = {recipe.tensor: recipe for recipe in self.recipes.values()}
        faults = list(self._faults)
        for name, recipe in wanted.items():
            if name in tensors:
                faults += _entry_faults(tensors[name], recipe)
            elif name not in self._absent and not self._unreadable_files():
                faults.append(tensor_fault(self.folder, name, "missing from all files"))
        unknown = f"unknown, the format ({self.format}) has no such tensor"
        faults += [
            tensor_fault(entry.file, name, unknown) for name, entry in sorted(tensors.items()) if name not in wanted
        ]
        faults += [
            Fault(str(self.folder), f"no tensor is known for {leaf}") for leaf in sorted({*leaves} - {*self.recipes})
        ]
        return faults

    def _unreadable_files(self) -> bool:
        """Whether any tensor may lie in a file whose header cannot be read."""
        return not (self.folder / INDEX).is_file() and any(not file.names for file in self.files.values())

    def check_headers(self, leaves: Iterable[str] = ()) -> None:
        """Raises what `problems` finds.

        Raises:
            SourceError: all of it.
        """
        _raise(self.problems(leaves))

    # ---- contents ----

    def check_file(self, name: str, report: Callable[[int], object] = _silent) -> FileReport:
        """Reads one file from end to end: hashes it, looks for NaN, Inf and scale byte 255, tries out the packing.

        Args:
            name: of the file.
            report: called with the number of bytes that were read since its last call.
        """
        file, digest = self.files[name], hashlib.sha256()
        wanted = {recipe.tensor: recipe for recipe in self.recipes.values()}
        faults, rounding, end = [], {}, 0
        for entry in sorted(file.tensors.values(), key=lambda entry: entry.offset):
            recipe = wanted.get(entry.name)
            sound = recipe is not None and not _entry_faults(entry, recipe)
            check = ContentCheck(entry, recipe if sound else None)
            if not file.faults:  # else there may be gigabytes between two tensors
                digest.update(_read_file(file.path, end, entry.offset))
                report(entry.offset - end)
            end = entry.offset + entry.size_bytes
            for chunk in check.chunks():
                digest.update(chunk.data)
                check.see(chunk)
                report(chunk.nbytes)
            faults += check.faults(self.quantize_experts)
            if check.off_grid:
                rounding[entry.name] = check.rounding
        digest.update(_read_file(file.path, end, file.size_bytes) if not file.faults else b"")
        return FileReport("" if file.faults else digest.hexdigest(), rounding, tuple(faults))

    def read(self, path: str, leaf: Leaf) -> np.ndarray:
        """The array of the leaf at `path`, as the model declares it.

        Raises:
            SourceError: its contents hold NaN, Inf or scale byte 255, or lie off the MXFP4 grid.
        """
        recipe = self.recipes[path]
        entry = self.tensors[recipe.tensor]
        if recipe.pack:
            return self._read_packed(path, entry, recipe)
        row_bytes = entry.size_bytes // entry.shape[0]
        first, last = recipe.rows or (0, entry.shape[0])
        content = entry.read(first * row_bytes, (last - first) * row_bytes)
        check = ContentCheck(entry, recipe)
        for start in range(0, content.nbytes, CHUNK_BYTES):  # in chunks, as looking takes room
            check.see(content[start : start + CHUNK_BYTES])
        _raise(check.faults(self.quantize_experts))
        return content.view(_NUMPY[entry.dtype]).reshape(leaf.shape)

    def read_all(self, leaves: Mapping[str, Leaf]) -> Iterator[tuple[str, np.ndarray]]:
        """Every leaf by name, read through the same tables and under the same checks as a conversion.

        Nothing is written. Once a fault is found, what is left is looked through for others, and given no more.

        Raises:
            SourceError: headers or contents are at fault: all listed.
        """
        self.check_headers(leaves)
        faults = []
        for path, leaf in leaves.items():
            try:
                array = self.read(path, leaf)
            except ContentError as error:
                faults += error.faults
                continue
            if not faults:
                yield path, array
            del array  # while the next one is read
        _raise(list(dict.fromkeys(faults)))  # blocks and scales of one tensor have the same

    def _read_packed(self, path: str, entry: Entry, recipe: Recipe) -> np.ndarray:
        """Blocks or scales of a bfloat16 tensor; the scales that fall off while packing blocks are kept for later."""
        if recipe.pack == "scales" and path in self._scales:
            return self._scales.pop(path)
        experts, inputs, out = entry.shape
        scales = _empty((experts, out, inputs // 32))
        blocks = _empty((experts if recipe.pack == "blocks" else 0, out, inputs // 32, 16))
        check = ContentCheck(entry, recipe)
        for i, chunk in enumerate(check.chunks()):
            packed = check.see(chunk)
            if packed is None:  # NaN or Inf
                continue
            scales[i] = packed.scales
            if recipe.pack == "blocks":
                blocks[i] = packed.blocks
        _raise(check.faults(self.quantize_experts))
        if recipe.pack == "scales":
            return scales
        self._scales = {path.removesuffix("blocks") + "scales": scales}
        return blocks

    def pack_one_expert(self, entry: Entry) -> None:
        """Packs the first expert of a bfloat16 tensor, for its time."""
        expert = entry.read(0, entry.size_bytes // entry.shape[0])
        packing.pack(expert.view(_NUMPY["BF16"]).reshape(entry.shape[1:]))

    def provenance(self, reports: Mapping[str, FileReport]) -> dict[str, Any]:
        """Where a checkpoint made from this comes from: no paths or times, so that the same source gives the same."""
        files = [
            {"name": name, "size_bytes": file.size_bytes, "sha256": reports[name].sha256, "metadata": file.metadata}
            for name, file in sorted(self.files.items())
        ]
        config = {
            "name": "config.json",
            "sha256": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest(),
        }
        rounding = {tensor: rms for report in reports.values() for tensor, rms in report.rounding.items()}
        experts = "published MXFP4 bytes"
        if self.format == HUGGINGFACE_BF16:
            experts = "bfloat16 rounded to MXFP4" if rounding else "bfloat16 packed to MXFP4, exactly"
        return {
            "source": {"layout": self.format, "config": config, "files": files},
            "experts": experts,
            "rounding_relative_rms": dict(sorted(rounding.items())),
        }


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    return host_memory.empty(math.prod(shape)).reshape(shape)


def _entry_faults(entry: Entry, recipe: Recipe) -> list[Fault]:
    found = []
    if entry.dtype != recipe.dtype:
        found.append(f"dtype {entry.dtype}, expected {recipe.dtype}{_HOW_TO_CAST.get((entry.dtype, recipe.dtype), '')}")
    if entry.shape != recipe.shape:
        turned = recipe.pack and entry.shape == (recipe.shape[0], recipe.shape[2], recipe.shape[1])
        hint = ": transposed, this format has [E, in, out]" if turned else ""
        found.append(f"shape {list(entry.shape)}, expected {list(recipe.shape)}{hint}")
    return [tensor_fault(entry.file, entry.name, what) for what in found]


def _read_file(path: Path, start: int, end: int) -> bytes:
    """Bytes between tensors: the header, as a rule."""
    if start >= end:
        return b""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(end - start)


def _raise(faults: Sequence[Fault]) -> None:
    if faults:
        raise ContentError(faults)


# ---- opening ----


def open_source(path: str | Path, *, quantize_experts: bool = False) -> Source:
    """Opens a published checkpoint, reading headers only.

    Args:
        path: a folder in any format of FORMATS, or one whose `original/` is.
        quantize_experts: as in Source.

    Raises:
        SourceError: there is no published checkpoint, or none that agrees with its config.json.
        ConfigError: its config.json is not a gpt-oss model.
    """
    folder, remark = _locate(Path(path))
    config = read_config(folder / "config.json")
    files, faults, absent = open_files(folder)
    names = {name for file in files.values() for name in file.names} | absent
    if kind := foreign.quantization(names):
        _raise([Fault(str(folder), kind)])
    name = _format(names)
    _check_layers(folder, config, names, complete=not faults)
    recipes = FORMATS[name](config)
    return Source(folder, name, remark, config, files, recipes, quantize_experts, faults, absent)


def _check_layers(folder: Path, config: ModelConfig, names: Iterable[str], *, complete: bool) -> None:
    """Refuses a config.json whose number of layers is not the files', before anything is made of that number."""
    layers = 1 + max((int(found[1]) for found in map(_LAYER.match, names) if found), default=config.num_layers - 1)
    if layers > config.num_layers or (complete and layers < config.num_layers):
        fault = f"num_hidden_layers is {config.num_layers}, but the safetensors hold {layers} layers: of another model"
        _raise([Fault(str(folder / "config.json"), fault)])


def _locate(path: Path) -> tuple[Path, str]:
    """The folder that holds the files, and a remark where there was a choice."""
    if not path.is_dir():
        raise SourceError(foreign.no_folder(path))
    inner = path / "original"
    if _holds_safetensors(path):
        return path, "its original/ is not read" if _holds_safetensors(inner) else ""
    if _holds_safetensors(inner):
        return inner, "found in original/"
    if manifest.is_checkpoint(path):
        raise SourceError(f"{path}: converted already (it holds {manifest.MANIFEST}), expected published safetensors")
    if (path / "config.json").is_file():
        read_config(path / "config.json")  # another model's is to be refused for that
    raise SourceError(
        foreign.no_checkpoint(path)
        or f"{path}: no *.safetensors and no {INDEX}, neither here nor in original/: expected a checkpoint as published"
    )


def _holds_safetensors(folder: Path) -> bool:
    return os.path.lexists(folder / INDEX) or any(map(_is_of_the_model, folder.glob("*.safetensors")))


def _is_of_the_model(path: Path) -> bool:
    return path.name not in foreign.ADAPTER_FILES


def _format(names: set[str]) -> str:
    if any(name.startswith("block.") for name in names):
        return OPENAI
    whole = any(name.endswith((".experts.gate_up_proj", ".experts.down_proj")) for name in names)
    packed = any(name.endswith(("_proj_blocks", "_proj_scales")) for name in names)
    return HUGGINGFACE_BF16 if whole and not packed else HUGGINGFACE
