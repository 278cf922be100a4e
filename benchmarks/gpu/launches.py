"""The launches of a decoding step, by name and duration, as the profiler saw them on the device."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import true_width, under_load
from benchmarks.gpu.models import Whole
from benchmarks.gpu.options import config_path
from benchmarks.gpu.results import Results
from gptoss_jax.model.config import parse_config
from gptoss_jax.model.layers import Kernels

LAYERS = 4  # of the true width, so that there are few launches to look at
CONTEXT_TOKENS, STEPS, DISPATCHES = 1024, 8, 3
SHOWN = 40  # lines of the table


class Launch(NamedTuple):
    """All launches of one name."""

    name: str
    times: int
    median_seconds: float
    total_seconds: float


def measure(results: Results, options: flags.FlagValues, model: str, kernels: Kernels) -> None:
    """The section: a few dispatches under the profiler, whose file is kept beside --out."""
    raw = true_width.raw_config(LAYERS, config_path(model))
    config = parse_config(raw)
    whole = Whole.of(config, kernels)
    context = min(CONTEXT_TOKENS, config.max_context_tokens - STEPS)
    load = under_load.start(config, [under_load.GREEDY], context, STEPS)
    program = under_load.decode_program(under_load.forms(whole.step))
    compiled = program.lower(whole.shapes(), *load, jnp.int32(1)).compile()
    params = whole.params()
    with tempfile.TemporaryDirectory() as folder:
        for traced in (False, True):
            if traced:
                jax.profiler.start_trace(folder, profiler_options=_options())
            began = time.perf_counter()
            for _ in range(DISPATCHES):
                load = load.with_length(context)
                _, cache, state = compiled(params, *load, jnp.int32(STEPS))
                load = jax.block_until_ready(load._replace(cache=cache, state=state))
            seconds = (time.perf_counter() - began) / (DISPATCHES * STEPS)
        jax.profiler.stop_trace()
        [path] = Path(folder).rglob("*.xplane.pb")
        if options.out:  # the profiler's own viewers read it
            out = Path(options.out)
            shutil.copy(path, out.with_name(f"{out.stem}-{results.section.replace('/', '-')}.xplane.pb"))
        found = launches(jax.profiler.ProfileData.from_file(str(path)).planes)
    if not found:
        results.leave_out("launches by name", "the profiler saw none on a device")
        return
    _report(results, found, seconds)


def _options() -> Any:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 1
    return options


def launches(planes: Iterable[Any]) -> list[Launch]:
    """What ran on GPUs, of the planes of a profile, the most expensive first."""
    durations: dict[str, list[float]] = {}
    for name, seconds in _events(planes):
        durations.setdefault(name, []).append(seconds)
    found = (Launch(name, len(each), statistics.median(each), sum(each)) for name, each in durations.items())
    return sorted(found, key=lambda launch: -launch.total_seconds)


def _events(planes: Iterable[Any]) -> Iterator[tuple[str, float]]:
    """Of the streams; other lines of a device say the same again, by module and operation."""
    for plane in planes:
        if plane.name.startswith("/device:GPU"):
            lines = list(plane.lines)
            streams = [line for line in lines if line.name.startswith("Stream")] or lines
            yield from ((event.name, event.duration_ns * 1e-9) for line in streams for event in line.events)


def _report(results: Results, found: list[Launch], seconds: float) -> None:
    """Per step, and of each name how often and how long."""
    steps = DISPATCHES * STEPS
    total, count = sum(launch.total_seconds for launch in found) / steps, sum(launch.times for launch in found) / steps
    entry = {
        "layers": LAYERS,
        "seconds_per_step": seconds,
        "device_seconds_per_step": total,
        "launches_per_step": count,
        "launches": [launch._asdict() for launch in found],
    }
    said = f"{LAYERS} layers: a step takes {seconds * 1e6:.0f} us, {count:.0f} launches of {total * 1e6:.0f} us in all"
    table = [
        f"{launch.total_seconds / steps * 1e6:9.1f} us a step, {launch.times / steps:6.1f} x "
        f"{launch.median_seconds * 1e6:7.2f} us  {launch.name[:80]}"
        for launch in found[:SHOWN]
    ]
    results.add("profile", entry, "\n".join([said, *table]))
