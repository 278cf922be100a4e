"""Memory of a training step by part: each follows from the model's numbers, and is cut as the mesh cuts it."""

import dataclasses

import pytest

from gptoss_jax.checkpoints.huggingface import mxfp4_recipes
from gptoss_jax.model import mesh
from gptoss_jax.model.config import parse_config, read_config
from gptoss_jax.training import loss, memory
from gptoss_jax.training.memory import Memory
from gptoss_jax.training.options import LoraOptions, OptimizerOptions, TrainOptions
from pallas_kernels import expert_mlp
from tests.goldens.make import ROOT, tiny_config

TINY = parse_config(tiny_config())
FULL = TrainOptions(batch_rows=6, row_tokens=50, steps=1, method="full")
LORA = TrainOptions(batch_rows=6, row_tokens=50, steps=1, method="lora", lora=LoraOptions(rank=8))
# By hand, of configs/tiny.json with 512 rows: elements of a layer's attention, of its experts' matrices, of the rest.
ATTENTION, EXPERTS = 2 * 64 * (6 + 2) * 96, 7 * 3 * 160 * 96
REST = (6 + 4) * 64 + 6 + 96 + 7 * (320 + 96) + 7 * 97 + 2 * 96
ELEMENTS = 5 * (ATTENTION + EXPERTS + REST) + 2 * 512 * 96 + 96


def test_the_model_has_as_many_weights_as_its_leaves():
    """Guards a part of the model that the count forgets; recipes name all leaves with their shapes."""
    experts = ("blocks", "scales")
    leaves = mxfp4_recipes(TINY)
    assert ELEMENTS == memory.memory(TINY, FULL).trained / 4
    assert len([name for name in leaves if not name.endswith(experts)]) == 5 * 15 + 3


def test_full_training_has_all_weights_four_times():
    """Guards Adam's two moments, and the sums of accumulated gradients."""
    found = memory.memory(TINY, FULL)
    assert found[:4] == (0, 4 * ELEMENTS, 4 * ELEMENTS, 8 * ELEMENTS)
    accumulated = memory.memory(TINY, dataclasses.replace(FULL, accumulate=3))
    assert accumulated.gradients == 2 * found.gradients
    assert accumulated.activations == pytest.approx(found.activations / 3, abs=1)


def test_muon_has_one_number_for_each_of_a_matrix():
    """Guards the optimizer that the demo is trained with."""
    found = memory.memory(TINY, dataclasses.replace(FULL, optimizer=OptimizerOptions("muon")))
    assert found.optimizer == 8 * ELEMENTS - 4 * 5 * (ATTENTION + EXPERTS)


def test_lora_leaves_experts_packed():
    """Guards the promise of LoRA here: experts take 4.25 bits a weight, and only adapters have gradients."""
    found = memory.memory(TINY, LORA)
    dense = ELEMENTS - 5 * EXPERTS
    assert found.base == 2 * dense + 5 * EXPERTS * 17 // 32
    adapters = 5 * 8 * (2 * (96 + 384) + 2 * (96 + 128) + 7 * (96 + 3 * 160 + 96))
    assert found[1:4] == (4 * adapters, 4 * adapters, 8 * adapters)


@pytest.mark.parametrize(
    ("targets", "numbers"),
    [(("router",), 5 * (96 + 7)), (("unembedding",), 96 + 512), (("router", "unembedding"), 5 * (96 + 7) + 96 + 512)],
)
def test_adapters_are_those_that_are_asked_for(targets, numbers):
    """Guards --lora-targets: each selectable, none counted that is not there."""
    lora = LoraOptions(rank=8, targets=targets)
    assert memory.memory(TINY, dataclasses.replace(LORA, lora=lora)).trained == 4 * 8 * numbers


def test_a_mesh_cuts_what_it_cuts():
    """Guards bytes per device: data shards have fewer rows, tensor and expert shards fewer weights."""
    small = read_config(ROOT / "configs" / "small.json")
    whole, by_data, by_experts, by_width = (
        memory.memory(small, dataclasses.replace(LORA, batch_rows=8), mesh.num_shards(text))
        for text in ("", "data=2", "expert=4", "tensor=2")
    )
    assert by_data.base == whole.base and by_data.activations == whole.activations / 2
    assert by_data.trained == whole.trained and by_data.optimizer == whole.optimizer / 2
    assert whole.base / 4 < by_experts.base < whole.base / 2 and by_experts.trained < whole.trained
    assert whole.base / 2 < by_width.base < whole.base * 0.6
    assert by_width.activations < whole.activations


def test_rematerialisation_and_small_number_formats_save_activations():
    """Guards the two options that people turn when a step does not fit."""
    whole = memory.memory(TINY, FULL).activations
    again = memory.memory(TINY, dataclasses.replace(FULL, rematerialize=True)).activations
    half = memory.memory(TINY, dataclasses.replace(LORA, dtype="bfloat16")).activations
    assert again < whole / 2 and half < whole


def test_few_experts_in_bfloat16_keep_what_all_of_them_make():
    """Guards the one way of running experts that keeps their insides, and the bound that stands in two places."""
    assert memory.FEW_EXPERTS == expert_mlp.FEW_EXPERTS
    half = dataclasses.replace(FULL, dtype="bfloat16")
    inside = 300 * 5 * 24 * 7 * 160
    assert memory.memory(TINY, half).activations == pytest.approx(
        memory.memory(TINY, dataclasses.replace(LORA, dtype="bfloat16")).activations + inside
    )
    assert memory.memory(TINY, FULL).activations == memory.memory(TINY, LORA).activations


def test_logits_are_bounded_as_the_loss_bounds_them():
    """Guards the bound, which stands in two places since one of them imports JAX."""
    assert memory.LOGITS_BYTES == loss.LOGITS_BYTES
    assert memory.memory(TINY, FULL).logits == 2 * 4 * 300 * 512
    many = dataclasses.replace(FULL, batch_rows=6000)
    assert memory.memory(TINY, many).logits == 2 * loss.LOGITS_BYTES
    assert memory.memory(TINY, FULL, vocab_rows=100).logits == 2 * 4 * 300 * 100


def test_the_published_models_need_what_is_known():
    """Guards orders of magnitude: weights of 12.8 and 60.8 GiB, as the model cards have it."""
    for name, low, high in (("gpt-oss-20b", 12.5, 13.5), ("gpt-oss-120b", 59, 62)):
        config = read_config(ROOT / "configs" / f"{name}.json")
        found = memory.memory(config, dataclasses.replace(LORA, dtype="bfloat16"))
        assert low < found.base / 2**30 < high


def test_the_table_shows_both_ways_and_marks_the_one_that_runs():
    """Guards the lines of --dry-run."""
    again = dataclasses.replace(LORA, rematerialize=True)
    lines = memory.table(memory.memory(TINY, LORA), memory.memory(TINY, again), again)
    assert lines[-1].endswith("<- these options") and "--rematerialize" in lines[-1]
    assert not lines[-2].endswith("options")
    assert len(lines) == len(Memory._fields) + 1 + 2
    assert memory.in_gib(3 << 30) == "    3.00 GiB"
