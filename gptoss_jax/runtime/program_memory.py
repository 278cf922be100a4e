"""What a compiled program takes of a device's memory, by its compiler's own count."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

LOGGED = {"TPU_MIN_LOG_LEVEL": "0", "TPU_STDERR_LOG_LEVEL": "0"}
"""With these in its environment as it starts a TPU's compiler says on stderr what its program needs of each memory."""


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


def program_memory(compiled: Any, log: str = "") -> ProgramMemory:
    """Of a program that `jax.jit(...).lower(...).compile()` gave; `log` is what a TPU's compiler said meanwhile."""
    found = compiled.memory_analysis()
    new = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    return ProgramMemory(found.argument_size_in_bytes, new, found.temp_size_in_bytes - counted_twice(log))


def counted_twice(log: str) -> int:
    """Bytes of HBM that JAX counts twice among a TPU program's temporaries: what its compiler calls fragmentation.

    The compiler's "HLO temp" has them, and `memory_analysis` adds them to it.
    """
    said = re.findall(r"Program hbm requirement.*?HLO temp [^\n]*fragmentation \(([\d.]+)([BKMG])\)", log, re.DOTALL)
    return round(float(said[-1][0]) * 1024 ** "BKMG".index(said[-1][1])) if said else 0


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """What is written to stderr meanwhile, by libraries too, as one text in the list, once it is over."""
    said: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
