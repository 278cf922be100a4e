"""What a compiled program takes of a device's memory, by the compiler's own count."""

from typing import Any, NamedTuple


class ProgramMemory(NamedTuple):
    """Bytes of one device; results that take the place of donated arguments are not counted twice."""

    argument_bytes: int
    temporary_bytes: int  # beside arguments and results


def program_memory(compiled: Any) -> ProgramMemory:
    """Of a program that `jax.jit(...).lower(...).compile()` gave."""
    found = compiled.memory_analysis()
    return ProgramMemory(found.argument_size_in_bytes, found.temp_size_in_bytes)
