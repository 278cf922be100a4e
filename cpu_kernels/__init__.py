"""C++ kernels for CPUs, called through XLA's foreign function interface: finds the compiled library and registers it.

The ops are those of `pallas_kernels`, one module each, with the same signatures. Imports jax only; nothing is loaded
before an op is called or asked for.
"""

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import jax

FOLDER = Path(__file__).parent
HANDLERS = (
    "linear",
    "expert_mlp",
    "paged_attention",
    "sliding_window_attention",
    "packed_attention",
    "packed_attention_gradient",
    "dense_experts",
    "dense_experts_gradient",
    "survey",
    "likeliest",
    "nucleus",
)


class Unavailable(RuntimeError):
    """There is no compiled library, or it cannot be loaded."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library, its handlers registered with XLA as targets `cpu_kernels_<op>`.

    Raises:
        Unavailable: it was not built, or does not load.
    """
    found = sorted(FOLDER.glob("_native*.so"))
    if not found:
        raise Unavailable("cpu_kernels was installed without a C++ compiler")
    try:
        native = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise Unavailable(f"cpu_kernels does not load: {error}") from error
    native.cpu_kernels_supported.restype = ctypes.c_char_p
    if not all(hasattr(native, f"cpu_kernels_{name}") for name in HANDLERS):
        raise Unavailable("cpu_kernels was built from other sources; installing again builds it anew")
    for name in HANDLERS:
        handler = getattr(native, f"cpu_kernels_{name}")
        jax.ffi.register_ffi_target(f"cpu_kernels_{name}", jax.ffi.pycapsule(handler), platform="cpu")
    return native


@functools.cache
def why_not() -> str | None:
    """Why the kernels cannot run here, in a few words, or None if they can."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


def instruction_sets() -> tuple[str, ...]:
    """Those that this machine can run, the best, which is the one in use, first.

    They are avx512bf16, avx512vnni, avx512, avxvnni, avx2, neon and portable. Experts have the same bits under bfloat16
    on all of them, dense products of bfloat16s and attention over them on all but the first.
    """
    names = map(library().cpu_kernels_supported, itertools.count())
    return tuple(name.decode() for name in itertools.takewhile(bool, names))


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Has every call in this process use the instruction set `name` for a while: for tests and benchmarks.

    Raises:
        ValueError: this machine cannot run it.
    """
    if library().cpu_kernels_select(name.encode()):
        raise ValueError(f"instruction set {name!r}, expected one of {', '.join(instruction_sets())}")
    try:
        yield
    finally:
        library().cpu_kernels_select(instruction_sets()[0].encode())
