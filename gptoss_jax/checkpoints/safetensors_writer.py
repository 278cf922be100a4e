"""Safetensors files as they are to lie on the disk: headers, shards, index. Contents are written by who has them.

Headers are those of the safetensors library, byte by byte: wide tensors first, then by name, padded to eight bytes.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gptoss_jax.errors import GptossError, short

_ITEMSIZES = {"BF16": 2, "U8": 1}
_ALIGNMENT = 8


class Tensor(NamedTuple):
    """One tensor to be stored; its dtype is in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its contents."""
        return math.prod(self.shape) * _ITEMSIZES[self.dtype]


class Shard(NamedTuple):
    """One file.

    Attributes:
        name: of the file.
        header: its first bytes, up to the tensors.
        offsets: tensor -> where its contents begin in the file.
        size_bytes: of the whole file.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size_bytes: int


class HeaderError(GptossError):
    """A header that does not describe the tensors that are to be stored."""


def shard(name: str, tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> Shard:
    """A file of these tensors as the safetensors library lays it out."""
    in_order = sorted(tensors, key=lambda tensor: (-_ITEMSIZES[tensor.dtype], tensor.name))
    entries, at = {}, 0
    for tensor in in_order:
        offsets = [at, at := at + tensor.size_bytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    return _with_header(name, _encoded({"__metadata__": dict(metadata), **entries}), entries)


def _encoded(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _with_header(name: str, header: bytes, entries: Mapping[str, Any]) -> Shard:
    start = len(header)
    offsets = {tensor: start + entry["data_offsets"][0] for tensor, entry in entries.items()}
    return Shard(
        name, header, offsets, start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    )


def from_header(
    name: str, header: bytes, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Shard:
    """A file with a header that is given, as it is, or with other metadata.

    Args:
        name: of the file.
        header: its first bytes, up to the tensors.
        tensors: all that there may be, by name.
        metadata: what it is to say of itself; None: what it says.

    Raises:
        HeaderError: the header's tensors are not of these, have other shapes, overlap, or leave holes.
    """
    try:
        content = json.loads(header[8:])
        entries = {tensor: entry for tensor, entry in content.items() if tensor != "__metadata__"}
        _check_entries(name, entries, tensors)
        if metadata:
            content = {"__metadata__": dict(metadata), **entries}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise error if isinstance(error, HeaderError) else HeaderError(f"{name}: no header: {error}") from None
    return _with_header(name, _encoded(content) if metadata else header, entries)


def _check_entries(name: str, entries: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    end = 0
    for tensor, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        wanted = tensors.get(tensor)
        found = Tensor(tensor, entry["dtype"], tuple(entry["shape"]))
        if wanted is None or found != wanted:
            raise HeaderError(f"{name}: {short(tensor)} is {found[1:]}, expected {wanted and wanted[1:]}")
        if entry["data_offsets"] != [end, end := end + wanted.size_bytes]:
            raise HeaderError(f"{name}: {short(tensor)} lies at {entry['data_offsets']}, expected {end}")


def split(tensors: Iterable[Tensor], shard_bytes: int | None) -> list[list[Tensor]]:
    """The tensors, in name order, in groups of at most `shard_bytes` (None: one); a larger tensor is alone."""
    groups, held = [[]], 0
    for tensor in sorted(tensors):
        if groups[-1] and shard_bytes is not None and held + tensor.size_bytes > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.size_bytes
    return groups


def shards(
    tensors: Iterable[Tensor], shard_bytes: int | None, metadata: Mapping[str, str], joint: str = "-"
) -> list[Shard]:
    """Files of at most `shard_bytes` of tensors each, named as transformers names them.

    Args:
        tensors: all of the model.
        shard_bytes: as in `split`.
        metadata: of each file.
        joint: between `model` and the number: OpenAI's files have two dashes there.
    """
    groups = split(tensors, shard_bytes)
    if len(groups) == 1:
        return [shard("model.safetensors", groups[0], metadata)]
    names = [f"model{joint}{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return [shard(name, group, metadata) for name, group in zip(names, groups, strict=True)]


def index(files: Iterable[Shard], tensors: Iterable[Tensor]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    total = sum(tensor.size_bytes for tensor in tensors)
    weight_map = {tensor: file.name for file in files for tensor in file.offsets}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
