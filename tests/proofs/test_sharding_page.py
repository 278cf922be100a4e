"""The strategies of docs/sharding.md, run as the page has them: each equals the model on one device."""

import re
from typing import Any

import pytest

from tests.goldens.make import ROOT

PAGE = (ROOT / "docs" / "sharding.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
MOST_LINES = 50  # of a strategy, as the page's readers are promised
STRATEGIES = ("rule", "axis", "exchange")


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the page's first block defines: logits on one device, and the check."""
    found: dict[str, Any] = {}
    exec(compile(BLOCKS[0], "docs/sharding.md", "exec"), found)
    return found


@pytest.mark.parametrize(("strategy", "block"), [*zip(STRATEGIES, BLOCKS[1:], strict=True)])
def test_a_strategy_of_the_page_equals_one_device(strategy, block, names):
    """Guards a page that no longer runs, and a seam that a strategy of one's own needs: rules, axes, the exchange."""
    assert block.count("check(model)") == 1, strategy
    assert block.count("\n") < MOST_LINES
    exec(compile(block, f"docs/sharding.md, {strategy}", "exec"), dict(names))


def test_a_wrong_exchange_is_found(names):
    """Guards the page's check: an exchange that loses what another node's experts add is not equal to one device."""
    wrong = BLOCKS[3].replace('jax.lax.psum(part, "node")', "part")
    assert wrong != BLOCKS[3]
    with pytest.raises(AssertionError):
        exec(compile(wrong, "wrong", "exec"), dict(names))
