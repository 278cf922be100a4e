"""The C++ kernels as compilers build them: without what a compiler lacks, and under the sanitizers."""

import ctypes
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest

import cpu_kernels

ROOT = Path(__file__).parents[2]
MISSING = cpu_kernels.why_not()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
INSTRUCTION_SETS: tuple[str, ...] = () if MISSING else cpu_kernels.instruction_sets()


def _setup() -> Any:
    """setup.py as a module."""
    pytest.importorskip("setuptools", reason="setup.py holds the compiler's flags")
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiler(folder: Path, objects: Path, refused: str) -> Path:
    """A compiler that fails where its command has `refused`; else what one case compiled, others find in `objects`.

    Which instruction sets there are is said to all that is compiled once, and makes a difference to dispatch.cc alone.
    """
    objects.mkdir(exist_ok=True)
    real = os.environ.get("CXX", "g++")
    compiler = folder / "compiler"
    compiler.write_text(f"""#!/bin/sh
case " $* " in *" {refused} "*) exit 1;; esac
case "$*" in *dispatch.cc*) sets=;; *) sets='s/-DCPU_KERNELS_HAVE_[^ ]* //g';; esac
kept={objects}/$(echo "$*" | sed -e 's#{folder}##g' -e "$sets" | md5sum | cut -c 1-32)
object=$(echo "$*" | sed -n 's/.* -o \\([^ ]*[.]o\\) .*/\\1/p')
[ -n "$object" ] && [ -f $kept ] && exec cp $kept "$object"
{real} "$@" -O0 || exit 1  # optimising takes long
[ -z "$object" ] || {{ cp "$object" $kept.$$ && mv $kept.$$ $kept; }}
""")
    compiler.chmod(0o755)
    return compiler


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have one instruction set beside C++")
@pytest.mark.parametrize(
    ("refused", "lost"),
    [
        ("-mavx512bf16", ["avx512bf16"]),
        ("-mavx512vnni", ["avx512bf16", "avx512vnni"]),  # for products of int16s both need it
        ("-mavx512f", ["avx512bf16", "avx512vnni", "avx512"]),
        ('-DCPU_KERNELS_AVXVNNI "*"supported.cc', ["avxvnni"]),  # it knows the flag, and not the name to test for
        ("-std=c++17", None),
    ],
)
def test_a_compiler_loses_what_it_lacks_and_no_more(refused, lost, tmp_path, tmp_path_factory, monkeypatch, capsys):
    """Guards older compilers: what one lacks costs that instruction set alone, and does not pass without a word."""
    setuptools = pytest.importorskip("setuptools")
    build = _setup()
    compiler = _compiler(tmp_path, tmp_path_factory.getbasetemp().parent / "objects", refused)
    for variable in ("CC", "CXX", "LDSHARED", "LDCXXSHARED"):
        monkeypatch.setenv(variable, f"{compiler} -shared" if variable.startswith("LD") else str(compiler))
    monkeypatch.chdir(ROOT)
    command = build.BuildKernels(setuptools.Distribution({"ext_modules": [build.extension()]}))
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    command.ensure_finalized()
    command.run()
    built, said = list(tmp_path.glob("lib/cpu_kernels/_native*.so")), capsys.readouterr().err.splitlines()
    if lost is None:
        assert not built and [line[:50] for line in said] == ["gptoss-jax: no CPU kernels, XLA alone will run the"]
        return
    assert [line.partition(", which")[0] for line in said] == [f"gptoss-jax: CPU kernels without {s}" for s in lost]
    sets, content = build.machine_flags(), built[0].read_bytes()
    tables = [name for name in sets if f"cpu_kernels{len(name)}{name}8kKernels".encode() in content]
    assert tables == [name for name in sets if name not in lost]
    native = ctypes.CDLL(str(built[0]))
    native.cpu_kernels_supported.restype = ctypes.c_char_p
    assert native.cpu_kernels_supported(0).decode() == next(name for name in INSTRUCTION_SETS if name not in lost)


# Those with VNNI have one instruction in place of two, on registers.
@pytest.mark.parametrize("name", [name for name in INSTRUCTION_SETS if not name.endswith("vnni")])
def test_sanitizers_find_nothing(name, tmp_path):
    """Guards reads beyond the end of an array, helpers that come late, and undefined arithmetic.

    The driver's pools of 0 to 5 threads must also agree on every bit.
    """
    build = _setup()
    compiler = os.environ.get("CXX", "g++")
    flags = [*build.FLAGS, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    native, objects = ROOT / build.NATIVE, []
    for source, more in (
        (native / "kernels.cc", [f"-DCPU_KERNELS_{name.upper()}", *build.machine_flags()[name]]),
        (native / "parallel.cc", []),
        (ROOT / "tests" / "native" / "driver.cc", [f"-DCPU_KERNELS_DRIVEN={name}", f"-I{native}"]),
    ):
        objects.append(tmp_path / f"{source.stem}.o")
        subprocess.run([compiler, *flags, *more, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([compiler, *flags, *objects, "-pthread", "-o", tmp_path / "driver"], check=True)
    done = subprocess.run([tmp_path / "driver"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "same bits\n", "")
