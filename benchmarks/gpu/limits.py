"""What the device can do, measured: what every share of a roofline is a share of."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax import lax

from benchmarks.gpu import timing
from benchmarks.gpu.results import Results
from benchmarks.gpu.timing import Loop
from gptoss_jax.errors import GptossError

LAUNCHES = 32  # in a row, of which each needs the one before it
MOST_EMPTY_SECONDS = 3e-6  # of a turn with one launch; more, and what is timed is the host
_MEASURED = {  # of each limit, its unit for a table
    "copied_bytes_per_second": (1e9, "GB/s copied, read and written"),
    "read_bytes_per_second": (1e9, "GB/s read"),
    "bfloat16_operations_per_second": (1e12, "TFLOP/s multiplied, bfloat16"),
}


class Limits(NamedTuple):
    """Of one device."""

    copied_bytes_per_second: float  # read and written
    read_bytes_per_second: float
    bfloat16_operations_per_second: float
    empty_seconds: float  # a turn of a loop with one launch
    launch_seconds: float  # a launch that waits for the one before it

    def roofline(self, num_bytes: float, operations: float) -> float:
        """Seconds: bytes that are read, or operations, whichever takes longer."""
        return max(num_bytes / self.read_bytes_per_second, operations / self.bfloat16_operations_per_second)


def of(results: Results) -> Limits:
    """What the section of that name has found in this run.

    Raises:
        GptossError: it has not, so that no share can be said.
    """
    if not (found := results.found("limits")):
        raise GptossError("the limits of this device are not known: --only limits measures them, into --out")
    return Limits(*(found[-1][name] for name in Limits._fields))


def measure(results: Results, options: flags.FlagValues) -> None:
    """The section."""
    loops = timing.compile_loops(_loops(options.limit_mib << 20, options.matrix_side, options.loop_ms / 1e3))
    for loop in loops:
        if isinstance(loop, Exception):
            raise loop
    copy, read, multiply, empty, chain = (timing.measure(loop, options.dispatches) for loop in loops)  # pyright: ignore[reportArgumentType]
    num_bytes = options.limit_mib << 20
    found = Limits(
        2 * num_bytes / copy.seconds,
        num_bytes / read.seconds,
        2 * options.matrix_side**3 / multiply.seconds,
        empty.beside_seconds,
        chain.seconds / (LAUNCHES - 1),
    )
    for (name, (unit, said)), timed in zip(_MEASURED.items(), (copy, read, multiply), strict=True):
        print(f"{getattr(found, name) / unit:10,.0f} {said:34} {timed.said}", flush=True)
    entry = found._asdict() | {"spread": {"copy": copy[:3], "read": read[:3], "multiply": multiply[:3]}}
    line = f"an empty turn {found.empty_seconds * 1e6:.2f} us, a launch {found.launch_seconds * 1e6:.2f} us"
    results.add("limits", entry, line)
    if jax.default_backend() == "gpu":
        what = f"an empty turn takes less than {MOST_EMPTY_SECONDS * 1e6:.0f} us"
        said = f"{found.empty_seconds * 1e6:.2f} us"
        results.judge({"seconds": found.empty_seconds}, what, said, ok=found.empty_seconds < MOST_EMPTY_SECONDS)


def _loops(num_bytes: int, side: int, loop_seconds: float) -> list[Loop]:
    words = jnp.arange(num_bytes // 4, dtype=jnp.uint32)
    a, b = (jax.random.normal(jax.random.key(k), (side, side), jnp.bfloat16) for k in (1, 2))
    one, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.uint32)
    calls = timing.calls_for(num_bytes / 2e12, 10 * loop_seconds)

    def copy(i: Any, x: Any, _: Any) -> Any:
        return ~x

    def read(i: Any, found: Any, x: Any) -> Any:
        return jnp.max(x ^ found)

    def count(i: Any, x: Any, _: Any) -> Any:
        return x + 1

    def multiply(i: Any, a: Any, b: Any) -> Any:
        y = jnp.dot(a, b, preferred_element_type=jnp.float32)
        return (y * side**-0.5).astype(jnp.bfloat16)

    def chain(i: Any, x: Any, _: Any) -> Any:
        for _ in range(LAUNCHES):
            x = lax.optimization_barrier(x + 1)
        return x

    return [
        timing.slope(copy, words, (), calls),
        timing.lowered(read, count, none, words, calls),
        timing.slope(multiply, a, b, timing.calls_for(2 * side**3 / 5e14, 10 * loop_seconds)),
        timing.lowered(chain, count, one, (), 50),
        timing.lowered(chain, count, one, (), 50),
    ]
