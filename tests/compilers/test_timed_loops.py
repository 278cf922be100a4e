"""The loops that `benchmarks.gpu` times, compiled for an H200: what is timed is the kernel, and not the host."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import ahead_of_time, launches

MISSING = ahead_of_time.missing("gpu")
CODE = "from tests.compilers import test_timed_loops as test; test.compile_loops()"


def compile_loops() -> None:
    """Prints, for one token of the 20b's experts, each kernel's loop and what is beside it; in its own process."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from benchmarks import true_width
    from benchmarks.gpu import kernels_alone, weights
    from gptoss_jax.model import sharding
    from gptoss_jax.model.config import read_config
    from pallas_kernels.expert_mlp import IMPLEMENTATIONS

    config, kernel = read_config(true_width.CONFIG), IMPLEMENTATIONS["gpu"]
    laid_out = sharding.make(None, ahead_of_time.devices(ahead_of_time.TARGETS["H200"]))

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=laid_out.named((None,) * len(shape)))

    def run(ids, fixed):
        return kernel.run(fixed[0], ids, fixed[1], fixed[2], limit=7.0)

    packed = jax.eval_shape(lambda: weights.random_experts(config, kernel.layout))
    fixed = array(jnp.bfloat16, 1, config.hidden_size), array(jnp.float32, 1, 4), packed
    for found in kernels_alone.find_shapes(run, [array(jnp.int32, 1, 4)] * 8, fixed):
        others = jax.tree.map(lambda x: array(x.dtype, *x.shape), (found.varying, found.fixed))
        loops = {}
        for name, step in (("whole", kernels_alone.step(found)), ("beside", kernels_alone.beside(found))):

            def repeat(carry, others, step=step):
                return lax.fori_loop(0, 100, lambda i, carry: step(i, carry, others), carry)

            lowered = ahead_of_time.lower(repeat, laid_out, array(jnp.float32), others)
            with tempfile.TemporaryDirectory() as folder:
                options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
                text = lowered.compile(compiler_options=options).as_text()
                found_launches = launches.of_folder(Path(folder), text).launches
            loops[name] = [text.count('"known_trip_count"'), len(found_launches)]
        print(json.dumps(loops | {"calls": found.turns}))


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_kernels_alone_are_what_a_loop_has_more_than_what_is_beside_it():
    """Guards times: a loop of unknown length asks the host each turn; one beside that does less is too little."""
    environment = os.environ | ahead_of_time.ENVIRONMENT
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert kernels
    for loops in kernels:
        (trips, whole), (trips_beside, beside) = loops["whole"], loops["beside"]
        assert trips == trips_beside == 1, loops
        assert whole == beside + loops["calls"], loops
