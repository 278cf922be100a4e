"""Who may import whom: the house of docs/architecture.md as a table, checked on all modules' syntax trees."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("gptoss_jax", "pallas_kernels", "cpu_kernels", "converters")

# Module -> first-party modules it may import, anywhere in it; "package.*" is the package and all below it.
# Rows stand as in the house, the lower floors first: a module may import from floors below its own.
_BASE = {
    "gptoss_jax.config",
    "gptoss_jax.sharding",
    "gptoss_jax.rope",
    "gptoss_jax.kv_cache",
    "gptoss_jax.layers",
    "gptoss_jax.row_sum",
}
_CONVERSION = {
    "gptoss_jax.config",
    "gptoss_jax.model",
    "gptoss_jax.sharding",
    "gptoss_jax.checkpoint",
    "gptoss_jax.host_memory",
    "pallas_kernels.mxfp4",
    "converters.*",
}
_WORDS = {"gptoss_jax.tokenizer", "gptoss_jax.parser", "gptoss_jax.harmony", "gptoss_jax.messages"}
_COMMAND = {
    "gptoss_jax.command",
    "gptoss_jax.request_flags",
    "gptoss_jax.runtime",
    "gptoss_jax.sampling",
    "gptoss_jax.terminal",
}
ALLOWED: dict[str, set[str]] = {
    "cpu_kernels.*": {"cpu_kernels.*"},
    "pallas_kernels.*": {"pallas_kernels.*", "cpu_kernels.*"},
    "gptoss_jax.config": set(),
    "gptoss_jax.sharding": {"gptoss_jax.config"},
    "gptoss_jax.rope": {"gptoss_jax.config"},
    "gptoss_jax.kv_cache": {"gptoss_jax.config", "gptoss_jax.sharding"},
    "gptoss_jax.row_sum": set(),
    "gptoss_jax.layers": {"gptoss_jax.row_sum", "gptoss_jax.sharding", "pallas_kernels.*"},
    "gptoss_jax.attention": _BASE,
    "gptoss_jax.moe": _BASE | {"pallas_kernels.*"},
    "gptoss_jax.model": _BASE | {"gptoss_jax.attention", "gptoss_jax.moe", "pallas_kernels.*"},
    "gptoss_jax.sampling": {"gptoss_jax.row_sum"},
    "gptoss_jax.host_memory": set(),
    "gptoss_jax.checkpoint": {"gptoss_jax.config", "gptoss_jax.sharding", "gptoss_jax.host_memory"},
    "gptoss_jax.tokenizer": set(),
    "gptoss_jax.harmony": {"gptoss_jax.tokenizer"},
    "gptoss_jax.parser": {"gptoss_jax.tokenizer"},
    "gptoss_jax.messages": {"gptoss_jax.harmony", "gptoss_jax.parser"},
    "gptoss_jax.programs": _BASE | {"gptoss_jax.model", "gptoss_jax.sampling"},
    "gptoss_jax.engine": _BASE | {"gptoss_jax.model", "gptoss_jax.sampling", "gptoss_jax.programs"},
    "gptoss_jax.command": set(),
    "converters.*": _CONVERSION | {"gptoss_jax.command"},
    "gptoss_jax.runtime": _BASE
    | _CONVERSION
    | {"gptoss_jax.sampling", "gptoss_jax.engine", "gptoss_jax.tokenizer", "pallas_kernels.*"},
    "gptoss_jax": {"gptoss_jax.runtime"},
    "gptoss_jax.answer": {"gptoss_jax.engine", *_WORDS},
    "gptoss_jax.terminal": {
        "gptoss_jax.answer",
        "gptoss_jax.command",
        "gptoss_jax.engine",
        "gptoss_jax.runtime",
        *_WORDS,
    },
    "gptoss_jax.chat": {"gptoss_jax.answer", "gptoss_jax.command", "gptoss_jax.engine", "gptoss_jax.terminal", *_WORDS},
    "gptoss_jax.request_flags": {
        "gptoss_jax.command",
        "gptoss_jax.config",
        "gptoss_jax.engine",
        "gptoss_jax.sampling",
        *_WORDS,
    },
    "gptoss_jax.generate": _COMMAND | {"gptoss_jax.answer", "gptoss_jax.chat", "gptoss_jax.engine", *_WORDS},
    "gptoss_jax.score": _COMMAND | {"gptoss_jax.messages", "gptoss_jax.tokenizer"},
}

# Floors that are to be usable by themselves: words and ids without jax, kernels with jax alone.
KNOW_NO_JAX = tuple(sorted(_WORDS))
KERNELS = ("pallas_kernels", "cpu_kernels")
KERNELS_IMPORT = {"jax", "jaxtyping", "numpy", "ml_dtypes"}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of all first-party modules."""
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(source: str, package: str, known: set[str]) -> Iterator[str]:
    """Names of the modules that a source in `package` imports, inside functions and `TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import module` imports that module, `from module import name` the one it names.
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                yield full if full in known else origin


def matches(name: str, row: str) -> bool:
    """Whether a row or an entry of the table speaks of this module."""
    return name == row or (row.endswith(".*") and f"{name}.".startswith(row[:-1]))


def imports_of(name: str) -> set[str]:
    """What the module of this name imports."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return set(imports(path.read_text(), package, set(modules())))


