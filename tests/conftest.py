"""The test session is stricter than production: eight CPU devices, strict dtype promotion, no network."""

import os
import socket
import sys
from pathlib import Path

import hypothesis
import pytest

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could configure it; find the pytest plugin that did")

# Environment rather than jax.config, so that commands which tests start as processes are held to it too.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
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


from gptoss_jax.checkpoints import host_memory  # noqa: E402  (jax reads the environment)
from tests.gate import TinyModel  # noqa: E402
from tests.goldens.make import tiny_config  # noqa: E402


def _local_only(connect):
    """Wrap a connecting method of `socket.socket`: Unix sockets pass (asyncio needs them), others raise."""

    def guarded(self, address):
        if self.family != socket.AF_UNIX:
            raise RuntimeError(f"tests may not use the network: connection to {address!r}")
        return connect(self, address)

    return guarded


def pytest_configure():
    """Before anything is collected, so that code run by imports is held to it too."""
    socket.socket.connect = _local_only(socket.socket.connect)
    socket.socket.connect_ex = _local_only(socket.socket.connect_ex)


@pytest.fixture(scope="session")
def tiny() -> TinyModel:
    """The golden model: configs/tiny.json with a vocabulary of 512, random weights of seed 0."""
    return TinyModel(tiny_config())


@pytest.fixture(scope="session")
def tiny_folder(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model as a published checkpoint, Hugging Face layout."""
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
