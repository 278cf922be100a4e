"""Which matrices can have adapters, what tells an adapter's models from others, and one line for what is none."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.checkpoints import peft
from gptoss_jax.checkpoints.huggingface import mxfp4_recipes
from gptoss_jax.checkpoints.identity import identity
from gptoss_jax.errors import GptossError
from gptoss_jax.model import adapters
from gptoss_jax.model.adapters import LowRank
from gptoss_jax.model.config import parse_config
from tests.gate import TinyModel
from tests.goldens import make as golden
from tests.lora import RANK, factors_of

CONFIG = parse_config(golden.two_layers_config())


@pytest.fixture
def published(tmp_path) -> Path:
    """A random model."""
    return TinyModel(golden.two_layers_config()).write(tmp_path)


@pytest.fixture
def adapter(tmp_path) -> Path:
    """An adapter of its attention."""
    peft.write(tmp_path / "adapter", CONFIG, factors_of(CONFIG, ["attention"]), alpha=1.0)
    return tmp_path / "adapter"


def test_every_matrix_has_a_target_of_its_shape():
    """Guards the table: a factor's axes are those of the published matrix, and no matrix is forgotten."""
    targets = adapters.targets(CONFIG)
    recipes = mxfp4_recipes(CONFIG)
    matrices = {path for path, recipe in recipes.items() if len(recipe.shape) > 1 and not path.endswith("bias")}
    assert {target.weight for target in targets.values()} == {
        path for path in matrices - {"embedding"} if not path.endswith("/scales")
    }
    for target in targets.values():
        shape, factors = recipes[target.weight].shape, target.shapes(RANK)
        rows, columns = int(np.prod(target.out)), int(np.prod(target.inputs))
        if target.experts:
            assert shape == (target.experts, rows, columns // 32, 16)
        else:
            assert shape == (rows, columns)
        assert [len(axes) for axes in target.axes] == [len(factor) for factor in factors]
        assert np.prod(factors.a) == max(target.experts, 1) * RANK * columns
        assert np.prod(factors.b) == max(target.experts, 1) * RANK * rows


def test_groups_are_what_was_asked_for():
    """Guards --lora-targets: all matrices of a group in all layers, and no others."""
    assert sorted(adapters.targets(CONFIG, ["router"])) == ["layers/0/moe/router", "layers/1/moe/router"]
    assert list(adapters.targets(CONFIG, ["unembedding"])) == ["unembedding"]
    assert len(adapters.targets(CONFIG, ["attention", "experts"])) == 12
    assert not adapters.have_experts(adapters.targets(CONFIG, ["attention", "router", "unembedding"]))
    assert adapters.have_experts(adapters.targets(CONFIG, ["experts"]))
    with pytest.raises(GptossError, match="adapter target 'mlp', expected some of attention, router, experts"):
        adapters.targets(CONFIG, ["mlp"])


def test_factors_of_another_model_are_refused():
    """Guards a name and a shape that this model has not, each in one line."""
    factors = factors_of(CONFIG)
    adapters.check(CONFIG, factors)
    a, b = factors["layers/1/moe/down"]
    for wrong, message in (
        ({"layers/2/moe/down": LowRank(a, b)}, "adapter of 'layers/2/moe/down': this model has no such matrix"),
        (
            {"layers/1/moe/down": LowRank(a[:, :, :-1], b)},
            r"adapter of layers/1/moe/down: factors of shapes \(7, 3, 159\)",
        ),
        ({"layers/1/moe/down": LowRank(a, b[..., :2])}, "for rank 2; is it another model's adapter"),
    ):
        with pytest.raises(GptossError, match=message):
            adapters.check(CONFIG, wrong)


def test_an_adapter_is_part_of_what_weights_are(published, adapter, tmp_path):
    """Guards a job that goes on with another adapter: its answers would be of two models."""
    base = identity(published)
    with_adapter = identity(published, adapter)
    assert len({base, with_adapter}) == 2 and len(with_adapter) == 64
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    assert identity(published, copy) == with_adapter
    config = (copy / "adapter_config.json").read_text()
    (copy / "adapter_config.json").write_text(config.replace('"lora_alpha": 1.0', '"lora_alpha": 2.0'))
    assert identity(published, copy) not in (base, with_adapter)
    (copy / "adapter_config.json").write_text(config)
    weights = bytearray((copy / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "adapter_model.safetensors").write_bytes(weights)
    assert identity(published, copy) not in (base, with_adapter)
    with pytest.raises(GptossError, match=r"adapter_config.json: .*; expected the folder of a PEFT adapter"):
        identity(published, tmp_path / "none")


def test_load_refuses_what_is_no_adapter(published, tmp_path):
    """Guards `load` and --adapter: one line, before the weights are read."""
    read = []
    for wrong, message in (
        (tmp_path / "none", r"none/adapter_config.json: .*; expected the folder of a PEFT adapter"),
        (published, r"adapter_config.json: .*; expected the folder of a PEFT adapter"),
    ):
        with pytest.raises(GptossError, match=message) as caught:
            gptoss_jax.load(published, adapter=wrong, report=lambda *done: read.append(done))
        assert "\n" not in str(caught.value)
    assert read == []
