"""Adapters beside the PEFT library, run on the spot: it loads ours, we load its, and both merge to the same model."""

# pyright: reportMissingImports=false
# (these packages are installed by `make gates` alone)

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

import gptoss_jax
from converters import convert
from converters.random_checkpoint import write_checkpoint
from gptoss_jax.checkpoints import peft as ours
from gptoss_jax.checkpoints.export import open_export
from gptoss_jax.checkpoints.merging import Merger
from gptoss_jax.model import adapters
from gptoss_jax.model.config import parse_config
from tests.gate import assert_agrees
from tests.goldens import make as golden
from tests.lora import RANK, factors_of

torch = pytest.importorskip("torch", reason="the live comparison needs torch")
pytest.importorskip("transformers", reason="the live comparison needs transformers")
peft = pytest.importorskip("peft", reason="the live comparison needs peft")

pytestmark = [  # between two libraries that are not ours
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
CONFIG = parse_config(golden.two_layers_config())
ALPHA = 2.0 * RANK
TOKENS = golden.token_ids(150, seed=31)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A random model of two layers, as published."""
    folder = tmp_path_factory.mktemp("models") / "published"
    write_checkpoint(folder, golden.two_layers_config())
    return folder


def their_logits(model: Any) -> np.ndarray:
    """Logits of a torch model, which PEFT may wrap."""
    with torch.inference_mode():
        return model(torch.from_numpy(TOKENS)[None], use_cache=False).logits[0].float().numpy()


def our_logits(published: Path, adapter: Path | None = None) -> np.ndarray:
    """Ours, in float32."""
    return gptoss_jax.load(published, dtype="float32", adapter=adapter).logits(TOKENS.tolist())


def both(folder: Path, groups: Any) -> Path:
    """An adapter that we wrote."""
    ours.write(folder, CONFIG, factors_of(CONFIG, groups, scale=0.1), alpha=ALPHA)
    return folder


@pytest.mark.parametrize(
    "groups", [tuple(adapters.GROUPS), ["attention"], ["router"], ["experts"], ["unembedding"]], ids="+".join
)
def test_peft_loads_what_we_write(groups, published, tmp_path):
    """Guards names, axes, the experts' order and nesting, and the scale with PEFT itself: the same logits."""
    folder = both(tmp_path / "adapter", groups)
    base = golden.load_transformers(published, "float32")
    before = their_logits(base)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    theirs = their_logits(model)
    assert golden.divergence(theirs, before).mean() > 1e-3
    assert_agrees(our_logits(published, folder), theirs, max_abs=2e-3, max_kl=1e-6)


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_peft_loads_one_expert_parameter(name, published, tmp_path):
    """Guards the name of a wrapper in which no other is nested."""
    factors = {path: pair for path, pair in factors_of(CONFIG, ["experts"]).items() if path.endswith(name)}
    ours.write(tmp_path / "adapter", CONFIG, factors, alpha=ALPHA)
    model = peft.PeftModel.from_pretrained(golden.load_transformers(published, "float32"), tmp_path / "adapter").eval()
    assert_agrees(our_logits(published, tmp_path / "adapter"), their_logits(model), max_abs=2e-3, max_kl=1e-6)


def theirs(published: Path, folder: Path, **options: Any) -> np.ndarray:
    """Saves an adapter that PEFT made, and gives its model's logits."""
    base = golden.load_transformers(published, "float32")
    given = peft.LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, **options})
    model = peft.get_peft_model(base, given).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # numbers that bfloat16 holds, so that they are the same here
                drawn = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(drawn.bfloat16().float())
    model.save_pretrained(folder)
    return their_logits(model)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "o_proj", "lm_head"], "target_parameters": ["mlp.router.weight", *EXPERTS]},
        {"target_modules": ["k_proj", "v_proj"], "target_parameters": EXPERTS[::-1]},
        {
            "target_modules": "all-linear",
            "target_parameters": ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"],
        },
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["experts.down_proj"],
            "use_rslora": True,
            "r": 4,
            "lora_alpha": 4,
        },
    ],
    ids=["all", "reversed", "cookbook", "rslora"],
)
def test_we_load_what_peft_saves(options, published, tmp_path):
    """Guards adapters that others trained: PEFT's own file, by its own names, gives PEFT's own logits."""
    wanted = theirs(published, tmp_path / "adapter", **options)
    assert golden.divergence(wanted, our_logits(published)).mean() > 1e-3
    assert_agrees(our_logits(published, tmp_path / "adapter"), wanted, max_abs=5e-3, max_kl=1e-6)


def test_merged_as_peft_merges(published, tmp_path):
    """Guards every merged matrix: PEFT's merge_and_unload on the bfloat16 export of the base gives ours."""
    folder = both(tmp_path / "adapter", adapters.GROUPS)
    convert.run(convert.Options(published, tmp_path / "checkpoint"))
    export = open_export(tmp_path / "checkpoint", "bf16")
    export.run(tmp_path / "base")
    export.run(tmp_path / "merged", Merger(CONFIG, ours.read(folder, CONFIG), pack=False), "an adapter")
    model = peft.PeftModel.from_pretrained(golden.load_transformers(tmp_path / "base", "float32"), folder)
    found = {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}
    (file,) = (tmp_path / "merged").glob("*.safetensors")
    merged = safetensors.load_file(file)
    assert merged.keys() == found.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(tensor.astype(np.float32), found[name], rtol=2.0**-8, atol=1e-6, err_msg=name)
