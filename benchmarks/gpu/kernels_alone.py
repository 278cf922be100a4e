"""The kernels within an op, each as a function of its own operands: what is timed alone, beside the op as a whole.

An op is a few kernels and the launches around them, and its time says nothing of the kernels. They are found in the
op's jaxpr, whatever the op is made of: nothing here knows how many there are, or what they take.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from benchmarks.gpu import timing
from benchmarks.gpu.timing import Step

_KERNELS = {"mpmd_map", "pallas_call", "core_map", "run_state"}  # what Pallas calls them, by version
_CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "custom_vmap_call"}
_INNER = ("jaxpr", "call_jaxpr", "call")  # the parameters of calls that hold what is called; loops are not looked into


class Kernel(NamedTuple):
    """One call of a kernel.

    Attributes:
        name: as its author called it, or its place.
        run: of all its operands, in their order.
        turns: how often it is called in one turn of a loop, with other operands each time.
        varying: for each of these calls the operands that follow from what varies, None in the places of the others.
        fixed: the other operands, None in the places of those.
    """

    name: str
    run: Callable[..., Sequence[jax.Array]]
    turns: int
    varying: list[list[jax.Array | None]]
    fixed: list[jax.Array | None]


class _Found(NamedTuple):
    """An equation, and what goes in."""

    name: str
    run: Callable[..., Sequence[jax.Array]]
    operands: list[Any]
    varies: list[bool]


def find(function: Callable[[Any, Any], Any], varying: Sequence[Any], fixed: Any) -> list[Kernel]:
    """The kernels that `function(one of varying, fixed)` calls, with the operands that they get there.

    Runs the function once for each of `varying`, which are trees of arrays of the same shapes.
    """
    operands, kept = _operands(function, varying[0], fixed)
    compiled = jax.jit(operands, static_argnums=2)
    fixed_ones = compiled(varying[0], fixed, False)
    return _kernels(kept, fixed_ones, [compiled(one, fixed, True) for one in varying])


def find_shapes(function: Callable[[Any, Any], Any], varying: Sequence[Any], fixed: Any) -> list[Kernel]:
    """As `find`, of shapes alone."""
    operands, kept = _operands(function, varying[0], fixed)
    fixed_ones, varying_ones = (
        jax.eval_shape(lambda one, fixed, v=v: operands(one, fixed, v), varying[0], fixed) for v in (False, True)
    )
    return _kernels(kept, fixed_ones, [varying_ones] * len(varying))


def _operands(function: Callable[[Any, Any], Any], one: Any, fixed: Any) -> tuple[Callable[..., Any], list[_Found]]:
    """(one of varying, fixed, whether those that vary) -> operands of each kernel; and these, once it is traced."""
    closed = jax.make_jaxpr(function)(one, fixed)
    kept: list[_Found] = []

    def operands(one: Any, fixed: Any, of_varying: bool) -> list[list[jax.Array]]:
        values = [(leaf, varies) for tree, varies in ((one, True), (fixed, False)) for leaf in jax.tree.leaves(tree)]
        kept.clear()
        _walk(closed.jaxpr, closed.consts, values, kept)
        return [[x for x, v in zip(each.operands, each.varies, strict=True) if v == of_varying] for each in kept]

    return operands, kept


def _kernels(
    found: Sequence[_Found], fixed: Sequence[Sequence[Any]], turns: Sequence[Sequence[Sequence[Any]]]
) -> list[Kernel]:
    kernels = []
    for place, each in enumerate(found):

        def placed(operands: Sequence[Any], of_varying: bool, each: _Found = each) -> list[Any]:
            left = iter(operands)
            return [next(left) if varies == of_varying else None for varies in each.varies]

        name = each.name if each.name != "anonymous" else f"kernel {place}"
        varying = [placed(turn[place], True) for turn in turns]
        # jitted, so that the calls of a turn are lowered once
        kernels.append(Kernel(name, jax.jit(each.run), len(turns), varying, placed(fixed[place], False)))
    return kernels


def step(kernel: Kernel) -> Step:
    """A turn of a loop that calls a kernel with each of its operands: (i, carry, (varying, fixed)) -> carry."""

    def run(i, carry, others):
        varying, fixed = others
        for one in varying:
            operands = timing.tied([a if f is None else f for a, f in zip(one, fixed, strict=True)], carry)
            carry = sum((timing.first(x) for x in kernel.run(*operands)), jnp.float32(0))
        return carry

    return run


def beside(kernel: Kernel) -> Step:
    """The same turn without the kernel."""

    def run(i, carry, others):
        varying, fixed = others
        for one in varying:
            operands = timing.tied([a if f is None else f for a, f in zip(one, fixed, strict=True)], carry)
            carry = timing.first(timing.smallest(operands))
        return carry

    return run


def _walk(jaxpr: Any, consts: Sequence[Any], values: Sequence[tuple[Any, bool]], found: list[_Found]) -> list[Any]:
    """Evaluates, noting kernels; a value is an array and whether it follows from what varies."""
    known = dict(zip(jaxpr.invars, values, strict=True)) | {
        var: (const, False) for var, const in zip(jaxpr.constvars, consts, strict=True)
    }

    def read(atom: Any) -> tuple[Any, bool]:
        return (atom.val, False) if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, [read(atom) for atom in equation.invars]
        if name in _CALLS:
            inner = next(equation.params[key] for key in _INNER if key in equation.params)
            results = _walk(inner.jaxpr, inner.consts, given, found)
        else:
            run, taken = _alone(jaxpr, equation)
            operands = [known[var] for var in taken]
            if name in _KERNELS:
                arrays, varies = map(list, zip(*operands, strict=True))
                found.append(_Found(_name(equation), run, arrays, varies))
            varies = any(varies for _, varies in given)
            results = [(x, varies) for x in run(*(x for x, _ in operands))]
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _alone(jaxpr: Any, equation: Any) -> tuple[Callable[..., Sequence[jax.Array]], list[Any]]:
    """One equation of a jaxpr as a function, and the variables that it takes."""
    taken = list(dict.fromkeys(atom for atom in equation.invars if not isinstance(atom, core.Literal)))
    outvars = list(equation.outvars)
    alone = jaxpr.replace(constvars=[], invars=taken, outvars=outvars, eqns=[equation], effects=equation.effects)
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, [])), taken


def _name(equation: Any) -> str:
    meshes = equation.params.get("meshes") or [None]
    return getattr(meshes[0], "kernel_name", None) or str(equation.params.get("name") or "anonymous")
