"""The export command with an adapter: merged where it survives, refused where it does not, or kept beside."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

import gptoss_jax
from converters import convert
from converters.random_checkpoint import write_checkpoint
from gptoss_jax.checkpoints import peft
from gptoss_jax.checkpoints.orbax.manifest import read_config
from gptoss_jax.model.config import ModelConfig
from tests import processes
from tests.goldens import make as golden
from tests.lora import RANK, factors_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijk"
TOKENS = [token for letter in LETTERS for token in (ord(letter) - ord("A") + 32, 198)][:-1]
"""What o200k has for the letters, a line each: ids that a vocabulary of 512 has too."""


@dataclasses.dataclass(frozen=True)
class Models:
    """A base, adapters of it, and a text that it can read."""

    folder: Path
    config: ModelConfig

    @property
    def base(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    def adapter(self, name: str, **options: Any) -> Path:
        """The folder of one, written when it is first asked for."""
        path = self.folder / name
        if not path.exists():
            peft.write(path, self.config, factors_of(self.config, **options), alpha=float(RANK))
        return path

    @property
    def strong(self) -> Path:
        """One of all matrices, that rounding cannot hurt much."""
        return self.adapter("strong", scale=0.05)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    """A model of two layers, converted."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "published", golden.two_layers_config())
    convert.run(convert.Options(folder / "published", folder / "checkpoint"))
    (folder / "text.txt").write_text("\n".join(LETTERS) + "\n")
    return Models(folder, read_config(folder / "checkpoint"))


def export(*arguments: object) -> processes.Done:
    """The command, in a process of its own."""
    return processes.run("converters.export", *arguments)


def refusal(*arguments: object) -> str:
    """The only line on stderr, beside progress, of a command that must end with exit code 2."""
    done = export(*arguments)
    assert done.returncode == 2, done
    lines = [line for line in done.stderr.splitlines() if not line.startswith("measuring: ")]
    assert len(lines) == 1 and lines[0].startswith("export: "), lines
    return lines[0].removeprefix("export: ")


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a published folder."""
    return {name: array for path in folder.glob("*.safetensors") for name, array in safetensors.load_file(path).items()}


def test_a_merged_model_answers_as_the_adapter_does(models, tmp_path):
    """Guards the whole way: what is loaded from DST is as far from the adapter's model, and the base, as was said."""
    done = export(models.base, tmp_path / "out", "--adapter", models.strong, "--text", models.text)
    assert done.returncode == 0, done.stderr
    loaded = {
        "base": gptoss_jax.load(models.base, dtype="float32"),
        "adapter": gptoss_jax.load(models.base, dtype="float32", adapter=models.strong),
        "merged": gptoss_jax.load(tmp_path / "out", dtype="float32"),
    }
    logits = {name: model.logits(TOKENS) for name, model in loaded.items()}
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["exported"] == "merged, MXFP4" and report["tokens"] == len(TOKENS)
    for name, said in (("base", "base"), ("merged", "merged, MXFP4")):
        found = report["divergences"][said]
        for which in ("adapter", "base"):
            kl = golden.divergence(logits[which], logits[name]).mean()
            assert found[f"from_{which}"] == pytest.approx(kl, rel=1e-3, abs=1e-9)
        same = (logits["adapter"].argmax(-1) == logits[name].argmax(-1)).mean()
        assert found["agrees"] == pytest.approx(same, abs=1e-9)
    before, rounded = (report["divergences"][name] for name in ("merged, bfloat16", "merged, MXFP4"))
    assert before["from_adapter"] < 0.02 * rounded["from_adapter"] and not report["nearer_the_base"]
    assert len(report["matrices"]) == 15 and all(0.8 < found["kept"] < 1.1 for found in report["matrices"].values())
    assert re.search(r"^layers/1/moe/down +[\d.]+ +[\d.]+% +[\d.]+ +[\d.]+% +[\d.]+% +[\d.]+%$", done.stdout, re.M)
    assert re.search(r"^layers/1/attention/q +[\d.]+ +[\d.]+% +[\d.]+ +[\d.]+% +- +-$", done.stdout, re.M)


def test_what_rounding_takes_is_refused(models, tmp_path):
    """Guards against an export that is the base under another name: nothing is written, unless it is asked for."""
    weak = models.adapter("weak", groups=["experts"], scale=3e-5)
    arguments = (models.base, tmp_path / "out", "--adapter", weak, "--text", models.text)
    line = refusal(*arguments)
    assert re.match(
        r"merged, the model is nearer to the base than to the adapter's: KL\(adapter \|\| merged\) [\d.e-]+, "
        r"KL\(base \|\| merged\) [\d.e-]+ nats a token; \d of 4 matrices lost more than 50% of their delta",
        line,
    )
    assert line.endswith("or take --keep-scales, --format bf16 or --keep-adapter; --accept-loss writes it all the same")
    assert list(tmp_path.iterdir()) == []
    done = export(*arguments, "--accept-loss")
    assert done.returncode == 0, done.stderr
    assert "note: the merged model is nearer to the base than to the adapter's: accepted, as asked\n" in done.stdout
    assert "  lost in rounding\n" in done.stdout
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["nearer_the_base"] and report["loss_accepted"]


