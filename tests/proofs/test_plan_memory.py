"""A plan's memory beside what a process with eight real CPU devices takes, at its peak."""

import json
import os
import subprocess
import sys

import pytest

import gptoss_jax
from converters.random_checkpoint import with_vocab_size
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.model import mesh
from gptoss_jax.model.config import read_config
from gptoss_jax.planner import memory
from gptoss_jax.planner.chips import CHIPS
from gptoss_jax.planner.memory import Workload
from tests.gate import TinyModel
from tests.goldens.make import ROOT
from tests.memory import peak_bytes

MESH = "data=2,tensor=2,sequence=2"
LONG, SHORT = (Workload(slots=16, context_tokens=tokens, prefill_tokens=64) for tokens in (131_072, 256))
WITHIN = 0.1
CHILD = "import sys; from tests.proofs.test_plan_memory import print_added as p; p(sys.argv[1])"


def test_a_process_takes_what_was_planned(tmp_path):
    """Guards the plan against a real run: what an engine holds and makes, on all of its devices, is what was said."""
    config = with_vocab_size(json.loads((ROOT / "configs" / "small.json").read_text()), 512)
    folder = TinyModel(config).write(tmp_path)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", CHILD, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = memory.memory(read_config(folder / "config.json"), mesh.read(MESH), CHIPS["cpu"], LONG).total
    assert int(done.stdout.split()[-1]) == pytest.approx(8 * said, rel=WITHIN)


def print_added(folder: str) -> None:
    """How far LONG and an answer raise the peak of a process in which SHORT has run, so that it has started."""
    kept, peaks = [], []
    for workload in (SHORT, LONG):
        sizes = EngineConfig(
            slots=workload.slots,
            max_context_tokens=workload.context_tokens,
            prefill_widths=(workload.prefill_tokens,),
            deterministic=False,
        )
        engine = gptoss_jax.load(folder, mesh=MESH).engine(sizes)
        engine.submit(Request(tuple(range(100)), (), 4, SamplingParams(temperature=0.0)))
        kept += [engine, *engine.run()]
        peaks.append(peak_bytes())
    print(peaks[1] - peaks[0], flush=True)
