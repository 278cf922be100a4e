"""How long a step takes on the device: loops of a static length, beside the same loop without what is timed.

A loop whose length is data is a while loop whose predicate goes to the host each turn, and what is timed then is the
host. A static count needs no predicate: XLA knows the trip count and launches one turn after the other.
"""

import concurrent.futures
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MOST_CALLS, FEWEST_CALLS = 400, 4
COMPILING_THREADS = 8

Step = Callable[[Any, Any, Any], Any]
"""(i, carry, others) -> carry."""


class Timed(NamedTuple):
    """Seconds of one call, the empty step beside it taken off: median, fastest, slowest of several dispatches."""

    seconds: float
    fastest_seconds: float
    slowest_seconds: float
    beside_seconds: float  # of the empty step, which is not in the others
    calls: int  # of a dispatch

    @property
    def said(self) -> str:
        """For a table."""
        spread = f"({self.fastest_seconds * 1e6:.1f} to {self.slowest_seconds * 1e6:.1f})"
        return f"{self.seconds * 1e6:10.1f} us {spread:24} beside it {self.beside_seconds * 1e6:5.1f}"


class Loop(NamedTuple):
    """Two programs that a time is the difference of, and what they take."""

    whole: Any
    beside: Any
    arguments: tuple[Any, Any]  # carry, others
    calls: int


def lowered(step: Step, beside: Step, carry: Any, others: Any, calls: int, calls_per_turn: int = 1) -> Loop:
    """So many calls, in turns of a step, and what is not to be counted, to be compiled by `compile_all`."""
    turns = max(2, calls // calls_per_turn)
    whole, without = (_lower(each, carry, others, turns) for each in (step, beside))
    return Loop(whole, without, (carry, others), turns * calls_per_turn)


def _lower(step: Step, carry: Any, others: Any, calls: int) -> Any:
    def repeat(carry, others):
        return lax.fori_loop(0, calls, lambda i, carry: step(i, carry, others), carry)

    return jax.jit(repeat).lower(carry, others)


def slope(step: Step, carry: Any, others: Any, calls: int) -> Loop:
    """As `lowered`, of a step whose carry is large: what copies it in and out is beside, as one turn more on either."""
    more, one = (_lower(step, carry, others, count) for count in (calls + 1, 1))
    return Loop(more, one, (carry, others), calls)


def tied(tree: Any, carry: jax.Array) -> Any:
    """`tree` with its smallest leaf in memory of its own, written once `carry` is there: no call overlaps the last.

    A graph runs what is independent side by side, and a loop's compiler takes out of it what does not change.
    """
    leaves, structure = jax.tree.flatten(tree)
    place = min(range(len(leaves)), key=lambda i: _num_bytes(leaves[i]))
    zero = (first(carry) * 0).astype(leaves[place].dtype)  # of a float, which no compiler knows to be 0
    leaves[place] = lax.optimization_barrier(leaves[place] + zero)
    return jax.tree.unflatten(structure, leaves)


def smallest(tree: Any) -> jax.Array:
    """The leaf that `tied` has written."""
    return min(jax.tree.leaves(tree), key=_num_bytes)


def _num_bytes(x: jax.Array) -> int:
    return x.size * x.dtype.itemsize


def first(x: jax.Array) -> jax.Array:
    """One element of it, float32; 0 for one that is not finite."""
    one = x[(0,) * x.ndim].astype(jnp.float32)
    return jnp.where(jnp.isfinite(one), one, 0)


def calls_for(seconds: float, loop_seconds: float) -> int:
    """Turns of a loop of `loop_seconds`, of a step that takes `seconds` at the roofline."""
    return max(FEWEST_CALLS, min(MOST_CALLS, round(loop_seconds / max(seconds, 1e-9))))


def compile_all(programs: Sequence[Any]) -> list[Any]:
    """Compiles what was lowered, side by side; what the compiler refuses stands as its error in the result's place."""

    def compiled(program: Any) -> Any:
        try:
            return program.compile()
        except Exception as error:  # the others are to be measured
            return error

    with concurrent.futures.ThreadPoolExecutor(COMPILING_THREADS) as pool:
        return list(pool.map(compiled, programs))


def compile_loops(loops: Sequence[Loop]) -> list[Loop | Exception]:
    """The loops with their programs compiled, or what kept one from it."""
    programs = compile_all([program for loop in loops for program in (loop.whole, loop.beside)])
    pairs = zip(loops, programs[::2], programs[1::2], strict=True)
    found: list[Loop | Exception] = []
    for loop, *pair in pairs:
        errors = [program for program in pair if isinstance(program, Exception)]
        found.append(errors[0] if errors else loop._replace(whole=pair[0], beside=pair[1]))
    return found


def measure(loop: Loop, dispatches: int) -> Timed:
    """Both loops in turns; the first dispatch of each warms up."""
    whole, beside = [], []
    for _ in range(dispatches + 1):
        whole.append(seconds_of(loop.whole, *loop.arguments) / loop.calls)
        beside.append(seconds_of(loop.beside, *loop.arguments) / loop.calls)
    empty = statistics.median(beside[1:])
    found = [max(seconds - empty, 1e-9) for seconds in whole[1:]]
    return Timed(statistics.median(found), min(found), max(found), empty, loop.calls)


def seconds_of(program: Any, *arguments: Any) -> float:
    """Of one dispatch, until its results are there."""
    began = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - began
