"""Compiled programs in a folder: found again, and never taken for what they are not."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.runtime import device, kept_programs
from gptoss_jax.runtime.kept_programs import KeptPrograms

pytestmark = pytest.mark.usefixtures("compiles_anew")

CPUS = jax.devices()
X = np.arange(8, dtype=np.float32)
SHARDED = jax.device_put(X, jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data")))


class Untraceable:
    """In place of a jitted function that must not be traced."""

    def lower(self, *arguments):
        raise AssertionError("traced again")


def doubled(x):
    """The program that is kept."""
    return {"doubled": (jnp.sin(x), x * 2)}


def kept(folder, devices=CPUS[:1], described="a model"):
    """The folder's programs, of one CPU device."""
    return KeptPrograms(folder, devices, described)


@pytest.fixture
def folder(tmp_path):
    """A folder that holds one program."""
    kept(tmp_path).compile("doubled", jax.jit(doubled), (X,))
    return tmp_path


@pytest.mark.parametrize(("devices", "x"), [(CPUS[:1], X), (CPUS[3:4], jax.device_put(X, CPUS[3])), (CPUS, SHARDED)])
def test_a_kept_program_is_neither_traced_nor_compiled_again_and_gives_the_same(tmp_path, devices, x):
    """Guards the start of every command; and a program that is loaded onto other devices than its own."""
    first = kept(tmp_path, devices).compile("doubled", jax.jit(doubled), (x,))(x)
    again = kept(tmp_path, devices).compile("doubled", Untraceable(), (x,))(x)
    assert jax.tree.structure(first) == jax.tree.structure(again)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_another_model_version_environment_shape_or_device_is_compiled_for_itself(folder, monkeypatch):
    """Guards a program that was compiled from something else: wrong numbers without a word."""

    def is_traced(programs: KeptPrograms | None = None, x: Any = X) -> bool:
        try:
            (programs or kept(folder)).compile("doubled", Untraceable(), (x,))
        except AssertionError:
            return True
        return False

    assert not is_traced()
    assert is_traced(kept(folder, described="another model"))
    assert is_traced(kept(folder, CPUS[1:2]))
    assert is_traced(x=X[:4])
    assert is_traced(x=X.astype(np.int32))
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_enable_fast_math=true")
        assert is_traced(kept(folder))
    monkeypatch.setattr(kept_programs, "_installation", lambda: "changed sources")
    assert is_traced()


@pytest.mark.parametrize(
    "garble",
    [
        lambda entry: b"",
        lambda entry: entry[:10],
        lambda entry: entry[:-1],
        lambda entry: bytes([entry[0] ^ 1]) + entry[1:],
        lambda entry: entry[:40] + bytes([entry[40] ^ 1]) + entry[41:],
        lambda entry: entry[:-7] + bytes([entry[-7] ^ 1]) + entry[-6:],
        lambda entry: b"garbage" * 1000,
    ],
)
def test_a_garbled_entry_is_compiled_and_written_anew(folder, garble):
    """Guards a disk's fault or a stray write: the price is a compilation, not a traceback or another program's code."""
    [entry] = folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(garble(whole))
    result = kept(folder).compile("doubled", jax.jit(doubled), (X,))(X)
    np.testing.assert_array_equal(np.asarray(result["doubled"][1]), X * 2)
    assert kept(folder).compile("doubled", Untraceable(), (X,))


def test_exchanged_entries_are_compiled_and_written_anew(folder):
    """Guards files that changed their names: both programs take and give the same shapes."""

    def negated(x):
        return {"doubled": (jnp.sin(x), -x)}

    [one] = folder.iterdir()
    kept(folder, described="another").compile("doubled", jax.jit(negated), (X,))
    [other] = set(folder.iterdir()) - {one}
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    result = kept(folder).compile("doubled", jax.jit(doubled), (X,))(X)
    np.testing.assert_array_equal(np.asarray(result["doubled"][1]), X * 2)


def test_an_entry_in_whose_place_a_folder_lies_costs_a_compilation(folder):
    """Guards a write that fails: the program runs, and is not kept."""
    [entry] = folder.iterdir()
    entry.unlink()
    entry.mkdir()
    result = kept(folder).compile("doubled", jax.jit(doubled), (X,))(X)
    np.testing.assert_array_equal(np.asarray(result["doubled"][1]), X * 2)
    assert list(folder.iterdir()) == [entry]


@pytest.mark.parametrize("make", [os.mkfifo, functools.partial(os.symlink, "/dev/zero")], ids=["pipe", "device"])
def test_an_entry_in_whose_place_no_file_lies_is_compiled_and_written_anew(folder, make):
    """Guards a start that waits for ever, or reads until the memory is full."""
    [entry] = folder.iterdir()
    entry.unlink()
    make(entry)
    result = kept(folder).compile("doubled", jax.jit(doubled), (X,))(X)
    np.testing.assert_array_equal(np.asarray(result["doubled"][1]), X * 2)
    assert kept(folder).compile("doubled", Untraceable(), (X,))


def test_a_folder_is_made_for_its_user_alone(tmp_path):
    """Guards code that anybody could put there: what is kept is run."""
    folder = tmp_path / "cache" / "programs"
    assert kept_programs.why_not(folder) is None
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert "others can write to" in str(kept_programs.why_not(folder))
    (tmp_path / "file").write_text("")
    assert "cannot make" in str(kept_programs.why_not(tmp_path / "file" / "programs"))


def test_programs_are_those_of_a_processor_not_of_a_host(folder, monkeypatch):
    """Guards containers, whose names change with each start; and a home that machines of two kinds share."""
    monkeypatch.setattr(device.platform, "node", lambda: "another")
    assert kept(folder).compile("doubled", Untraceable(), (X,))
    monkeypatch.setattr(device, "_cpuinfo", lambda field: "without AVX-512")
    with pytest.raises(AssertionError, match="traced again"):
        kept(folder).compile("doubled", Untraceable(), (X,))


def test_what_the_runtime_does_not_take_is_compiled_anew(folder, monkeypatch):
    """Guards a driver that refuses an executable of the one before it."""

    def refuse(*arguments, **options):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: another driver")

    monkeypatch.setattr(kept_programs.serialize_executable, "deserialize_and_load", refuse)
    result = kept(folder).compile("doubled", jax.jit(doubled), (X,))(X)
    np.testing.assert_array_equal(np.asarray(result["doubled"][1]), X * 2)
