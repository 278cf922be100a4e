"""Conversations as the batches of a run: the same from any place, named by line; some measured, not learned."""

import pytest

from gptoss_jax.training import feed
from gptoss_jax.training.feed import Sources
from gptoss_jax.training.options import TrainOptions
from gptoss_jax.training.packing import Position
from tests import finetunes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """24 conversations of some 80 tokens."""
    return str(finetunes.chats(tmp_path_factory.mktemp("feed") / "chats.jsonl"))


def _options(**others) -> TrainOptions:
    return TrainOptions(**{"batch_rows": 3, "row_tokens": 160, "epochs": 2.0, "method": "full"} | others)


def _same(one, other) -> bool:
    return all(
        (a == b).all() for a, b in zip(one[:1] + one[1] + one[2:], other[:1] + other[1] + other[2:], strict=True)
    )


def test_from_any_place_the_same_batches_follow(data, tmp_path):
    """Guards resuming: a process that begins in the middle of an epoch must go on as the one that was killed."""
    whole = feed.read(Sources((data,)), _options(), tmp_path / "tokens")
    position, batches, places = Position(), [], []
    for _ in range(whole.total_steps + 3):
        places.append(position)
        batch, position = whole.take(position)
        batches.append(batch)
    again = feed.read(Sources((data,)), _options(), tmp_path / "tokens")
    for i in (len(batches) - 1, 3, 0):
        assert _same(again.take(places[i])[0], batches[i])
    assert not _same(batches[0], batches[1])


def test_epochs_are_counted_in_steps(data):
    """Guards --epochs: rows of an epoch over the rows of a step, rounded up; a half is half as many."""
    whole = feed.read(Sources((data,)), _options(), None)
    rows = len(whole.training.plan(0))
    assert whole.total_steps == -(-2 * rows // 3)
    assert feed.read(Sources((data,)), _options(epochs=0.01), None).total_steps == 1
    assert feed.read(Sources((data,)), _options(epochs=None, steps=7), None).total_steps == 7


def test_places_name_each_rows_conversations(data):
    """Guards the message of a loss that is no number: all lines of an epoch, each once, also over an epoch's end."""
    whole = feed.read(Sources((data,)), _options(batch_rows=1), None)
    rows = len(whole.training.plan(0))
    named = [whole.places(Position(0, row))[0] for row in range(rows)]
    lines = sorted(int(part.rpartition(" ")[2]) for row in named for part in row.split("; "))
    assert lines == list(range(1, 25)) and all(row.startswith(data) for row in named)
    both = feed.read(Sources((data,)), _options(batch_rows=2), None).places(Position(0, rows - 1))
    assert both == [named[-1], whole.places(Position(1, 0))[0]]


def test_what_is_measured_is_not_learned(data):
    """Guards validation by a share: no line on both sides, none lost, batches as large as a step's parts."""
    found = feed.read(Sources((data,), (), 0.3), _options(batch_rows=4, accumulate=2), None)
    assert found.held_out is not None
    sides = [{tuple(line) for line in side.corpus.lines.tolist()} for side in (found.training, found.held_out)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 24
    assert {batch.tokens.shape for batch in found.validation()} == {(2, 160)}
    learned = sum(int(batch.weights.sum()) for batch in found.validation())
    assert learned == int(found.held_out.corpus.learned.sum())


def test_the_compact_vocabulary_holds_validation_too(data, tmp_path):
    """Guards an id that only validation has: it must have its row, or measuring would stop the run."""
    others = str(
        finetunes.write_lines(
            tmp_path / "others.jsonl",
            [{"messages": [{"role": "user", "content": "Zebra?"}, {"role": "assistant", "content": "Quagga."}]}],
        )
    )
    found = feed.read(Sources((data,), (others,)), _options(compact_vocabulary=True), None)
    assert found.vocabulary is not None and len(found.vocabulary) < 400
    (batch,) = found.validation()
    assert batch.tokens.max() < len(found.vocabulary)
    assert "1 conversation for validation" in found.described
