"""Packed rows: each token once, as its example has it; places by an independent statement; order and resume."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptoss_jax.harmony.tokenizer import START
from gptoss_jax.training import batch, corpus, heads, packing, rows, vocabulary
from gptoss_jax.training.best_fit import OpenRows
from gptoss_jax.training.corpus import Corpus
from gptoss_jax.training.jsonl import DataError
from gptoss_jax.training.options import CHANNELS
from gptoss_jax.training.packing import Packer, Position, RowStream
from gptoss_jax.training.rows import Member, Row
from gptoss_jax.training.vocabulary import CompactVocabulary, VocabularyError
from pallas_kernels.attention.packed import visible

KINDS = {  # of corpora: conversations, turns, what each begins with, what is learned
    "one head": (40, 1, lambda i: "Be brief.", CHANNELS),
    "three heads": (60, 1, lambda i: ("Be brief.", "Rhyme.", "Answer in words.")[i % 3], CHANNELS),
    "all different": (30, 1, lambda i: f"You are number {i}, and nobody else is.", CHANNELS),
    "turns": (25, 4, lambda i: "Be brief.", CHANNELS),
    "turns, all different": (25, 4, lambda i: f"You are number {i}.", CHANNELS),
    "answers only": (25, 2, lambda i: "Be brief.", ("final",)),
}


def conversation(rng: random.Random, turns: int, system: str) -> list[dict[str, Any]]:
    """One with up to so many turns, of numbers."""
    said: list[dict[str, Any]] = [{"role": "system", "content": system}]
    for _ in range(rng.randint(1, turns)):
        question, thought, answer = (
            " ".join(str(rng.randint(0, 99)) for _ in range(rng.randint(1, 12))) for _ in "qta"
        )
        said += [{"role": "user", "content": question}]
        said += [{"role": "assistant", "content": answer, **({"reasoning": thought} if rng.random() < 0.7 else {})}]
    return said


def made(folder: Path, kind: str) -> Corpus:
    """A corpus of a kind."""
    count, turns, system, channels = KINDS[kind]
    rng = random.Random(5)
    path = folder / "a.jsonl"
    documents = [conversation(rng, turns, system(i)) for i in range(count)]
    documents += [[*document[:-1], {"role": "assistant", "content": "?"}] for document in documents[:9]]  # asked again
    documents += [[*document[:-1], document[-1] | {"content": "!"}] for document in documents[:9]]  # thought alike
    path.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    return corpus.read([str(path)], row_tokens=1000, channels=channels)


@pytest.fixture(scope="module", params=KINDS)
def packed(request, tmp_path_factory) -> tuple[Corpus, Packer]:
    """A corpus, and its packer into rows of little more than the longest example."""
    read = made(tmp_path_factory.mktemp("packed"), request.param)
    return read, Packer(read, int(read.lengths.max()) * 2 + 3, seed=11)


def examples_of(row: Row) -> list[tuple[list[int], list[bool]]]:
    """The examples that a row's places spell: ids, and which of them are learned, but for the first."""
    found = []
    own = np.flatnonzero(row.position >= 0)
    length_of_head = int(row.head.max())
    for first, part in itertools.groupby(own[own >= length_of_head].tolist(), key=lambda index: int(row.first[index])):
        indices = list(part)
        head = int(row.head[indices[0]])
        assert indices == list(range(first, first + len(indices)))
        assert all(row.head[index] == head for index in indices)
        whole = [*range(head), *indices]
        assert row.position[whole].tolist() == list(range(len(whole)))
        learned = [bool(row.learned[index]) for index in whole[:-1]]
        for index, following in itertools.pairwise(whole):
            assert row.targets[index] == (row.tokens[following] if row.learned[index] else 0)
        assert not row.learned[whole[-1]]
        found.append((row.tokens[whole].tolist(), learned))
    return found


def test_each_example_stands_in_one_row_as_it_is(packed):
    """Guards every token, its place and its target: what a row says, read back by its places alone, is the corpus."""
    read, packer = packed
    plan = packer.plan(0)
    found = [example for row in range(len(plan)) for example in examples_of(packer.row(0, row))]
    expected = []
    for begin, end in itertools.pairwise(read.offsets.tolist()):
        expected.append((read.ids[begin:end].tolist(), read.learned[begin + 1 : end].tolist()))
    assert sorted(found) == sorted(expected)


def test_every_learned_token_is_a_target_once(packed):
    """Guards the loss against tokens that a shared head, or a row's seam, would swallow or count twice."""
    read, packer = packed
    weights = sum(int(packer.row(0, row).learned.sum()) for row in range(len(packer.plan(0))))
    assert weights == int(read.learned.sum())


def test_a_query_sees_its_own_conversation(packed):
    """Guards masks: the keys that the attention's contract shows a token are those of its own example, up to it."""
    _, packer = packed
    row = packer.row(0, 0)
    seen = np.asarray(visible(batch.stack([row], 1).places, None))[0]
    for index in np.flatnonzero(row.position >= 0).tolist():
        keys = np.flatnonzero(seen[index])
        assert row.position[keys].tolist() == list(range(row.position[index] + 1))
        assert keys[-1] == index
    assert not seen[row.position < 0].any()
    assert not seen[:, row.position < 0].any()


