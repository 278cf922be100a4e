"""Builds the CPU kernels' shared library, one object file per instruction set; all else is in pyproject.toml.

An installation without a C++17 compiler, or on a machine that the kernels do not know, goes on without the library:
the package then computes with XLA alone. A compiler that is too old for an instruction set loses that one.
"""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = Path("cpu_kernels/native")
FLAGS = ["-std=c++17", "-O3", "-g0", "-Wall", "-Wextra", "-ffp-contract=off", "-fvisibility-inlines-hidden"]
# GCC 12 warns of what its own AVX-512 header leaves undefined on purpose.
AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
AVX2 = ["-mavx2", "-mfma"]
X86 = {
    "avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    "avx512vnni": [*AVX512, "-mavx512vnni"],
    "avx512": AVX512,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx2": AVX2,
}
OF_ONE_SET = ["kernels.cc", "supported.cc"]  # compiled once per instruction set, the first of them with its flags
PORTABLE = "portable"
MACHINES = {  # instruction sets beside portable C++, with the flags that allow them
    "x86_64": X86,
    "amd64": X86,
    "aarch64": {"neon": []},
    "arm64": {"neon": []},
}


def machine_flags() -> dict[str, list[str]]:
    """The compiler's flags for each instruction set that machines of this family may have."""
    return {**MACHINES.get(platform.machine().lower(), {}), PORTABLE: []}


def macro(what: str) -> tuple[str, None]:
    """The definition that the sources ask for: CPU_KERNELS_AVX2, CPU_KERNELS_HAVE_AVX2."""
    return f"CPU_KERNELS_{what.upper()}", None


class BuildKernels(build_ext):
    """Compiles what is of one instruction set once for each, the rest once, knowing which there are, and links them."""

    def build_extension(self, ext: Extension) -> None:
        """Builds the one extension, or says in one line what is lost without it."""
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)))
        except Exception as error:  # of any kind: whatever stops the compiler must not stop the installation
            print(f"gptoss-jax: no CPU kernels, XLA alone will run there, many times slower ({error})", file=sys.stderr)

    def _build(self, library: Path) -> None:
        import jax.ffi

        objects = self._compile_set(PORTABLE, [])  # any C++17 compiler can build these
        have = []
        for name, flags in MACHINES.get(platform.machine().lower(), {}).items():
            try:
                objects += self._compile_set(name, flags)
                have.append(macro(f"have_{name}"))
            except CompileError as error:
                print(f"gptoss-jax: CPU kernels without {name}, which this compiler lacks ({error})", file=sys.stderr)
        once = [path.name for path in sorted(NATIVE.glob("*.cc")) if path.name not in OF_ONE_SET]
        objects += self._compile(once, "common", have, ["-isystem", jax.ffi.include_dir()])
        library.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(library), target_lang="c++")

    def _compile_set(self, name: str, flags: list[str]) -> list[str]:
        kernels, supported = ([source] for source in OF_ONE_SET)
        objects = self._compile(supported, name, [macro(name)], [])
        return objects + self._compile(kernels, name, [macro(name)], flags)

    def _compile(self, names: list[str], folder: str, macros: list, flags: list[str]) -> list[str]:
        return self.compiler.compile(
            [str(NATIVE / name) for name in names],
            output_dir=str(Path(self.build_temp) / folder),
            macros=macros,
            extra_postargs=FLAGS + flags,
            depends=[str(path) for path in sorted(NATIVE.iterdir())],
        )


def extension() -> Extension:
    """The library, whose sources and headers a source distribution takes along."""
    sources, headers = (sorted(map(str, NATIVE.glob(pattern))) for pattern in ("*.cc", "*.h"))
    return Extension("cpu_kernels._native", sources, depends=headers, optional=True)


def main() -> None:
    """What the build backend runs."""
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildKernels})


if __name__ == "__main__":
    main()
