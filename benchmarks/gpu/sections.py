"""One section of `benchmarks.gpu`, in the process that was started for it: from its name to its function."""

import tempfile
from datetime import date
from pathlib import Path

import jax
from absl import flags

from benchmarks import true_width
from benchmarks.gpu import launches, limits, models, ops, peer, smoke
from benchmarks.gpu.driver import gpu_state
from benchmarks.gpu.options import KINDS, OF_MODELS, config_path
from benchmarks.gpu.results import Results
from gptoss_jax.errors import GptossError
from gptoss_jax.model import layers
from gptoss_jax.model.config import ModelConfig, parse_config, read_config
from gptoss_jax.model.layers import Kernels
from gptoss_jax.runtime import device_memory
from pallas_kernels.choice import Hardware

SMOKE_LAYERS = 2


def run(options: flags.FlagValues) -> int:
    """Runs --section; gives the exit code.

    Raises:
        GptossError: no section has that name.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Results(Path(options.out or Path(folder) / "results.jsonl"), options.section)
        kind, _, rest = options.section.partition("/")
        if kind not in KINDS or (kind in (*OF_MODELS, "smoke")) != bool(rest):
            raise GptossError(f"--section {options.section}, expected limits, smoke/GROUP, ops/MODEL and the like")
        if kind == "transformers":  # in a process without JAX's memory
            return peer.run(results)
        before = gpu_state()
        kernels = _kernels(results, options)
        if kind == "limits":
            limits.measure(results, options)
        elif kind == "smoke":
            config = _smoke_config(options)
            smoke.run(results, config, kernels, sizes=options.smoke_sizes, group=rest, repeats=options.repeats)
        else:
            _of_model(results, options, kind, rest, kernels)
        results.add("state", {"before": before, "after": gpu_state()}, f"GPU before {before}, after {gpu_state()}")
        return 0 if results.is_good else 1


def _kernels(results: Results, options: flags.FlagValues) -> Kernels:
    """Those that --kernels names, and a line on what they run on."""
    hardware = Hardware.of(jax.devices()[0])
    kernels, line = layers.choose_kernels(options.kernels, hardware)
    entry = {"device": hardware.name, "jax": jax.__version__, "date": date.today().isoformat(), "kernels": line}
    memory = device_memory.described()
    results.add("machine", entry | {"memory": memory}, f"{memory or hardware.name}, jax {jax.__version__}\n{line}")
    return kernels


def _of_model(results: Results, options: flags.FlagValues, kind: str, rest: str, kernels: Kernels) -> None:
    """`rest` is the model's name, for launches with what is said of them behind it."""
    [model] = [name for name in options.models if rest in (name, f"{name}/launches")] or [rest]
    if kind == "profile":
        return launches.measure(results, options, model, kernels)
    measure = {"ops": ops.measure, "decode": models.measure_decode, "prefill": models.measure_prefill}[kind]
    return measure(results, options, read_config(config_path(model)), kernels)


def _smoke_config(options: flags.FlagValues) -> ModelConfig:
    """Few layers of the first of --models."""
    return parse_config(true_width.raw_config(SMOKE_LAYERS, config_path(options.models[0])))
