"""The bytes of a checkpoint's files: zarr3 with one chunk per tensor, cut into parts by its sharding codec.

Zarr v3 core specification; sharding codec, version 1.0.
"""

import functools
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

PART_BYTES = 4 << 20  # most bytes in one separately readable part: small enough that a sharded restore reads its own


def dtype_of(name: str) -> np.dtype:
    """The number format that a manifest calls `name`."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def to_json(content: Any) -> str:
    """A JSON file's text, the same for the same content."""
    return json.dumps(content, indent=1) + "\n"


def part_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Largest slab (1, ..., 1, n, whole, ...) of at most PART_BYTES, or one row, that divides the tensor.

    Slabs of this form follow one another in the file exactly as in the tensor.
    """
    part = [1] * len(shape)
    size = itemsize
    for axis in reversed(range(len(shape))):
        most = min(shape[axis], max(PART_BYTES // size, 1))
        part[axis] = next((n for n in range(most, 1, -1) if shape[axis] % n == 0), 1)
        size *= part[axis]
        if part[axis] < shape[axis]:
            break
    return tuple(part)


def zarr_json(shape: tuple[int, ...], dtype: str) -> str:
    """The text of one leaf's zarr.json."""
    bytes_codec = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": list(part_shape(shape, dtype_of(dtype).itemsize)),
        "codecs": [bytes_codec if dtype_of(dtype).itemsize > 1 else {"name": "bytes"}],
        "index_codecs": [bytes_codec, {"name": "crc32c"}],
        "index_location": "end",
    }
    return to_json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
        }
    )


def index(shape: tuple[int, ...], dtype: str) -> bytes:
    """What follows the tensor's bytes in its file: offset and size of every part, and a checksum of that."""
    itemsize = dtype_of(dtype).itemsize
    part_bytes = math.prod(part_shape(shape, itemsize)) * itemsize
    parts = math.prod(shape) * itemsize // part_bytes
    table = b"".join(struct.pack("<QQ", i * part_bytes, part_bytes) for i in range(parts))
    return table + struct.pack("<I", crc32c(table))


@functools.cache
def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC (RFC 3720, appendix B.4)."""
    table, crc = _crc32c_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def orbax_metadata(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The text of _METADATA: the tree of leaves, by path, as Orbax reads it (every key a string in a dict)."""
    tree = {}
    for path in sorted(shapes):
        keys = tuple(path.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(shapes[path]),
            },
        }
    return to_json(
        {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
    )
