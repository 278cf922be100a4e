"""Loading: leaves go one by one through a list of transforms; names of number formats are known without JAX."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.checkpoints.orbax import reader
from gptoss_jax.checkpoints.orbax.manifest import CheckpointError
from gptoss_jax.checkpoints.orbax.writer import save
from gptoss_jax.checkpoints.safetensors_reader import SourceError
from gptoss_jax.errors import GptossError
from gptoss_jax.model import sharding, transformer
from gptoss_jax.model.config import ConfigError, parse_config
from gptoss_jax.model.sharding import MeshError
from gptoss_jax.runtime import number_formats, weight_transforms
from tests.gate import TinyModel
from tests.goldens.make import tiny_config


def _published(folder: Path, name: str, **changed: Any) -> Path:
    """A published checkpoint whose config.json says something else than its files, or that lacks them."""
    path = TinyModel(tiny_config()).write(folder / name)
    (path / "config.json").write_text(json.dumps(tiny_config() | changed))
    return path


def test_load_raises_what_it_says(tmp_path):
    """Guards `except` clauses: each kind of fault by its own name, and all of them by GptossError."""
    good = _published(tmp_path, "good")
    converted = save(tmp_path / "converted", {}, parse_config(tiny_config()))
    faults: list[tuple[type[Exception], Path, dict[str, Any]]] = [
        (SourceError, tmp_path / "absent", {}),
        (SourceError, _published(tmp_path, "other", hidden_size=128), {}),
        (ConfigError, _published(tmp_path, "llama", model_type="llama"), {}),
        (CheckpointError, converted, {}),
        (MeshError, good, {"mesh": "expert=2"}),
        (MeshError, good, {"mesh": "tensor=100"}),
        (GptossError, good, {"dtype": "float16"}),
        (GptossError, good, {"dense": "int4"}),
        (GptossError, good, {"kernels": "attention=none"}),
    ]
    for kind, path, options in faults:
        with pytest.raises(GptossError) as raised:
            gptoss_jax.load(path, **options)
        assert isinstance(raised.value, kind), (path, options)
        assert kind is GptossError or kind.__name__ in str(gptoss_jax.load.__doc__)


def test_names_known_without_jax_are_those_of_the_model():
    """Guards --dtype, whose values are listed before JAX is imported."""
    assert number_formats.ACTIVATIONS == tuple(transformer.DTYPE_POLICIES)


def test_each_leaf_is_finished_before_the_next_is_read():
    """Guards the memory of loading: a leaf in two formats, or two leaves, at a time."""
    happened = []

    def read():
        for name in "ab":
            happened.append(f"read {name}")
            yield name, np.zeros(1)

    def first(path, array):
        happened.append(f"first {path}")
        return array + 1

    def second(path, array):
        happened.append(f"second {path}")
        return array * 10

    leaves = dict(weight_transforms.apply([first, second], read()))
    assert happened == [f"{what} {path}" for path in "ab" for what in ("read", "first", "second")]
    assert {path: array.tolist() for path, array in leaves.items()} == {"a": [10.0], "b": [10.0]}


def test_reading_runs_a_few_leaves_ahead_and_no_more(tmp_path, addresses_given):
    """Guards the memory of loading where transforms are slower than the disk: bfloat16 piles up beside int8."""
    leaves = {f"leaf{i}": transformer.Leaf((3,), np.dtype(np.float32), (None,)) for i in range(20)}
    arrays = {name: np.full(3, i, np.float32) for i, name in enumerate(leaves)}
    path = save(tmp_path / "checkpoint", arrays, parse_config(tiny_config()))
    taken = 0
    for name, array in reader.read(path, leaves, sharding.make()):
        taken += 1
        assert array.tolist() == arrays[name].tolist()
        assert len(addresses_given) <= taken + reader.READERS
    assert taken == 20


@pytest.mark.parametrize("name", number_formats.DENSE_ITEMSIZE)
def test_dense_formats_touch_dense_weights_only(name):
    """Guards experts, norms and the embedding, which keep their published bytes in every format."""
    laid = sharding.make()
    model = transformer.declare(parse_config(tiny_config()), laid)
    convert = weight_transforms.to_dense_format(model, name)
    changed = {
        path
        for path, leaf in model.leaves.items()
        if (array := jnp.zeros(leaf.shape, leaf.dtype)) is not convert(path, array)
    }
    dense = {path for path in model.leaves if path == "unembedding" or ("/attention/" in path and "weight" in path)}
    assert changed == (dense if name == "int8" else set())
