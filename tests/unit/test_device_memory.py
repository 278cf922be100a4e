"""What JAX may take of a GPU, and what its out-of-memory errors mean."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from gptoss_jax.runtime import device_memory

GIB = 1 << 30
SAID = ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"]
SAID += ["XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"]


def _device(platform: str, **stats: int):
    return SimpleNamespace(platform=platform, device_kind="NVIDIA H100", memory_stats=lambda: stats or None)


def test_the_120b_has_room_on_80_gb():
    """Guards the default: JAX's own share of an H100 is smaller than the weights of the 120b."""
    environment: dict[str, str] = {}
    device_memory.reserve(environment)
    assert list(environment) == ["XLA_CLIENT_MEM_FRACTION"]
    assert 0.75 * 79.6 < 60.7 < 65.3 < float(environment["XLA_CLIENT_MEM_FRACTION"]) * 79.6


@pytest.mark.parametrize("name", SAID)
def test_what_the_user_has_set_stands(name):
    """Guards whoever shares a card; and JAX, which refuses two names for one thing."""
    environment = {name: "0.3"}
    device_memory.reserve(environment)
    assert environment == {name: "0.3"}


def test_one_line_where_a_gpu_is_used_and_none_elsewhere(monkeypatch):
    """Guards the note: what it is, how much, what changes it; silence on CPUs and TPUs."""
    assert device_memory.described() is None
    monkeypatch.setattr(jax, "local_devices", lambda: [_device("tpu", bytes_limit=GIB)])
    assert device_memory.described({}) is None
    monkeypatch.setattr(jax, "local_devices", lambda: [_device("gpu", bytes_limit=74 * GIB)])
    line = device_memory.described({"XLA_CLIENT_MEM_FRACTION": "0.93"})
    assert line == "NVIDIA H100: JAX may take 74.0 GiB of its memory (XLA_CLIENT_MEM_FRACTION=0.93)"
    monkeypatch.setattr(jax, "local_devices", lambda: [_device("gpu")])
    said = device_memory.described({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"})
    assert said == "NVIDIA H100: JAX may take a share of its memory (XLA_PYTHON_CLIENT_ALLOCATOR=platform)"


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("Out of memory while trying to allocate 1610612736 bytes.", "1.5 GiB more were needed"),
        ("Out of memory while trying to allocate 59.30GiB.", "59.3 GiB more were needed"),
        ("Failed to allocate request for 1.00GiB (1073741824B) on device ordinal 0", "1.0 GiB more were needed"),
        ("Out of memory allocating 8388608 bytes.", "8.00 MiB more were needed"),
        ("Attempting to reserve 60.00G at the bottom of memory.", "60.0 GiB more were needed"),
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 16.40G of 15.75G hbm.",
            "a program takes 16.4 GiB, there are 15.8 GiB",
        ),
        ("no more\nof anything", "RESOURCE_EXHAUSTED: no more of anything"),
    ],
)
def test_what_was_needed_and_what_there_was(text, needed, monkeypatch):
    """Guards the sizes: each allocator says them in words of its own, and one that is unknown is quoted."""
    device = _device("gpu", bytes_limit=74 * GIB, bytes_in_use=73 * GIB)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}")
    expected = f"out of memory on NVIDIA H100: {needed}, and 73.0 of 74.0 GiB were in use"
    assert device_memory.out_of_memory(error) == expected


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INTERNAL: a bug"), RuntimeError("RESOURCE_EXHAUSTED")])
def test_other_errors_are_not_explained_away(error):
    """Guards tracebacks: an error that is not about memory, or not JAX's, is a bug until someone looks at it."""
    assert device_memory.out_of_memory(error) is None


def test_commands_reserve_before_jax_starts():
    """Guards the call: without it JAX's default acts, silently."""
    code = (
        "import os, sys\nfrom gptoss_jax.cli import command\n"
        "def main(arguments): print(os.environ['XLA_CLIENT_MEM_FRACTION'], 'jax' in sys.modules)\n"
        "command.run(main, 'test')"
    )
    environment = {name: value for name, value in os.environ.items() if name not in SAID}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0.93 False\n", "")
