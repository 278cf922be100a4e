"""Folders of adapters as PEFT keeps them: written and read again, by PEFT's names; one line for what is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from gptoss_jax.checkpoints import peft
from gptoss_jax.checkpoints.peft import AdapterError
from gptoss_jax.errors import GptossError
from gptoss_jax.model import adapters
from gptoss_jax.model.adapters import LowRank
from gptoss_jax.model.config import parse_config
from tests.goldens import make as golden
from tests.lora import RANK, factors_of

CONFIG = parse_config(golden.two_layers_config())
LAYER = "base_model.model.model.layers.1"


def written(folder: Path, groups: Any = tuple(adapters.GROUPS), alpha: float = 12.0) -> dict[str, LowRank]:
    """Writes a folder, and gives what it should be read as: the scale in b."""
    factors = factors_of(CONFIG, groups)
    peft.write(folder, CONFIG, factors, alpha=alpha, base="openai/gpt-oss-20b")
    return {path: LowRank(a, b * np.float32(alpha / RANK)) for path, (a, b) in factors.items()}


def assert_same(found: dict[str, LowRank], wanted: dict[str, LowRank]) -> None:
    """The same matrices with the same numbers."""
    assert found.keys() == wanted.keys()
    for path, pair in wanted.items():
        assert all(np.array_equal(x, y) and x.dtype == np.float32 for x, y in zip(found[path], pair, strict=True)), path


@pytest.mark.parametrize("groups", [tuple(adapters.GROUPS), *([group] for group in adapters.GROUPS)], ids=str)
def test_what_is_written_is_read(groups, tmp_path):
    """Guards every matrix's axes, the order of experts in a factor, and the scale, there and back."""
    wanted = written(tmp_path / "a", groups)
    assert_same(peft.read(tmp_path / "a", CONFIG), wanted)