def test_beginnings_are_shared_and_little_is_padding(packed, request):
    """Guards the speed of training: less than the tokens of all examples is computed, and few are padding."""
    read, packer = packed
    plan = packer.plan(0)
    computed = len(plan) * packer.row_tokens
    assert plan.heads.sum() > 0.1 * len(read.ids)  # all have a system message in common
    assert computed == pytest.approx((len(read.ids) - plan.heads.sum()) / (1 - plan.padding_share), rel=1e-6)
    assert plan.padding_share < 0.2  # of rows of two examples' length


def test_heads_end_where_messages_begin(packed):
    """Guards prompts: an example's own part begins a message, which is never learned."""
    _, packer = packed
    for number in range(len(packer.plan(0))):
        row = packer.row(0, number)
        for first in np.unique(row.first[row.head > 0]):
            assert row.tokens[first] == START
            assert not row.learned[row.head[first] - 1]


def by_hand(*examples: tuple[list[int], list[int]]) -> Corpus:
    """A corpus of ids and flags, each a line."""
    ids, learned = zip(*examples, strict=True)
    return Corpus(
        ids=np.array([*itertools.chain(*ids)], np.int32),
        learned=np.array([*itertools.chain(*learned)], bool),
        lines=np.array([[0, line + 1] for line in range(len(ids))], np.int32),
        digests=np.arange(len(ids), dtype=np.uint64),
        offsets=np.cumsum([0, *map(len, ids)]),
        files=("a",),
        conversations=len(ids),
    )


def test_what_examples_share():
    """Guards targets and masks: nothing learned is shared, nor what only looks alike after different beginnings."""
    begin, flags = [START, 1, START, 2], [0, 0, 0, 0]
    read = by_hand(
        ([*begin, START, 3, START, 4], [*flags, 0, 0, 0, 1]),
        ([*begin, START, 3, START, 5], [*flags, 0, 0, 0, 1]),
        ([*begin, START, 3, START, 6], [*flags, 0, 0, 1, 1]),  # the model draws <|start|> itself
        ([*begin, START, 7], [*flags, 0, 1]),
        ([START, 9, START, 2, START, 3], [0, 0, 0, 0, 0, 1]),
        ([START, 1, 1, START, 2, START, 3], [0, 0, 0, 0, 0, 0, 1]),
    )
    found = heads.find(read)
    assert [[found.shared(one, other) for other in range(6) if other != one] for one in range(6)] == [
        [6, 4, 4, 0, 0],
        [6, 4, 4, 0, 0],
        [4, 4, 4, 0, 0],
        [4, 4, 4, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]


def test_rows_are_filled_best_first():
    """Guards best fit: most in common first, then the fullest row; one that is taken away leaves no trace."""
    begin, other = [START, 1, 1, START], [START, 2, 2, START]
    lengths = [9, 5, 8, 6, 6, 4]
    beginnings = [begin, other, other, begin, other, other]
    examples = [head + [0] * (length - 4) for head, length in zip(beginnings, lengths, strict=True)]
    read = by_hand(*((ids, [0] * (len(ids) - 1) + [1]) for ids in examples[:-1]), ([*other, 5], [0, 0, 0, 0, 1]))
    found = OpenRows(heads.find(read), read.lengths, 12)
    for example in (0, 1, 2):
        found.open(example)
    found.place(3)  # 3 of its tokens stand in row 0, where the other 3 fit
    assert found.members == [[Member(0, 0), Member(3, 3)], [Member(1, 0)], [Member(2, 0)]]
    assert found.take_back(0) == [1]
    found.place(4)  # into what was row 2, is row 1
    assert found.members == [[Member(0, 0), Member(3, 3)], [Member(2, 0), Member(4, 3)]]
    found.place(5, least_shared=4)  # with nothing that long in common
    found.place(1)
    assert found.members[2] == [Member(5, 0), Member(1, 3)]


def test_a_row_by_hand():
    """Guards the layout that the attention's contract draws: head, own parts, one without a head, padding."""
    start = START
    read = by_hand(
        ([start, 1, start, 2, 3], [0, 0, 0, 0, 1]),
        ([start, 1, start, 4], [0, 0, 0, 1]),
        ([start, 5, 6], [0, 1, 1]),
    )
    row = rows.fill(read, [Member(0, 0), Member(1, 2), Member(2, 0)], 12)
    assert row.tokens.tolist() == [start, 1, start, 2, 3, start, 4, start, 5, 6, 0, 0]
    assert row.position.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 2, -1, -1]
    assert row.first.tolist() == [0, 0, 2, 2, 2, 5, 5, 7, 7, 7, 0, 0]
    assert row.head.tolist() == [0, 0, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0]
    assert row.targets.tolist() == [0, 0, 0, 3, 0, 4, 0, 5, 6, 0, 0, 0]
    assert row.learned.tolist() == [target > 0 for target in row.targets.tolist()]


