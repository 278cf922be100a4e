"""How much of a GPU's memory JAX takes, said before it starts; and what an out-of-memory error of its means.

Imports no JAX: what it reads of the environment has to stand there before a device is asked for.
"""

import os
import re
import sys
from collections.abc import Mapping, MutableMapping

GPU_FRACTION = 0.93
"""Of a GPU's memory that JAX takes when it starts. Its own choice is 0.75, 59.7 of an H100's 79.6 GiB, and the weights
of gpt-oss-120b are 60.7. The rest is for the CUDA context and for what libraries take beside JAX.
"""
FRACTION = "XLA_CLIENT_MEM_FRACTION"
_SAID_BY_USER = (FRACTION, "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
_SAID_BY_USER += ("XLA_PYTHON_CLIENT_ALLOCATOR",)
_GIB = 1 << 30
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": _GIB, "T": 1 << 40}
_SIZE = r"([\d.]+)\s*([KMGT]?)(?:i?B|\s?bytes)?\b"


def reserve(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has JAX take GPU_FRACTION of each GPU, unless the environment says what it is to take.

    To be called before anything asks JAX for devices; without a GPU it changes nothing.
    """
    if not any(name in environment for name in _SAID_BY_USER):
        environment[FRACTION] = str(GPU_FRACTION)


def described(environment: Mapping[str, str] = os.environ) -> str | None:
    """One line on what JAX may take of a GPU, and what changes it; None where its devices are no GPUs.

    Asks JAX for its devices.
    """
    import jax

    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return None
    limit = (device.memory_stats() or {}).get("bytes_limit")
    share = f"{limit / _GIB:.1f} GiB of its memory" if limit else "a share of its memory"
    said = [f"{name}={environment[name]}" for name in _SAID_BY_USER if name in environment]
    return f"{device.device_kind}: JAX may take {share} ({', '.join(said) or 'its own default'})"


def out_of_memory(error: BaseException) -> str | None:
    """What an error of JAX says that ran out of a device's memory: what was needed, what there was. Else None."""
    text = str(error)
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    if not of_jax or "RESOURCE_EXHAUSTED" not in text:
        return None
    device, there = _device()
    return f"out of memory{device}: {_needed(text)}{there}"


def _needed(text: str) -> str:
    """Of XLA's message, whose words differ from one allocator to the next."""
    if found := re.search(rf"Used {_SIZE} of {_SIZE}", text):  # a TPU's compiler
        return f"a program takes {_gib(*found.groups()[:2])}, there are {_gib(*found.groups()[2:])}"
    pattern = rf"(?:allocat\w*|reserve|request for|requested)\D{{0,40}}?{_SIZE}"
    if found := re.search(pattern, text):
        return f"{_gib(*found.groups())} more were needed"
    return " ".join(text.split())[:200]


def _gib(number: str, unit: str) -> str:
    size = float(number.rstrip(".")) * _UNITS[unit]
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / (1 << 20):.2f} MiB"


def _device() -> tuple[str, str]:
    """The device's name, and what of its memory is in use, as far as it says so."""
    if "jax" not in sys.modules:
        return "", ""
    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return f" on {device.device_kind}", ""
    used, limit = stats.get("bytes_in_use", 0) / _GIB, stats["bytes_limit"] / _GIB
    return f" on {device.device_kind}", f", and {used:.1f} of {limit:.1f} GiB were in use"
