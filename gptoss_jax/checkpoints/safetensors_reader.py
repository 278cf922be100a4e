"""Safetensors files, read lazily with plain reads, every claim of their headers checked.

Not the safetensors package: that maps files into memory, and mapped pages count into the process's resident size,
which the converter promises to bound; and it stops at the first fault, where all are wanted. `convert --verify` asks it
for a second opinion of the headers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from gptoss_jax.checkpoints import host_memory
from gptoss_jax.checkpoints.leaf import are_sizes
from gptoss_jax.errors import Fault, GptossError, short, shortened
from gptoss_jax.files import MAX_BYTES, FileError, check_regular, parse_json, recognize

CHUNK_BYTES = 16 << 20


class SourceError(GptossError):
    """A published checkpoint that cannot be taken as it is. One fault per line, each naming file and tensor."""


_ITEMSIZES: dict[str, int] = dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)
_ITEMSIZES |= dict.fromkeys(("BF16", "F16", "I16", "U16"), 2)
_ITEMSIZES |= dict.fromkeys(("F32", "I32", "U32"), 4) | dict.fromkeys(("F64", "I64", "U64"), 8)


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: its bytes are [offset, offset + size_bytes) of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    def read(self, start: int = 0, size_bytes: int | None = None) -> np.ndarray:
        """Bytes from `start` of the tensor on, in memory of their own that a device on a CPU can take as it is.

        Raises:
            SourceError: the file has become shorter than it was.
        """
        buffer = host_memory.empty(self.size_bytes - start if size_bytes is None else size_bytes)
        with open(self.file, "rb", buffering=0) as file:
            count = host_memory.read_into(buffer, file.fileno(), self.offset + start)
        if count < buffer.nbytes:
            end = self.offset + start + count
            raise SourceError(f"{self.file}: ends at byte {end:,}: it has been truncated since its header was read")
        return buffer

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        """The tensor's bytes, chunk by chunk."""
        for start in range(0, self.size_bytes, chunk_bytes):
            yield self.read(start, min(chunk_bytes, self.size_bytes - start))


@dataclass(frozen=True)
class SafetensorsFile:
    """One file's header.

    Attributes:
        path: the file.
        size_bytes: of the whole file.
        mtime_ns: when it was last written, to notice that it changed between runs.
        metadata: its `__metadata__`.
        tensors: entries that can be read, by name.
        names: of all tensors in the header, those included that cannot be read.
        faults: what is wrong with the file or its header.
    """

    path: Path
    size_bytes: int
    mtime_ns: int
    metadata: dict[str, str]
    tensors: dict[str, Entry]
    names: frozenset[str]
    faults: tuple[Fault, ...]


