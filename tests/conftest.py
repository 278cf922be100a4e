"""The test session is stricter than production: eight CPU devices, strict dtype promotion, no network.

GPTOSS_JAX_TEST_PLATFORMS=cuda runs what is made for it on a GPU (tests/accelerators/test_gpu_smoke.py).

A test's folder is its mark (docs/testing.md says what each holds), and a case marked unit has a budget of CPU time.
"""

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could configure it; find the pytest plugin that did")

# Environment rather than jax.config, so that commands which tests start as processes are held to it too.
os.environ["JAX_PLATFORMS"] = os.environ.get("GPTOSS_JAX_TEST_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# BLAS threads of several processes wait for one another in loops; workers of pytest-xdist and commands have one each.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Compiled extensions (openai-harmony is one) and child processes do not pass through Python's sockets; a
# proxy at which nobody listens stops those that speak HTTP.
for _name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ[_name] = os.environ[_name.upper()] = "http://127.0.0.1:9"
for _name in ("no_proxy", "NO_PROXY"):
    os.environ.pop(_name, None)

# How long an example takes says how busy the machine is, not whether the code is right.
hypothesis.settings.register_profile("session", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("session")
# --hypothesis-profile=full: what leaves its number of examples open (the parser's mutations) takes this many.
hypothesis.settings.register_profile("full", hypothesis.settings.get_profile("session"), max_examples=100_000)


import jax  # noqa: E402  (it reads the environment)
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from gptoss_jax.checkpoints import host_memory  # noqa: E402
from tests.gate import TinyModel  # noqa: E402
from tests.goldens.make import tiny_config  # noqa: E402

PROGRAMS = "GPTOSS_JAX_TEST_PROGRAMS"  # the folder that a session's workers, or several sessions, share programs in
MADE_PROGRAMS = pytest.StashKey[bool]()
UNIT_CPU_SECONDS = 6.0  # of one case, without its fixtures; half of it is left for slow machines


def _local_only(connect):
    """Wrap a connecting method of `socket.socket`: Unix sockets pass (asyncio needs them), others raise."""

    def guarded(self, address):
        if self.family != socket.AF_UNIX:
            raise RuntimeError(f"tests may not use the network: connection to {address!r}")
        return connect(self, address)

    return guarded


def pytest_configure(config: pytest.Config):
    """Before anything is collected, so that code run by imports is held to it too."""
    socket.socket.connect = _local_only(socket.socket.connect)
    socket.socket.connect_ex = _local_only(socket.socket.connect_ex)
    if PROGRAMS not in os.environ:
        os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="gptoss-jax-programs-")
        config.stash[MADE_PROGRAMS] = True
    _keep_programs(os.environ[PROGRAMS])


def pytest_unconfigure(config: pytest.Config):
    """The process that made the folder, which outlives its workers, removes it."""
    if MADE_PROGRAMS in config.stash:
        shutil.rmtree(os.environ.pop(PROGRAMS), ignore_errors=True)


def _keep_programs(folder: str | None) -> None:
    """Programs that take long to compile are compiled once a session; most of the time of tests is compiling.

    Not in the environment: commands that tests start have a cache of their own, which this would turn off.
    """
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_compilation_cache_max_size", 16 << 30)  # a limit has entries written and read under a lock
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    compilation_cache.reset_cache()


@pytest.fixture
def compiles_anew() -> Generator[None, None, None]:
    """For tests of the project's own cache, which is off where JAX's is on."""
    _keep_programs(None)
    yield
    _keep_programs(os.environ[PROGRAMS])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test with the folder that holds it, and what runs an interpreted kernel as accelerators."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        item.add_marker("accelerators" if "-interpreted" in item.name else folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fails a case in tests/unit that takes more than UNIT_CPU_SECONDS, of all its threads and child processes.

    CPU time rather than the clock's, which says how busy the machine is. `make mutations` asks for more on purpose.
    """
    began = _cpu_seconds()
    result = yield
    seconds = _cpu_seconds() - began
    is_limited = item.get_closest_marker("unit") and item.config.getoption("--hypothesis-profile") != "full"
    if is_limited and seconds > UNIT_CPU_SECONDS:
        pytest.fail(
            f"{seconds:.1f} s of CPU time, and a case in tests/unit may take {UNIT_CPU_SECONDS:g} s: make it faster, "
            "or move it to tests/proofs",
            pytrace=False,
        )
    return result


def _cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


@pytest.fixture(scope="session")
def tiny() -> TinyModel:
    """The golden model: configs/tiny.json with a vocabulary of 512, random weights of seed 0."""
    return TinyModel(tiny_config())


@pytest.fixture(scope="session")
def tiny_folder(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model as a published checkpoint, Hugging Face format."""
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def addresses_given(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Where `host_memory.empty` has put what the test asked of it so far."""
    given, empty = set(), host_memory.empty

    def spy(num_bytes: int):
        memory = empty(num_bytes)
        given.add(memory.ctypes.data)
        return memory

    monkeypatch.setattr(host_memory, "empty", spy)
    return given
