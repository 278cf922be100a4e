"""The page pool: pages on demand, shared by several holders, back when the last one lets go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.engine.page_pool import PagePool


def test_a_shared_page_is_free_once_nobody_holds_it():
    """Guards a prefix that two sequences share: freed by the first of them, it would be overwritten."""
    pool = PagePool(3)
    first, second = pool.allocate(2)
    pool.share([first])
    pool.release([first, second])
    assert pool.num_free == 2
    pool.release([first])
    assert pool.num_free == 3


def test_what_cannot_be_is_refused():
    """Guards the free list: a page given twice, or given back twice, belongs to two sequences."""
    pool = PagePool(2)
    pages = pool.allocate(2)
    with pytest.raises(ValueError, match="1 pages wanted, 0 of 2 are free"):
        pool.allocate(1)
    pool.release(pages)
    for change in (pool.release, pool.share):
        with pytest.raises(ValueError, match=f"page {pages[0]} is free: nobody holds it"):
            change([pages[0]])


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 5)), max_size=60))
def test_pages_are_neither_lost_nor_doubled(acts):
    """Guards any order of use: free and held pages are always the pool's, each once."""
    pool, holders = PagePool(8), []
    for act, number in acts:
        if act == "allocate" and number <= pool.num_free:
            holders.append(pool.allocate(number))
        elif act == "share" and holders:
            holders.append(list(holders[number % len(holders)]))
            pool.share(holders[-1])
        elif act == "release" and holders:
            pool.release(holders.pop(number % len(holders)))
        held = {page for pages in holders for page in pages}
        assert pool.num_free == 8 - len(held)
