"""The machine: where its compiled programs are kept, and how fast its memory is read."""

import contextlib
import json
import os
import platform
import re
import stat
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoints import host_memory
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import user_cache
from gptoss_jax.runtime import program_cache

BANDWIDTH_FILE = "read_bandwidth.json"
SAMPLE_BYTES = 1 << 28
REPEATS = 5


def compiled_programs_folder() -> Path:
    """Where compiled programs are kept unless another folder is named: xla/ in the user's cache folder."""
    return user_cache.cache_folder() / "xla"


def keep_compiled_programs(folder: Path | None = None) -> None:
    """Lets XLA keep its programs in `folder`; None: in `compiled_programs_folder()`, which only its owner may enter.

    A program is code: a folder that is made here is its owner's alone, and one that anyone can write to is not used.

    Raises:
        GptossError: nothing can be kept there, and why.
    """
    try:
        place = folder or compiled_programs_folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder is None:
            place.chmod(0o700)
    except (OSError, RuntimeError) as error:  # Path.home raises RuntimeError for a user without an account
        raise GptossError(f"cannot write to {folder or 'the cache folder'}: {_reason(error)}") from None
    if place.stat().st_mode & stat.S_IWOTH:
        raise GptossError(f"anyone can write to {place}, expected a folder of your own (chmod go-w)")
    if not os.access(place, os.W_OK | os.X_OK):
        raise GptossError(f"cannot write to {place}")
    program_cache.use(place)


def _reason(error: OSError | RuntimeError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def read_bandwidth(device: Any, at_least: float = 0.0) -> float:
    """Bytes per second that `device` reads from its memory, measured once per machine.

    The figure is kept in the user's cache folder. Where nothing can be read or written there, each call measures.

    Args:
        device: a `jax.Device` on this host.
        at_least: bytes per second that were read already. A figure below that was measured on a busy machine, and is
            measured again.
    """
    figures, machine = _kept_figures(), _machine(device)
    if figures.get(machine, 0.0) <= at_least:
        figures[machine] = measure_read_bandwidth(device)
        _keep_figures(figures)
    return figures[machine]


def measure_read_bandwidth(device: Any, num_bytes: int = SAMPLE_BYTES) -> float:
    """Bytes per second that `device` reads from its memory: best of a few sums over a large array."""
    ones = host_memory.empty(num_bytes).view(np.float32).reshape(256, -1)  # as weights lie, and not twice beside them
    ones.fill(1)
    x = jax.device_put(ones, device)
    total = jax.jit(lambda a: jnp.sum(a, axis=1)).lower(x).compile()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        total(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return num_bytes / min(seconds)


def _machine(device: Any) -> str:
    """What the figure depends on: kind of device, host, processor and the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{device.device_kind}, {platform.node()}, {_processor()}, {cores} cores"


def _processor() -> str:
    with contextlib.suppress(OSError):  # Linux only
        if found := re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def _kept_figures() -> dict[str, float]:
    """The figures in the user's cache folder, by machine; none where there is no such file, or a damaged one."""
    try:
        content: Any = json.loads((user_cache.cache_folder() / BANDWIDTH_FILE).read_text())
    except (OSError, ValueError, RuntimeError):  # Path.home raises RuntimeError for a user without an account
        return {}
    figures = content.items() if isinstance(content, dict) else ()
    return {key: float(value) for key, value in figures if isinstance(value, int | float) and 0 < value < 1e18}


def _keep_figures(figures: dict[str, float]) -> None:
    """Keeps the figures for later runs; where nothing can be written, each run measures for itself."""
    with contextlib.suppress(OSError, RuntimeError):
        content = json.dumps(figures, indent=1).encode()
        user_cache.write(user_cache.cache_folder() / BANDWIDTH_FILE, content)
