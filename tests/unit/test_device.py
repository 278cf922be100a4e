"""What a machine is asked once and keeps: its read bandwidth."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from gptoss_jax.runtime import device, user_cache


class _Device(NamedTuple):
    """As much of a device as the figure depends on."""

    device_kind: str


CPU, GPU = _Device("cpu"), _Device("NVIDIA H200")


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """Where figures are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gptoss_jax" / device.BANDWIDTH_FILE


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The kinds of the devices that were measured; each measurement finds 1 GB/s more than the last."""
    kinds: list[str] = []

    def measure(measured_device) -> float:
        kinds.append(measured_device.device_kind)
        return len(kinds) * 1e9

    monkeypatch.setattr(device, "measure_read_bandwidth", measure)
    return kinds


def test_a_machine_is_measured_once(kept, measured):
    """Guards the end of every answer: five passes over 256 MB are made on the first run only."""
    assert [device.read_bandwidth(CPU) for _ in range(3)] == [1e9, 1e9, 1e9]
    assert device.read_bandwidth(GPU) == 2e9
    assert device.read_bandwidth(CPU) == 1e9
    assert measured == ["cpu", "NVIDIA H200"]
    assert sorted(json.loads(kept.read_text()).values()) == [1e9, 2e9]
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_other_processors_and_other_numbers_of_cores_are_other_machines(kept, measured, monkeypatch):
    """Guards a home that several machines share, and a run that `taskset` holds on one core."""
    device.read_bandwidth(CPU)
    monkeypatch.setattr(device.platform, "node", lambda: "another")
    device.read_bandwidth(CPU)
    monkeypatch.setattr(device, "_processor", lambda: "another")
    device.read_bandwidth(CPU)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5, 6}, raising=False)
    device.read_bandwidth(CPU)
    assert len(measured) == len(json.loads(kept.read_text())) == 4


def test_a_figure_from_a_busy_machine_is_measured_again(kept, measured):
    """Guards the share of the limit against one above 100 %, kept for ever."""
    assert device.read_bandwidth(CPU) == 1e9
    assert device.read_bandwidth(CPU, at_least=0.9e9) == 1e9
    assert device.read_bandwidth(CPU, at_least=1.5e9) == 2e9
    assert device.read_bandwidth(CPU) == 2e9


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"x": "fast"}', b'{"x": -1}', b"0"])
def test_a_damaged_file_is_measured_again_and_mended(content, kept, measured):
    """Guards answers against a cache: what it holds is a file, and files get damaged."""
    kept.parent.mkdir()
    kept.write_bytes(content)
    assert [device.read_bandwidth(CPU) for _ in range(2)] == [1e9, 1e9]
    assert len(measured) == 1


def test_a_pipe_in_its_place_is_not_waited_for(kept, measured):
    """Guards the end of an answer against a wait for ever."""
    kept.parent.mkdir()
    os.mkfifo(kept)
    assert [device.read_bandwidth(CPU) for _ in range(2)] == [1e9, 1e9]
    assert kept.is_file()


@pytest.mark.parametrize("value", ["0", "-3", "Infinity", "NaN", "null", '"fast"', "true"])
def test_figures_that_cannot_be_are_measured_again(value, kept, measured):
    """Guards the division by the figure."""
    device.read_bandwidth(CPU)
    (machine,) = json.loads(kept.read_text())
    kept.write_text(f"{{{json.dumps(machine)}: {value}}}")
    assert device.read_bandwidth(CPU, at_least=1.0) == 2e9


def test_where_nothing_can_be_kept_each_run_measures(tmp_path, measured, monkeypatch):
    """Guards read-only homes, full disks and users without an account: the answer's statistics still come."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [device.read_bandwidth(CPU) for _ in range(2)] == [1e9, 2e9]
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert device.read_bandwidth(CPU) == 3e9


def test_files_of_the_cache_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Guards two commands that end at the same time, and a disk that is full."""
    file = tmp_path / "folder" / "figures.json"
    user_cache.keep(file, b"old")

    def fail(*_) -> None:
        raise OSError("full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(user_cache.os, "replace", fail)
        user_cache.keep(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(file.parent.iterdir()) == [file]


def test_the_measurement_itself():
    """Guards the unit: bytes per second, between a slow disk's and a fast accelerator's."""
    assert 1e8 < device.measure_read_bandwidth(jax.devices()[0], num_bytes=1 << 22) < 1e14
