"""What a machine is asked once and keeps: its read bandwidth, and compiled programs."""

import json
import stat
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache as jax_cache

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import user_cache
from gptoss_jax.runtime import device, program_cache


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


def test_the_measurement_itself():
    """Guards the unit: bytes per second, between a slow disk's and a fast accelerator's."""
    assert 1e8 < device.measure_read_bandwidth(jax.devices()[0], num_bytes=1 << 22) < 1e14


@pytest.fixture
def jax_settings():
    """JAX's settings and cache as they were, afterwards."""
    names = [name for name in jax.config.values if "cache" in name]
    before, opened = {name: jax.config.values[name] for name in names}, jax_cache.get_file_cache
    yield
    jax_cache.get_file_cache = opened
    jax_cache.reset_cache()
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_where_they_can_be(tmp_path, jax_settings, monkeypatch):
    """Guards a home that cannot be written to, or has none: said once, rather than a warning for each program."""
    before = jax.config.values["jax_compilation_cache_dir"]
    (tmp_path / "file").write_text("")
    with pytest.raises(GptossError, match=r"cannot write to .*/file/xla: Not a directory"):
        device.keep_compiled_programs(tmp_path / "file" / "xla")
    with monkeypatch.context() as patch:
        patch.setattr(user_cache, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        with pytest.raises(GptossError, match="cannot write to the cache folder: no home"):
            device.keep_compiled_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == before
    device.keep_compiled_programs(tmp_path / "xla")
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "xla")


def test_the_folder_of_compiled_programs_is_its_owners_alone(tmp_path, jax_settings, monkeypatch):
    """Guards against code that others put there: a new folder, the usual one from before, one for all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    usual = device.compiled_programs_folder()
    usual.mkdir(parents=True, mode=0o755)
    for folder, place in ((None, usual), (tmp_path / "new", tmp_path / "new")):
        device.keep_compiled_programs(folder)
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    with pytest.raises(GptossError, match=r"anyone can write to .*/shared, expected a folder of your own"):
        device.keep_compiled_programs(tmp_path / "shared")
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o1777


def test_a_program_that_is_not_as_it_was_put_is_not_there(tmp_path):
    """Guards XLA, which runs what it is handed: bits that flipped, a cut file, a folder, another program's file."""
    cache = program_cache.ProgramCache(str(tmp_path))
    for key in "ab":
        cache.put(key, 100 * key.encode())
    assert (cache.get("a"), cache.get("b"), cache.get("absent")) == (100 * b"a", 100 * b"b", None)
    good = (tmp_path / "a-cache").read_bytes()
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    for bad in (b"", good[:20], good[:-1], flipped, b"x" + good[1:], (tmp_path / "b-cache").read_bytes()):
        (tmp_path / "a-cache").write_bytes(bad)
        assert cache.get("a") is None
    cache.put("a", b"again")
    assert cache.get("a") == b"again"
    (tmp_path / "c-cache").mkdir()
    cache.put("c", b"nowhere")
    assert cache.get("c") is None


def test_jax_compiles_again_what_is_damaged_in_the_folder(tmp_path, jax_settings):
    """Guards the hook into JAX: two programs exchanged on the disk give neither a wrong result nor a warning."""
    device.keep_compiled_programs(tmp_path / "xla")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def results() -> list[int]:
        jax.clear_caches()
        return [int(jax.jit(lambda x, n=n: x * n + n)(jnp.int32(1))) for n in (2, 3)]

    expected, files = results(), sorted((tmp_path / "xla").glob("jit__lambda*-cache"))
    programs = [file.read_bytes() for file in files]
    assert len(files) == 2
    for file, other in zip(files, reversed(programs), strict=True):
        file.write_bytes(other)
    assert results() == expected == [4, 6]
    cache = program_cache.ProgramCache(str(tmp_path / "xla"))
    assert all(cache.get(file.name.removesuffix("-cache")) for file in files)