def library_faults(file: SafetensorsFile) -> list[Fault]:
    """Where the safetensors library, with which others read the file, finds other tensors in it than we do."""
    try:
        with safetensors.safe_open(file.path, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            theirs = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
    except safetensors.SafetensorError as error:
        return [Fault(str(file.path), f"the safetensors library cannot read it: {error}")]
    ours = {name: (entry.dtype, entry.shape) for name, entry in file.tensors.items()}
    return [
        tensor_fault(file.path, name, f"{ours.get(name)} here, {theirs.get(name)} by the safetensors library")
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def open_file(path: Path) -> SafetensorsFile:
    """Reads and checks a header; what is wrong with it, or with the file, is in `faults`."""
    size_bytes = mtime_ns = 0
    try:
        stat = check_regular(path)
        size_bytes, mtime_ns = stat.st_size, stat.st_mtime_ns
        raw, data_start = _header(path, size_bytes)
    except FileError as error:
        return SafetensorsFile(path, size_bytes, mtime_ns, {}, {}, frozenset(), (Fault(str(path), error.what),))
    metadata, tensors, faults = _tensors(path, raw, data_start)
    if all(name in tensors for name, _ in raw if name != "__metadata__"):  # else what is malformed explains the holes
        faults += _extent_faults(path, list(tensors.values()), data_start, size_bytes)
    readable = {name: entry for name, entry in tensors.items() if entry.offset + entry.size_bytes <= size_bytes}
    names = frozenset(name for name, _ in raw) - {"__metadata__"}
    return SafetensorsFile(path, size_bytes, mtime_ns, metadata, readable, names, tuple(faults))


def _header(path: Path, size_bytes: int) -> tuple[list[tuple[str, Any]], int]:
    """The header's pairs, duplicates included, and where the data starts."""
    with open(path, "rb") as file:
        beginning = file.read(64)
        length = int.from_bytes(beginning[:8], "little")
        if len(beginning) < 8 or length > MAX_BYTES or 8 + length > size_bytes:
            fault = f"{size_bytes:,} bytes, a header of {length:,} does not fit: truncated, or not safetensors"
            raise FileError(path, recognize(beginning) or fault)
        file.seek(8)
        text = file.read(length)
    try:
        header = parse_json(text, path, objects=_Pairs)
    except FileError as error:
        raise FileError(path, f"its header is corrupt, or not safetensors: {error.what}") from None
    if not isinstance(header, _Pairs):
        raise FileError(path, "its header is no JSON object: corrupt, or not safetensors")
    return [(name, dict(value) if isinstance(value, _Pairs) else value) for name, value in header], 8 + length


def _tensors(
    path: Path, raw: list[tuple[str, Any]], data_start: int
) -> tuple[dict[str, str], dict[str, Entry], list[Fault]]:
    """Metadata and entries of a header, and what is wrong with single ones."""
    metadata, tensors, faults = {}, {}, []
    for name, value in raw:
        if name == "__metadata__":
            metadata = {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}
        elif name in tensors:
            faults.append(tensor_fault(path, name, "duplicate in this file's header"))
        elif isinstance(entry := _entry(path, name, value, data_start), Entry):
            tensors[name] = entry
        else:
            faults.append(tensor_fault(path, name, entry))
    return metadata, tensors, faults


def tensor_fault(path: Path, name: str, what: str) -> Fault:
    """What is wrong with one tensor of a file."""
    return Fault(f"{path}: {shortened(name)}", what)


class _Pairs(list):
    """A JSON object with its duplicate keys."""


def _entry(path: Path, name: str, value: Any, data_start: int) -> Entry | str:
    """The entry, or what is wrong with it."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return "its header entry is malformed, expected dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEMSIZES:
        return f"unknown dtype {short(dtype)}"
    if not are_sizes(shape) or not are_sizes(offsets) or len(offsets) != 2:
        return f"malformed shape {short(shape)} or data_offsets {short(offsets)}"
    size = math.prod(shape) * _ITEMSIZES[dtype]
    if offsets[1] - offsets[0] != size:
        return f"data_offsets {offsets} span {offsets[1] - offsets[0]:,} bytes, but {dtype} {shape} takes {size:,}"
    return Entry(path, name, dtype, tuple(shape), data_start + offsets[0], size)


def _extent_faults(path: Path, entries: list[Entry], data_start: int, size_bytes: int) -> Iterator[Fault]:
    """Tensors that overlap, leave holes or reach beyond the file, and bytes after the last of them."""
    end, before = data_start, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.size_bytes)):
        if entry.offset < end:
            yield tensor_fault(path, entry.name, f"overlaps {before}")
        elif entry.offset > end:
            hole = f"{entry.offset - end:,} bytes between {before} and {shortened(entry.name)} belong to no tensor"
            yield Fault(str(path), hole)
        if entry.offset + entry.size_bytes > end:
            end, before = entry.offset + entry.size_bytes, shortened(entry.name)
    if end > size_bytes:
        cut = sum(entry.offset + entry.size_bytes > size_bytes for entry in entries)
        fault = f"{size_bytes:,} bytes, expected {end:,}: truncated, {cut} tensors are cut off; fetch it again"
        yield Fault(str(path), fault)
    elif end < size_bytes:
        yield Fault(str(path), f"{size_bytes - end:,} bytes after {before} belong to no tensor")
