"""Prompts that begin alike read it once: what is found again, what is not, and what it costs. No model runs."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.page_pool import PagePool
from gptoss_jax.engine.prefix_cache import PrefixCache, Snapshots, block_keys
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.runner import num_snapshots
from gptoss_jax.engine.sampling import FAULTY
from gptoss_jax.engine.statistics import Statistics
from tests.fake_runner import (
    BOTH,
    CONFIG,
    VOCAB,
    FakeRunner,
    RoundingRunner,
    all_pages_are_free,
    answer,
    check_answers,
    prompt,
    run,
)


def make_engine(config: EngineConfig, runner=FakeRunner, **options) -> Engine:
    """An engine over a fake runner."""
    return Engine(runner(config, **options), CONFIG, config)


def answers(engine: Engine, prompts, count: int = 3) -> list[list[int]]:
    """What follows each of `prompts`, all submitted at once."""
    ids = [engine.submit(Request(ids, (), count)) for ids in prompts]
    tokens = run(engine)
    return [tokens[i] for i in ids]


@BOTH
@pytest.mark.parametrize("slots", [4, 64])
def test_a_beginning_that_64_rows_share_is_read_once(one_batch, slots):
    """Guards the point of it all: of 1,000 shared tokens, 896 are read by the first row, and by no other at once."""
    shared = prompt(1000)
    prompts = [shared + prompt(20 + i, i) for i in range(64)]
    engine = make_engine(EngineConfig(slots=slots, max_context_tokens=2048), one_batch=one_batch)
    assert answers(engine, prompts) == [answer(ids, 3) for ids in prompts]
    found = engine.statistics
    assert found.prompt_tokens == sum(map(len, prompts))
    assert found.cached_prompt_tokens == 63 * 896
    assert found.hit_rate == found.cached_prompt_tokens / found.prompt_tokens
    assert all_pages_are_free(engine)


def test_two_prompts_that_differ_are_read_side_by_side():
    """Guards the wait for a prefix: nobody waits for what it cannot share."""
    engine = make_engine(EngineConfig(slots=2, max_context_tokens=2048), one_batch=True)
    for seed in range(2):
        engine.submit(Request(prompt(1000, seed), (), 1))
    engine.tick()
    assert engine.num_waiting == 0


@BOTH
def test_samples_of_one_prompt_read_it_once(one_batch):
    """Guards --n: also where the prompt ends with a block, of which the last token has to be read to draw."""
    for length in (256, 257, 300):
        engine = make_engine(EngineConfig(slots=4, max_context_tokens=2048), one_batch=one_batch)
        assert answers(engine, [prompt(length)] * 6) == [answer(prompt(length), 3)] * 6
        assert engine.statistics.cached_prompt_tokens == 5 * (128 if length == 256 else 256)


@BOTH
def test_a_chat_reads_on(one_batch):
    """Guards --chat's one slot: each turn begins as the last prompt did, and reads what is new, to a block."""
    engine = make_engine(EngineConfig(slots=1, max_context_tokens=4096), one_batch=one_batch)
    history, unread = prompt(200), []
    for turn in range(6):
        before = dataclasses.replace(engine.statistics)
        assert answers(engine, [history], 30) == [answer(history, 30)]
        hit = engine.statistics.cached_prompt_tokens - before.cached_prompt_tokens
        unread.append(len(history) - hit)
        history += prompt(40, turn + 1)
    assert unread[0] == 200
    assert max(unread[1:]) <= 127 + 40


def test_what_was_drawn_is_not_found():
    """Guards bits: an answer's keys and values came from decoding steps, a prompt's come from chunks."""
    engine = make_engine(EngineConfig(slots=1, max_context_tokens=2048), RoundingRunner)
    ((*drawn,),) = answers(engine, [prompt(200)], 300)
    answers(engine, [(*prompt(200), *drawn, 1)])
    assert engine.statistics.cached_prompt_tokens == 128


def test_another_prompt_of_the_same_block_is_no_hit():
    """Guards content: a block after another beginning has other keys and values."""
    middle = prompt(128, 5)
    engine = make_engine(EngineConfig(slots=1, max_context_tokens=2048))
    first, second = (prompt(128, 1) + middle + (1,)), (prompt(128, 2) + middle + (1,))
    assert answers(engine, [first, second]) == [answer(first, 3), answer(second, 3)]
    assert engine.statistics.cached_prompt_tokens == 0


