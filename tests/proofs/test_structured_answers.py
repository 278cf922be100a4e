"""Random weights at temperature 2 under fifty schemas: an answer that is whole has its form, and a cut one says so."""

import collections
import json

import pytest

from benchmarks.schemas import SCHEMAS
from benchmarks.structured import draw_answers
from converters.random_checkpoint import write_checkpoint
from gptoss_jax.engine.request import EngineConfig
from gptoss_jax.runtime import loading
from tests.goldens.make import ROOT


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Tiny sizes, the whole vocabulary."""
    folder = tmp_path_factory.mktemp("random") / "model"
    config = json.loads((ROOT / "configs" / "tiny.json").read_text())
    layers = {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    write_checkpoint(folder, config | layers)
    return loading.load(folder)


def test_no_whole_answer_is_invalid(model):
    """Guards the promise, whatever the model wants: each answer is valid, by jsonschema, or says that it was cut."""
    engine = model.engine(EngineConfig(slots=8, max_context_tokens=512, prefix_snapshots=0))
    drawn = list(draw_answers(engine, len(SCHEMAS), most_tokens=160))
    found = collections.Counter(each.status for each in drawn)
    assert set(found) <= {"valid", "cut"}, [each.answer.parsed.text for each in drawn if each.status not in found]
    assert found["valid"] >= 25
    assert all(each.answer.finish_reason == "length" for each in drawn if each.status == "cut")
    assert {"final", "call"} <= {message.kind for each in drawn for message in each.answer.messages}
