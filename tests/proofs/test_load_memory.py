"""What loading weights takes of the host's memory, in a process of its own."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoints.orbax.manifest import Manifest
from gptoss_jax.checkpoints.orbax.writer import save
from gptoss_jax.model import sharding, transformer
from tests.memory import peak_bytes
from tests.unit.test_checkpoint import CONFIG, ROOT, restore


def test_loading_takes_the_memory_of_the_weights_and_no_more(tmp_path):
    """Guards against a second copy of a leaf, on its way or left over; whole huge pages for leaves' small ends."""
    arrays = {f"a/{i}": np.full((1 << 20, 16 + i), i, np.uint8) for i in range(8)}
    save(tmp_path / "large", arrays, CONFIG)
    code = "import sys; from tests.proofs.test_load_memory import peak_of_restoring as p; print(*p(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    added, weights = map(int, done.stdout.split())
    assert weights == sum(array.nbytes for array in arrays.values())
    assert weights < added < weights + (8 << 20)


def peak_of_restoring(path: str) -> tuple[int, int]:
    """How far restoring a whole checkpoint raises the peak of this process's memory, and the bytes of its weights."""
    records = Manifest.read(path).leaves.values()
    leaves = {r.path: transformer.Leaf(r.shape, jnp.dtype(r.dtype), (None,) * len(r.shape)) for r in records}
    laid = sharding.make()
    jax.device_put(np.zeros(1), laid.named((None,)))  # JAX's own start
    before = peak_bytes()
    restored = restore(path, leaves, laid)
    return peak_bytes() - before, sum(array.nbytes for array in restored.values())
