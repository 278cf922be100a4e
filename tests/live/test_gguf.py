"""The GGUF files that llama.cpp is timed with, read back by the gguf package; `make gates` installs it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import true_width, write_gguf
from converters.random_checkpoint import with_vocab_size, write_checkpoint
from converters.random_model import random_tensors
from tests.unit.test_write_gguf import dequantized

gguf = pytest.importorskip("gguf", reason="reading and writing GGUF needs the gguf package")


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    """config.json of two layers of the tiny model with a small vocabulary."""
    return with_vocab_size(true_width.raw_config(2, Path("configs/tiny.json")), 512)


@pytest.mark.parametrize("dense", write_gguf.DENSE)
def test_file_holds_the_model(dense, raw, tmp_path):
    """A leaf under another's name, gate and up swapped, a matrix transposed: read back by the gguf package itself."""
    tensors = random_tensors(raw, true_width.SEED)
    path = tmp_path / "model.gguf"
    assert write_gguf.write(path, write_gguf.random_leaves(raw), dense) == path.stat().st_size
    reader = gguf.GGUFReader(path)
    got = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    layer = "model.layers.1"

    def same(name: str, expected: np.ndarray, tolerance: float = 0.0) -> None:
        found = got.pop(name)
        assert found.shape == expected.shape, name
        np.testing.assert_allclose(found, expected.astype(np.float32), rtol=0, atol=tolerance * np.abs(expected).max())

    rounding = 0.0 if dense == "bf16" else 0.005
    same("token_embd.weight", tensors["model.embed_tokens.weight"].astype(np.float32), rounding)
    for ours, theirs in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v"), ("o_proj", "attn_output")):
        same(f"blk.1.{theirs}.weight", tensors[f"{layer}.self_attn.{ours}.weight"].astype(np.float32), rounding)
        same(f"blk.1.{theirs}.bias", tensors[f"{layer}.self_attn.{ours}.bias"])
    same("blk.1.attn_sinks.weight", tensors[f"{layer}.self_attn.sinks"])
    same("blk.1.ffn_gate_inp.weight", tensors[f"{layer}.mlp.router.weight"])
    experts = f"{layer}.mlp.experts"
    for name, part, rows in (
        ("ffn_gate_exps", "gate_up_proj", np.s_[:, ::2]),
        ("ffn_up_exps", "gate_up_proj", np.s_[:, 1::2]),
        ("ffn_down_exps", "down_proj", np.s_[:]),
    ):
        blocks, scales = (tensors[f"{experts}.{part}_{half}"] for half in ("blocks", "scales"))
        same(f"blk.1.{name}.weight", dequantized(blocks, scales)[rows])
        same(f"blk.1.{name}.bias", tensors[f"{experts}.{part}_bias"][rows])
    norms = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
    for theirs, ours in norms.items():
        same(f"blk.1.{theirs}.weight", tensors[f"{layer}.{ours}.weight"])
    assert {name.replace("blk.0.", "") for name in got if "blk.1." not in name} >= {"output.weight", "attn_q.bias"}


def test_published_and_random_weights_give_the_same_file(raw, tmp_path):
    """--checkpoint and --layers that would give llama.cpp another model than ours."""
    write_checkpoint(tmp_path / "published", raw, seed=true_width.SEED)
    files = [tmp_path / name for name in ("published.gguf", "random.gguf")]
    write_gguf.write(files[0], write_gguf.published(tmp_path / "published"), "bf16")
    write_gguf.write(files[1], write_gguf.random_leaves(raw), "bf16")
    assert files[0].read_bytes() == files[1].read_bytes()