def test_names_and_shapes_are_those_of_peft(tmp_path):
    """Guards the names by which PEFT finds its tensors: a folder that it loads without a word and leaves at zero."""
    written(tmp_path / "a")
    tensors = safetensors.load_file(tmp_path / "a" / "adapter_model.safetensors")
    shapes = {name.removeprefix(f"{LAYER}."): array.shape for name, array in tensors.items() if LAYER in name}
    rank, experts = RANK, CONFIG.num_experts
    hidden, inner, queries, keys = CONFIG.hidden_size, CONFIG.intermediate_size, 6 * 64, 2 * 64
    assert shapes == {
        "self_attn.q_proj.lora_A.weight": (rank, hidden),
        "self_attn.q_proj.lora_B.weight": (queries, rank),
        "self_attn.k_proj.lora_A.weight": (rank, hidden),
        "self_attn.k_proj.lora_B.weight": (keys, rank),
        "self_attn.v_proj.lora_A.weight": (rank, hidden),
        "self_attn.v_proj.lora_B.weight": (keys, rank),
        "self_attn.o_proj.lora_A.weight": (rank, queries),
        "self_attn.o_proj.lora_B.weight": (hidden, rank),
        "mlp.router.lora_A.weight": (rank, hidden),
        "mlp.router.lora_B.weight": (experts, rank),
        "mlp.experts.base_layer.lora_A.weight": (experts * rank, hidden),
        "mlp.experts.base_layer.lora_B.weight": (2 * inner, experts * rank),
        "mlp.experts.lora_A.weight": (experts * rank, inner),
        "mlp.experts.lora_B.weight": (hidden, experts * rank),
    }
    others = {name: array.shape for name, array in tensors.items() if ".layers." not in name}
    assert others == {
        "base_model.model.lm_head.lora_A.weight": (rank, hidden),
        "base_model.model.lm_head.lora_B.weight": (CONFIG.vocab_size, rank),
    }
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", rank, 12.0)
    assert said["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
    experts_at = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert said["target_parameters"] == ["mlp.router.weight", *experts_at]
    assert said["base_model_name_or_path"] == "openai/gpt-oss-20b"


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_only_one_of_the_experts_parameters(name, tmp_path):
    """Guards the name that a single wrapper has: nothing is nested in it, and gate_up is not taken for down."""
    factors = {path: pair for path, pair in factors_of(CONFIG, ["experts"]).items() if path.endswith(name)}
    peft.write(tmp_path / "a", CONFIG, factors, alpha=float(RANK))
    tensors = safetensors.load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(".mlp.experts.lora_" in tensor for tensor in tensors), list(tensors)
    assert_same(peft.read(tmp_path / "a", CONFIG), factors)


@pytest.mark.parametrize("prefix", ["mlp.", "", "model.layers.{}.mlp.", "{}.mlp."])
def test_experts_named_as_others_do(prefix, tmp_path):
    """Guards against the wrong matrix: PEFT takes ends of names in any order, and nests as the module has them."""
    wanted = written(tmp_path / "a", ["experts"])
    names = [f"{prefix.format(i)}experts.{name}" for i in (0, 1) for name in ("down_proj", "gate_up_proj")]
    change_config(tmp_path / "a", target_parameters=names)
    assert_same(peft.read(tmp_path / "a", CONFIG), wanted)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_other_number_formats_are_read(dtype, tmp_path):
    """Guards adapters that others saved in half precision."""
    wanted = written(tmp_path / "a", ["attention"], alpha=float(RANK))
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {name: array.astype(dtype) for name, array in safetensors.load_file(path).items()}
    safetensors.save_file(tensors, path)
    rounded = {p: LowRank(*(x.astype(dtype).astype(np.float32) for x in pair)) for p, pair in wanted.items()}
    assert_same(peft.read(tmp_path / "a", CONFIG), rounded)


def test_the_copy_of_the_unembedding_is_left_alone(tmp_path):
    """Guards adapters of lm_head, beside which PEFT saves the base's table; one of another size is refused."""
    wanted = written(tmp_path / "a", ["unembedding"])
    name, table = "base_model.model.lm_head.base_layer.weight", np.ones((CONFIG.vocab_size, CONFIG.hidden_size))
    change_tensors(tmp_path / "a", lambda tensors: tensors.update({name: table}))
    assert_same(peft.read(tmp_path / "a", CONFIG), wanted)
    change_tensors(tmp_path / "a", lambda tensors: tensors.update({name: table[:-1].astype(np.float32)}))
    with pytest.raises(AdapterError, match="expected names that end with lora_A"):
        peft.read(tmp_path / "a", CONFIG)


def test_rank_stabilised_scale(tmp_path):
    """Guards rsLoRA's scale, alpha / sqrt(r), against being read as LoRA's."""
    factors = factors_of(CONFIG, ["router"])
    peft.write(tmp_path / "a", CONFIG, factors, alpha=6.0)
    change_config(tmp_path / "a", use_rslora=True)
    found = peft.read(tmp_path / "a", CONFIG)
    for path, (_, b) in factors.items():
        np.testing.assert_allclose(found[path].b, b * (6.0 / np.sqrt(RANK)), rtol=1e-6)


# ---- what is no adapter ----


def change_config(folder: Path, **keys: Any) -> None:
    """Sets keys of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Changes the tensors in place."""
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    change(tensors)
    safetensors.save_file(tensors, path)


def cut(folder: Path) -> None:
    """Ends the weights in the middle."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


Q = f"{LAYER}.self_attn.q_proj.lora"
SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "adapter_config.json"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "expected the folder of a PEFT adapter"),
    "no object": (lambda f: (f / "adapter_config.json").write_text("[1]"), "expected an object of keys"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "other type": (lambda f: change_config(f, peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"),
    "dora": (lambda f: change_config(f, use_dora=True), "use_dora is True, which is not supported"),
    "ranks": (lambda f: change_config(f, rank_pattern={"q_proj": 4}), "rank_pattern is {'q_proj': 4}, which is not"),
    "alphas": (lambda f: change_config(f, alpha_pattern={"q_proj": 4}), "alpha_pattern is {'q_proj': 4}, which is"),
    "modules": (lambda f: change_config(f, modules_to_save=["embed_tokens"]), "modules_to_save is ['embed_tokens']"),
    "biases": (lambda f: change_config(f, bias="all"), "bias is 'all', expected 'none'"),
    "no rank": (lambda f: change_config(f, r="16"), "r is '16' and lora_alpha 12.0, expected two numbers"),
    "rank 0": (lambda f: change_config(f, r=0), "r is 0 and lora_alpha 12.0, expected two numbers"),
    "other rank": (lambda f: change_config(f, r=5), "(512, 5) of rank 5; is it another"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: "),
    "truncated": (cut, "copy the adapter again"),
    "no safetensors": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"PK\3\4"), "copy the adapter again"),
    "empty": (lambda f: change_tensors(f, dict.clear), "no tensors, expected lora_A and lora_B"),
    "no factor": (lambda f: change_tensors(f, lambda t: t.pop(f"{Q}_B.weight")), "q: lora_B is missing; copy the"),
    "other name": (
        lambda f: change_tensors(f, lambda t: t.update({f"{LAYER}.mlp.gate.lora_A.weight": t.pop(f"{Q}_A.weight")})),
        "this model has no such module, expected one of self_attn.q_proj",
    ),
    "magnitude": (
        lambda f: change_tensors(f, lambda t: t.update({f"{Q}_magnitude_vector": np.ones(3, np.float32)})),
        "expected names that end with lora_A.weight or lora_B.weight",
    ),
    "more layers": (
        lambda f: change_tensors(
            f, lambda t: [t.update({name.replace("layers.1", "layers.7"): t.pop(name)}) for name in list(t)]
        ),
        "this model has no such layer; is it another model's adapter?",
    ),
    "shape": (
        lambda f: change_tensors(f, lambda t: t.update({f"{Q}_A.weight": np.ones((RANK, 32), np.float32)})),
        "q: factors of shapes (3, 32) and (384, 3), expected (3, 96) and (384, 3) of rank 3",
    ),
    "integers": (
        lambda f: change_tensors(f, lambda t: t.update({f"{Q}_A.weight": np.ones((RANK, 96), np.int32)})),
        "is I32, expected one of F32, BF16, F16",
    ),
    "NaN": (lambda f: change_tensors(f, lambda t: t[f"{Q}_A.weight"].fill(np.nan)), "q: holds NaN or infinity"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_bad_folders_are_one_line(kind, tmp_path):
    """Guards every way in which a folder is no adapter of this model against a traceback, or silence."""
    written(tmp_path / "a")
    spoil, message = SPOILED[kind]
    spoil(tmp_path / "a")
    with pytest.raises(AdapterError) as caught:
        peft.read(tmp_path / "a", CONFIG)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "a"))


def test_bad_factors_are_not_written(tmp_path):
    """Guards the writer: adapters of no matrix, of another shape, of several ranks, or over what is there already."""
    factors = factors_of(CONFIG, ["router"])
    wide = {path: LowRank(a[:, :32], b) for path, (a, b) in factors.items()}
    first, second = factors
    ranks = factors | {second: factors_of(CONFIG, ["router"], rank=2)[second]}
    for wrong in (wide, {"layers/9/moe/router": factors[first]}, {}, ranks):
        with pytest.raises(GptossError) as caught:
            peft.write(tmp_path / "a", CONFIG, wrong, alpha=1.0)
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    peft.write(tmp_path / "a", CONFIG, factors, alpha=1.0)
    with pytest.raises(GptossError, match="exists; remove it or name another folder"):
        peft.write(tmp_path / "a", CONFIG, factors, alpha=1.0)
