"""The field's words: names, docstrings and comments of the product must not fall back to words of our own."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("gptoss_jax", "pallas_kernels", "cpu_kernels", "converters")
INSTEAD = {  # a word, alone or between the underscores of a name -> the word to use
    "banded": "sliding window",
    "told": "given, or the verb that says how",
    "apart": "batch invariant, or separate",
    "by_rows": "row-major",
    "talk": "chat, session or conversation",
    "piece": "chunk, shard or part",
    "pieces": "chunks, shards or parts",
    "choices": "assignments, or top_k experts",
    "floor": "roofline",
    "floors": "rooflines",
    "behind": "after, or before",
}
HONEST = ("behind one interface", "left behind")  # plain English, wherever it stands
WORD = re.compile(rf"(?<![^\W_])({'|'.join(INSTEAD)})(?![^\W_])", re.IGNORECASE)


def faults(source: str) -> Iterator[str]:
    """A line for each word of INSTEAD in a source's names, docstrings and comments."""
    for line, text in (*_prose(source), *_names(source)):
        for honest in HONEST:
            text = text.replace(honest, "")
        yield from (f"line {line}: {found[0]}: say {INSTEAD[found[0].lower()]}" for found in WORD.finditer(text))


def _prose(source: str) -> Iterator[tuple[int, str]]:
    """Comments, and texts that stand alone, which are docstrings."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def _names(source: str) -> Iterator[tuple[int, str]]:
    """Names that a source binds: of others' functions, such as `jnp.floor`, it may use any."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.arg(arg=name)
                | ast.Name(id=name, ctx=ast.Store())
                | ast.Attribute(attr=name, ctx=ast.Store())
            ):
                yield node.lineno, name


MODULES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_the_fields_words(module):
    """Guards readers of the field against names and sentences that only their author understands."""
    assert list(faults((ROOT / module).read_text())) == []


@pytest.mark.parametrize(
    "planted",
    [
        "def keep_rows_apart(): pass",
        "class Talk: pass",
        "def f(banded): pass",
        "lambda choices: 0",
        "by_rows = 1",
        "self.told = 1",
        "for piece in range(3): pass",
        'def f():\n    """Told by the caller."""',
        "x = 1  # the floor of speed",
        "x = 1\n'''What is behind a token.'''",
    ],
)
def test_a_planted_word_is_found(planted):
    """Guards the check itself: blind to names, arguments, docstrings or comments, it passes all."""
    (fault,) = faults(planted)
    assert "say " in fault


@pytest.mark.parametrize(
    "fine", ["jnp.floor(x)", "# nothing is left behind", "floored, talkative = 1, 2", "'told'.upper()"]
)
def test_plain_english_and_others_names_are_fine(fine):
    """Guards against a check so strict that people work around it."""
    assert list(faults(fine)) == []
