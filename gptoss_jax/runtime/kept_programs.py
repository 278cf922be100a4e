"""Compiled programs in a folder: a later run of the same installation neither traces nor compiles them again.

JAX's own cache finds a program by its HLO, so that a run has to trace and lower it first, which takes longer than all
else at a start. Here it is found by what it would be traced from. An entry says what it was made for and has a digest:
one of another version, a garbled or an exchanged one is compiled and written anew. What Python code changes in a
running process is not seen: commands keep programs, a library does not unless it is asked.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pickle
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

import cpu_kernels
from gptoss_jax.runtime import device, user_cache

PACKAGES = ("jax", "jaxlib", "flax", "numpy")
SOURCES = ("gptoss_jax", "pallas_kernels", "cpu_kernels")
ENVIRONMENT = ("JAX_", "XLA_", "LIBTPU_", "CUDA_", "NVIDIA_")  # variables that change what is compiled begin so
DIGEST_BYTES = hashlib.sha256().digest_size


def default_folder() -> Path:
    """Where commands keep programs unless another folder is named: programs/ in the user's cache folder.

    Raises:
        RuntimeError: as `user_cache.cache_folder`.
    """
    return user_cache.cache_folder() / "programs"


def why_not(folder: Path) -> str | None:
    """Why no programs can be kept in `folder`, which is made for its user alone if it is not there; None: they can."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        return f"cannot make {folder} ({error.strerror})"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"cannot write to {folder}"
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        return f"others can write to {folder}, and what is kept there runs as code"
    return None


class KeptPrograms:
    """The programs of one model on its devices, in a folder for which `why_not` has no reason."""

    def __init__(self, folder: Path, devices: Iterable[Any], described: str):
        """`described`: everything that the programs depend on, beside devices, arguments and this installation."""
        self._folder, self._devices = folder, list(devices)
        of_devices = [(d.id, d.platform, d.device_kind, d.client.platform_version) for d in self._devices]
        self._described = f"{described} {of_devices} {device.processor()} {_environment()}"

    def compile(self, name: str, program: Any, arguments: tuple[Any, ...]) -> Any:
        """`program`, a jitted function, compiled for `arguments`: the kept one, or a new one, which is then kept."""
        shapes = jax.tree.map(lambda x: (jax.numpy.shape(x), str(x.dtype)), arguments)
        asked = f"{name} {self._described} {shapes}"
        path = self._folder / f"{name}-{_sha256(asked.encode()).hex()[:32]}"
        key = _sha256(f"{asked} {_installation()}".encode())
        kept = _read(path, key)
        if kept is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the devices' driver has become another one, say
                cpu_kernels.why_not()  # has XLA know the kernels that a program may call, where there are any
                return serialize_executable.deserialize_and_load(
                    *kept, backend=self._devices[0].client, execution_devices=self._devices
                )
        compiled = program.lower(*arguments).compile()
        with contextlib.suppress(OSError, ValueError, NotImplementedError):  # a full disk; what JAX cannot serialize
            payload = pickle.dumps(serialize_executable.serialize(compiled))
            user_cache.keep(path, key + _sha256(payload) + payload)
        return compiled


def _read(path: Path, key: bytes) -> tuple[Any, Any, Any] | None:
    """What `serialize` gave, if the entry was written under `key` and is whole."""
    try:
        entry = path.read_bytes() if path.is_file() else b""  # a pipe gives nothing for ever, a device no end
    except OSError:
        return None
    found, digest, payload = entry[:DIGEST_BYTES], entry[DIGEST_BYTES : 2 * DIGEST_BYTES], entry[2 * DIGEST_BYTES :]
    return pickle.loads(payload) if found == key and digest == _sha256(payload) else None


@functools.cache
def _installation() -> str:
    """Versions and sources of all that traces and compiles."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    digest = hashlib.sha256()
    site = Path(__file__).parents[2]
    for package in SOURCES:
        for path in sorted((site / package).rglob("*.py")):
            digest.update(str(path.relative_to(site)).encode())
            digest.update(path.read_bytes())
    return f"python {platform.python_version()} {versions} {digest.hexdigest()}"


def _environment() -> list[tuple[str, str]]:
    return sorted(pair for pair in os.environ.items() if pair[0].startswith(ENVIRONMENT))


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
