"""Who may import whom: the rooms of docs/architecture.md, checked on all modules' syntax trees."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Rooms, floor by floor from the ground: a room imports from itself and from floors below, never from a neighbour.
FLOORS = (
    ("cpu_kernels", "gptoss_jax.errors"),
    ("pallas_kernels", "gptoss_jax.files", "gptoss_jax.whole_files"),
    ("gptoss_jax.model", "gptoss_jax.hlo", "gptoss_jax.compression", "gptoss_jax.pictures"),
    ("gptoss_jax.jsonl", "gptoss_jax.engine", "gptoss_jax.harmony", "gptoss_jax.checkpoints"),
    ("gptoss_jax.grammar", "gptoss_jax.tools"),
    ("gptoss_jax.runtime", "gptoss_jax.api"),
    ("gptoss_jax.server", "gptoss_jax.jobs", "gptoss_jax.training", "gptoss_jax.planner"),
    ("gptoss_jax.cli",),
    ("gptoss_jax", "converters"),  # the commands; gptoss_jax itself is the modules that lie directly in it
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
KERNELS_IMPORT = {"jax", "jaxtyping", "einops", "numpy", "ml_dtypes", "pallas_kernels", "cpu_kernels"}
KNOW_NO_JAX = (
    "gptoss_jax.harmony",
    "gptoss_jax.grammar",
    "gptoss_jax.tools",
    "gptoss_jax.api",
    "gptoss_jax.errors",
    "gptoss_jax.files",
    "gptoss_jax.whole_files",
    "gptoss_jax.compression",
    "gptoss_jax.hlo",
    "gptoss_jax.pictures",
    "gptoss_jax.jsonl",
)


def room_of(module: str) -> str:
    """The innermost room that a module lies in."""
    return max((room for room in FLOOR_OF if f"{module}.".startswith(f"{room}.")), key=len, default="")


def faults(module: str, source: str) -> list[str]:
    """What a module of this name and source may not import."""
    room, found = room_of(module), sorted(set(imports(source)))
    wrong = [
        name for name in found if (other := room_of(name)) and other != room and not FLOOR_OF[other] < FLOOR_OF[room]
    ]
    if room in ("pallas_kernels", "cpu_kernels"):
        wrong += [name for name in found if name.split(".")[0] not in KERNELS_IMPORT | sys.stdlib_module_names]
    if room in KNOW_NO_JAX:
        wrong += [name for name in found if name.split(".")[0] in {"jax", "flax", "orbax", "jaxtyping"}]
    return wrong


def imports(source: str) -> Iterator[str]:
    """Names that a source imports, inside functions and `TYPE_CHECKING` too; relative imports count as a fault."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: name the whole module"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("gptoss_jax", "pallas_kernels", "cpu_kernels", "converters")
    for path in sorted((ROOT / package).rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down_only(module):
    """Guards the house: a kernel that knows the model, an engine that knows text, two rooms that know each other."""
    wrong = faults(module, MODULES[module].read_text())
    assert wrong == [], f"{module} may not import {wrong}; if it should, change docs/architecture.md and FLOORS"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gptoss_jax.model.layers", "def f():\n    from gptoss_jax.engine.engine import Engine"),
        ("gptoss_jax.engine.engine", "from gptoss_jax.harmony import parser"),
        ("gptoss_jax.checkpoints.orbax", "if TYPE_CHECKING:\n    import converters.convert"),
        ("gptoss_jax.runtime.loading", "from gptoss_jax import generate"),
        ("pallas_kernels.linear", "import flax"),
        ("gptoss_jax.harmony.parser", "import jax.numpy as jnp"),
        ("cpu_kernels", "from pallas_kernels import mxfp4"),
    ],
)
def test_a_planted_violation_is_found(module, source):
    """Guards the check itself: blind to functions, type-checking blocks or neighbours, it passes all."""
    assert len(faults(module, source)) == 1