def same(one: list[Row], other: list[Row]) -> bool:
    """Whether two lists of rows are equal to the bit."""
    parts = zip(itertools.chain(*one), itertools.chain(*other), strict=True)
    return all(np.array_equal(a, b) for a, b in parts)


def test_a_resume_goes_on_with_the_next_row(packed):
    """Guards kill -9: a stream at a saved position gives what the first one goes on to give, over epochs' ends."""
    read, packer = packed
    count = len(packer.plan(0))
    stream = RowStream(packer)
    all_rows = stream.take(3 * count)
    assert stream.position.epoch >= 2
    assert same(all_rows[:count], [packer.row(0, row) for row in range(count)])
    for taken in (1, count - 1, count, count + 2):
        first = RowStream(packer)
        first.take(taken)
        fresh = Packer(read, packer.row_tokens, seed=11)
        assert same(RowStream(fresh, Position(*first.position)).take(3), all_rows[taken : taken + 3])


def test_order_depends_on_seed_and_epoch(packed):
    """Guards shuffling: every epoch its own order, every seed too, and the same one each time."""
    read, packer = packed
    orders = [packer.plan(0), packer.plan(1), Packer(read, packer.row_tokens, seed=12).plan(0)]
    assert len({tuple(plan.examples.tolist()) for plan in orders}) == 3
    assert all(sorted(plan.examples.tolist()) == list(range(len(read))) for plan in orders)
    again = packer.plan(0)
    assert again.examples.tolist() == orders[0].examples.tolist()
    assert packer.rows_of(1.5) >= len(again)


def test_the_order_is_that_of_other_machines():
    """Guards a resume after an upgrade of NumPy: the order is a hash of our own."""
    assert packing._shuffled(8, 3, 1, 0) == [7, 5, 1, 0, 2, 4, 3, 6]
    assert sorted(packing._shuffled(1000, 3)) == list(range(1000))


def test_an_example_longer_than_a_row_is_refused(tmp_path):
    """Guards a corpus that was made for longer rows."""
    read = made(tmp_path, "one head")
    with pytest.raises(
        DataError, match=r"line \d+: the conversation has 1\d\d tokens, expected at most the 50 of a row"
    ):
        Packer(read, 50)


# ---- batches and the compact vocabulary ----


def test_a_batch_stacks_rows_and_pads(packed):
    """Guards the last, short batch: rows that are not there are padding, of weight 0."""
    _, packer = packed
    row = packer.row(0, 0)
    stacked = batch.stack([row, row], 3)
    assert stacked.tokens.shape == stacked.places.head.shape == stacked.weights.shape == (3, packer.row_tokens)
    for part, of_row in zip((stacked.tokens, *stacked.places, stacked.targets), row[:5], strict=True):
        assert np.array_equal(part[1], of_row)
        assert part.dtype == np.int32
    assert stacked.weights.dtype == np.float32
    assert np.array_equal(stacked.weights[0], row.learned)
    assert (np.asarray(stacked.places.position[2]) == -1).all()
    assert not np.asarray(stacked.tokens[2]).any() and not np.asarray(stacked.weights[2]).any()


def test_the_compact_vocabulary_goes_there_and_back(packed):
    """Guards embeddings of few rows: ids -> rows -> ids is the same, and padding needs no id 0."""
    read, packer = packed
    compact = vocabulary.of_corpora([read.ids])
    assert set(vocabulary.ALWAYS) <= set(compact.ids.tolist())
    assert set(compact.ids.tolist()) == set(read.ids.tolist()) | set(vocabulary.ALWAYS)
    assert compact.ids.tolist() == sorted(compact.ids.tolist())
    row = packer.row(0, len(packer.plan(0)) - 1)
    plain, mapped = batch.stack([row], 2), batch.stack([row], 2, compact)
    real, learned = plain.places.position >= 0, plain.weights > 0
    assert np.array_equal(compact.ids[mapped.tokens[real]], plain.tokens[real])
    assert np.array_equal(compact.ids[mapped.targets[learned]], plain.targets[learned])
    assert not mapped.tokens[~real].any() and not mapped.targets[~learned].any()


def test_ids_without_a_row_are_refused():
    """Guards validation whose tokens no embedding has: -1 would be its last row."""
    compact = CompactVocabulary([7, 3, 7])
    assert len(compact) == 2 + len(vocabulary.ALWAYS)
    assert compact.rows(np.array([7, 3], np.int32)).tolist() == [1, 0]
    with pytest.raises(VocabularyError, match="token id 5 is not among the 12 of the compact vocabulary"):
        compact.rows(np.array([7, 5], np.int32))
    with pytest.raises(VocabularyError, match="token id 201088 is outside the vocabulary of 201,088 ids"):
        CompactVocabulary([201088])
