"""Whether a plan's flags ask for a compiler, and whether they go together: found without JAX."""

from pathlib import Path

from absl import flags

from gptoss_jax.errors import GptossError, short

SECTIONS = ("collectives", "sharding", "memory", "flops", "timeline", "hlo")  # of --show


def is_asked(options: flags.FlagValues) -> bool:
    """Whether a compiler has to run."""
    return bool(not options.fast or options.show or options.dump)


def check(options: flags.FlagValues) -> None:
    """Refuses flags that do not go together, before anything is computed.

    Raises:
        GptossError: says which.
    """
    asked = [name for name, value in (("--show", options.show), ("--dump", options.dump)) if value]
    asked += ["--nofast"] if not options.fast else []
    if options["fast"].present and options.fast and asked:
        raise GptossError(f"--fast and {asked[0]}: leave one of them out")
    for name in ("sweep", "compare"):
        if options[name].value and asked:
            raise GptossError(f"--{name} and {asked[0]}: leave one of them out, one program at a time is compiled")
    for name in ("layers", "step"):
        if options[name].present and not asked:
            raise GptossError(f"--{name} has an effect with --show, --dump or --nofast only: give both")
    if unknown := [name for name in options.show or () if name.strip() not in SECTIONS]:
        raise GptossError(f"--show is {short(unknown[0])}, expected some of {', '.join(SECTIONS)}")
    if options.dump and Path(options.dump).exists() and not Path(options.dump).is_dir():
        raise GptossError(f"--dump is {options.dump}, a file, expected the name of a folder")
    if options.json and options.show and "hlo" in options.show:
        raise GptossError("--show hlo and --json: leave one of them out, a program is text")
