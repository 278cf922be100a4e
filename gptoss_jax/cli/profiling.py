"""`--profile`: a trace of what devices and host did while answers were drawn, for XProf, TensorBoard and Perfetto."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from gptoss_jax.errors import GptossError

if TYPE_CHECKING:
    import gptoss_jax.cli.terminal

PROFILE_FLAGS = ("profile",)


def define_flags() -> None:
    """The flags named in PROFILE_FLAGS."""
    flags.DEFINE_string(
        "profile", None, "FOLDER: Where to write a trace of the run, for XProf or TensorBoard, and Perfetto."
    )


def check(options: flags.FlagValues) -> None:
    """Refuses a folder that no trace can be written to, before weights are read.

    Raises:
        GptossError: --profile is empty, or names a file.
        OSError: the folder cannot be made.
    """
    if options.profile is None:
        return
    folder = Path(options.profile)
    if not options.profile or (folder.exists() and not folder.is_dir()):
        raise GptossError(f"--profile is {options.profile!r}, expected the name of a folder for the trace")
    folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def traced(options: flags.FlagValues, screen: "gptoss_jax.cli.terminal.Screen") -> Iterator[None]:
    """Traces what is done inside, if --profile asks for it: what devices and JAX's threads do, by operation.

    The folder gets `plugins/profile/TIME/*.xplane.pb`, and beside it `perfetto_trace.json.gz`. Python's own calls are
    left out: they would be most of the file, and slow the run.
    """
    if options.profile is None:
        yield
        return
    import jax  # here, since commands begin without it

    settings = jax.profiler.ProfileOptions()
    settings.python_tracer_level = 0
    jax.profiler.start_trace(options.profile, create_perfetto_trace=True, profiler_options=settings)
    try:
        yield
    finally:
        jax.profiler.stop_trace()
        screen.note(
            f"a trace is in {options.profile}: tensorboard --logdir {options.profile} (pip install xprof), or open its "
            "perfetto_trace.json.gz at ui.perfetto.dev"
        )