def test_sources_are_read_as_python_would():
    """A checker blind to relative imports, submodules, functions or type-checking blocks: it passes all."""
    source = (
        "import jax.numpy as jnp\n"
        "from gptoss_jax import model, load\n"
        "from gptoss_jax.config import ModelConfig\n"
        "from . import engine\n"
        "from .sampling import sample\n"
        "if TYPE_CHECKING:\n    import orbax\n"
        "def f():\n    from pallas_kernels.mxfp4 import pack\n"
    )
    known = {"gptoss_jax", "gptoss_jax.model", "gptoss_jax.engine", "gptoss_jax.sampling"}
    assert set(imports(source, "gptoss_jax", known)) == {
        "jax.numpy",
        "gptoss_jax.model",
        "gptoss_jax",
        "gptoss_jax.config",
        "gptoss_jax.engine",
        "gptoss_jax.sampling",
        "orbax",
        "pallas_kernels.mxfp4",
    }


def test_table_entries_match_whole_names():
    """`gptoss_jax.*`-like entries that let `gptoss_jaxes` or `gptoss_jax.model_zoo` slip through."""
    assert matches("converters", "converters.*") and matches("converters.openai", "converters.*")
    assert not matches("converters_old", "converters.*")
    assert not matches("gptoss_jax.model_zoo", "gptoss_jax.model")
    assert not matches("gptoss_jax.model", "gptoss_jax")


@pytest.mark.parametrize("name", modules())
def test_module_imports_what_the_house_allows(name):
    """An arrow that points up: a kernel that knows the model, an engine that knows text."""
    rows = [row for row in ALLOWED if matches(name, row)]
    assert len(rows) == 1, f"{name} needs exactly one row in the table of tests/test_imports.py, has {rows}"
    first_party = {target for target in imports_of(name) if target.split(".")[0] in PACKAGES}
    wrong = sorted(t for t in first_party if not any(matches(t, entry) for entry in ALLOWED[rows[0]]))
    assert wrong == [], f"{name} may not import {wrong}; if it should, change docs/architecture.md and the table"


@pytest.mark.parametrize("name", [name for name in modules() if name in KNOW_NO_JAX])
def test_words_and_ids_know_no_jax(name):
    """Text handling that pulls in jax, flax or orbax, and so cannot start in a tenth of a second."""
    assert {target.split(".")[0] for target in imports_of(name)}.isdisjoint({"jax", "flax", "orbax", "jaxtyping"})


@pytest.mark.parametrize("name", [name for name in modules() if name.split(".")[0] in KERNELS])
def test_kernels_import_jax_only(name):
    """A kernel package that cannot be used, or tested, without the rest of the project's dependencies."""
    tops = {target.split(".")[0] for target in imports_of(name)}
    assert tops - sys.stdlib_module_names <= KERNELS_IMPORT | set(KERNELS)
