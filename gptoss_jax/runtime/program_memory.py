"""What a compiled program takes of a device's memory, by its compiler's own count."""

from typing import Any, NamedTuple

import jax


class ProgramMemory(NamedTuple):
    """Bytes of one device.

    Attributes:
        argument_bytes: weights, cache and slots.
        output_bytes: of results that take no argument's place.
        temporary_bytes: of everything in between.
    """

    argument_bytes: int
    output_bytes: int
    temporary_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of all three."""
        return sum(self)


def program_memory(compiled: Any) -> ProgramMemory:
    """Of a program that `jax.jit(...).lower(...).compile()` gave."""
    return of_stats(compiled.memory_analysis(), _platform(compiled))


def _platform(compiled: Any) -> str:
    placed = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))[0]
    return next(iter(placed.device_set)).platform


def of_stats(said: Any, platform: str) -> ProgramMemory:
    """Of JAX's `CompiledMemoryStats`.

    Of a TPU they have the gaps between temporaries twice: its compiler counts them among the temporaries, calls them
    fragmentation, and JAX adds them once more. The peak has what is alive and no gaps: halfway is what is taken. Where
    a program needs more of the core's own memory (128 MiB at most) than of the device's, the peak is that, and what is
    said here is too much, but never more than JAX says.
    """
    new = max(said.output_size_in_bytes - said.alias_size_in_bytes, 0)
    temporaries = said.temp_size_in_bytes
    if platform == "tpu":
        alive = said.peak_memory_in_bytes - said.argument_size_in_bytes - new
        temporaries = (temporaries + min(alive, temporaries)) // 2
    return ProgramMemory(said.argument_size_in_bytes, new, temporaries)
