"""How much memory an export takes: that is what lets a 120b go out of a small machine."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from converters import convert
from converters.random_checkpoint import with_vocab_size, write_checkpoint
from gptoss_jax.checkpoints.orbax.manifest import Manifest

ROOT = Path(__file__).parents[2]
WIDE = with_vocab_size(json.loads((ROOT / "configs" / "tiny.json").read_text()), 100_000) | {
    "num_hidden_layers": 1,
    "layer_types": ["sliding_attention"],
    "hidden_size": 1024,
    "intermediate_size": 992,
    "num_local_experts": 24,
}
EXPORT = """
import sys
from pathlib import Path
from gptoss_jax.checkpoints.export import open_export
from tests.memory import peak_bytes

opened = open_export(Path(sys.argv[1]), sys.argv[2])
change = (lambda path, arrays: arrays) if sys.argv[4] == "changed" else None
before = peak_bytes()
opened.run(Path(sys.argv[3]), change)
opened.verify(Path(sys.argv[3]))
print(peak_bytes() - before, before, "jax" in sys.modules)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model whose largest leaves have 205 MB, and whose experts have 24 of 4 MB unpacked."""
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(folder / "published", WIDE)
    convert.run(convert.Options(folder / "published", folder / "checkpoint"))
    shutil.rmtree(folder / "published")
    return folder / "checkpoint"


@pytest.mark.parametrize(
    ("format", "change"), [("huggingface", "untouched"), ("bf16", "untouched"), ("openai", "changed")]
)
def test_memory_stays_within_one_leaf(format, change, checkpoint, tmp_path):
    """Guards against a leaf held twice, experts unpacked all at once, files that are mapped; and against JAX."""
    arguments = [sys.executable, "-c", EXPORT, checkpoint, format, tmp_path / "out", change]
    done = subprocess.run(list(map(str, arguments)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "out")
    added, before, jax = done.stdout.split()
    largest = max(record.size_bytes for record in Manifest.read(checkpoint).leaves.values())
    most = 1.1 * largest if change == "changed" else 48 << 20
    assert int(added) < most and int(before) < 128 << 20 and jax == "False", done.stdout
