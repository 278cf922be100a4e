"""The estimate of a training step's memory beside what XLA says that the compiled step takes."""

import functools
import json
from typing import Any, NamedTuple

import pytest

from converters.random_checkpoint import with_vocab_size
from gptoss_jax.model import mesh
from gptoss_jax.training import batch as batches
from gptoss_jax.training import memory, rows
from gptoss_jax.training.options import OptimizerOptions, TrainOptions
from gptoss_jax.training.step import Trainer
from tests.gate import TinyModel
from tests.goldens.make import ROOT

CONFIG = with_vocab_size(json.loads((ROOT / "configs" / "small.json").read_text()), 512)
FACTOR = 1.5  # between the estimate and what the compiler says, both ways
CASES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "full, rematerialized": {"method": "full", "rematerialize": True},
    "full, muon, accumulated": {"method": "full", "optimizer": OptimizerOptions("muon"), "accumulate": 2},
    "full, data shards": {"method": "full", "mesh": "data=2"},
    "full, muon, data and expert shards": {
        "method": "full",
        "optimizer": OptimizerOptions("muon"),
        "mesh": "data=2,expert=2",
    },
    "full, bfloat16": {"method": "full", "dtype": "bfloat16"},
    "lora": {"method": "lora"},
    "lora, rematerialized": {"method": "lora", "rematerialize": True},
}


class Found(NamedTuple):
    """Bytes of the compiled step, and the estimate."""

    arguments: int
    temporary: int
    estimate: memory.Memory


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By case, compiled once."""
    folder = TinyModel(CONFIG).write(tmp_path_factory.mktemp("memory"))

    @functools.cache
    def compiled(case: str) -> Found:
        changes = dict(CASES[case])
        axes = changes.pop("mesh", "")
        options = TrainOptions(batch_rows=8, row_tokens=256, steps=4, **changes)
        trainer = Trainer.open(folder, options, total_steps=4, mesh=axes or None)
        step = trainer.compiled_step(trainer.init(), batches.stack([rows.empty(256)], 8))
        analysis: Any = step.memory_analysis()
        sizes = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
        return Found(*sizes, memory.memory(trainer.config, options, mesh.num_shards(axes)))

    return compiled


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_near_what_xla_says(case, found):
    """Guards --dry-run: weights and moments as they are, and in all neither much more nor much less than is taken."""
    arguments, temporary, estimate = found(case)
    state = estimate.base + estimate.trained + estimate.optimizer
    assert state == pytest.approx(arguments, rel=0.03)  # beside the batch's tokens
    assert 1 / FACTOR < estimate.total / (arguments + temporary) < FACTOR


@pytest.mark.parametrize("method", ["full", "lora"])
def test_rematerialisation_saves_memory_on_a_cpu_too(method, found):
    """Guards against a compiler that joins the second computation of a layer with the first."""
    whole, again = found(method).temporary, found(f"{method}, rematerialized").temporary
    assert again < 0.6 * whole