def test_each_data_shard_has_its_own():
    """Guards shards: pages and rings are those of the slot's devices; a slot where more is shared is taken first."""
    engine = make_engine(EngineConfig(slots=4, max_context_tokens=1024), num_shards=2)
    assert answers(engine, [prompt(300)]) == [answer(prompt(300), 3)]
    others = [(*prompt(300), i) for i in range(4)]
    assert answers(engine, others) == [answer(ids, 3) for ids in others]
    assert engine.statistics.cached_prompt_tokens == 3 * 256  # once for each shard it is read
    assert all_pages_are_free(engine)


def test_a_slot_where_more_is_shared_is_taken_first():
    """Guards shards: of two free slots, that of the shard which holds the prompt's beginning."""
    engine = make_engine(EngineConfig(slots=2, max_context_tokens=1024), num_shards=2)
    other = engine.submit(Request(prompt(5), (), 500))
    engine.tick()
    engine.submit(Request(prompt(300), (), 1))  # in the second shard
    while not engine.is_idle:
        engine.tick()
        if engine.statistics.prompt_tokens > 300 and len(engine._placement.running) == 1:
            engine.cancel(other)
    answers(engine, [prompt(300)])
    assert engine.statistics.cached_prompt_tokens == 256


def test_who_reads_again_what_lost_its_rings_has_them_kept():
    """Guards a shared beginning of long prompts that come one by one: their own tails would push its rings out."""
    engine = make_engine(EngineConfig(slots=1, max_context_tokens=4096, pool_tokens=32_768, prefix_snapshots=4))
    shared = prompt(512)
    for i in range(4):
        answers(engine, [shared + prompt(1500, i)])
    assert engine.statistics.cached_prompt_tokens == 2 * 512  # of the third and the fourth


def test_prefixes_give_way_to_what_runs():
    """Guards memory: pages that nobody holds are free, whatever is kept in them; the oldest goes first."""
    config = EngineConfig(slots=1, max_context_tokens=768, pool_tokens=768)
    engine = make_engine(config)
    for seed in (1, 2, 3, 3, 1):
        assert answers(engine, [prompt(300, seed)], 400) == [answer(prompt(300, seed), 400)]
    assert engine.statistics.cached_prompt_tokens == 256  # of seed 3, the second time
    assert engine.statistics.evictions >= 4
    assert engine.statistics.preemptions == 0


def test_the_end_of_a_prefix_gives_way_first():
    """Guards what is left of it: without its beginning, pages of a prefix's end would be kept for nothing."""
    engine = make_engine(EngineConfig(slots=1, max_context_tokens=1024, pool_tokens=1024))
    for ids in (prompt(700), prompt(400), prompt(700)):
        assert answers(engine, [ids]) == [answer(ids, 3)]
    assert engine.statistics.cached_prompt_tokens == 4 * 128  # of five blocks, the last lost a page


def test_without_it_there_is_none():
    """Guards the switch, and contexts too short for a block: nothing is kept, and nothing found."""
    config = EngineConfig(slots=2, max_context_tokens=2048, prefix_snapshots=0)
    engine = make_engine(config)
    answers(engine, [prompt(1000)] * 4)
    assert engine.statistics.cached_prompt_tokens == 0
    assert FakeRunner(config).snapshots_per_shard == 0
    assert num_snapshots(EngineConfig(max_context_tokens=128)) == 0
    assert num_snapshots(EngineConfig(slots=2, max_context_tokens=256)) == 4  # blocks of two slots' pages
    assert num_snapshots(EngineConfig(slots=40, max_context_tokens=4096)) == 40
    assert num_snapshots(EngineConfig(prefix_snapshots=3)) == 3


def test_what_a_faulty_answer_read_is_forgotten():
    """Guards others from it: numbers that are not finite may stand in its pages."""

    class FaultyOnce(FakeRunner):
        faults = 1

        def _draw(self, slot, budget, ids=range(VOCAB)):
            self.faults -= 1
            return FAULTY if self.faults >= 0 else super()._draw(slot, budget, ids)

    engine = make_engine(EngineConfig(slots=1, max_context_tokens=2048), FaultyOnce)
    engine.submit(Request(prompt(300), (), 3))
    while not engine.is_idle:
        engine.tick()
    assert answers(engine, [prompt(300)]) == [answer(prompt(300), 3)]
    assert engine.statistics.cached_prompt_tokens == 0


JOBS = st.lists(
    st.tuples(
        st.sampled_from([0, 1]),  # which beginning
        st.sampled_from([0, 64, 100, 130, 200]),  # how much of it
        st.integers(1, 80),
        st.integers(1, 100),
        st.sampled_from([None, None, 0, 1, 5, 30]),
    ),
    min_size=1,
    max_size=14,
)


