"""What --ray changes in the command for batch jobs: who answers, and where."""

import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from gptoss_jax.checkpoints import opening
from gptoss_jax.cli import interrupts
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.errors import GptossError
from gptoss_jax.jobs.inputs import Inputs
from gptoss_jax.jobs.store import Layout
from gptoss_jax.jobs.summary import Pace
from gptoss_jax.jobs.survey import Survey
from gptoss_jax.jobs.work import Reading
from gptoss_jax.model import mesh

if TYPE_CHECKING:
    import gptoss_jax.jobs.on_ray

_LOOPBACK = ("127.0.0.1", "localhost")


def check(options: flags.FlagValues) -> None:
    """Whether there can be a job on Ray.

    Raises:
        GptossError: Ray is not installed, or a flag's value cannot be.
    """
    _on_ray(options)
    if options.ray_workers is not None and options.ray_workers < 1:
        raise GptossError(f"--ray-workers is {options.ray_workers}, expected at least 1")


def job(
    options: flags.FlagValues, inputs: Inputs, layout: Layout, found: Survey, reading: Reading, model_name: str
) -> "gptoss_jax.jobs.on_ray.Job":
    """What workers have to know; `model_name` stands in responses."""
    return _on_ray(options).Job(
        folder=os.getcwd(),
        inputs=inputs.names,
        layout=layout,
        survey=found,
        reading=reading,
        model={
            "path": options.checkpoint,
            "mesh": options.mesh or None,
            **{name: options[name].value for name in ("dtype", "dense", "adapter", "kernels")},
        },
        programs=options.compilation_cache,
        model_name=model_name,
    )


def answer(
    options: flags.FlagValues, screen: Screen, job: "gptoss_jax.jobs.on_ray.Job", wanted: np.ndarray, pace: Pace
) -> tuple[int, int]:
    """Has the rows answered that are wanted, bool [N], and counts them in `pace`.

    Returns:
        How many workers there were, and the number of the signal that has ended it; 0: none has.

    Raises:
        GptossError: as `on_ray.connected` and `on_ray.run`.
    """
    on_ray = _on_ray(options)
    if opening.open_weights(Path(options.checkpoint)).are_random:
        screen.say("these weights are RANDOM: the text is noise, not an answer")
    cluster = on_ray.Cluster(options.ray_address, options.ray_workers, mesh.num_devices(options.mesh))
    with (
        on_ray.connected(cluster.address),  # before signals are noted: Ray handles SIGTERM itself
        screen.status() as show,
        interrupts.noted_with_sigterm() as signalled,
    ):

        def finished(document: Any) -> None:
            pace.tally.add(document)
            show(pace.line())

        workers = on_ray.run(job, wanted, cluster, finished, screen.note, signalled)
        pace.end()
        return workers, 0 if pace.tally.rows == pace.total else signalled()


def _on_ray(options: flags.FlagValues) -> ModuleType:
    """The module that needs Ray, which is large and slow to import.

    Raises:
        GptossError: it is not installed.
    """
    address = options.ray_address
    if address is None or address.rpartition(":")[0] in _LOOPBACK:
        # A cluster of this machine alone: Ray would take the address that others know it by, and listen to them.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        from gptoss_jax.jobs import on_ray
    except ModuleNotFoundError as error:
        raise GptossError(f"--ray needs the package {error.name}: pip install 'gptoss-jax[ray]'") from None
    return on_ray