def test_bfloat16_keeps_what_mxfp4_would_lose(models, tmp_path):
    """Guards --format bf16: experts are the sums in bfloat16, and the very adapter that MXFP4 swallows is there."""
    weak = models.adapter("fine", groups=["experts"], scale=3e-3)
    done = export(models.base, tmp_path / "out", "--adapter", weak, "--text", models.text, "--format", "bf16")
    assert done.returncode == 0, done.stderr
    assert "note: merged experts are no MXFP4 numbers: transformers runs them, here converters.convert" in done.stdout
    assert export(models.base, tmp_path / "base", "--format", "bf16").returncode == 0
    base, merged = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    changed = {name for name in base if base[name].tobytes() != merged[name].tobytes()}
    assert changed == {f"model.layers.{i}.mlp.experts.{name}_proj" for i in (0, 1) for name in ("gate_up", "down")}
    for path, (a, b) in factors_of(models.config, ["experts"], scale=3e-3).items():
        _, layer, _, matrix = path.split("/")
        name = f"model.layers.{layer}.mlp.experts.{matrix}_proj"
        wanted = base[name].astype(np.float32) + np.einsum("eri,eor->eio", a, b)
        assert merged[name].dtype == ml_dtypes.bfloat16
        off = np.abs(merged[name].astype(np.float32) - wanted)
        assert (off <= 2.0**-8 * np.abs(wanted) + 1e-9).all()


def test_an_adapter_that_is_kept(models, tmp_path):
    """Guards --keep-adapter: the base byte for byte, and beside it a folder that loads as the adapter that it is."""
    done = export(models.base, tmp_path / "out", "--adapter", models.strong, "--keep-adapter", "--verify")
    assert done.returncode == 0, done.stderr
    assert "verified: all 1 safetensors files equal the source's by sha256" in done.stdout

    def digests(folder: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}

    assert digests(tmp_path / "out") == digests(models.folder / "published")
    assert digests(tmp_path / "out" / "adapter") == digests(models.strong)
    kept = gptoss_jax.load(tmp_path / "out", dtype="float32", adapter=tmp_path / "out" / "adapter")
    first = gptoss_jax.load(models.base, dtype="float32", adapter=models.strong)
    assert np.array_equal(kept.logits(TOKENS[:20]), first.logits(TOKENS[:20]))


def test_dry_run_measures_and_writes_nothing(models, tmp_path):
    """Guards a plan that leaves something, or does not say what merging would cost."""
    arguments = ("--adapter", models.strong, "--text", models.text, "--dry-run", "--format", "openai")
    done = export(models.base, tmp_path / "out", *arguments)
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []
    assert re.search(r"^merged, MXFP4 +[\d.e-]+ +[\d.e-]+ +[\d.]+%$", done.stdout, re.M)
    assert "merge_report.json" in done.stdout


def test_mistakes_are_one_line(models, tmp_path):
    """Guards flags that mean nothing together, and texts and folders that are of no use, before anything is written."""
    out, adapter = tmp_path / "out", models.strong
    assert refusal(models.base, out, "--keep-adapter").startswith("--keep-adapter without --adapter: ")
    assert refusal(models.base, out, "--text", models.text).startswith("--text without --adapter: ")
    assert refusal(models.base, out, "--accept-loss").startswith("--accept-loss without --adapter: ")
    line = refusal(models.base, out, "--adapter", adapter, "--keep-adapter", "--accept-loss")
    assert line.startswith("--keep-adapter merges nothing: ")
    assert refusal(models.base, out, "--adapter", adapter, "--verify").startswith("--verify compares with the source")
    line = refusal(models.base, out, "--adapter", tmp_path / "none")
    assert line.startswith(f"{tmp_path / 'none'}/adapter_config.json: ")
    line = refusal(models.base, out, "--adapter", adapter)
    assert re.match(r"the text to measure on: has token id \d+, but the model knows 512: give a --text", line)
    line = refusal(models.base, out, "--adapter", adapter, "--text", tmp_path / "none.txt")
    assert line.startswith(f"{tmp_path / 'none.txt'}: No such file")
    assert list(tmp_path.iterdir()) == []
