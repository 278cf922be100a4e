"""The machine: what it is, and how fast its memory is read."""

import contextlib
import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoints import host_memory
from gptoss_jax.files import FileError, read_json
from gptoss_jax.runtime import user_cache

BANDWIDTH_FILE = "read_bandwidth.json"
SAMPLE_BYTES = 1 << 28
REPEATS = 5


def read_bandwidth(device: Any, at_least: float = 0.0) -> float:
    """Bytes per second that `device` reads from its memory, measured once per machine.

    The figure is kept in the user's cache folder. Where nothing can be read or written there, each call measures.

    Args:
        device: a `jax.Device` on this host.
        at_least: bytes per second that were read already. A figure below that was measured on a busy machine, and is
            measured again.
    """
    figures, here = _kept_figures(), machine(device)
    if figures.get(here, 0.0) <= at_least:
        figures[here] = measure_read_bandwidth(device)
        _keep_figures(figures)
    return figures[here]


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


def machine(device: Any) -> str:
    """What a device's speed depends on: its kind, the host, its processor and the cores that this process may use."""
    return f"{device.device_kind}, {platform.node()}, {_processor()}, {_cores()} cores"


def processor() -> str:
    """What compiled programs depend on, whatever the host is called: the processor, its features, the cores."""
    return f"{_processor()}, {_cpuinfo('flags') or _cpuinfo('Features')}, {_cores()} cores"


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    """What Linux says of the first processor; "" elsewhere."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"^{field}\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return ""


def _kept_figures() -> dict[str, float]:
    """The figures in the user's cache folder, by machine; none where there is no such file, or a damaged one."""
    try:
        content: Any = read_json(user_cache.cache_folder() / BANDWIDTH_FILE)
    except (OSError, FileError, RuntimeError):  # Path.home raises RuntimeError for a user without an account
        return {}
    figures = content.items() if isinstance(content, dict) else ()
    return {key: float(value) for key, value in figures if isinstance(value, int | float) and 0 < value < 1e18}


def _keep_figures(figures: dict[str, float]) -> None:
    """Keeps the figures for later runs; where nothing can be written, each run measures for itself."""
    with contextlib.suppress(OSError, RuntimeError):
        content = json.dumps(figures, indent=1).encode()
        user_cache.keep(user_cache.cache_folder() / BANDWIDTH_FILE, content)
