"""What tells a folder of weights from others, found without reading all of it: for jobs that go on another day."""

import hashlib
import os
from pathlib import Path

from gptoss_jax.checkpoints import published
from gptoss_jax.checkpoints.orbax import manifest
from gptoss_jax.errors import GptossError

SAMPLE_BYTES = 1 << 20
STRIDE_BYTES = 64 << 20


def identity(path: Path, adapter: Path | None = None) -> str:
    """64 hexadecimal digits of the weights at `path`, and of the adapter beside them, if there is one.

    Of a converted checkpoint they stand for every byte: its manifest holds the hash of each tensor. Of published files
    they stand for config.json, names, sizes, headers, and 1 MiB of every 64.

    Raises:
        GptossError: there are no weights at `path`, or no adapter where one is named.
    """
    if adapter is None:
        return _of_weights(path).hexdigest()
    digest = _of_weights(path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        try:
            digest.update((adapter / name).read_bytes())
        except OSError as error:
            raise GptossError(f"{adapter / name}: {error.strerror}; expected the folder of a PEFT adapter") from None
    return digest.hexdigest()


def _of_weights(path: Path) -> "hashlib._Hash":
    digest = hashlib.sha256()
    if manifest.is_checkpoint(path):
        for name in (manifest.MANIFEST, manifest.CONFIG):
            digest.update((path / name).read_bytes())
        return digest
    source = published.open_source(path)
    digest.update((source.folder / "config.json").read_bytes())
    for name, file in sorted(source.files.items()):
        digest.update(f"{name} {file.size_bytes}".encode())
        _sample(file.path, file.size_bytes, digest)
    return digest


def _sample(path: Path, size_bytes: int, digest: "hashlib._Hash") -> None:
    """The header stands in the first sample; the file's end is one too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset in [*range(0, size_bytes, STRIDE_BYTES), max(0, size_bytes - SAMPLE_BYTES)]:
            digest.update(os.pread(descriptor, SAMPLE_BYTES, offset))
    except OSError as error:
        raise GptossError(f"{path}: {error.strerror}") from None
    finally:
        os.close(descriptor)