@pytest.mark.parametrize("runner", [FakeRunner, RoundingRunner])
@given(
    JOBS,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([384, 512, None]),
    st.sampled_from([1, 2]),
    st.sampled_from([None, 1, 2, 3]),
    st.booleans(),
)
@settings(max_examples=30)
def test_any_jobs_draw_what_they_draw_without_it(runner, jobs, slots, pool, shards, snapshots, one_batch):
    """Guards all of it together: cancels, preemption, pools and snapshots that run dry, shards.

    The second runner's cache shows the chunks in which a prompt was read: they are those without a prefix cache too.
    """
    one_batch = one_batch and runner is FakeRunner
    config = EngineConfig(
        slots=slots * shards,
        max_context_tokens=384,
        prefill_widths=(16, 64),
        pool_tokens=pool and pool * shards,
        prefix_snapshots=snapshots,
    )
    asked = [
        (prompt(200, which)[:part] + prompt(own, i + 2), count) for i, (which, part, own, count, _) in enumerate(jobs)
    ]
    alone = make_engine(
        dataclasses.replace(config, slots=1, pool_tokens=None, prefix_snapshots=0), runner, one_batch=one_batch
    )
    expected = [answers(alone, [ids], count)[0] for ids, count in asked]
    engine = make_engine(config, runner, num_shards=shards, one_batch=one_batch)
    for ids, count in asked:
        engine.submit(Request(ids, (), count))
    cancelled = {i: after for i, (*_, after) in enumerate(jobs) if after is not None}
    check_answers(engine, dict(enumerate(expected)), cancelled)


# ---- its parts ----


def test_keys_are_those_of_all_before_them():
    """Guards the keys: one for each whole block, the same for the same beginning only."""
    first, second = block_keys(prompt(300), 128), block_keys(prompt(300)[:256], 128)
    assert first == second
    assert len(set(first)) == 2
    changed = (VOCAB - 1, *prompt(300)[1:])
    assert not set(block_keys(changed, 128)) & set(first)
    assert block_keys(prompt(127), 128) == []


def test_a_block_without_a_snapshot_ends_no_prefix():
    """Guards sliding windows: pages alone are no hit; the last block that has its rings is the end of one."""
    pool = PagePool(8)
    statistics = Statistics()
    cache = PrefixCache(pool, 1, statistics)
    pages = pool.allocate(6)
    for key, its_pages in ((b"1", pages[:2]), (b"2", pages[2:4])):
        assert cache.add(key, its_pages) == 0
    assert cache.find([b"1"]).pages == ()
    assert cache.find([b"1", b"2", b"3"])[1:] == (pages[:4], 0)
    assert statistics.evictions == 1
    cache.forget(pages[:1])
    assert cache.find([b"1", b"2"]).pages == ()
    cache.forget(pages[2:4])
    assert statistics.evictions == 3
    assert cache.add(b"1", pages[4:]) == 0  # nobody has lost it
    assert statistics.evictions == 3


def test_a_prefix_that_was_wanted_outlasts_those_that_come_once():
    """Guards what many share: tails of prompts pass through the other half of the snapshots."""
    snapshots = Snapshots(4)
    snapshots.take(b"shared", wanted=False)
    snapshots.note_want(b"shared")
    for i in range(10):
        snapshots.take(b"%d" % i, wanted=False)
    assert snapshots.find(b"shared") is not None
    assert [snapshots.find(b"%d" % i) is not None for i in range(10)] == [False] * 7 + [True] * 3
    for i in range(10, 16):  # what was wanted long ago gives way to what was wanted since
        snapshots.take(b"%d" % i, wanted=True)
    assert snapshots.find(b"shared") is None
    for i in range(16, 18):  # and there is always room for what may be wanted
        snapshots.take(b"%d" % i, wanted=False)
    assert snapshots.find(b"16") is not None


@given(st.lists(st.tuples(st.sampled_from(["take", "wanted", "want", "drop"]), st.integers(0, 7)), max_size=60))
def test_no_snapshot_is_given_twice(acts):
    """Guards rings: two blocks with one snapshot, and a snapshot that nobody can have any more."""
    snapshots = Snapshots(4)
    for act, number in acts:
        key = b"%d" % number
        has = snapshots.find(key) is not None
        if act in ("take", "wanted") and not has:
            snapshots.take(key, wanted=act == "wanted")
        elif act == "want" and has:
            snapshots.note_want(key)
        elif act == "drop":
            snapshots.drop(key)
        taken = [place for i in range(8) if (place := snapshots.find(b"%d" % i)) is not None]
        assert sorted([*taken, *snapshots._free]) == list(range(4))
