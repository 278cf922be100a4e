"""The training step's gradients beside torch's of transformers' model, run on the spot; `make gates` installs both."""

# pyright: reportMissingImports=false

import numpy as np
import pytest

from gptoss_jax.checkpoints.huggingface import bf16_recipes
from gptoss_jax.model.config import parse_config
from tests import trainings
from tests.gate import TinyModel
from tests.goldens import make as golden

pytest.importorskip("torch", reason="the live comparison needs torch")
pytest.importorskip("transformers", reason="the live comparison needs transformers")

CONFIG = golden.tiny_config() | {"sliding_window": 9}
TOLERANCE = 1e-4  # of each gradient's norm: both compute in float32


def _torch_gradients(folder, of) -> dict[str, np.ndarray]:
    """Of the mean cross entropy of learned tokens, each conversation alone, by transformers' names."""
    import torch

    model = golden.load_transformers(folder, "float32")
    learned = sum(int(conversation.learned[1:].sum()) for conversation in of)
    for ids, is_learned in of:
        tokens = torch.from_numpy(ids.astype(np.int64))
        logits = model(tokens[None], use_cache=False).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        (losses[torch.from_numpy(is_learned[1:])].sum() / learned).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def test_gradients_are_those_of_transformers(tmp_path):
    """Guards every weight's gradient, sinks, routers and biases too, with a program that nobody here wrote."""
    folder = TinyModel(CONFIG, seed=21).write(tmp_path, "huggingface-bf16")
    of = trainings.conversations(seed=22)
    theirs = _torch_gradients(folder, of)
    trainer = trainings.trainer(folder)
    ours = trainer.gradients(trainer.init(), trainings.batch(of))
    recipes = bf16_recipes(parse_config(CONFIG))
    off = {}
    for path, gradient in ours.items():
        matrix, _, name = path.rpartition("/")
        is_expert = matrix.endswith(("gate_up", "down")) and name == "weight"
        expected = theirs.pop(recipes[f"{matrix}/blocks" if is_expert else path].tensor)
        expected = expected.swapaxes(1, 2) if is_expert else expected  # transformers has them [E, in, out]
        found = np.asarray(gradient).reshape(expected.shape)
        off[path] = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert theirs == {}, "weights that only transformers trains"
    assert {path: error for path, error in off.items() if not error <= TOLERANCE} == {}
