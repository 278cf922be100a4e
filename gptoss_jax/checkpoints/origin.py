"""What a checkpoint keeps of the published folder it was made from, so that an export can give back the same bytes.

The folder `origin/` of a checkpoint holds the header of each safetensors file (which tensor lies where, in which order,
with which metadata) and the small files beside them (config.json, the tokenizer's), each as it was; manifest.json has
the sha256 of each. Checkpoints without one (older, or of a training run) are exported in a layout of our own.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptoss_jax.checkpoints.orbax.manifest import ORIGIN, PROVENANCE, CheckpointError, Manifest, read_provenance
from gptoss_jax.errors import Fault, listed
from gptoss_jax.files import MAX_BYTES

HEADER = ".header"  # after a safetensors file's name: its first bytes, up to the tensors
MAX_ALL_BYTES = 2 * MAX_BYTES  # of small files; the published tokenizer.json has 28 MB
_SUFFIXES = (".json", ".jinja", ".txt", ".md", ".model", ".tiktoken")
_NAMES = ("LICENSE", "NOTICE", "USAGE_POLICY")


class Origin(NamedTuple):
    """What is known of a checkpoint's source.

    Attributes:
        headers: safetensors file -> its first bytes, up to the tensors.
        files: name -> content of a small file.
        format: of the source, a key of `published.FORMATS`; "" where it was no published folder.
        sha256: safetensors file -> hash of all of it.
        metadata: what all its safetensors files say of themselves.
        is_exact: whether its values are those of the source: no expert was rounded.
    """

    headers: Mapping[str, bytes]
    files: Mapping[str, bytes]
    format: str
    sha256: Mapping[str, str]
    metadata: Mapping[str, str]
    is_exact: bool


def collect(folder: Path, safetensors: Iterable[str]) -> tuple[dict[str, bytes], list[Fault]]:
    """What a checkpoint is to keep of a published folder, by name in `origin/`; small files that are too large for it.

    Raises:
        OSError: a file cannot be read.
    """
    kept = {f"{name}{HEADER}": _header(folder / name) for name in sorted(safetensors)}
    left_out, held_bytes = [], 0
    for path in sorted(filter(_is_small_file, folder.iterdir())):
        size_bytes = path.stat().st_size
        if size_bytes > MAX_BYTES or held_bytes + size_bytes > MAX_ALL_BYTES:
            left_out.append(Fault(str(path), f"{size_bytes:,} bytes: too large to be kept for an export"))
            continue
        kept[path.name] = path.read_bytes()
        held_bytes += len(kept[path.name])
    return kept, left_out


def _is_small_file(path: Path) -> bool:
    named = path.suffix in _SUFFIXES or path.name in _NAMES
    return named and not path.name.startswith(".") and path.is_file()


def _header(path: Path) -> bytes:
    """The length and the header of a file whose header has been checked."""
    with open(path, "rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def read(checkpoint: Path, manifest: Manifest) -> Origin:
    """What the checkpoint keeps, every file compared with its hash.

    Raises:
        CheckpointError: files are missing or damaged: all listed; or provenance.json is.
    """
    kept: dict[str, bytes] = {}
    faults = []
    for name, expected in manifest.origin.items():
        content, fault = _read_kept(checkpoint / ORIGIN / name, expected)
        faults += [fault] if fault else []
        kept[name] = content
    if faults:
        raise CheckpointError(listed(faults))
    headers = {name.removesuffix(HEADER): content for name, content in kept.items() if name.endswith(HEADER)}
    files = {name: content for name, content in kept.items() if not name.endswith(HEADER)}
    try:
        return _with_provenance(headers, files, read_provenance(checkpoint))
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{checkpoint / PROVENANCE}: damaged, convert again") from None


def _with_provenance(headers: dict[str, bytes], files: dict[str, bytes], provenance: Mapping[str, Any]) -> Origin:
    source = provenance.get("source", {})
    of_files = {file["name"]: file for file in source.get("files", [])}
    sha256 = {name: str(file["sha256"]) for name, file in of_files.items()}
    shared = [set(file["metadata"].items()) for file in of_files.values()]
    metadata = dict(sorted(set.intersection(*shared))) if shared else {}
    is_exact = not provenance.get("rounding_relative_rms")
    return Origin(headers, files, str(source.get("layout", "")), sha256, metadata, is_exact)


def _read_kept(path: Path, sha256: str) -> tuple[bytes, Fault | None]:
    content = path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_BYTES + 8 else b""
    if hashlib.sha256(content).hexdigest() == sha256:
        return content, None
    return b"", Fault(str(path), "missing, or not as written: the checkpoint is damaged, convert again")


def small_files(checkpoint: Path) -> dict[str, bytes]:
    """The small files that a checkpoint keeps of its source, for a checkpoint that is made from it.

    Raises:
        CheckpointError: as `read`.
    """
    return dict(read(checkpoint, Manifest.read(checkpoint)).files)
